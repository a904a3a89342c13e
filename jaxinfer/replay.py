"""Runs a journal again and points at the first thing that comes out otherwise."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxinfer.engine import Engine
from jaxinfer.errors import EngineFailed, JournalRefused
from jaxinfer.host.journal import Memory, Recorder
from jaxinfer.host.loop import Phase
from jaxinfer.host.pace import Pace
from jaxinfer.host.plain import Record, engine_from_plain, request_from_plain
from jaxinfer.host.rehearsal import Difference, Rehearsal, compare, num_tokens
from jaxinfer.host.segments import Segment

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Report:
    """What a replay has found."""

    num_steps: int
    """That were run and compared; all of the segment where there is no difference."""
    num_requests: int
    num_tokens: int
    seconds: float
    compared: str
    """What of every step."""
    difference: Difference | None = None


class Conditions:
    """What an engine takes from outside, taken from a journal: clock, pace and failures."""

    def __init__(self) -> None:
        self.record: Record = {"now": 0.0}
        self.pace = Pace()
        self._num_reads = 0

    def begin(self, record: Record) -> None:
        """The next step is that of this record."""
        self.record, self._num_reads = record, 0
        self.pace = Pace(*record["pace"]) if "pace" in record else self.pace

    def clock(self) -> float:
        """The time at which the step began."""
        return self.record["now"]

    def fault(self, phase: Phase) -> None:
        """Fails where the journal says that the device failed."""
        is_here = self.record.get("failed") == phase
        if phase == "read":
            is_here = is_here and self._num_reads == len(self.record.get("got", ()))
            self._num_reads += 1
        if is_here:
            raise jax.errors.JaxRuntimeError("INTERNAL: the journal says that this step failed")


def on_model(
    segment: Segment,
    engine: Engine,
    conditions: Conditions,
    *,
    tokens: bool = True,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Runs a segment on a new engine that was built with `conditions.clock` and `.fault`.

    Without `tokens` the schedule alone is compared, for a journal of another model.
    """
    check_kept(segment)
    memory = Memory()
    recorder = Recorder(memory)
    names: dict[int, str] = {}  # order of arrival -> request_id
    if segment.header["state"]:
        sequences = engine.load_state(segment.header["state"])
        recorder.resume(segment.header["state"]["step"], sequences)
        names |= {sequence.order: sequence.request.request_id for sequence in sequences}
    engine.journal = recorder

    def step(record: Record) -> Record:
        conditions.begin(record)
        for event in record.get("events", ()):
            apply(event, engine, names)
        with contextlib.suppress(EngineFailed):  # then it failed as well
            engine.step(drain="drain" in record, pace=conditions.pace)
        return memory.records.pop()

    batches = engine_from_plain(segment.header["engine"]) == engine.config
    compared = "plan and page"
    if tokens:
        between = ", batch, " if batches else ", "
        compared = f"plan, page{between}token and log probability"
    return _run(segment, step, tokens=tokens, batches=batches, compared=compared, progress=progress)


def apply(event: list[Any], engine: Engine, names: dict[int, str]) -> None:
    """Lets one event of a journal happen; `names` knows requests by their order of arrival."""
    match event:
        case ["submit", order, request, *tokens]:
            names[order] = request["request_id"]
            engine.enter(request_from_plain(request), *tokens)
        case ["cancel", order]:
            engine.cancel(names[order])
        case ["flush"]:
            engine.flush_prefix_cache()
        case _:
            raise JournalRefused(f"the journal has an event that is unknown here: {event[:1]}")


def check_kept(segment: Segment) -> None:
    """Raises JournalRefused where a model can't run a segment: its token ids are stand-ins."""
    if segment.header["prompts"] != "keep":
        raise JournalRefused(
            f"{segment.path} was written with journal.prompts={segment.header['prompts']}: it has "
            "no token ids, so only its schedule can be run again (--schedule)"
        )


def on_schedule(
    segment: Segment, *, progress: Progress = lambda stage, done, total: None
) -> Report:
    """Runs the scheduler alone; the model's tokens are those of the journal."""
    rehearsal = Rehearsal(segment)
    is_kept = segment.header["prompts"] == "keep"
    compared = "plan, page and batch" if is_kept else "plan and page"
    return _run(segment, rehearsal.step, tokens=is_kept, compared=compared, progress=progress)


def _run(
    segment: Segment,
    step: Callable[[Record], Record],
    *,
    tokens: bool,
    compared: str,
    batches: bool = True,
    progress: Progress,
) -> Report:
    started_s = time.monotonic()
    difference, count = None, 0
    for count, record in enumerate(segment.records, start=1):
        difference = compare(record, step(record), tokens=tokens, batches=batches)
        progress("replay", count, len(segment.records))
        if difference is not None:
            break
    done = segment.records[:count]
    return Report(
        num_steps=count,
        num_requests=sum(e[0] == "submit" for one in done for e in one.get("events", ())),
        num_tokens=num_tokens(done),
        seconds=time.monotonic() - started_s,
        compared=compared,
        difference=difference,
    )
