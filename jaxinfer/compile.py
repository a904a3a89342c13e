"""The only place that jits: the set of programs, donation, memory, and the count of compiles."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.monitoring
import jax.numpy as jnp

from jaxinfer import cache as paged
from jaxinfer import step
from jaxinfer.cache import Cache
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.inputs import StepOutput, packed_width, unpack
from jaxinfer.spec import abstract

Progress = Callable[[str, int, int], None]
"""Told (stage, done, total) as long work goes on."""

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_compile_seconds: list[float] = []


class Shape(NamedTuple):
    """What sets one program of a phase apart from another."""

    phase: str  # "prefill" or "decode"
    rows: int
    tokens: int

    @property
    def name(self) -> str:
        """How the program is called in tables: decode-8x1."""
        return f"{self.phase}-{self.rows}x{self.tokens}"


@dataclass(frozen=True)
class Program:
    """One compiled step and what it costs."""

    shape: Shape
    run: Callable[[Any, Cache, Any], tuple[Cache, StepOutput]]
    """(params, cache, packed batch); the cache is donated."""
    seconds: float
    argument_bytes: int
    alias_bytes: int
    temp_bytes: int
    text: Callable[[], str]
    """The optimised HLO."""


Programs = dict[Shape, Program]


def shapes(engine: EngineConfig) -> tuple[Shape, ...]:
    """Every program that serving with this config can run."""
    prefills = (Shape("prefill", 1, tokens) for tokens in engine.prefill_chunks)
    decodes = (Shape("decode", rows, 1) for rows in engine.row_counts)
    return (*prefills, *decodes)


def build(
    params: Any,
    model: ModelConfig,
    engine: EngineConfig,
    *,
    wanted: Sequence[Shape] | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Programs:
    """Compiles every program; nothing compiles afterwards.

    Tracing holds Python's lock and compiling does not, so one shape is traced while others compile.
    """
    wanted = shapes(engine) if wanted is None else wanted
    abstract_params = jax.tree.map(_abstract_leaf, params)
    pending: list[Future[Program]] = []
    with ThreadPoolExecutor(max_workers=2) as pool:
        for shape in wanted:
            started = time.monotonic()
            lowered = _lower(shape, abstract_params, model, engine)
            pending.append(pool.submit(_finish, shape, lowered, started))
        programs: Programs = {}
        for shape, future in zip(wanted, pending, strict=True):
            programs[shape] = future.result()
            progress("compile", len(programs), len(wanted))
    return programs


def compile_function(function: Callable[..., Any], *examples: Any) -> Callable[..., Any]:
    """Compiles a function of arrays for arguments like these, nothing donated."""
    return jax.jit(function).lower(*map(_abstract_leaf, examples)).compile()


def num_compiles() -> int:
    """Programs that XLA compiled, or fetched from its cache, in this process so far."""
    return len(_compile_seconds)


def make_cache(model: ModelConfig, engine: EngineConfig) -> Cache:
    """An empty cache, allocated by one small program an array kind."""
    return paged.make(model, engine)


def use_compilation_cache(folder: Path) -> None:
    """Keeps compiled programs on disk, so that the next start only reads them."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _lower(shape: Shape, params: Any, model: ModelConfig, engine: EngineConfig) -> Any:
    function = {"prefill": step.prefill, "decode": step.decode}[shape.phase]

    def packed_step(params: Any, cache: Cache, packed: Any) -> tuple[Cache, StepOutput]:
        batch = unpack(packed, tokens=shape.tokens)
        return function(params, cache, batch, model=model, engine=engine)

    packed_step.__name__ = shape.name.replace("-", "_")
    cache = abstract(paged.spec(model, engine), engine.compute_dtype)
    width = packed_width(shape.tokens, engine.pages_per_seq)
    packed = jax.ShapeDtypeStruct((shape.rows, width), jnp.int32)
    return jax.jit(packed_step, donate_argnums=1).lower(params, cache, packed)


def _finish(shape: Shape, lowered: Any, started: float) -> Program:
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return Program(
        shape=shape,
        run=compiled,
        seconds=time.monotonic() - started,
        argument_bytes=memory.argument_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        text=compiled.as_text,
    )


def _abstract_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _count_compile(event: str, seconds: float, **_: Any) -> None:
    if event == _COMPILE_EVENT:
        _compile_seconds.append(seconds)


jax.monitoring.register_event_duration_secs_listener(_count_compile)
