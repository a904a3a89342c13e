"""Attention by others in this process, on the same shapes: cuDNN, XLA, and Pallas over Triton.

Each may be missing, or refuse a shape: then it raises, and whoever asked goes on without it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxinfer import compile as programs_of
from jaxinfer.bench.hardware.sizes import Load, Sizes, Turns
from jaxinfer.bench.kernel_cases import Case, repeated
from jaxinfer.bench.probes import seconds


def dense(name: str, sizes: Sizes, load: Load, turns: Turns) -> Case:
    """`jax.nn.dot_product_attention` over keys that lie end to end: what paging is free of."""
    attend = partial(
        jax.nn.dot_product_attention,
        implementation="cudnn" if name == "cudnn" else "xla",
        is_causal=load.queries == load.context,
    )
    if 1 < load.queries < load.context:
        raise NotImplementedError("a chunk in the middle of a prompt has another mask")
    keys, values = _pool(sizes, load, (load.batch, load.context))
    lengths = jnp.full((load.batch,), load.context, jnp.int32)

    def run(q: Array, pools: Any, lengths: Array) -> Array:
        for k, v in pools:
            more = {} if load.queries > 1 else {"key_value_seq_lengths": lengths}
            q = q + attend(q, k, v, **more)
        return q

    pools = tuple((keys + 0, values + 0) for _ in range(turns.layers))
    return _case(name, sizes, load, turns, run, (_queries(sizes, load), pools, lengths))


def triton_paged(name: str, sizes: Sizes, load: Load, turns: Turns) -> Case:
    """The paged decode that jax ships for Triton; on a CPU in Pallas' interpreter."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    if load.queries > 1:
        raise NotImplementedError("it decodes one token a row")
    count = -(-load.context // load.page_size)
    splits = math.gcd(count, 16)
    heads = sizes.heads.num_kv_heads
    keys, values = _pool(sizes, load, (heads, load.batch * count, load.page_size), heads_last=False)
    table = jnp.arange(load.batch * count, dtype=jnp.int32).reshape(load.batch, count)
    lengths = jnp.full((load.batch,), load.context, jnp.int32)

    def run(q: Array, pools: Any, table: Array, lengths: Array) -> Array:
        for k, v in pools:
            out: Any = paged_attention(
                q,
                k,
                v,
                table,
                lengths,
                k_splits=splits,
                pages_per_compute_block=math.gcd(count // splits, 8),
                interpret=jax.devices()[0].platform == "cpu",
            )
            q = q + out
        return q

    pools = tuple((keys + 0, values + 0) for _ in range(turns.layers))
    arguments = (_queries(sizes, load)[:, 0], pools, table, lengths)
    return _case(name, sizes, load, turns, run, arguments)


def cudnn_paged(name: str, sizes: Sizes, load: Load, turns: Turns) -> Case:
    """cuDNN over pages, by jax's private way to it."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, paged_attention

    if load.queries > 1:
        raise NotImplementedError("timed for decodes only")
    count = -(-load.context // load.page_size)
    keys, values = _pool(sizes, load, (load.batch * count, load.page_size))
    table = jnp.arange(load.batch * count, dtype=jnp.int32).reshape(load.batch, 1, count, 1)
    ones = jnp.ones((load.batch,), jnp.int32)

    def run(q: Array, pools: Any, table: Array, ones: Array) -> Array:
        for k, v in pools:
            out: Any = paged_attention(
                q,
                k,
                v,
                ones,
                ones * load.context,
                table,
                table,
                scale=sizes.heads.head_dim**-0.5,
                mask_type=MaskType.PADDING,
            )
            q = q + out
        return q

    pools = tuple((keys + 0, values + 0) for _ in range(turns.layers))
    return _case(name, sizes, load, turns, run, (_queries(sizes, load), pools, table, ones))


PEERS: dict[str, Callable[[str, Sizes, Load, Turns], Case]] = {
    "cudnn": dense,
    "cudnn paged": cudnn_paged,
    "triton paged": triton_paged,
}


def _queries(sizes: Sizes, load: Load) -> Array:
    shape = (load.batch, load.queries, sizes.heads.num_heads, sizes.heads.head_dim)
    return jax.random.normal(jax.random.key(0), shape, _dtype(sizes))


def _pool(
    sizes: Sizes, load: Load, shape: tuple[int, ...], *, heads_last: bool = True
) -> tuple[Array, Array]:
    """Keys and values; kv heads are the last axis but one, or in `shape` already."""
    heads = (sizes.heads.num_kv_heads,) if heads_last else ()
    one, two = jax.random.split(jax.random.key(1))
    whole = (*shape, *heads, sizes.heads.head_dim)
    return jax.random.normal(one, whole, _dtype(sizes)), jax.random.normal(
        two, whole, _dtype(sizes)
    )


def _dtype(sizes: Sizes) -> jnp.dtype:
    return jnp.dtype(sizes.dtype)


def _case(
    name: str, sizes: Sizes, load: Load, turns: Turns, run: Any, arguments: tuple[Any, ...]
) -> Case:
    program = programs_of.compile_function(repeated(run, turns.repeats), *arguments)
    model, kind = sizes.heads, _dtype(sizes)
    seen = load.context * load.queries - load.queries * (load.queries - 1) // 2
    tokens = load.batch * load.context
    return Case(
        kernel=f"{name} {kind.name}",
        size=f"{load.batch} x {load.context}"
        + (f", {load.queries} queries" if load.queries > 1 else ""),
        run=lambda: seconds(program, *arguments),
        count=turns.layers * turns.repeats,
        floor_bytes=2 * tokens * model.num_kv_heads * model.head_dim * kind.itemsize,
        flops=4 * load.batch * seen * model.num_heads * model.head_dim,
    )
