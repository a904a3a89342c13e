"""Whole steps of Llama shapes with random weights, against what their bytes and products take."""

import time
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer import compile as programs_of
from jaxinfer import models, spec
from jaxinfer.bench import floors
from jaxinfer.bench.hardware.device import product
from jaxinfer.bench.hardware.part import Part
from jaxinfer.bench.probes import Probes
from jaxinfer.compile import Program, Programs, Shape
from jaxinfer.config import ModelConfig
from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.inputs import Batch, inert_batch, pack


class _Machine:
    """What this process gets of the device."""

    def __init__(self, part: Part) -> None:
        self._probes = Probes(part.sizes.probe_bytes)
        self._run, self._flops = product(part.sizes.peak_side, "bfloat16")
        self._run()

    def copy(self) -> float:
        """Bytes a second."""
        return self._probes.copy_bytes_per_s()

    def peak(self) -> float:
        """Operations a second."""
        return self._flops / self._run()


class _Loaded(NamedTuple):
    """A model with its programs; the cache goes from step to step."""

    name: str
    model: ModelConfig
    params: Any
    config: EngineConfig
    programs: Programs
    cache: list[Any]

    def step_s(self, shape: Shape, packed: np.ndarray, steps: int) -> float:
        """Seconds of one of some steps that are dispatched one behind another."""
        started, output = time.perf_counter(), None
        for _ in range(steps):
            self.cache[0], output = self.programs[shape].run(self.params, self.cache[0], packed)
        assert output is not None
        np.asarray(output.tokens)
        return (time.perf_counter() - started) / steps


def measure(part: Part) -> None:
    """A row a model and program: compile times and memory, then milliseconds against a floor."""
    machine = _Machine(part)
    for name, model in part.sizes.models:
        loaded = part.attempt(f"{name}: weights and programs", partial(_load, part, name, model))
        if loaded is None:
            continue
        first, *others = part.sizes.batches
        part.attempt(f"{name}: decode of {first}", partial(_decode, part, machine, loaded, first))
        part.attempt(f"{name}: prefill", partial(_prefill, part, machine, loaded))
        for rows in others:
            part.attempt(f"{name}: decode of {rows}", partial(_decode, part, machine, loaded, rows))


def config_of(part: Part, model: ModelConfig) -> EngineConfig:
    """An engine of as many rows as the largest batch, each with room for the context."""
    size = part.sizes
    engine = EngineConfig(
        num_slots=size.batches[-1],
        max_seq_len=size.context + size.block,
        decode_rows=size.batches,
        prefill_chunks=(size.context,),
        max_prefill_tokens=size.context,
        compute_dtype="float32" if size.dtype == "float32" else "bfloat16",
        attention_block=size.block,
        cache=CacheConfig(page_size=16 if size.is_tiny else 64),
    )
    return part.best(engine, head_dim=model.head_dim)


def _load(part: Part, name: str, model: ModelConfig) -> _Loaded:
    """Programs compile beside each other, as in an engine's start."""
    config = config_of(part, model)
    started = time.perf_counter()
    params = spec.initialise(models.spec_of(model), jax.random.key(0), part.sizes.dtype)
    params = jax.block_until_ready(params)
    weights_s = time.perf_counter() - started
    programs = programs_of.build(params, model, config)
    built_s = time.perf_counter() - started - weights_s
    part.fact(**{f"{name} weights_s": weights_s, f"{name} programs_s": built_s})
    cache = programs_of.build_allocate(params, model, config).run()
    return _Loaded(name, model, params, config, programs, [cache])


def _decode(part: Part, machine: _Machine, loaded: _Loaded, rows: int) -> None:
    context, config, shape = part.sizes.context, loaded.config, Shape("decode", rows, 1)
    batch = _batch(config, shape)
    batch.lengths[:], batch.starts[:] = 1, context - 1
    batch.take_last[:] = batch.sample[:] = 1
    run = partial(loaded.step_s, shape, pack(batch))
    floor = floors.decode_bytes(loaded.params, loaded.model, config, active=rows, context=context)
    alone, behind, of_floor = [], [], []
    run(2)
    for _ in range(part.sizes.rounds):
        speed = machine.copy()
        alone.append(run(1))
        behind.append(run(part.sizes.steps))
        of_floor.append(floor / speed / behind[-1])
        if part.is_late:
            break
    part.add(
        model=loaded.name,
        program=shape.name,
        context=context,
        attention=config.attention,
        ms=1e3 * median(behind),
        alone_ms=1e3 * median(alone),
        floor_bytes=floor,
        of_floor=median(of_floor),
        tokens_per_s=rows / median(behind),
        **_costs(loaded.programs[shape]),
    )


def _prefill(part: Part, machine: _Machine, loaded: _Loaded) -> None:
    tokens, config = part.sizes.context, loaded.config
    shape = Shape("prefill", 1, tokens)
    batch = _batch(config, shape)
    vocabulary = loaded.model.vocab_size
    batch.tokens[:] = np.random.default_rng(0).integers(0, vocabulary, (1, tokens))
    batch.lengths[:], batch.sample[:] = tokens, 1
    run = partial(loaded.step_s, shape, pack(batch))
    flops = floors.prefill_flops(loaded.model, tokens)
    times, of_peak = [], []
    run(1)
    for _ in range(part.sizes.rounds):
        top = machine.peak()
        times.append(run(2))
        of_peak.append(flops / times[-1] / top)
        if part.is_late:
            break
    part.add(
        model=loaded.name,
        program=shape.name,
        context=tokens,
        attention=config.attention,
        ms=1e3 * median(times),
        flops=flops,
        of_floor=median(of_peak),
        tokens_per_s=tokens / median(times),
        **_costs(loaded.programs[shape]),
    )


def _batch(config: EngineConfig, shape: Shape) -> Batch:
    """Rows whose pages lie in any order."""
    batch = inert_batch(
        shape.rows,
        shape.tokens,
        pages_per_seq=config.pages_per_seq,
        trash_slot=config.num_slots,
        trash_page=config.num_pages,
    )
    per_row = config.num_pages // shape.rows
    pages = np.random.default_rng(0).permutation(config.num_pages)[: per_row * shape.rows]
    owned = min(per_row, config.pages_per_seq)
    batch.page_table[:, :owned] = pages.reshape(shape.rows, per_row)[:, :owned]
    batch.slots[:] = np.arange(shape.rows)
    return batch


def _costs(program: Program) -> dict[str, Any]:
    """What building it took, and what memory it needs beside weights and pages."""
    return {
        "trace_s": program.trace_s,
        "compile_s": program.compile_s,
        "temp_mb": program.temp_bytes / 1e6,
        "pages_in_place": program.alias_bytes > 0,
    }
