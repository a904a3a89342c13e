"""Tries the tile sizes of a kernel on this device, beside those of the rule, and keeps the best."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer import cache as paged
from jaxinfer import compile as programs_of
from jaxinfer.bench import kernel_cases
from jaxinfer.bench.hardware.cases import LIMIT
from jaxinfer.bench.hardware.sizes import Load, Turns
from jaxinfer.bench.kernel_cases import Attended
from jaxinfer.bench.probes import seconds
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.errors import ConfigError
from jaxinfer.kernels import paged_attention
from jaxinfer.kernels.paged_attention import Needs, tiles
from jaxinfer.kernels.paged_attention.tiles import Sizes
from jaxinfer.kernels.paged_attention.tuned import Entry

_TURNS = Turns(layers=16, repeats=8)
_WORTH = 0.98  # sizes that save less than this are not worth leaving the rule for
Show = Callable[[str, int, int], None]
Place = Callable[[], AbstractContextManager[Any]]
# What a compiler, or the device, may say to sizes that looked as if they fitted.
_FAILURES = (jax.errors.JaxRuntimeError, NotImplementedError, TypeError, ValueError)


@dataclass(frozen=True)
class Tried:
    """Some sizes: their time over that of the rule's sizes in the same round, load by load."""

    sizes: Sizes
    ratios: tuple[float, ...]
    why_not: str = ""
    """Why they can't be taken: an error, or a result that is off."""

    @property
    def ratio(self) -> float:
        """The geometric mean."""
        return math.exp(sum(map(math.log, self.ratios)) / len(self.ratios))


@dataclass(frozen=True)
class Tuned:
    """What was tried of one kernel, the rule's sizes first, and what came of it."""

    entry: Entry
    tried: tuple[Tried, ...]


class _Run(NamedTuple):
    """One kernel with some sizes, ready."""

    time: Callable[[], float]
    out: np.ndarray


def backend_here(engine: EngineConfig, needs: Needs) -> str:
    """The kernel with tiles that serves the engine; ConfigError where there is none."""
    able, reasons = [], []
    wanted = [engine.attention] if engine.attention in tiles.FIELDS else list(tiles.FIELDS)
    for name in wanted:
        try:
            able.append(paged_attention.choose(name, needs))
        except ConfigError as error:
            reasons.append(str(error).partition(", which ")[2].partition(";")[0])
    if not able:
        said = "; ".join(f"{name} {reason}" for name, reason in zip(wanted, reasons, strict=True))
        raise ConfigError(f"no attention kernel with tiles can serve this engine here: {said}")
    return able[0]


def tune(
    model: ModelConfig,
    engine: EngineConfig,
    needs: Needs,
    *,
    loads: Sequence[Load],
    device: str,
    rounds: int = 7,
    turns: Turns = _TURNS,
    most: int | None = None,
    place: Place,
    progress: Show = lambda stage, done, total: None,
) -> Tuned:
    """Tries every candidate on every load, in turns with the rule's sizes.

    `engine.attention` is a kernel with tiles. Sizes whose results are not the rule's to within
    rounding are left out, and so are those that don't compile; `most` tries only so many.
    """
    name = engine.attention
    found = tiles.candidates(
        name, needs, num_kv_heads=model.num_kv_heads, longest=max(load.context for load in loads)
    )[:most]
    ways: tuple[Sizes, ...] = ((), *found)
    ratios: dict[Sizes, list[float]] = {sizes: [] for sizes in ways}
    why_not: dict[Sizes, str] = {}
    for number, load in enumerate(loads):
        runs: dict[Sizes, _Run] = {}
        fitted = kernel_cases.fitted(engine, load.batch, load.context)
        arguments = kernel_cases.attended(
            model, fitted, load.batch, load.context, queries=load.queries, layers=turns.layers
        )
        for at, sizes in enumerate(ways):
            progress("compile", number * len(ways) + at, len(loads) * len(ways))
            if sizes in why_not:
                continue
            try:
                with place():
                    runs[sizes] = _ready(replace(fitted, attention_tiles=sizes), arguments, turns)
            except _FAILURES as error:
                if not sizes:
                    raise
                why_not[sizes] = f"{type(error).__name__}: {str(error)[:200]}"
                continue
            error = _distance(runs[sizes].out, runs[()].out)
            if not error < LIMIT[needs.dtype]:
                why_not[sizes] = f"its results are {error:.1e} off"
                del runs[sizes]
        for sizes, ratio in _in_turns(runs, rounds).items():
            ratios[sizes].append(ratio)
    tried = tuple(Tried(sizes, tuple(ratios[sizes]), why_not.get(sizes, "")) for sizes in ways)
    return Tuned(_entry(_best(tried), model, engine, needs, device, loads), tried)


def _best(tried: Sequence[Tried]) -> Tried:
    """The fastest; the rule's own where it is as good as that."""
    fit = [one for one in tried if not one.why_not]
    best = min(fit, key=lambda one: one.ratio)
    return best if best.ratio < _WORTH else next(one for one in fit if not one.sizes)


def _entry(
    best: Tried,
    model: ModelConfig,
    engine: EngineConfig,
    needs: Needs,
    device: str,
    loads: Sequence[Load],
) -> Entry:
    group = model.num_heads // model.num_kv_heads
    longest = max(load.context for load in loads)
    rule = {
        "pallas_gpu": lambda: tiles.gpu_tiles(
            longest, model.head_dim, block=needs.block, dtype=needs.dtype
        ),
        "pallas_triton": lambda: tiles.triton_tiles(
            longest, model.head_dim, block=needs.block, dtype=needs.dtype
        ),
        "pallas_tpu": lambda: tiles.tpu_tiles(
            group * longest,
            model.num_kv_heads,
            paged.head_width(model.head_dim, engine),
            block=needs.block,
            dtype=needs.dtype,
        ),
    }
    return Entry(
        backend=engine.attention,
        device=device,
        dtype=needs.dtype,
        head_dim=model.head_dim,
        group=group,
        page_size=needs.page_size,
        sizes=tuple(best.sizes or rule[engine.attention]()),
        ratio=round(best.ratio, 3),
    )


def _ready(engine: EngineConfig, arguments: Attended, turns: Turns) -> _Run:
    """Compiles, and runs once: a first run is slow, and says what comes out."""
    run = kernel_cases.through_layers(engine, turns.repeats)
    program = programs_of.compile_function(run, *arguments)
    return _Run(partial(seconds, program, *arguments), np.asarray(program(*arguments)))


def _in_turns(runs: dict[Sizes, _Run], rounds: int) -> dict[Sizes, float]:
    """The median over rounds of the time over the rule's own, which frames each round."""
    found: dict[Sizes, list[float]] = {sizes: [] for sizes in runs}
    for number in range(rounds):
        before = runs[()].time()
        order = list(runs)[:: -1 if number % 2 else 1]
        times = {sizes: runs[sizes].time() for sizes in order}
        base = (before + runs[()].time()) / 2
        for sizes, taken in times.items():
            found[sizes].append(taken / base)
    ratios = {sizes: median(some) for sizes, some in found.items()}
    return ratios | {(): 1.0}


def _distance(out: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a part of the largest value."""
    return float(np.abs(out - expected).max() / np.abs(expected).max())
