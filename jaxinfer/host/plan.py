"""A step, decided: what a plan of the scheduler says."""

from typing import Literal, NamedTuple

from jaxinfer.host.sequence import Sequence

HeldUp = Literal["", "slot", "pages", "prefill", "step"]
"""Why the first in line got no slot: none was free, its pages were not, the step had prefill work
enough, or a step from before it gave way is still under way. Empty where nobody was left."""


class Chunk(NamedTuple):
    """A piece of a sequence to prefill."""

    sequence: Sequence
    start: int
    length: int
    size: int  # of the program that takes it: length plus padding
    is_last: bool  # the token after it is sampled


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

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to run."""
        return not (self.chunks or self.decodes)

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """The sequences that get a token from this step, in the order of its outputs."""
        last = tuple(chunk.sequence for chunk in self.chunks if chunk.is_last)
        return (*last, *self.decodes)
