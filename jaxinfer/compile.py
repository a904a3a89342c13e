"""The only place that jits: the set of programs, donation, memory, and the count of compiles."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.monitoring
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxinfer import cache as paged
from jaxinfer import models, step
from jaxinfer.cache import Cache
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.fingerprint import program_key, settle
from jaxinfer.inputs import Scores, StepOutput, packed_width, unpack
from jaxinfer.parallel import gather
from jaxinfer.sharding import Layout, layout_of
from jaxinfer.spec import ArraySpec, abstract
from jaxinfer.store import Devices, Key, ProgramCost, Shape, Store, StoreAhead, Trees, digest

Progress = Callable[[str, int, int], None]
"""Told (stage, done, total) as long work goes on."""

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"
_compile_seconds: list[float] = []
log = logging.getLogger(__name__)


ALLOCATE = Shape("allocate", 0, 0)  # makes an empty cache; at the start, and after a failed step
READ_PAGES = Shape("pages", 0, 0)  # the bits of some pages; for the self-test
PAGES_READ = 16  # at a time


@dataclass(frozen=True, kw_only=True)
class Program(ProgramCost):
    """One compiled program and what it costs."""

    run: Callable[..., Any]
    """A step: (params, cache, packed batch) -> (cache, output); the cache is donated."""
    text: Callable[[], str | None]
    """The optimised HLO."""
    load_s: float = 0.0
    """What it took to read it from the store; 0 where it was compiled just now."""

    @property
    def seconds(self) -> float:
        """What this start has spent on it."""
        return self.load_s or self.trace_s + self.compile_s


Programs = dict[Shape, Program]


def _silent(stage: str, done: int, total: int) -> None:
    """Shows no progress."""


class _Recipe(NamedTuple):
    """A program before it is one."""

    shape: Shape
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...]
    trees: Trees
    key: Key
    devices: Devices


class _ThisThread(threading.local):
    """What was compiled on this thread so far."""

    count = 0
    num_cache_hits = 0  # of count, what came from jax's own cache
    last = ""


_this_thread = _ThisThread()


def shapes(engine: EngineConfig) -> tuple[Shape, ...]:
    """Every step that serving with this config can run."""
    smallest, *larger = engine.prefill_chunks
    several = (Shape("prefill", rows, smallest) for rows in engine.prefill_row_counts)
    prefills = (Shape("prefill", 1, tokens) for tokens in larger)
    decodes = (Shape("decode", rows, 1) for rows in engine.row_counts)
    return (*several, *prefills, *decodes)


def build(
    params: Any,
    model: ModelConfig,
    engine: EngineConfig,
    *,
    wanted: Sequence[Shape] | None = None,
    store: Store | None = None,
    progress: Progress = _silent,
) -> Programs:
    """Loads every step from the store, or compiles and keeps it; nothing compiles afterwards."""
    arguments, layout = jax.tree.map(_abstract_leaf, params), _layout(params, model)
    recipes = [
        _step_recipe(shape, arguments, model, engine, layout)
        for shape in (shapes(engine) if wanted is None else wanted)
    ]
    return _obtain(recipes, store, progress)


def build_allocate(
    params: Any, model: ModelConfig, engine: EngineConfig, *, store: Store | None = None
) -> Program:
    """The program that makes an empty cache: run() -> Cache."""
    recipe = _allocate_recipe(model, engine, _layout(params, model))
    return _obtain([recipe], store, _silent)[ALLOCATE]


def score_shape(engine: EngineConfig) -> Shape:
    """The program that scores prompts; it runs on pages of its own: EngineConfig.scoring."""
    return Shape("score", 1, engine.score_chunk)


def build_read_pages(
    params: Any, model: ModelConfig, engine: EngineConfig, *, store: Store | None = None
) -> Program:
    """The program that reads PAGES_READ pages: run(cache, ids) -> bits [pages, 2L, K, C, H]."""
    recipe = _read_pages_recipe(model, engine, _layout(params, model))
    return _obtain([recipe], store, _silent)[READ_PAGES]


def rebuild(
    shape: Shape,
    params: Any,
    model: ModelConfig,
    engine: EngineConfig,
    *,
    store: Store | None = None,
) -> Program:
    """Compiles one program of a config whatever the store holds, and puts it there instead."""
    layout = _layout(params, model)
    if shape == ALLOCATE:
        recipe = _allocate_recipe(model, engine, layout)
    elif shape == READ_PAGES:
        recipe = _read_pages_recipe(model, engine, layout)
    else:
        arguments = jax.tree.map(_abstract_leaf, params)
        recipe = _step_recipe(shape, arguments, model, engine, layout)
    started = time.monotonic()
    lowered = _lower(recipe)
    return _compile(recipe, lowered, time.monotonic() - started, store)


def load_ahead(
    model: ModelConfig, engine: EngineConfig, store: Store, params: Any = None
) -> StoreAhead:
    """Begins to load every program that is stored, so that weights can be read meanwhile.

    They are those for abstract `params`; without, for the model's own on the first device.
    """
    pool = ThreadPoolExecutor(max_workers=max(1, min(8, (os.cpu_count() or 1) - 1)))
    under_way = {
        digest(one.key): pool.submit(store.load, one.shape.name, one.key, one.trees, one.devices)
        for one in _every_recipe(model, engine, params)
    }
    pool.shutdown(wait=False)
    return StoreAhead(store.folder, store.agree, under_way)


def stored_costs(
    model: ModelConfig, engine: EngineConfig, store: Store, params: Any = None
) -> Mapping[Shape, ProgramCost]:
    """What the stored programs of a config take, without weights, tracing or loading.

    They are those that `load_ahead` looks for; what isn't stored is left out.
    """
    found = {
        recipe.shape: store.cost(recipe.shape.name, recipe.key)
        for recipe in _every_recipe(model, engine, params)
        if recipe.shape != READ_PAGES
    }
    return {shape: cost for shape, cost in found.items() if cost is not None}


def compile_function(
    function: Callable[..., Any], *examples: Any, donated: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Compiles a function of arrays for arguments like these."""
    arguments = jax.tree.map(_abstract_leaf, examples)
    return jax.jit(function, donate_argnums=donated).lower(*arguments).compile()


def num_compiles() -> int:
    """Programs that XLA compiled, or fetched from its cache, in this process so far."""
    return len(_compile_seconds)


def num_compiles_here() -> int:
    """The same, counting only what this thread asked for."""
    return _this_thread.count


def last_compiled_here() -> str:
    """The name of the function that this thread had compiled last."""
    return _this_thread.last


def use_compilation_cache(folder: Path) -> None:
    """Has jax keep what XLA compiles: the other way to start sooner, to compare the store with.

    It still traces, and what comes out of it can't go into a store.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _every_recipe(model: ModelConfig, engine: EngineConfig, params: Any = None) -> list[_Recipe]:
    """All that an engine builds, without weights."""
    if params is None:
        params = abstract(models.spec_of(model), engine.compute_dtype)
    arguments, layout = params, _layout(params, model)
    recipes = [_step_recipe(shape, arguments, model, engine, layout) for shape in shapes(engine)]
    recipes.append(_allocate_recipe(model, engine, layout))
    if engine.bits == "exact":
        recipes.append(_read_pages_recipe(model, engine, layout))
    if engine.score_chunk:
        shape = score_shape(engine)
        recipes.append(_step_recipe(shape, arguments, model, engine.scoring, layout))
        recipes.append(_allocate_recipe(model, engine.scoring, layout))
    return recipes


def _step_recipe(
    shape: Shape, params: Any, model: ModelConfig, engine: EngineConfig, layout: Layout
) -> _Recipe:
    engine = settle(model, engine, layout.devices).engine
    function = {"prefill": step.prefill, "decode": step.decode, "score": step.score_targets}
    width = packed_width(shape.tokens, engine.pages_per_seq)
    num_targets = shape.tokens if shape.phase == "score" else 0
    known = {"model": layout.local(model), "engine": engine, "split": layout.split}

    def packed_step(params: Any, cache: Cache, packed: Any) -> tuple[Cache, StepOutput | Scores]:
        batch = unpack(packed[:, :width], tokens=shape.tokens)
        targets = (packed[:, width:],) if num_targets else ()
        return function[shape.phase](params, cache, batch, *targets, **known)

    pages = paged.spec(model, engine)
    arguments = (
        params,
        layout.abstract(pages, engine.compute_dtype),
        _whole_numbers(layout, shape.rows, width + num_targets),
    )
    output = Scores(0, 0) if num_targets else StepOutput(0, 0)
    results = (layout.partitions(pages), jax.tree.map(lambda _: PartitionSpec(), output))
    return _recipe(shape, packed_step, arguments, results, model, engine, layout, donated=(1,))


def _allocate_recipe(model: ModelConfig, engine: EngineConfig, layout: Layout) -> _Recipe:
    def allocate() -> Cache:
        return paged.make(layout.local(model), engine)

    results = layout.partitions(paged.spec(model, engine))
    return _recipe(ALLOCATE, allocate, (), results, model, engine, layout)


def _read_pages_recipe(model: ModelConfig, engine: EngineConfig, layout: Layout) -> _Recipe:
    def read(cache: Cache, ids: Any) -> Any:
        return gather(paged.read_bits(cache, ids), layout.split.heads, dimension=2)

    cache = layout.abstract(paged.spec(model, engine), engine.compute_dtype)
    arguments = (cache, _whole_numbers(layout, PAGES_READ))
    return _recipe(READ_PAGES, read, arguments, PartitionSpec(), model, engine, layout)


def _recipe(
    shape: Shape,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    results: Any,
    model: ModelConfig,
    engine: EngineConfig,
    layout: Layout,
    *,
    donated: tuple[int, ...] = (),
) -> _Recipe:
    """A program of one device's function; `results` says where what it returns lies."""
    key = program_key(
        shape.name, model, engine, arguments=arguments, devices=layout.devices, mesh=layout.name
    )
    trees = Trees(jax.tree.structure((arguments, {})), jax.tree.structure(results))
    whole = layout.over_devices(function, arguments, results)
    return _Recipe(shape, whole, arguments, donated, trees, key, layout.devices)


def _whole_numbers(layout: Layout, *shape: int) -> jax.ShapeDtypeStruct:
    return layout.abstract(ArraySpec(shape, (None,) * len(shape), dtype=jnp.int32), jnp.int32)


def _obtain(recipes: Iterable[_Recipe], store: Store | None, progress: Progress) -> Programs:
    """Loads what is stored; traces one program while others compile.

    Tracing holds Python's lock; loading and compiling do not.
    """
    recipes = tuple(recipes)
    with ThreadPoolExecutor(max_workers=max(2, min(8, os.cpu_count() or 1))) as pool:
        found: dict[Shape, Program | None] = dict.fromkeys(recipe.shape for recipe in recipes)
        if store is not None:
            for recipe, program in zip(recipes, pool.map(_load_from(store), recipes), strict=True):
                found[recipe.shape] = program
                progress("programs", sum(map(bool, found.values())), len(recipes))
        missing = [recipe for recipe in recipes if found[recipe.shape] is None]
        pending = []
        for recipe in missing:
            started = time.monotonic()
            lowered = _lower(recipe)
            traced = time.monotonic() - started
            pending.append((recipe.shape, pool.submit(_compile, recipe, lowered, traced, store)))
        for done, (shape, future) in enumerate(pending, start=1):
            found[shape] = future.result()
            progress("compile", done, len(missing))
    if store is not None and missing:
        store.prune()
    return {shape: program for shape, program in found.items() if program is not None}


def _load_from(store: Store) -> Callable[[_Recipe], Program | None]:
    def load(recipe: _Recipe) -> Program | None:
        loaded = store.load(recipe.shape.name, recipe.key, recipe.trees, recipe.devices)
        if loaded is None:
            return None
        run, cost, seconds = loaded
        return Program(**vars(cost), run=run, text=run.as_text, load_s=seconds)

    return load


def _lower(recipe: _Recipe) -> jax.stages.Lowered:
    recipe.function.__name__ = recipe.shape.name.replace("-", "_")
    with jax.default_device(recipe.devices[0]):  # of what takes no array that lies somewhere
        return jax.jit(recipe.function, donate_argnums=recipe.donated).lower(*recipe.arguments)


def _compile(
    recipe: _Recipe, lowered: jax.stages.Lowered, trace_s: float, store: Store | None
) -> Program:
    started, num_hits = time.monotonic(), _this_thread.num_cache_hits
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    assert memory is not None, "every backend of jax counts memory"
    cost = ProgramCost(
        **recipe.shape._asdict(),
        key=digest(recipe.key),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        trace_s=trace_s,
        compile_s=time.monotonic() - started,
    )
    if store is not None and _this_thread.num_cache_hits == num_hits:
        store.save(recipe.key, compiled, cost)
    elif store is not None:
        # XLA:CPU writes such a program without its code: it loads, and fails when it runs.
        log.info("%s came from jax's own cache, so it is not stored", recipe.shape.name)
    return Program(**vars(cost), run=compiled, text=compiled.as_text)


def _layout(params: Any, model: ModelConfig) -> Layout:
    return layout_of(models.spec_of(model), params).on_devices()


def _abstract_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _count_compile(event: str, duration_secs: float, **details: Any) -> None:
    if event == _COMPILE_EVENT:
        _compile_seconds.append(duration_secs)
        _this_thread.count += 1
        _this_thread.last = str(details.get("fun_name", "a function"))


def _count_cache_hit(event: str, **_: Any) -> None:
    if event == _CACHE_HIT_EVENT:
        _this_thread.num_cache_hits += 1


jax.monitoring.register_event_duration_secs_listener(_count_compile)
jax.monitoring.register_event_listener(_count_cache_hit)
