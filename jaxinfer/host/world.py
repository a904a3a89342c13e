"""The whole state of a simulation: what can be saved, restored, compared and checked."""

import dataclasses
import zlib
from collections import deque
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, NamedTuple

from jaxinfer.host.batch import SlotTable
from jaxinfer.host.fake_device import EMPTY, FakeDevice, Solo, solo
from jaxinfer.host.loop import Loop
from jaxinfer.host.pace import Pace
from jaxinfer.host.plan import Plan
from jaxinfer.host.request import FinishReason
from jaxinfer.host.scenario import Scenario
from jaxinfer.host.scheduler import Scheduler
from jaxinfer.host.sequence import Sequence

MAX_PREEMPTIONS = 4
"""Of one request, where no step fails."""
_CONTAINERS = (list, dict, bytearray, deque)
_SEQUENCE_FIELDS = tuple(field.name for field in dataclasses.fields(Sequence))


class Part(NamedTuple):
    """What returns of a step at once."""

    tokens: tuple[int, ...]
    written: tuple[tuple[int, int], ...]  # cell, contents


class UnderWay(NamedTuple):
    """What is known of a dispatched step when it returns."""

    parts: tuple[Part, ...]
    event: int  # that dispatched it


class World:
    """A scheduler, a device, a clock, and clients that believe what they are told."""

    loop: Loop[UnderWay]

    def __init__(self, scenario: Scenario, *, is_logged: bool = True) -> None:
        """Without a log the world is faster, and nobody checks that plan() only reads."""
        config = scenario.config
        self.scenario = scenario
        self.config = config
        self.eos = frozenset(scenario.eos)
        self.scheduler = Scheduler(config, eos_token_ids=scenario.eos)
        self.device = FakeDevice(config, key=scenario.key)
        self.pace = Pace(*scenario.pace)
        self.now_s = 0.0
        self.num_events: int = 0
        self.num_failures: int = 0
        self.sequences: list[Sequence] = []  # by order of arrival
        self.indices: list[int] = []  # of their requests
        self.live: dict[int, Sequence] = {}  # request index -> sequence
        self.emitted: dict[int, int] = {}  # order -> tokens that its client got
        self.ended: dict[int, FinishReason] = {}  # order -> why
        self.preempted: dict[int, int] = {}  # order -> how often a plan took its slot
        self.returned: list[int] = list(self.device.cells)  # written by returned steps
        self.writers: list[int] = [-1] * config.num_pages  # order of the last to write each page
        self.depths: list[int] = [0] * config.num_pages  # each page's place in its writer's table
        self.handed_out: list[int] = [0] * config.num_pages  # number of the event that emptied it
        self.tables: dict[int, tuple[int, ...]] = {}  # order -> pages when its last step returned
        self.num_forgotten = 0  # events that may make pages unknown before they are evicted
        self.idle_since: dict[int, int] = {}  # page -> number of the event after which it was idle
        self.hopeless: dict[int, int] = {}  # orders that ended early -> how often preempted
        self.struck: dict[int, None] = {}  # orders whose rows were once not finite
        self.last_plan: Plan | None = None
        self.is_logged = is_logged
        self.log: list[Any] = []
        self._solos: dict[int, Solo] = {}  # request index -> answer
        self.table = SlotTable(config, eos_token_ids=scenario.eos) if scenario.is_packed else None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is live and nothing under way."""
        return not (self.live or self.loop.under_way)

    @property
    def log_hash(self) -> str:
        """A digest of every plan, token and end so far."""
        return blake2b(repr(self.log).encode(), digest_size=16).hexdigest()

    def bound(self) -> int:
        """Steps after which every live request must have ended, however often it is preempted."""
        smallest, each = self.config.prefill_chunks[0], 4
        for sequence in self.live.values():
            length = len(sequence.request.prompt) + len(self.solo(sequence).tokens)
            each += (length // smallest + 3) * (MAX_PREEMPTIONS + 1) + length
        return each

    def solo(self, sequence: Sequence) -> Solo:
        """What the sequence's request gets when it is alone."""
        index = self.indices[sequence.order]
        if index not in self._solos:
            self._solos[index] = solo(
                sequence.request, self.config, eos=self.eos, key=self.scenario.key
            )
        return self._solos[index]

    def hand_out(self, pages: Iterable[int]) -> None:
        """Empties pages: new owners must not read what the old ones left."""
        self.device.empty(pages)
        size = self.device.page_size
        for page in pages:
            self.idle_since.pop(page, None)
            self.handed_out[page] = self.num_events
            self.returned[page * size : (page + 1) * size] = [EMPTY] * size

    def landed(self, step: UnderWay) -> tuple[tuple[int, int], ...]:
        """What a step has written to pages that have had no new owner since."""
        size, handed_out = self.device.page_size, self.handed_out
        return tuple(
            (place, cell)
            for part in step.parts
            for place, cell in part.written
            if handed_out[place // size] <= step.event
        )

    def note(self, *what: Any) -> None:
        """Writes into the log."""
        if self.is_logged:
            self.log.append(what)

    def snapshot(self) -> tuple[Any, ...]:
        """The whole state, to be restored any number of times into this simulation."""
        assert self.table is None, "packed rows are not part of a snapshot"
        owners = (self, self.scheduler, self.scheduler.pool, self.scheduler.prefix, self.loop)
        saved = tuple((owner, _copy(vars(owner))) for owner in (*owners, self.device))
        return saved, tuple((sequence, _fields(sequence)) for sequence in self.sequences)

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Back to the state of a snapshot."""
        saved, sequences = snapshot
        for owner, values in saved:
            for name, value in _copy(values).items():
                setattr(owner, name, value)
        for sequence, values in sequences:
            for name, value in zip(_SEQUENCE_FIELDS, values, strict=True):
                setattr(sequence, name, value.copy() if type(value) is list else value)

    def fingerprint(self) -> int:
        """A hash of all that the future depends on: equal for states that can't be told apart.

        Only of numbers: Python's hash of a string or of None is another one in every process.
        """
        scheduler = self.scheduler
        return hash(
            (
                tuple(map(self._fingerprint, self.sequences)),
                tuple(self.indices),
                tuple((page, self._salt_of(page)) for page in sorted(scheduler.prefix.pages)),
                tuple(scheduler.pool.idle),
                tuple(scheduler.prefill_debt.values()),
                tuple(
                    (
                        tuple(one.order for one in plan.sampled),
                        tuple((one.order, end, times) for one, end, times in plan.stored),
                        tuple(part.tokens for part in handle.parts),
                        self.landed(handle),
                    )
                    for plan, handle in self.loop.under_way
                ),
                tuple(self.device.cells),
                tuple(self.returned),
                tuple(
                    last if held is not None else 0
                    for last, held in zip(self.device.last[:-1], scheduler.slots, strict=True)
                ),
                self.now_s,
                self.num_failures,
            )
        )

    def _salt_of(self, page: int) -> int:
        return zlib.crc32(self.sequences[self.writers[page]].request.salt.encode())

    def _fingerprint(self, sequence: Sequence) -> tuple[Any, ...]:
        if sequence.finish_reason is not None:
            return ()
        return (
            len(sequence.tokens),
            tuple(sequence.pages),
            -1 if sequence.slot is None else sequence.slot,
            sequence.num_stored,
            sequence.num_to_prefill,
            sequence.num_written,
            sequence.num_pending,
            sequence.num_published,
            sequence.num_preemptions,
            self.preempted.get(sequence.order, 0),
        )


def _copy(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.copy() if type(value) in _CONTAINERS else value
        for name, value in values.items()
    }


def _fields(sequence: Sequence) -> tuple[Any, ...]:
    values: list[Any] = []
    for name in _SEQUENCE_FIELDS:
        value = getattr(sequence, name)
        values.append(value.copy() if type(value) is list else value)
    return tuple(values)
