"""A step, decided: what a plan of the scheduler says."""

import functools
from typing import Literal, NamedTuple

from jaxinfer.config import EngineConfig
from jaxinfer.host.sequence import Sequence

CHUNK_OVERHEAD = 32  # tokens of prefill that take as long as one more program does
HeldUp = Literal["", "slot", "pages", "prefill", "step", "prefix"]
"""Why the first in line got no slot: none was free, its pages were not, the step had prefill work
enough, a step from before it gave way is still under way, or what it shares is still being stored.
Empty where nobody was left."""


class Chunk(NamedTuple):
    """A piece of a sequence to prefill."""

    sequence: Sequence
    start: int
    length: int
    size: int  # of the program that takes it: length plus padding
    is_last: bool  # the token after it is sampled


def worth_a_step(config: EngineConfig) -> int:
    """Tokens of prefill that cost more than a step of waiting does: a quarter of a full one."""
    return max(config.prefix_step, config.max_prefill_tokens // 4)


def chunk_size(num_left: int, sizes: tuple[int, ...]) -> int:
    """The size of the first of those chunks that take so many tokens with the least work.

    Padding costs what tokens cost: 140 of them go as 128 and 32 rather than as 512.
    """
    return sizes[-1] if num_left >= sizes[-1] else _covers(sizes)[num_left].size


class _Cover(NamedTuple):
    """Chunks, largest first, that take a number of tokens."""

    work: int  # in tokens
    size: int  # of the first


@functools.cache
def _covers(sizes: tuple[int, ...]) -> list[_Cover]:
    """The cheapest for each number of tokens; of equal ones that with the larger first chunk."""
    found = [_Cover(0, 0)]
    for num_tokens in range(1, sizes[-1]):
        covers = (
            _Cover(found[max(0, num_tokens - size)].work + size + CHUNK_OVERHEAD, size)
            for size in sizes
        )
        found.append(min(covers, key=lambda cover: (cover.work, -cover.size)))
    return found


class Admission(NamedTuple):
    """A slot for a sequence, and the cached pages that it begins with."""

    sequence: Sequence
    slot: int
    shared: tuple[int, ...]


class Stored(NamedTuple):
    """How far a sequence's tokens are in pages once the step has returned."""

    sequence: Sequence
    num_stored: int
    num_preemptions: int  # when it was planned: a later one makes this void


class Plan(NamedTuple):
    """One step, decided."""

    preempt: tuple[Sequence, ...]
    admit: tuple[Admission, ...]
    chunks: tuple[Chunk, ...]
    decodes: tuple[Sequence, ...]
    num_pages: dict[int, int]  # arrival order -> pages that the sequence then has
    stored: tuple[Stored, ...]
    held_up: HeldUp = ""
    gainers: tuple[Sequence, ...] = ()  # for whom each of `preempt` gives way
    is_waited_for: bool = False
    """Nothing is planned behind it until it has returned: a tenant may ask that lacks its share."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to run."""
        return not (self.chunks or self.decodes)

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """The sequences that get a token from this step, in the order of its outputs."""
        last = tuple(chunk.sequence for chunk in self.chunks if chunk.is_last)
        return (*last, *self.decodes)
