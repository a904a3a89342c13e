"""The engine: plan -> arrays -> step -> tokens -> commit, with one step always under way.

    step n      |-- device --|
    step n+1        plan, begin, dispatch |-- device --|
    step n                                 read, commit, text

The sampled token stays on the device; the host reads it while the next step runs.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from jaxinfer import compile as programs_of
from jaxinfer.compile import Programs, Shape
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.errors import CompileAfterStart, DuplicateRequest, EngineFailed
from jaxinfer.host.batch import SlotTable
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
from jaxinfer.inputs import StepOutput, inert_batch, pack
from jaxinfer.plan import check_memory, plan_memory
from jaxinfer.store import Store

MAX_RECOVERIES_IN_A_ROW = 3
_PROMPT_TAIL = 8  # tokens of the prompt that may change how the first new one reads
log = logging.getLogger(__name__)


@runtime_checkable
class Stream(Protocol):
    """Tokens in, text out: text.stream.TextStream."""

    def push(self, token_id: int, /) -> Any: ...
    def finish(self) -> str: ...


@runtime_checkable
class MakesStreams(Protocol):
    """What an engine needs of a tokenizer: text.tokenizer.Tokenizer."""

    def stream(self, prompt_tail: Items[int] = ..., *, stop: tuple[str, ...] = ...) -> Stream: ...


class _UnderWay(NamedTuple):
    """A dispatched step, its results still on the device."""

    plan: Plan
    outputs: tuple[StepOutput, ...]  # of each chunk that samples, then of the decode
    rows: tuple[int, ...]  # how many rows of each count


@dataclass(slots=True)
class _Live:
    """What the engine knows of a request beside its sequence."""

    sequence: Sequence
    stream: Stream
    timings: Timings
    stop: str | int | None = None
    error: str = ""
    unsent: list[tuple[int, float]] = field(default_factory=list)  # token, logprob
    text: list[str] = field(default_factory=list)


class Engine:
    """One model, one cache, one scheduler. Not thread-safe: see runner.EngineThread."""

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
    ) -> None:
        self.config = config
        self.model = model
        self.limits = Limits(model.vocab_size, config.max_seq_len, model.eos_token_ids)
        check_memory(plan_memory(model, config, params=params))
        self.programs: Programs = programs_of.build(
            params, model, config, store=store, progress=progress
        )
        self.allocate = programs_of.build_allocate(params, model, config, store=store)
        every = (*self.programs.values(), self.allocate)
        self.memory = plan_memory(model, config, params=params, programs=every)
        check_memory(self.memory)
        self.params = params
        self._tokenizer = tokenizer
        self._clock = clock
        self._cache = self.allocate.run()
        self._scheduler = Scheduler(config, eos_token_ids=model.eos_token_ids)
        self._table = SlotTable(config, eos_token_ids=model.eos_token_ids)
        self._live: dict[str, _Live] = {}
        self._under_way: deque[_UnderWay] = deque()
        self._ended: list[_Live] = []
        self._num_recoveries_in_a_row = 0
        self._counts = dict.fromkeys(("steps", "prefill", "output", "recoveries", "compiles"), 0)
        self._host_s = self._dispatch_s = self._wait_s = 0.0
        self._warm_up()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._live or self._under_way or self._ended)

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
        if request.request_id in self._live:
            raise DuplicateRequest(
                f"request_id {request.request_id!r} is in use by a live request",
                field="request_id",
            )
        self._live[request.request_id] = _Live(
            sequence=self._scheduler.add(request),
            stream=self._tokenizer.stream(
                request.prompt[-_PROMPT_TAIL:], stop=request.sampling.stop
            ),
            timings=Timings(self._clock()),
        )

    def cancel(self, request_id: str) -> None:
        """Ends a request; its slot and pages are free at once. One that has ended is left alone."""
        if request_id in self._live:
            self._end(self._live[request_id], FinishReason.CANCELLED)

    def flush_prefix_cache(self) -> int:
        """Forgets every cached prefix; returns how many pages that were."""
        return self._scheduler.prefix.flush()

    def step(self) -> list[Output]:
        """Dispatches one step and reads the one before it; returns what each request got.

        Raises EngineFailed when the device fails again and again, and CompileAfterStart.
        """
        started, worked = self._clock(), time.thread_time() - self._dispatch_s
        num_compiles = programs_of.num_compiles_here()
        for sequence in self._scheduler.overdue(started):
            self._end(self._live[sequence.request.request_id], FinishReason.DEADLINE)
        try:
            dispatched = self._dispatch(self._scheduler.plan())
            keep = 1 if dispatched and self.config.overlap else 0
            touched = []
            while len(self._under_way) > keep:
                touched += self._read(self._under_way.popleft())
            self._num_recoveries_in_a_row = 0
        except jax.errors.JaxRuntimeError as error:
            self._recover(error)
            touched = []
        ended, self._ended = self._ended, []
        outputs = [self._output(live) for live in _each_once([*touched, *ended])]
        self._host_s += time.thread_time() - self._dispatch_s - worked
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
            num_prefill_tokens=self._counts["prefill"],
            num_output_tokens=self._counts["output"],
            num_preemptions=scheduler.num_preemptions,
            num_recoveries=self._counts["recoveries"],
            num_programs=len(self.programs),
            num_compiles_after_start=self._counts["compiles"],
            host_s=self._host_s,
            dispatch_s=self._dispatch_s,
            wait_s=self._wait_s,
            num_queried_tokens=prefix.num_queried_tokens,
            num_cached_tokens=prefix.num_hit_tokens,
            num_evicted_pages=prefix.num_evicted_pages,
        )

    def run_program(self, shape: Shape, packed: np.ndarray) -> StepOutput:
        """Dispatches one program on a packed batch, without the scheduler's knowledge."""
        before = time.thread_time()
        self._cache, output = self.programs[shape].run(self.params, self._cache, packed)
        self._dispatch_s += time.thread_time() - before
        for part in output:
            part.copy_to_host_async()
        return output

    def _warm_up(self) -> None:
        """Runs every program once, on the trash page: the first request pays for no page fault."""
        for shape in self.programs:
            rows = inert_batch(
                shape.rows,
                shape.tokens,
                pages_per_seq=self.config.pages_per_seq,
                trash_slot=self.config.num_slots,
                trash_page=self.config.num_pages,
            )
            rows.lengths[:] = shape.tokens
            jax.block_until_ready(self.run_program(shape, pack(rows)))

    def check_integrity(self) -> None:
        """Asserts that pages, slots and requests add up."""
        self._scheduler.check_integrity()
        held = [*self._scheduler.running, *self._scheduler.waiting]
        assert sorted(one.request.request_id for one in held) == sorted(self._live)

    def _dispatch(self, plan: Plan) -> bool:
        """Starts a step on the device without waiting for it; False where there is none to run."""
        self._scheduler.begin(plan)
        if plan.is_empty:
            return False
        for admission in plan.admit:
            self._table.admit(admission.sequence)
            self._set_timing(admission.sequence, "scheduled_s")
        for stored in plan.stored:
            if stored.sequence.order in plan.num_pages:
                self._table.grow(stored.sequence)
        outputs, rows = [], []
        for chunk in plan.chunks:
            shape = Shape("prefill", 1, chunk.size)
            output = self.run_program(shape, self._table.chunk(chunk))
            self._counts["prefill"] += chunk.length
            if chunk.is_last:
                outputs.append(output)
                rows.append(1)
        if plan.decodes:
            packed = self._table.decode(plan.decodes)
            outputs.append(self.run_program(Shape("decode", len(packed), 1), packed))
            rows.append(len(plan.decodes))
        self._counts["steps"] += 1
        self._under_way.append(_UnderWay(plan, tuple(outputs), tuple(rows)))
        return True

    def _read(self, under_way: _UnderWay) -> list[_Live]:
        """Waits for a step, commits its tokens, and says whom they belong to."""
        before = self._clock()
        tokens, logprobs = [], []
        for output, rows in zip(under_way.outputs, under_way.rows, strict=True):
            tokens += np.asarray(output.tokens)[:rows].tolist()
            logprobs += np.asarray(output.logprobs)[:rows].tolist()
        self._wait_s += self._clock() - before
        self._scheduler.retire(under_way.plan, tokens)
        touched = []
        sampled = zip(under_way.plan.sampled, tokens, logprobs, strict=True)
        for sequence, token, logprob in sampled:
            live = self._live.get(sequence.request.request_id)
            counts = self._scheduler.commit(sequence, token)
            if live is None or live.sequence is not sequence:
                continue  # it ended while the step was under way
            if counts:
                self._take(live, token, logprob)
                touched.append(live)
            elif token < 0:
                live.error = "the model's logits were not finite for this request"
                self._close(live)
        self._counts["output"] += len(touched)
        return touched

    def _take(self, live: _Live, token: int, logprob: float) -> None:
        """One token into a request's text; a stop string ends it."""
        sequence = live.sequence
        if live.timings.first_token_s is None:
            self._set_timing(sequence, "first_token_s")
        live.unsent.append((token, logprob))
        reason = sequence.finish_reason
        if reason in (FinishReason.EOS, FinishReason.STOP_TOKEN):
            live.stop = token if reason is FinishReason.STOP_TOKEN else None
        else:
            said = live.stream.push(token)
            live.text.append(said.text)
            if said.stop is not None:
                live.stop = said.stop
                if reason is None:
                    self._scheduler.finish(sequence, FinishReason.STOP_STRING)
                else:
                    sequence.finish_reason = FinishReason.STOP_STRING
        if sequence.finish_reason is not None:
            self._close(live)

    def _end(self, live: _Live, reason: FinishReason) -> None:
        self._scheduler.finish(live.sequence, reason)
        self._close(live)

    def _close(self, live: _Live) -> None:
        """Takes an ended request out; its last output goes out with this step's."""
        if live.sequence.finish_reason is not FinishReason.STOP_STRING:
            live.text.append(live.stream.finish())
        self._set_timing(live.sequence, "finished_s")
        del self._live[live.sequence.request.request_id]
        self._ended.append(live)

    def _output(self, live: _Live) -> Output:
        unsent, live.unsent = live.unsent, []
        text, live.text = "".join(live.text), []
        sequence = live.sequence
        return Output(
            request_id=sequence.request.request_id,
            token_ids=tuple(token for token, _ in unsent),
            logprobs=tuple(logprob for _, logprob in unsent),
            text=text,
            finish_reason=sequence.finish_reason,
            stop=live.stop,
            error=live.error,
            num_prompt_tokens=len(sequence.request.prompt),
            num_output_tokens=len(sequence.tokens) - len(sequence.request.prompt),
            num_preemptions=sequence.num_preemptions,
            num_cached_tokens=sequence.num_cached,
            timings=live.timings,
        )

    def _set_timing(self, sequence: Sequence, name: str) -> None:
        live = self._live[sequence.request.request_id]
        if name != "scheduled_s" or live.timings.scheduled_s is None:
            live.timings = replace(live.timings, **{name: self._clock()})

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
        log.error("a step failed on the device, starting over: %s", error)
        if self._num_recoveries_in_a_row > MAX_RECOVERIES_IN_A_ROW:
            raise EngineFailed(
                f"{self._num_recoveries_in_a_row} steps in a row failed on the device"
            ) from error
        self._under_way.clear()
        self._scheduler.restart()
        self._cache = None  # free the old pool before the new one is there
        self._cache = self.allocate.run()


def _each_once(lives: list[_Live]) -> list[_Live]:
    """The same requests in the same order, each once."""
    return list({id(live): live for live in lives}.values())
