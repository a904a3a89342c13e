"""The page pool as the host sees it: which page ids are free, and which are owned.

    free --take--> owned --release--> free

The lowest free id is taken first, so that the part of the pool in use stays small and the same
requests always get the same pages. The trash page is not in the pool.
"""

import heapq
from collections.abc import Iterable

from jaxinfer.errors import OutOfPages


class PagePool:
    """Ids 0 to num_pages - 1, each free or owned by one sequence."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.peak_owned = 0
        self._free = list(range(num_pages))  # a heap; sorted is one
        self._is_owned = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        """Pages that can be taken."""
        return len(self._free)

    @property
    def num_owned(self) -> int:
        """Pages that sequences hold."""
        return self.num_pages - len(self._free)

    def take(self, count: int) -> list[int]:
        """Takes `count` pages, lowest ids first, or none at all."""
        if count > len(self._free):
            raise OutOfPages(
                f"asked for {count} pages, {len(self._free)} of {self.num_pages} are free"
            )
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._is_owned[page] = 1
        self.peak_owned = max(self.peak_owned, self.num_owned)
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Gives owned pages back; giving one back twice is a mistake of ours."""
        for page in pages:
            assert self._is_owned[page], f"page {page} was released but nobody owned it"
            self._is_owned[page] = 0
            heapq.heappush(self._free, page)

    def check_integrity(self, owned: Iterable[int]) -> None:
        """Asserts that exactly these pages are owned, each once."""
        listed = sorted(owned)
        marked = [page for page in range(self.num_pages) if self._is_owned[page]]
        assert listed == marked, f"sequences own {listed}, the pool says {marked}"
        assert sorted(self._free + marked) == list(range(self.num_pages)), (
            f"{len(self._free)} free + {len(marked)} owned pages are not the pool of "
            f"{self.num_pages}"
        )
