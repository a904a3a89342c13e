"""Attention and matrix products as cases that can be timed beside each other, round by round."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxinfer import cache as paged
from jaxinfer import compile as programs_of
from jaxinfer.bench.probes import Probes, seconds
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.kernels import paged_attention
from jaxinfer.kernels.products import PALLAS_GPU, XLA
from jaxinfer.nn.linear import project
from jaxinfer.quant import QTensor
from jaxinfer.quant.leaf import block_of
from jaxinfer.spec import abstract

COLD_BYTES = 96 * 2**20  # weights that are read in turn, so that no cache keeps them
LAYERS = 8  # page pools that attention reads in turn
_ITEMSIZE = {"f32": 4, "bf16": 2, "int8": 1, "int8 pallas_gpu": 1}
_PRODUCTS = {"int8": XLA, "int8 pallas_gpu": PALLAS_GPU}  # who multiplies int8 weights
Show = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Timing:
    """One kernel at one size; medians over the rounds."""

    kernel: str
    size: str
    us: float
    floor_bytes: int
    """What it must read: weights, or keys and values of the true lengths."""
    flops: int
    share: float
    """Bytes a second over those of the copy of the same round."""

    @property
    def gflops(self) -> float:
        """Billions of floating point operations a second."""
        return self.flops / self.us / 1e3


@dataclass(frozen=True)
class Case:
    """A kernel, ready to be timed; one call runs it `count` times."""

    kernel: str
    size: str
    run: Callable[[], float]
    count: int
    floor_bytes: int
    flops: int


class Rounds(NamedTuple):
    """Seconds of each case in each round, and what memory moved in the same rounds."""

    times: tuple[tuple[float, ...], ...]
    copies: tuple[float, ...]
    reads: tuple[float, ...]


def in_rounds(
    cases: Sequence[Case],
    probes: Probes,
    rounds: int,
    *,
    progress: Show = lambda stage, done, total: None,
    is_late: Callable[[], bool] = lambda: False,
) -> Rounds:
    """Every case once a round, there and back again, with the probes at its start.

    Ends after the first round that `is_late` finds to be the last.
    """
    copies, reads = [], []
    times: list[list[float]] = [[] for _ in cases]
    for number in range(rounds):
        copies.append(probes.copy_bytes_per_s())
        reads.append(probes.read_bytes_per_s())
        for place in range(len(cases))[:: 1 if number % 2 else -1]:
            times[place].append(cases[place].run() / cases[place].count)
        progress("measure", number + 1, rounds)
        if is_late():
            break
    return Rounds(tuple(map(tuple, times)), tuple(copies), tuple(reads))


def timing(case: Case, times: Sequence[float], copies: Sequence[float]) -> Timing:
    """What the rounds of one case come to."""
    shares = [case.floor_bytes / taken / copy for taken, copy in zip(times, copies, strict=True)]
    return Timing(
        kernel=case.kernel,
        size=case.size,
        us=1e6 * median(times),
        floor_bytes=case.floor_bytes,
        flops=case.flops,
        share=median(shares),
    )


class Attended(NamedTuple):
    """The arguments of attention over several layers' pools in turn."""

    q: Array  # [B, T, N, H]
    pools: tuple[tuple[Any, Any], ...]
    table: Array
    starts: Array
    lengths: Array


def attention(
    model: ModelConfig,
    engine: EngineConfig,
    batch: int,
    context: int,
    *,
    queries: int = 1,
    layers: int = LAYERS,
    repeats: int = 1,
) -> Case:
    """The last `queries` of `batch` rows over `context` tokens each, a pool after another.

    All pools in turn `repeats` times: what it takes to start a program should not show.
    """
    engine = fitted(engine, batch, context)
    arguments = attended(model, engine, batch, context, queries=queries, layers=layers)
    program = programs_of.compile_function(through_layers(engine, repeats), *arguments)
    seen = context * queries - queries * (queries - 1) // 2  # pairs of query and key, one head
    return Case(
        kernel=f"{engine.attention} {paged.kept_dtype(engine)}",
        size=f"{batch} x {context}" + (f", {queries} queries" if queries > 1 else ""),
        run=lambda: seconds(program, *arguments),
        count=layers * repeats,
        floor_bytes=batch * context * paged.bytes_per_token(model, engine) // model.num_layers,
        flops=4 * batch * seen * model.num_heads * model.head_dim,
    )


def fitted(engine: EngineConfig, batch: int, context: int) -> EngineConfig:
    """The config with the pages of so many rows."""
    size, block = engine.cache.page_size, engine.attention_block
    per_row = -(-context // block) * (block // size)
    pages = replace(engine.cache, num_pages=batch * per_row)
    return replace(engine, max_seq_len=per_row * size, cache=pages)


def attended(
    model: ModelConfig,
    engine: EngineConfig,
    batch: int,
    context: int,
    *,
    queries: int = 1,
    layers: int = LAYERS,
) -> Attended:
    """Random values, made on the device, in a config that is fitted; pages lie in any order."""
    keys = jax.random.split(jax.random.key(0), 3)
    size = (model.num_kv_heads, engine.num_pages + 1, engine.cache.page_size, model.head_dim)
    values = jax.random.normal(keys[0], size, jnp.float32)
    stored = paged.pool_of(values, abstract(paged.spec(model, engine).k[0], engine.compute_dtype))
    q = jax.random.normal(keys[1], (batch, queries, model.num_heads, model.head_dim), jnp.float32)
    table = jax.random.permutation(keys[2], engine.num_pages).astype(jnp.int32)
    return Attended(
        q=q,
        pools=tuple((_copied(stored), _copied(stored)) for _ in range(layers)),
        table=table.reshape(batch, -1),
        starts=jnp.full((batch,), context - queries, jnp.int32),
        lengths=jnp.full((batch,), queries, jnp.int32),
    )


def _copied(pool: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf + 0, pool)


def through_layers(engine: EngineConfig, repeats: int = 1) -> Callable[..., Array]:
    """Attention layer by layer: the result of one is part of the next one's query."""
    attend, load = paged_attention.backend(engine.attention), paged.reader(engine)
    settings: dict[str, Any] = {
        "block": engine.attention_block,
        "exact": engine.bits == "exact",
        "tiles": engine.attention_tiles,
    }

    def run(q: Array, pools: Any, table: Array, starts: Array, lengths: Array) -> Array:
        for keys, values in pools:
            q = q + attend(q, keys, values, table, starts, lengths, load=load, **settings)
        return q

    return repeated(run, repeats)


def repeated(run: Callable[..., Array], repeats: int) -> Callable[..., Array]:
    """The function again and again in one program, its result as its first argument."""
    if repeats == 1:
        return run
    return lambda first, *rest: lax.fori_loop(0, repeats, lambda _, x: run(x, *rest), first)


def matmul(
    precision: str,
    rows: int,
    outer: int,
    inner: int,
    *,
    cold_bytes: int | None = None,
    repeats: int = 1,
) -> Case:
    """Rows times several weights in turn, so many that none is still in a cache."""
    size = outer * inner * _ITEMSIZE[precision]
    count = max(2, math.ceil((cold_bytes or COLD_BYTES) / size))
    *keys, last = jax.random.split(jax.random.key(0), count + 1)
    weights = tuple(_weight(precision, key, outer, inner) for key in keys)
    x = jax.random.normal(last, (rows, inner), jnp.float32)

    total = jnp.zeros((rows, 1), jnp.float32)

    def run(total: Array, x: Array, weights: Any) -> Array:
        for weight in weights:  # one after another, as layers are
            out = project(x + total * 0, weight)
            total = jnp.max(out, axis=-1, keepdims=True)
        return total

    program = programs_of.compile_function(repeated(run, repeats), total, x, weights)
    return Case(
        kernel=f"matmul {precision}",
        size=f"{rows} x {inner} x {outer}",
        run=lambda: seconds(program, total, x, weights),
        count=count * repeats,
        floor_bytes=size,
        flops=2 * rows * outer * inner,
    )


def _weight(precision: str, key: Array, outer: int, inner: int) -> Any:
    if precision in _PRODUCTS:
        return QTensor(
            codes=jax.random.randint(key, (outer, inner), -127, 128, jnp.int8),
            scale=jnp.full((outer,), 0.01, jnp.float32),
            digits=1,
            block=block_of(inner),
            product=_PRODUCTS[precision],
        )
    dtype = {"f32": jnp.float32, "bf16": jnp.bfloat16}[precision]
    return jax.random.normal(key, (outer, inner), dtype)
