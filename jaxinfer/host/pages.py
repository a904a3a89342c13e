"""The page pool as the host sees it: who holds each page.

            take                    share / release
    free ---------> owned (by one or more sequences) --release of the last--> kept or free
      ^                                    ^                                    |
      |                                    +--------------- share --------------+
      +------------------------------- evict, drop ------------------------------

A page is kept when the prefix cache knows it: its contents outlive the sequences that wrote it,
until the page is needed. The lowest free id is taken first and the least recently released kept
page is evicted first, so that the same requests always get the same pages. The trash page is not
in the pool.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable

from jaxinfer.errors import OutOfPages


class PagePool:
    """Ids 0 to num_pages - 1."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.peak_owned = 0
        self.num_evicted = 0
        self.on_evict: Callable[[int], None] = lambda page: None  # told before the page is reused
        self._free = list(range(num_pages))  # a heap; sorted is one
        self._num_owners = [0] * num_pages
        self._is_kept = bytearray(num_pages)
        self._idle: dict[int, None] = {}  # kept and owned by nobody, least recently released first

    @property
    def num_available(self) -> int:
        """Pages that can be taken: free ones, and kept ones that nobody owns."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> list[int]:
        """Pages that only the prefix cache holds, the next one to be evicted first."""
        return list(self._idle)

    @property
    def num_idle(self) -> int:
        """Pages that only the prefix cache holds."""
        return len(self._idle)

    @property
    def num_owned(self) -> int:
        """Pages that sequences hold."""
        return self.num_pages - self.num_available

    def is_idle(self, page: int) -> bool:
        """Whether only the prefix cache holds a page."""
        return page in self._idle

    def num_owners(self, page: int) -> int:
        """How many sequences hold a page."""
        return self._num_owners[page]

    def take(self, count: int) -> list[int]:
        """Takes `count` pages, free ones first, or none at all."""
        if count > self.num_available:
            raise OutOfPages(
                f"asked for {count} pages, {self.num_available} of {self.num_pages} are free"
            )
        while len(self._free) < count:
            page = next(iter(self._idle))
            self.on_evict(page)
            self.num_evicted += 1
            self.drop(page)
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._num_owners[page] = 1
        self.peak_owned = max(self.peak_owned, self.num_owned)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds an owner to pages that are owned or kept."""
        for page in pages:
            assert self._num_owners[page] or page in self._idle, f"page {page} is free"
            self._idle.pop(page, None)
            self._num_owners[page] += 1
        self.peak_owned = max(self.peak_owned, self.num_owned)

    def release(self, pages: Iterable[int]) -> None:
        """Takes an owner away from each page; one too many is a mistake of ours.

        Later pages of a sequence are released first: they are of use to fewer prefixes.
        """
        for page in reversed(list(pages)):
            assert self._num_owners[page], f"page {page} was released but nobody owned it"
            self._num_owners[page] -= 1
            if self._num_owners[page]:
                continue
            if self._is_kept[page]:
                self._idle[page] = None
            else:
                heapq.heappush(self._free, page)

    def keep(self, page: int) -> None:
        """Marks an owned page as known to the prefix cache."""
        assert self._num_owners[page], f"page {page} is kept but nobody owns it"
        self._is_kept[page] = 1

    def drop(self, page: int) -> None:
        """The prefix cache no longer knows the page; it is free as soon as nobody owns it."""
        assert self._is_kept[page], f"page {page} was dropped but not kept"
        self._is_kept[page] = 0
        if page in self._idle:
            del self._idle[page]
            heapq.heappush(self._free, page)

    def load(
        self,
        *,
        owned: Iterable[int],
        kept: Iterable[int],
        idle: Iterable[int],
        peak_owned: int,
        num_evicted: int,
    ) -> None:
        """Takes over the pages of another pool: those of all sequences, and those that are kept."""
        assert self.num_available == self.num_pages and not self._idle, "the pool is in use"
        num_owners = Counter(owned)
        self._num_owners = [num_owners[page] for page in range(self.num_pages)]
        for page in kept:
            self._is_kept[page] = 1
        self._idle = dict.fromkeys(idle)
        self._free = [
            page
            for page in range(self.num_pages)
            if not self._num_owners[page] and not self._is_kept[page]
        ]
        self.peak_owned, self.num_evicted = peak_owned, num_evicted

    def check_integrity(self, owned: Iterable[int], kept: Iterable[int] = ()) -> None:
        """Asserts that these pages (once an owner) are owned, these kept, and all the rest free."""
        counts = [0] * self.num_pages
        for page in owned:
            counts[page] += 1
        assert counts == self._num_owners, f"owners are {counts}, the pool says {self._num_owners}"
        known = sorted(kept)
        marked = [page for page in range(self.num_pages) if self._is_kept[page]]
        assert known == marked, f"the prefix cache knows {known}, the pool says {marked}"
        idle = [page for page in marked if not counts[page]]
        assert sorted(self._idle) == idle, f"idle are {idle}, the pool says {sorted(self._idle)}"
        free = [page for page in range(self.num_pages) if not counts[page] and page not in known]
        assert sorted(self._free) == free, f"free are {free}, the pool says {sorted(self._free)}"
