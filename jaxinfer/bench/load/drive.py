"""Sends calls when they are due and notes what comes back, and how late the client itself was."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from jaxinfer.bench.load.calls import Call
from jaxinfer.bench.load.events import EMPTY, OK, Record, Spread, spread
from jaxinfer.bench.load.target import CallFailed, End, Target

BEAT_S = 0.01
Show = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Run:
    """What one load saw."""

    started: str
    """When, in UTC."""
    records: tuple[Record, ...]
    lag_s: Spread
    """How much later than it asked for the client's own loop woke up, every 10 ms or so."""
    concurrency: int | None = None
    """Of a closed loop."""


async def drive(
    target: Target,
    calls: Sequence[Call],
    *,
    concurrency: int | None = None,
    stage: str = "requests",
    progress: Show = lambda stage, done, total: None,
) -> Run:
    """Sends all calls: each at its time, or with a concurrency when one before it has ended."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    driver = _Driver(target, len(calls), stage, progress)
    lags: list[float] = []
    beat = asyncio.create_task(_beat(lags))
    try:
        if concurrency is None:
            await driver.open_loop(calls)
        else:
            await driver.closed_loop(calls, concurrency)
    finally:
        beat.cancel()
    records = tuple(sorted(driver.records, key=lambda one: (one.planned_s, one.number)))
    return Run(started, records, spread(lags), concurrency)


class _Driver:
    """One run: its start, and the records so far."""

    def __init__(self, target: Target, total: int, stage: str, progress: Show) -> None:
        self._target, self._total = target, total
        self._stage, self._progress = stage, progress
        self._start_s = time.perf_counter()
        self._num_ended = 0
        self.records: list[Record] = []

    async def open_loop(self, calls: Sequence[Call]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for call in calls:
                if (wait_s := call.at_s - self._now_s()) > 0:
                    await asyncio.sleep(wait_s)
                tasks.create_task(self._send(call, call.at_s))

    async def closed_loop(self, calls: Sequence[Call], concurrency: int) -> None:
        unsent = iter(calls)

        async def stream() -> None:
            for call in unsent:  # shared: each takes the next that nobody has taken
                await self._send(call, self._now_s())

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(concurrency, self._total)):
                tasks.create_task(stream())

    async def _send(self, call: Call, planned_s: float) -> None:
        record = Record(call.number, planned_s, sent_s=self._now_s())
        self.records.append(record)
        num_tokens = 0
        try:
            async for event in self._target.stream(call):
                if isinstance(event, End):
                    _note(record, event, num_tokens)
                else:
                    record.chunks_s.append(self._now_s())
                    num_tokens += event.num_tokens
        except CallFailed as failure:
            record.status, record.message = failure.status, str(failure)
            record.num_output_tokens = num_tokens
        record.ended_s = self._now_s()
        if record.status == OK and not record.chunks_s:
            record.status, record.message = EMPTY, "the answer held no token"
        self._num_ended += 1
        self._progress(self._stage, self._num_ended, self._total)

    def _now_s(self) -> float:
        return round(time.perf_counter() - self._start_s, 6)  # as it is saved


def _note(record: Record, end: End, num_tokens: int) -> None:
    counted = end.num_output_tokens
    record.num_output_tokens = num_tokens if counted is None else counted
    record.num_prompt_tokens = end.num_prompt_tokens or 0
    record.num_cached_tokens = end.num_cached_tokens
    record.num_preemptions = end.num_preemptions
    record.queue_s, record.prefill_s = end.queue_s, end.prefill_s


async def _beat(lags: list[float]) -> None:
    while True:
        before_s = time.perf_counter()
        await asyncio.sleep(BEAT_S)
        lags.append(time.perf_counter() - before_s - BEAT_S)
