"""The prefix cache: full pages that can be read again by any request that begins the same way.

A page is known by a digest of everything up to its end:

    digest(page 0) = hash(root, tokens of page 0)
    digest(page n) = hash(digest(page n-1), tokens of page n)

with a root made of the model and the tenant's salt, so that tenants never see each other's pages.
The tokens are compared as well on a hit: a collision of digests finds nothing. Pages are published
once the step that wrote them has returned, are never written again, and are forgotten when the pool
needs them.
"""

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
            part = np.asarray(tokens[start : start + size], np.int32).tobytes()
            parent = blake2b(parent + part, digest_size=_DIGEST_BYTES).digest()
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

    def count(self, *, queried: int, hits: int) -> None:
        """Books the outcome of one admission, in tokens."""
        self._num_queried += queried
        self._num_hits += hits

    def publish(self, page: int, tokens: Items[int], digest: bytes) -> None:
        """Makes an owned, written, full page known; one with the same contents stays as it is."""
        if digest in self._known or page in self._digest_of:
            return
        self._known[digest] = _Known(page, tuple(tokens))
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

    def stats(self) -> PrefixStats:
        """Counts so far."""
        return PrefixStats(
            num_queried_tokens=self._num_queried,
            num_hit_tokens=self._num_hits,
            num_evicted_pages=self._pool.num_evicted,
            num_pages=len(self._known),
        )

    def _forget(self, page: int) -> None:
        del self._known[self._digest_of.pop(page)]

    def _root(self, salt: str) -> bytes:
        parts = b"".join(
            len(part).to_bytes(8, "little") + part
            for part in (self._namespace.encode(), salt.encode())
        )
        return blake2b(parts, digest_size=_DIGEST_BYTES).digest()
