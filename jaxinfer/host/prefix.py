"""The prefix cache: full pages that can be read again by any request that begins the same way.

A page is known by a digest of everything up to its end:

    digest(page 0) = hash(root, tokens of page 0)
    digest(page n) = hash(digest(page n-1), tokens of page n)

with a root made of the model and the tenant's salt, so that tenants never see each other's pages.
The tokens are compared as well on a hit: a collision of digests finds nothing. Pages are published
once the step that wrote them has returned, are never written again, and are forgotten when the pool
needs them.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from jaxinfer.host.pages import PagePool

_DIGEST_BYTES = 16


class _Known(NamedTuple):
    page: int
    tokens: tuple[int, ...]
    parent: bytes  # digest of the page before it; empty for a first page
    salt: str


class KnownPage(NamedTuple):
    """What makes a page known again: its own tokens, and the page that they follow."""

    page: int
    parent: int  # -1 for a first page
    salt: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrefixStats:
    """Counts since the engine was built."""

    num_queried_tokens: int
    num_hit_tokens: int
    num_evicted_pages: int
    num_pages: int

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were found."""
        return self.num_hit_tokens / self.num_queried_tokens if self.num_queried_tokens else 0.0


class PrefixCache:
    """What the idle and shared pages of a pool hold."""

    def __init__(self, pool: PagePool, *, page_size: int, namespace: str = "") -> None:
        self._pool = pool
        self._page_size = page_size
        self._namespace = namespace
        self._known: dict[bytes, _Known] = {}
        self._digest_of: dict[int, bytes] = {}  # page -> digest
        self._num_queried = self._num_hits = 0
        pool.on_evict = self._forget

    @property
    def pages(self) -> list[int]:
        """Every page that is known."""
        return list(self._digest_of)

    def digests(self, tokens: Items[int], *, salt: str, done: Items[bytes] = ()) -> list[bytes]:
        """The digests of all full pages of `tokens`, those in `done` taken as they are."""
        found, size = list(done), self._page_size
        parent = found[-1] if found else self._root(salt)
        for start in range(len(found) * size, len(tokens) - size + 1, size):
            parent = _digest(parent, tokens[start : start + size])
            found.append(parent)
        return found

    def match(self, tokens: Items[int], digests: Items[bytes]) -> list[int]:
        """The pages that hold the longest known prefix of `tokens`; changes nothing."""
        pages: list[int] = []
        size = self._page_size
        for place, digest in enumerate(digests):
            known = self._known.get(digest)
            if known is None or known.tokens != tuple(tokens[place * size : (place + 1) * size]):
                break
            pages.append(known.page)
        return pages

    def knows(self, digest: bytes) -> bool:
        """Whether the page with this digest is known, whatever became of those before it."""
        return digest in self._known

    def count(self, *, queried: int, hits: int) -> None:
        """Books the outcome of one admission, in tokens."""
        self._num_queried += queried
        self._num_hits += hits

    def publish(
        self, page: int, tokens: Items[int], digest: bytes, *, parent: bytes, salt: str
    ) -> None:
        """Makes an owned, written, full page known; one with the same contents stays as it is.

        `parent` is the digest of the page before it, or empty.
        """
        if digest in self._known or page in self._digest_of:
            return
        self._known[digest] = _Known(page, tuple(tokens), parent, salt)
        self._digest_of[page] = digest
        self._pool.keep(page)

    def forget(self, pages: Items[int]) -> None:
        """Makes pages unknown, those that are owned too: their contents are not to be trusted."""
        for page in pages:
            if page in self._digest_of:
                self._forget(page)
                self._pool.drop(page)

    def flush(self) -> int:
        """Forgets everything; returns how many pages that were."""
        pages = self.pages
        self.forget(pages)
        return len(pages)

    def forget_orphans(self) -> int:
        """Forgets the pages that follow one that is unknown: nobody could compute them again."""
        rooted = {known.page for known in self._rooted().values()}
        orphans = [page for page in self.pages if page not in rooted]
        self.forget(orphans)
        return len(orphans)

    def known_pages(self) -> list[KnownPage]:
        """All that is known but orphans, each page after the one that it follows."""
        rooted = self._rooted()
        return [
            KnownPage(
                page=known.page,
                parent=rooted[known.parent].page if known.parent else -1,
                salt=known.salt,
                tokens=known.tokens,
            )
            for known in rooted.values()
        ]

    def chains(self) -> list[tuple[list[int], list[int]]]:
        """What to prefill, and into which pages, so that every known page holds what it should.

        Each chain begins at token 0 and ends at a page that no known one follows; orphans are in
        none.
        """
        known = {one.page: one for one in self.known_pages()}
        parents = {one.parent for one in known.values()}
        found: list[tuple[list[int], list[int]]] = []
        for page in (page for page in known if page not in parents):
            pages: list[int] = []
            while page >= 0:
                pages.append(page)
                page = known[page].parent
            pages.reverse()
            found.append(([token for page in pages for token in known[page].tokens], pages))
        return found

    def load(self, known: Iterable[KnownPage], *, num_queried: int, num_hits: int) -> None:
        """Takes over what another cache knew; the pool has kept these pages already."""
        assert not self._known, "a cache that knows pages can't become another one"
        for page, parent, salt, tokens in known:
            before = self._digest_of[parent] if parent >= 0 else b""
            digest = _digest(before or self._root(salt), tokens)
            self._known[digest] = _Known(page, tuple(tokens), before, salt)
            self._digest_of[page] = digest
        self._num_queried, self._num_hits = num_queried, num_hits

    def stats(self) -> PrefixStats:
        """Counts so far."""
        return PrefixStats(
            num_queried_tokens=self._num_queried,
            num_hit_tokens=self._num_hits,
            num_evicted_pages=self._pool.num_evicted,
            num_pages=len(self._known),
        )

    def _rooted(self) -> dict[bytes, _Known]:
        """The known pages that follow known ones only, each after the one that it follows."""
        followers: dict[bytes, list[bytes]] = {}
        for digest, known in self._known.items():
            followers.setdefault(known.parent, []).append(digest)
        found: dict[bytes, _Known] = {}
        line = followers.get(b"", [])
        for digest in line:
            found[digest] = self._known[digest]
            line += followers.get(digest, [])
        return found

    def _forget(self, page: int) -> None:
        del self._known[self._digest_of.pop(page)]

    def _root(self, salt: str) -> bytes:
        parts = b"".join(
            len(part).to_bytes(8, "little") + part
            for part in (self._namespace.encode(), salt.encode())
        )
        return blake2b(parts, digest_size=_DIGEST_BYTES).digest()


def _digest(parent: bytes, tokens: Items[int]) -> bytes:
    part = np.asarray(tokens, np.int32).tobytes()
    return blake2b(parent + part, digest_size=_DIGEST_BYTES).digest()
