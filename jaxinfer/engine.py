"""The engine: plan -> arrays -> step -> tokens -> commit, with one step always under way.

    step n      |-- device --|
    step n+1        plan, begin, dispatch |-- device --|
    step n                                 read, commit, text

The sampled token stays on the device; the host reads it while the next step runs. Between two
calls of `step` the engine is a value: with the same calls and the same clock it does the same.
"""

import logging
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinfer import compile as programs_of
from jaxinfer.compile import Programs
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.device import Device, Handle
from jaxinfer.errors import CompileAfterStart, DuplicateRequest, EngineFailed
from jaxinfer.host import cost_model, state
from jaxinfer.host.journal import Recorder
from jaxinfer.host.live import Live, MakesStreams, News, open_stream
from jaxinfer.host.loop import Loop, Phase, Sampled, weakly
from jaxinfer.host.observer import Observer
from jaxinfer.host.pace import Pace, PaceMeter
from jaxinfer.host.plan import Plan
from jaxinfer.host.request import (
    EngineStats,
    FinishReason,
    Limits,
    Output,
    Request,
    Timings,
    check_request,
)
from jaxinfer.host.scheduler import Scheduler
from jaxinfer.host.sequence import Sequence
from jaxinfer.host.snapshot import Saved, Snapshot
from jaxinfer.scoring import Scorer
from jaxinfer.store import Store
from jaxinfer.verdict import SelfTest

MAX_RECOVERIES_IN_A_ROW = 3
Tell = Callable[[list[Output]], None]
log = logging.getLogger(__name__)


class Engine:
    """One model, one cache, one scheduler. Not thread-safe: see runner.EngineThread.

    `journal` is told everything; `faults` is asked before the device is entered, and may raise
    what a failing device would.
    """

    def __init__(
        self,
        params: Any,
        model: ModelConfig,
        tokenizer: MakesStreams,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        store: Store | None = None,
        progress: programs_of.Progress = lambda stage, done, total: None,
        faults: Callable[[Phase], None] = lambda phase: None,
    ) -> None:
        self.model = model
        self.limits = Limits(model.vocab_size, config.max_seq_len, model.eos_token_ids)
        self.device = Device(params, model, config, clock=clock, store=store, progress=progress)
        self.config = config = self.device.config  # without programs that failed the self-test
        self.scorer = Scorer(params, model, config, store=store) if config.score_chunk else None
        self.journal: Recorder | None = None
        self.observer: Observer | None = None
        self.step_times: cost_model.StepTimes | None = None  # of step times; set it while idle
        self._faults = faults
        self._tokenizer = tokenizer
        self._clock = clock
        self._meter = PaceMeter()
        self._take_scheduler(Scheduler(config, eos_token_ids=model.eos_token_ids))
        self._live: dict[str, Live] = {}
        self._news = News()
        self._tell: Tell | None = None
        self._logprobs = np.zeros(0, np.float32)  # of the part that was read last
        self._num_recoveries_in_a_row = 0
        self._counts = dict.fromkeys(("steps", "output", "recoveries", "compiles"), 0)
        self._host_s = 0.0

    @property
    def programs(self) -> Programs:
        """Every step that can run."""
        return self.device.programs

    @property
    def self_test(self) -> SelfTest:
        """Which programs gave the same bits at the start, and what is not promised."""
        return self.device.self_test

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._live or self._loop.under_way or self._news)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._scheduler.waiting)

    @property
    def max_waiting(self) -> int:
        """Requests that may be without a slot."""
        return self.config.max_waiting

    def submit(self, request: Request) -> None:
        """Puts a request into the line; raises InvalidRequest. Whoever faces clients bounds it."""
        check_request(request, self.limits)
        self.enter(request)

    def cancel(self, request_id: str) -> None:
        """Ends a request; its slot and pages are free at once. One that has ended is left alone."""
        if request_id in self._live:
            live = self._live[request_id]
            if self.journal is not None:
                self.journal.cancelled(live.sequence.order)
            self._end(live, FinishReason.CANCELLED)

    def flush_prefix_cache(self) -> int:
        """Forgets every cached prefix; returns how many pages that were."""
        if self.journal is not None:
            self.journal.flushed()
        return self._scheduler.prefix.flush()

    def rotate_journal(self) -> Path | None:
        """Begins a new segment with the next step; returns the one that is being written now."""
        if self.journal is None:
            return None
        self.journal.ask_for_state()
        return self.journal.path

    def snapshot(self) -> Snapshot:
        """What another engine of the same model needs to go on with the live requests."""
        lives = sorted(self._live.values(), key=lambda live: live.sequence.order)
        saved = (Saved(live.request, live.tokens, tuple(live.logprobs)) for live in lives)
        return Snapshot(tuple(saved))

    def restore(self, snapshot: Snapshot) -> tuple[Request, ...]:
        """Goes on with the requests of a snapshot; their next outputs tell all from the start.

        Their deadlines were on another clock, so they have none. Raises InvalidRequest, and
        nothing has happened then, where this engine can't serve one of them.
        """
        requests = [replace(saved.request, deadline_s=None) for saved in snapshot.requests]
        for request in requests:
            check_request(request, self.limits)
        for request, saved in zip(requests, snapshot.requests, strict=True):
            self.enter(request, saved.tokens, saved.logprobs)
        return tuple(requests)

    def enter(self, request: Request, tokens: Items[int] = (), logprobs: Items[float] = ()) -> None:
        """Puts a checked request into the line, with what it has got of its answer elsewhere."""
        if request.request_id in self._live:
            raise DuplicateRequest(
                f"request_id {request.request_id!r} is in use by a live request",
                field="request_id",
            )
        sequence = self._scheduler.add(request)
        sequence.tokens.extend(tokens)
        if self.journal is not None:
            self.journal.submitted(sequence)
        live = self._know(sequence)
        if tokens:
            live.go_on(logprobs or [0.0] * len(tokens))
            self._news.add(live)

    def step(
        self, *, drain: bool = False, pace: Pace | None = None, tell: Tell | None = None
    ) -> list[Output]:
        """Dispatches one step and reads the one before it; returns what each request got.

        With `drain` nothing is under way afterwards. Without a pace deadlines go by the measured
        one. `tell` is given the outputs of a part of the step that is there before the rest.
        Raises EngineFailed when the device fails again and again, and CompileAfterStart.
        """
        self._tell = tell
        started_s, worked = self._clock(), time.thread_time() - self.device.dispatch_s
        num_compiles = programs_of.num_compiles_here()
        journal, pace = self.journal, self._meter.pace if pace is None else pace
        wants_state = journal is not None and journal.wants_state
        if journal is not None:
            journal.begun(started_s, pace)
        for sequence in self._scheduler.overdue(started_s, pace):
            self._end(self._live[sequence.request.request_id], FinishReason.DEADLINE)
        try:
            self._loop.step(drain=drain or wants_state)
            self._num_recoveries_in_a_row = 0
        except jax.errors.JaxRuntimeError as error:
            self._recover(error)
        if journal is not None:
            journal.close(drained=drain or wants_state)
            if wants_state:
                journal.save(state.save(self._scheduler))
        outputs = self._news.tell()
        self._host_s += time.thread_time() - self.device.dispatch_s - worked
        self._watch_compiles(num_compiles)
        return outputs

    def stats(self) -> EngineStats:
        """Counts since the engine was built."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        prefix = scheduler.prefix.stats()
        return EngineStats(
            num_slots=self.config.num_slots,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_pages=pool.num_pages,
            num_free_pages=pool.num_available,
            peak_pages_used=pool.peak_owned,
            num_steps=self._counts["steps"],
            num_prefill_tokens=self.device.num_prefill_tokens,
            num_output_tokens=self._counts["output"],
            num_preemptions=scheduler.num_preemptions,
            num_recoveries=self._counts["recoveries"],
            num_programs=len(self.programs),
            num_compiles_after_start=self._counts["compiles"],
            host_s=self._host_s,
            dispatch_s=self.device.dispatch_s,
            wait_s=self.device.wait_s,
            num_queried_tokens=prefix.num_queried_tokens,
            num_cached_tokens=prefix.num_hit_tokens,
            num_evicted_pages=prefix.num_evicted_pages,
            num_cached_pages=pool.num_idle,
        )

    def check_integrity(self) -> None:
        """Asserts that pages, slots and requests add up."""
        self._scheduler.check_integrity()
        held = [*self._scheduler.running, *self._scheduler.waiting]
        assert sorted(one.request.request_id for one in held) == sorted(self._live)

    def load_state(self, saved: dict[str, Any]) -> list[Sequence]:
        """Takes the place of an engine whose host.state was saved; pages are computed again.

        Returns its sequences, those that hold a slot first.
        """
        assert not self.has_work, "an engine that is at work can't become another one"
        self._take_scheduler(state.load(saved, self.config, eos_token_ids=self.model.eos_token_ids))
        for tokens, pages in self._scheduler.prefix.chains():
            self.device.fill(tokens, pages)
        self.device.take_over(self._scheduler.running)
        sequences = [*self._scheduler.running, *self._scheduler.waiting]
        for sequence in sequences:
            live = self._know(sequence)
            live.go_on([0.0] * len(live.tokens))
            live.output()
        return sequences

    def _take_scheduler(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._loop = Loop(
            scheduler,
            overlap=self.config.overlap,
            dispatch=weakly(self._dispatch),  # so an engine that is dropped is gone at once
            read=weakly(self._read),
            take=weakly(self._take),
            planned=weakly(self._planned),
            told=weakly(self._tell_part),
        )

    def _know(self, sequence: Sequence) -> Live:
        stream = open_stream(self._tokenizer, sequence.request)
        live = Live(sequence, stream, Timings(self._clock()))
        self._live[sequence.request.request_id] = live
        if self.observer is not None:
            self.observer.submitted(live)
        return live

    def _planned(self, plan: Plan) -> None:
        if self.journal is not None:
            self.journal.planned(plan)

    def _dispatch(self, plan: Plan) -> Handle:
        """Starts a step on the device without waiting for it."""
        if self.journal is not None:
            self.journal.booked(plan)
        self._faults("dispatch")
        watch = None if self.journal is None else self.journal.packed
        handle = self.device.dispatch(plan, watch)
        if self.step_times is not None:
            self.step_times.dispatched(plan, handle.began_s)
        if self.observer is not None:
            self.observer.dispatched(plan, handle.began_s)
        self._counts["steps"] += 1
        now_s = self._clock()
        for admission in plan.admit:
            live = self._live[admission.sequence.request.request_id]
            if live.timings.scheduled_s is None:
                live.timings = replace(live.timings, scheduled_s=now_s)
        return handle

    def _read(self, plan: Plan, handle: Handle) -> Iterator[list[int]]:
        """Waits for a step, part by part."""
        for returned in self.device.read(handle, self._faults):
            self._logprobs = returned.logprobs
            if self.journal is not None:
                self.journal.returned(plan, returned.tokens, returned.logprobs)
            if returned.is_last:
                self._returned(plan, handle)
            yield returned.tokens

    def _returned(self, plan: Plan, handle: Handle) -> None:
        """All of a step has returned."""
        now_s = self._clock()
        self._meter.returned(plan, handle.began_s, now_s)
        if self.step_times is not None:
            self.step_times.returned(now_s)
        if self.observer is not None:
            self.observer.returned(now_s)

    def _take(self, sampled: Sampled) -> None:
        """One token of a step that has returned, committed just now."""
        sequence = sampled.sequence
        live = self._live.get(sequence.request.request_id)
        if live is None or live.sequence is not sequence:
            return  # it ended while the step was under way
        if sampled.counts:
            self._counts["output"] += 1
            if live.timings.first_token_s is None:
                live.timings = replace(live.timings, first_token_s=self._clock())
            stop = live.take(sampled.token, float(self._logprobs[sampled.place]))
            if stop is not None and sequence.finish_reason is None:
                self._scheduler.finish(sequence, FinishReason.STOP_STRING)
            elif stop is not None:
                sequence.finish_reason = FinishReason.STOP_STRING
            self._news.add(live)
        elif sampled.token < 0:
            live.error = "the model's logits were not finite for this request"
        if sequence.finish_reason is not None:
            self._close(live)

    def _tell_part(self) -> None:
        if self._tell is not None and self._news:
            self._tell(self._news.tell())

    def _end(self, live: Live, reason: FinishReason) -> None:
        self._scheduler.finish(live.sequence, reason)
        self._close(live)

    def _close(self, live: Live) -> None:
        """Takes an ended request out; its last output goes out with this step's."""
        live.end(self._clock())
        if self.journal is not None:
            self.journal.ended(live.sequence)
        if self.observer is not None:
            self.observer.ended(live)
        del self._live[live.request.request_id]
        self._news.end(live)

    def _watch_compiles(self, before: int) -> None:
        """Nothing may compile in a step: it is counted and logged, and the end in strict mode."""
        count = programs_of.num_compiles_here() - before
        if not count:
            return
        self._counts["compiles"] += count
        message = (
            f"{count} programs were compiled in a step, {programs_of.last_compiled_here()} last, "
            "though all of them were built at the start; engine.strict_compiles=false goes on"
        )
        log.error(message)
        if self.config.strict_compiles:
            raise CompileAfterStart(message)

    def _recover(self, error: Exception) -> None:
        """The failed step took the donated cache with it: a new one, and everyone starts over.

        Requests keep their tokens, so clients see a pause and nothing else.
        """
        self._num_recoveries_in_a_row += 1
        self._counts["recoveries"] += 1
        if self.journal is not None:
            self.journal.failed(self._loop.phase)
        if self.observer is not None:
            self.observer.failed(self._clock())
        log.error("a step failed on the device, starting over: %s", error)
        if self._num_recoveries_in_a_row > MAX_RECOVERIES_IN_A_ROW:
            if self.journal is not None:
                self.journal.close(drained=False)
            raise EngineFailed(
                f"{self._num_recoveries_in_a_row} steps in a row failed on the device"
            ) from error
        self._loop.restart()
        if self.step_times is not None:
            self.step_times.restart()
        self.device.reset()
