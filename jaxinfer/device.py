"""The device's side of an engine: weights, cache and programs; steps go in, tokens come out."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer import compile as programs_of
from jaxinfer import models, selftest
from jaxinfer.compile import ALLOCATE, READ_PAGES, Programs, Shape
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.fingerprint import needs_of, settle_here
from jaxinfer.host.batch import SlotTable
from jaxinfer.host.loop import Phase
from jaxinfer.host.plan import Plan, chunk_size
from jaxinfer.host.prefills import prefills
from jaxinfer.host.sequence import Sequence
from jaxinfer.inputs import Batch, StepOutput, inert_batch, pack
from jaxinfer.kernels import paged_attention
from jaxinfer.plan import MemoryPlan, check_memory, plan_memory
from jaxinfer.sharding import layout_of
from jaxinfer.store import Store
from jaxinfer.verdict import SelfTest

Watch = Callable[[np.ndarray], None]
Rows = slice | list[int]
log = logging.getLogger(__name__)


class Handle(NamedTuple):
    """A dispatched step, its results still on the device."""

    outputs: tuple[StepOutput, ...]  # of each prefill that samples, then of the decode
    rows: tuple[Rows, ...]  # those of each that count
    began_s: float


class Returned(NamedTuple):
    """What a part of a step has sampled, in the order of plan.sampled."""

    tokens: list[int]
    logprobs: np.ndarray  # f32
    is_last: bool


class Device:
    """One model, one cache and every program of a config."""

    def __init__(
        self,
        params: Any,
        model: ModelConfig,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        store: Store | None = None,
        progress: programs_of.Progress = lambda stage, done, total: None,
    ) -> None:
        attention = paged_attention.choose(config.attention, needs_of(model, config))
        devices = layout_of(models.spec_of(model), params).devices
        config, reason = settle_here(model, replace(config, attention=attention), devices)
        if model.quant != "none":
            log.info("products: %s%s", config.products, reason and f", because {reason}")
        self.config = config
        check_memory(plan_memory(model, config, params=params))
        self.programs: Programs = programs_of.build(
            params, model, config, store=store, progress=progress
        )
        self.allocate = programs_of.build_allocate(params, model, config, store=store)
        every = (*self.programs.values(), self.allocate)
        self.memory: MemoryPlan = plan_memory(model, config, params=params, programs=every)
        check_memory(self.memory)
        self.params = params
        self.cache: Any = None
        self.self_test = self._warm_up(model, store)
        self.num_prefill_tokens = 0
        self.dispatch_s = self.wait_s = 0.0
        self._clock = clock
        self._eos = model.eos_token_ids
        self._table = SlotTable(self.config, eos_token_ids=self._eos)

    def dispatch(self, plan: Plan, watch: Watch | None = None) -> Handle:
        """Starts a step that is booked, without waiting for it; `watch` sees each packed batch."""
        began_s = self._clock()
        self._table.update(plan)
        outputs, rows = list[StepOutput](), list[Rows]()
        for prefill in prefills(plan.chunks, self.config):
            packed = self._table.prefill(prefill)
            if watch is not None:
                watch(packed)
            output = self.run(Shape("prefill", prefill.rows, prefill.size), packed)
            self.num_prefill_tokens += sum(chunk.length for chunk in prefill.chunks)
            if prefill.sampled:
                outputs.append(output)
                rows.append(list(prefill.sampled))
        if plan.decodes:
            packed = self._table.decode(plan.decodes)
            if watch is not None:
                watch(packed)
            outputs.append(self.run(Shape("decode", len(packed), 1), packed))
            rows.append(slice(len(plan.decodes)))
        return Handle(tuple(outputs), tuple(rows), began_s)

    def read(self, handle: Handle, faults: Callable[[Phase], None]) -> Iterator[Returned]:
        """Waits for a step, program by program; one that samples nothing has one empty part."""
        if not handle.outputs:
            faults("read")
            yield Returned([], np.zeros(0, np.float32), is_last=True)
        for place, (output, rows) in enumerate(zip(handle.outputs, handle.rows, strict=True), 1):
            faults("read")
            before = self._clock()
            tokens = np.asarray(output.tokens)[rows].tolist()
            logprobs = np.asarray(output.logprobs)[rows]
            self.wait_s += self._clock() - before
            yield Returned(tokens, logprobs, is_last=place == len(handle.outputs))

    def run(self, shape: Shape, packed: np.ndarray) -> StepOutput:
        """Dispatches one program on a packed batch."""
        before = time.thread_time()
        self.cache, output = self.programs[shape].run(self.params, self.cache, packed)
        self.dispatch_s += time.thread_time() - before
        for part in output:
            part.copy_to_host_async()
        return output

    def reset(self) -> None:
        """After a failed step, which took the donated cache with it: an empty one."""
        self.cache = None  # free the old pool before the new one is there
        self.cache = self.allocate.run()

    def fill(self, tokens: list[int], pages: list[int]) -> None:
        """Writes the keys and values of a prefix into pages, as a prefill of it would have."""
        sizes = self.config.prefill_chunks
        start = 0
        while start < len(tokens):
            shape = Shape("prefill", 1, chunk_size(len(tokens) - start, sizes))
            part = tokens[start : start + shape.tokens]
            rows = self._inert(shape)
            rows.tokens[0, : len(part)] = part
            rows.page_table[0, : len(pages)] = pages
            rows.starts[0], rows.lengths[0] = start, len(part)
            self.run(shape, pack(rows))
            start += len(part)

    def take_over(self, running: list[Sequence]) -> None:
        """Makes rows and pages of sequences that were booked elsewhere: see host.state."""
        last = np.zeros(self.config.num_slots + 1, np.int32)
        for sequence in running:
            self._table.admit(sequence)
            self._table.grow(sequence)
            self.fill(sequence.tokens[: sequence.num_stored], sequence.pages)
            last[sequence.slot] = sequence.tokens[-1]
        placed = jax.device_put(last, self.cache.last_tokens.sharding)
        self.cache = self.cache._replace(last_tokens=placed)

    def _warm_up(self, model: ModelConfig, store: Store | None) -> SelfTest:
        """Runs every program, so that the first request pays for no page fault.

        With engine.bits = exact it also compares them; config and programs are then what is left.
        """
        params, config = self.params, self.config
        programs = {**self.programs, ALLOCATE: self.allocate}
        if config.bits == "exact":
            programs[READ_PAGES] = programs_of.build_read_pages(params, model, config, store=store)
        tested = selftest.run(
            params,
            model,
            config,
            programs,
            rebuild=lambda shape: programs_of.rebuild(shape, params, model, config, store=store),
            store=store,
        )
        self.config, self.cache = tested.config, tested.cache
        self.allocate = tested.programs[ALLOCATE]
        self.programs = {shape: one for shape, one in tested.programs.items() if shape.rows}
        return tested.report

    def _inert(self, shape: Shape) -> Batch:
        return inert_batch(
            shape.rows,
            shape.tokens,
            pages_per_seq=self.config.pages_per_seq,
            trash_slot=self.config.num_slots,
            trash_page=self.config.num_pages,
        )
