"""How long a decode step takes, against the time that reading its bytes would take."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from jaxinfer import compile as programs_of
from jaxinfer.bench import floors
from jaxinfer.bench.offline import variant_of
from jaxinfer.compile import Shape
from jaxinfer.engine import Engine
from jaxinfer.host.request import JAXINFER_DEFAULTS, Request, SamplingParams
from jaxinfer.inputs import inert_batch, pack

_PROBE_BYTES = 512 * 2**20  # larger than any cache of the processor
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StepTiming:
    """One decode program at one load."""

    program: str
    active: int
    """Rows that decode; the rest are inert."""
    context: int
    """Tokens that each active row attends to."""
    median_ms: float
    min_ms: float
    floor_ms: float
    """Weights and cached tokens over the read bandwidth of the same round; median."""
    tokens_per_s: float
    temp_mb: float


@dataclass(frozen=True)
class HostTiming:
    """Where the time of the engine's steps goes, all slots decoding."""

    active: int
    steps: int
    step_ms: float
    host_ms: float
    """Processor time of the engine's thread per step: plan, pack, commit, text."""
    dispatch_ms: float
    """The same for JAX's call of the program."""
    output_tokens_per_s: float


@dataclass(frozen=True)
class Report:
    """Everything of one run."""

    model: str
    compute_dtype: str
    variant: str
    """Of the weights: bf16, f32, or the scheme they are quantised by."""
    read_gb_per_s: float
    steps: tuple[StepTiming, ...]
    host: tuple[HostTiming, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(
    engine: Engine,
    *,
    name: str,
    contexts: tuple[int, ...] = (256,),
    actives: tuple[int, ...] = (1, 8, 32),
    rounds: int = 15,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Times each decode load once a round, with a bandwidth probe beside it.

    Uses the engine's own programs and weights, and a cache of its own while it measures.
    """
    loads = [
        (active, context)
        for active in actives
        if active <= engine.config.num_slots
        for context in contexts
        if context <= engine.config.max_seq_len
    ]
    times: dict[tuple[int, int], list[float]] = {load: [] for load in loads}
    probe = _read_probe()
    speeds: list[float] = []
    for number in range(rounds):
        speeds.append(probe())
        for load in loads:
            times[load].append(_time_decode(engine, *load))
        progress("measure", number + 1, rounds)
    speed = float(np.median(speeds))
    host = [_time_engine(engine, active) for active in actives if active <= engine.config.num_slots]
    return Report(
        model=name,
        compute_dtype=engine.config.compute_dtype,
        variant=variant_of(engine),
        read_gb_per_s=speed / 1e9,
        steps=tuple(_timing(engine, load, times[load], speed) for load in loads),
        host=tuple(host),
    )


def step_bytes(engine: Engine, *, active: int, context: int) -> int:
    """Bytes that one decode step must read: every weight once, and the cached tokens."""
    parts = engine.device.params, engine.model, engine.config
    return floors.decode_bytes(*parts, active=active, context=context)


def _read_probe() -> Callable[[], float]:
    """A function that reads a large array with all cores and returns bytes per second."""
    data = jnp.ones(_PROBE_BYTES // 4, jnp.float32).reshape(-1, 4096)
    total = programs_of.compile_function(lambda x: jnp.sum(x, axis=1), data)
    jax.block_until_ready(total(data))

    def probe() -> float:
        started = time.perf_counter()
        jax.block_until_ready(total(data))
        return data.nbytes / (time.perf_counter() - started)

    return probe


def _time_decode(engine: Engine, active: int, context: int) -> float:
    config = engine.config
    rows = next(rows for rows in config.row_counts if rows >= active)
    batch = inert_batch(
        rows,
        1,
        pages_per_seq=config.pages_per_seq,
        trash_slot=config.num_slots,
        trash_page=config.num_pages,
    )
    pages = -(-context // config.cache.page_size)
    for row in range(active):
        owned = (np.arange(pages) + row * pages) % config.num_pages
        batch.page_table[row, :pages] = owned
    batch.lengths[:active] = 1
    batch.starts[:active] = context - 1
    batch.slots[:active] = np.arange(active)
    batch.take_last[:active] = batch.sample[:active] = 1
    packed = pack(batch)
    started = time.perf_counter()
    output = engine.device.run(Shape("decode", rows, 1), packed)
    np.asarray(output.tokens)
    return time.perf_counter() - started


def _timing(engine: Engine, load: tuple[int, int], times: list[float], speed: float) -> StepTiming:
    active, context = load
    rows = next(rows for rows in engine.config.row_counts if rows >= active)
    shape = Shape("decode", rows, 1)
    floor_s = step_bytes(engine, active=active, context=context) / speed
    median_s = float(np.median(times))
    return StepTiming(
        program=shape.name,
        active=active,
        context=context,
        median_ms=1e3 * median_s,
        min_ms=1e3 * min(times),
        floor_ms=1e3 * floor_s,
        tokens_per_s=active / median_s,
        temp_mb=engine.programs[shape].temp_bytes / 1e6,
    )


def _time_engine(
    engine: Engine, active: int, *, prompt_len: int = 64, steps: int = 64
) -> HostTiming:
    """Serves `active` equal requests and counts only the steps in which all of them decode."""
    sampling = SamplingParams(
        temperature=0.0, max_tokens=steps + 8, ignore_eos=True, seed=0
    ).or_else(JAXINFER_DEFAULTS)
    for number in range(active):
        prompt = tuple(1 + (number + place) % 100 for place in range(prompt_len))
        engine.submit(Request(f"bench-{number}", prompt, sampling))
    while engine.stats().num_waiting or engine.stats().num_running < active:
        engine.step()
    for _ in range(4):
        engine.step()
    before, started = engine.stats(), time.perf_counter()
    while engine.stats().num_running == active:
        engine.step()
    seconds, after = time.perf_counter() - started, engine.stats()
    while engine.has_work:
        engine.step()
    count = after.num_steps - before.num_steps
    return HostTiming(
        active=active,
        steps=count,
        step_ms=1e3 * seconds / count,
        host_ms=1e3 * (after.host_s - before.host_s) / count,
        dispatch_ms=1e3 * (after.dispatch_s - before.dispatch_s) / count,
        output_tokens_per_s=(after.num_output_tokens - before.num_output_tokens) / seconds,
    )


def tables(report: Report) -> tuple[Table, Table]:
    """For people: the steps by themselves, and those of an engine at work."""
    title = f"{report.model}, {report.variant}; reads {report.read_gb_per_s:.1f} GB/s"
    steps = Table(
        "rows", "context", "step ms", "min", "floor ms", "of floor", "tokens/s", title=title
    )
    for one in report.steps:
        steps.add_row(
            str(one.active),
            str(one.context),
            f"{one.median_ms:.1f}",
            f"{one.min_ms:.1f}",
            f"{one.floor_ms:.1f}",
            f"{one.floor_ms / one.median_ms:.0%}",
            f"{one.tokens_per_s:.0f}",
        )
    names = ("rows", "steps", "step ms", "host ms", "dispatch ms", "tokens/s")
    host = Table(*names, title="the engine's own steps")
    for one in report.host:
        host.add_row(
            str(one.active),
            str(one.steps),
            f"{one.step_ms:.1f}",
            f"{one.host_ms:.2f}",
            f"{one.dispatch_ms:.2f}",
            f"{one.output_tokens_per_s:.0f}",
        )
    return steps, host
