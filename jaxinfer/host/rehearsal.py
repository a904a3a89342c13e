"""A journal's schedule, run again without a model: the real scheduler, and the tokens as recorded.

What is compared is compared here for every kind of replay.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxinfer.errors import JournalRefused
from jaxinfer.host import state
from jaxinfer.host.batch import SlotTable
from jaxinfer.host.journal import Memory, Recorder
from jaxinfer.host.loop import Loop, Phase, Sampled
from jaxinfer.host.pace import Pace
from jaxinfer.host.plain import Record, engine_from_plain, request_from_plain
from jaxinfer.host.plan import Plan
from jaxinfer.host.prefills import prefills
from jaxinfer.host.request import FinishReason
from jaxinfer.host.scheduler import Scheduler
from jaxinfer.host.segments import Segment
from jaxinfer.host.sequence import Sequence

_GIVEN = (FinishReason.EOS, FinishReason.STOP_TOKEN, FinishReason.STOP_STRING)


class Difference(NamedTuple):
    """The first thing that came out otherwise."""

    step: int
    what: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"step {self.step}, {self.what}: the journal has {self.was}, now it is {self.now}"


class DeviceFailed(Exception):
    """The journal says that the device failed here."""


def compare(
    was: Record, now: Record, *, tokens: bool = True, batches: bool = True
) -> Difference | None:
    """The first difference between two records of a step, or None.

    Without `tokens` only the schedule counts: another model, or the same without its tokens.
    Without `batches` it may be packed otherwise: other settings of the engine.
    """
    step = was["step"]
    before, after = was.get("plan", {}), now.get("plan", {})
    for name in ("preempt", "admit", "chunks", "decodes"):
        if before.get(name) != after.get(name):
            what = f"plan, {name} (numbers are the requests' order of arrival)"
            return Difference(step, what, before.get(name, []), after.get(name, []))
    for name in ("failed", "drain", "pages"):
        if was.get(name) != now.get(name):
            return Difference(step, name, was.get(name), now.get(name))
    if tokens and batches and "batch" in was and was["batch"] != now.get("batch"):
        return Difference(step, "batch (checksum)", was["batch"], now.get("batch"))
    if tokens:
        found = _compare_tokens(step, was.get("got", []), now.get("got", []))
        if found is not None:
            return found
    if was.get("ended") != now.get("ended"):
        return Difference(step, "ended", was.get("ended", []), now.get("ended", []))
    return None


def names(segment: Segment) -> dict[int, str]:
    """The request_id of each order of arrival that a segment speaks of."""
    state = segment.header["state"]
    found = {one["order"]: one["request"]["request_id"] for one in state.get("sequences", ())}
    for record in segment.records:
        for event in record.get("events", ()):
            if event[0] == "submit":
                found[event[1]] = event[2]["request_id"]
    return found


def num_tokens(records: list[Record]) -> int:
    """Tokens that came back in these records."""
    return sum(len(tokens) for record in records for _, tokens, *_ in record.get("got", ()))


class Rehearsal:
    """A scheduler that is told what the journal's model said."""

    def __init__(self, segment: Segment) -> None:
        header = segment.header
        self._is_veiled = header["prompts"] != "keep"
        self._got: defaultdict[int, list[list[int]]] = defaultdict(list)  # step -> its parts
        for record in segment.records:
            for step, tokens, *_ in _got(record):
                self._got[step].append(tokens)
        self._ends: dict[tuple[int, int], str] = {}  # (order, its tokens) -> why
        self._fails_at: Phase | None = None
        self._step = 0
        self._live: dict[int, Sequence] = {}
        self.memory = Memory()
        self._recorder = Recorder(self.memory)
        config = engine_from_plain(header["engine"])
        eos = () if self._is_veiled else tuple(header["eos_token_ids"])
        self._table = None if self._is_veiled else SlotTable(config, eos_token_ids=eos)
        self.scheduler = Scheduler(config, eos_token_ids=eos)
        if header["state"]:
            self.scheduler = state.load(header["state"], config, eos_token_ids=eos)
            self._recorder.resume(header["state"]["step"], self.scheduler.running)
            self._step = header["state"]["step"]
        for sequence in self.scheduler.running:
            self._live[sequence.order] = sequence
            if self._table is not None:
                self._table.admit(sequence)
                self._table.grow(sequence)
        self._live |= {sequence.order: sequence for sequence in self.scheduler.waiting}
        self._pace = Pace()
        self._loop = Loop(
            self.scheduler,
            overlap=config.overlap,
            dispatch=self._dispatch,
            read=self._read,
            take=self._take,
            planned=self._recorder.planned,
        )

    def step(self, record: Record) -> Record:
        """Runs the step of a record, and returns what a journal would say of it now."""
        for event in record.get("events", ()):
            self._apply(event)
        self._pace = Pace(*record["pace"]) if "pace" in record else self._pace
        self._recorder.begun(record["now"], self._pace)
        self._ends = {(order, count): why for order, why, count in record.get("ended", ())}
        self._fails_at = record.get("failed")
        self._step = record["step"]
        for sequence in self.scheduler.overdue(record["now"], self._pace):
            self._end(sequence, FinishReason.DEADLINE)
        try:
            self._loop.step(drain="drain" in record)
        except DeviceFailed:
            self._recorder.failed(self._loop.phase)
            self._loop.restart()
        self.scheduler.check_integrity()
        self._recorder.close(drained="drain" in record)
        return self.memory.records.pop()

    def _apply(self, event: list[Any]) -> None:
        match event:
            case ["submit", _, request, *answers]:
                sequence = self.scheduler.add(request_from_plain(request))
                for tokens in answers:
                    sequence.tokens.extend(tokens)
                self._live[sequence.order] = sequence
                self._recorder.submitted(sequence)
            case ["cancel", order]:
                self._recorder.cancelled(order)
                self._end(self._live[order], FinishReason.CANCELLED)
            case ["flush"]:
                self._recorder.flushed()
                self.scheduler.prefix.flush()
            case _:
                raise JournalRefused(f"the journal has an event that is unknown here: {event[:1]}")

    def _dispatch(self, plan: Plan) -> int:
        self._recorder.booked(plan)
        if self._fails_at == "dispatch":
            raise DeviceFailed
        if self._table is not None:
            self._table.update(plan)
            for prefill in prefills(plan.chunks, self.scheduler.config):
                self._recorder.packed(self._table.prefill(prefill))
            if plan.decodes:
                self._recorder.packed(self._table.decode(plan.decodes))
        return self._step

    def _read(self, plan: Plan, step: int) -> Iterator[list[int]]:
        num_read = 0
        for tokens in self._got[step]:
            self._recorder.returned(plan, tokens)
            yield tokens
            num_read += len(tokens)
        if num_read == len(plan.sampled) and self._got[step]:
            return
        if self._fails_at == "read":
            raise DeviceFailed
        rest = [0] * (len(plan.sampled) - num_read)
        self._recorder.returned(plan, rest)
        yield rest

    def _take(self, sampled: Sampled) -> None:
        sequence = sampled.sequence
        if self._live.get(sequence.order) is not sequence:
            return
        said = self._ends.get((sequence.order, len(sequence.tokens)))
        if sampled.counts and said in _GIVEN:
            if sequence.finish_reason is None:
                self.scheduler.finish(sequence, FinishReason(said))
            else:
                sequence.finish_reason = FinishReason(said)
        if sequence.finish_reason is not None:
            self._close(sequence)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        self.scheduler.finish(sequence, reason)
        self._close(sequence)

    def _close(self, sequence: Sequence) -> None:
        self._recorder.ended(sequence)
        del self._live[sequence.order]


def _got(record: Record) -> list[Any]:
    return record.get("got", [])


def _compare_tokens(step: int, was: list[Any], now: list[Any]) -> Difference | None:
    for before, after in zip(was, now, strict=False):
        if before[:2] != after[:2]:
            return Difference(step, f"tokens of step {before[0]}", before[1], after[1])
        if len(before) > 2 and len(after) > 2 and before[2] != after[2]:
            what = f"log probabilities of step {before[0]} (checksum)"
            return Difference(step, what, before[2], after[2])
    if len(was) != len(now):
        return Difference(
            step, "steps that returned", [one[0] for one in was], [one[0] for one in now]
        )
    return None
