"""The log of steps: what a leader's engine takes from outside, sent before it is used.

A step follows from its arrivals, cancels, clock and pace alone, which is what a journal keeps of
it. So every process of a group runs the same scheduler on the leader's log, and what each decided
and computed is compared by a checksum of the journal's record of the step.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Items
from hashlib import blake2b
from pathlib import Path

import numpy as np

from jaxinfer.errors import EngineFailed
from jaxinfer.host.journal import Recorder
from jaxinfer.host.loop import Phase
from jaxinfer.host.pace import Pace
from jaxinfer.host.plain import Record
from jaxinfer.host.plan import Plan
from jaxinfer.host.sequence import Sequence

INPUTS = ("now", "pace", "events")
"""Of a record, what a step takes; all the rest follows from it."""


class Digests:
    """Where records go: a checksum of each step is handed on."""

    is_full = False
    path: Path | None = None

    def __init__(self, told: Callable[[int, str], None]) -> None:
        self._told = told

    def append(self, record: Record) -> None:
        """Takes one record."""
        self._told(record["step"], digest_of(record))

    def rotate(self, state: Record) -> None:
        """Never asked for."""


def digest_of(record: Record) -> str:
    """A short name of what a step did: plan, pages, batch, tokens, log probabilities, ends."""
    done = {name: part for name, part in record.items() if name not in INPUTS}
    return blake2b(json.dumps(done, sort_keys=True).encode(), digest_size=8).hexdigest()


class Followed(Recorder):
    """The record of a process in a group, where a failed step has no way back.

    What a process lost with its step the others still have, so that all of them start again.
    """

    def failed(self, phase: Phase) -> None:
        """The device failed."""
        raise EngineFailed(f"a step failed on the device ({phase}); its group starts again")


class Led(Followed):
    """The leader's: its inputs go out as `["step", inputs]`, and a journal hears all as well."""

    def __init__(
        self,
        told: Callable[[int, str], None],
        send: Callable[[list[Record | str]], None],
        *,
        journal: Recorder | None = None,
    ) -> None:
        super().__init__(Digests(told))
        self._send = send
        self._journal = journal

    @property
    def path(self) -> Path | None:
        """Of the journal."""
        return None if self._journal is None else self._journal.path

    @property
    def wants_state(self) -> bool:
        """Whether the journal wants a step that leaves nothing under way."""
        return self._journal is not None and self._journal.wants_state

    def ask_for_state(self) -> None:
        """As of the journal."""
        if self._journal is not None:
            self._journal.ask_for_state()

    def submitted(self, sequence: Sequence) -> None:
        super().submitted(sequence)
        if self._journal is not None:
            self._journal.submitted(sequence)

    def cancelled(self, order: int) -> None:
        super().cancelled(order)
        if self._journal is not None:
            self._journal.cancelled(order)

    def flushed(self) -> None:
        super().flushed()
        if self._journal is not None:
            self._journal.flushed()

    def begun(self, now_s: float, pace: Pace) -> None:
        """The followers hear what this step takes, before it is planned here."""
        super().begun(now_s, pace)
        inputs = {name: self._record[name] for name in INPUTS if name in self._record}
        if self.wants_state:
            inputs["drain"] = True
        self._send(["step", inputs])
        if self._journal is not None:
            self._journal.begun(now_s, pace)

    def planned(self, plan: Plan) -> None:
        super().planned(plan)
        if self._journal is not None:
            self._journal.planned(plan)

    def booked(self, plan: Plan) -> None:
        super().booked(plan)
        if self._journal is not None:
            self._journal.booked(plan)

    def packed(self, batch: np.ndarray) -> None:
        super().packed(batch)
        if self._journal is not None:
            self._journal.packed(batch)

    def returned(self, plan: Plan, tokens: Items[int], logprobs: np.ndarray | None = None) -> None:
        super().returned(plan, tokens, logprobs)
        if self._journal is not None:
            self._journal.returned(plan, tokens, logprobs)

    def ended(self, sequence: Sequence) -> None:
        super().ended(sequence)
        if self._journal is not None:
            self._journal.ended(sequence)

    def close(self, *, drained: bool) -> None:
        super().close(drained=drained)
        if self._journal is not None:
            self._journal.close(drained=drained)

    def save(self, state: Record) -> None:
        """A new segment of the journal begins; the log goes on."""
        if self._journal is not None:
            self._journal.save(state)


class Ledger:
    """The checksums of all ranks, step by step, until all of them are in."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._steps: defaultdict[int, dict[int, str]] = defaultdict(dict)
        self.num_compared = 0

    def add(self, rank: int, step: int, digest: str) -> str:
        """Takes one; returns what is wrong with the step, or nothing."""
        told = self._steps[step]
        told[rank] = digest
        if len(told) < self._size:
            return ""
        del self._steps[step]
        self.num_compared += 1
        if len(set(told.values())) == 1:
            return ""
        others = [str(one) for one in sorted(told) if told[one] != told[0]]
        return (
            f"step {step} came out otherwise in rank {', '.join(others)} than in rank 0: plan, "
            "pages, batch, tokens or log probabilities differ; are processors, drivers and "
            "versions the same on all machines?"
        )
