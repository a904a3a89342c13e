"""Ragged paged attention for TPUs: pages by DMA into VMEM, two blocks of them at a time.

One program of the grid is a row's tile of queries, for several kv heads at once. It reduces the
row's keys in blocks, in order; while one block is computed the pages of the next are on their
way. The page table lies in SMEM and only pages that the row owns are read.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxinfer.dims import Leaf
from jaxinfer.kernels.paged_attention import online, queries
from jaxinfer.kernels.paged_attention.needs import Needs
from jaxinfer.kernels.paged_attention.tiles import TPU_VMEM, TpuTiles, tpu_bytes, tpu_tiles

_DTYPES = ("bfloat16", "float32")  # Mosaic can't load float16 (libtpu 0.0.42)
_SUBLANES = 8  # rows of a vector register
_AHEAD = 2  # blocks of keys in VMEM: one that is computed, one on its way


class _Kind(NamedTuple):
    """What is the same for every row of a call."""

    group: int
    page_size: int
    block: int
    tiles: TpuTiles
    window: int
    soft_cap: float
    load: Callable[[Array], Array]


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Leaf,
    v_pages: Leaf,
    page_table: Int[Array, "B M"],
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    *,
    block: int,
    window: int = 0,
    soft_cap: float = 0.0,
    load: Callable[[Array], Array] = lambda stored: stored,
    exact: bool = True,
    tiles: tuple[int, ...] = (),
) -> Float[Array, "B T N H"]:
    """See reference.paged_attention; pages may be wider than heads, with zeros at the end.

    `exact` changes nothing here: rows never share a sum.
    """
    del exact
    batch, num_queries, num_heads, head_dim = q.shape
    num_kv_heads, _, page_size, width = k_pages.shape
    group = num_heads // num_kv_heads
    dtype = jax.eval_shape(load, jax.ShapeDtypeStruct((8, 128), k_pages.dtype)).dtype
    sizes = tpu_tiles(
        num_queries * group, num_kv_heads, width, block=block, dtype=dtype, chosen=tiles
    )
    q_BKRH = queries.grouped(q, num_kv_heads, tile=sizes.rows).astype(dtype)
    q_BKRH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, 0), (0, width - head_dim)))
    kind = _Kind(group, page_size, block, sizes, window, soft_cap, load)
    of_tile = pl.BlockSpec((1, *sizes, width), lambda row, heads, tile, *_: (row, heads, tile, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    buffer = pltpu.VMEM((_AHEAD, sizes.heads, block, width), k_pages.dtype)
    out_BKRH = pl.pallas_call(
        functools.partial(_kernel, kind=kind),
        out_shape=jax.ShapeDtypeStruct(q_BKRH.shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, num_kv_heads // sizes.heads, q_BKRH.shape[2] // sizes.rows),
            in_specs=[of_tile, anywhere, anywhere],
            out_specs=of_tile,
            scratch_shapes=[
                buffer,
                buffer,
                pltpu.VMEM((*sizes, 1), jnp.int32),
                pltpu.VMEM((*sizes, 1), jnp.float32),
                pltpu.VMEM((*sizes, width), jnp.float32),
                pltpu.SemaphoreType.DMA((_AHEAD, 2)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 3),
        name="paged_attention",
    )(page_table.reshape(-1), starts, lengths, q_BKRH, k_pages, v_pages)
    out_BKRH = out_BKRH[..., :head_dim]
    return queries.ungrouped(out_BKRH, lengths, num_queries=num_queries, group=group)


def refusal(needs: Needs) -> str:
    """Why this kernel can't serve an engine; "" where it can."""
    if needs.platform != "tpu":
        return f"needs a TPU, and this is a {needs.platform}"
    if needs.dtype not in _DTYPES:
        return f"reads pages of {' or '.join(_DTYPES)}, not of {needs.dtype}"
    if needs.page_size % _SUBLANES:
        return f"copies pages of a multiple of {_SUBLANES} tokens, not of {needs.page_size}"
    least = TpuTiles(heads=1, rows=4 * _SUBLANES // jnp.dtype(needs.dtype).itemsize)
    if tpu_bytes(least, needs.head_dim, block=needs.block, dtype=needs.dtype) > TPU_VMEM:
        return (
            f"can't hold engine.attention_block = {needs.block} keys of {needs.head_dim} "
            f"{needs.dtype} in {TPU_VMEM} bytes of VMEM"
        )
    return ""


def _kernel(
    table: Any,  # i32 [B * M] in SMEM
    starts: Any,
    lengths: Any,
    q: Any,  # [1, K, R, H]
    k_pages: Any,  # [K, P, C, H], not in VMEM
    v_pages: Any,
    out: Any,  # f32 [1, K, R, H]
    k_blocks: Any,  # [2, K, S, H]
    v_blocks: Any,
    top: Any,  # i32 [K, R, 1]
    total: Any,  # f32 [K, R, 1]
    sums: Any,  # f32 [K, R, H]
    arrived: Any,
    *,
    kind: _Kind,
) -> None:
    row, first_row = pl.program_id(0), pl.program_id(2) * kind.tiles.rows
    heads = pl.ds(pl.program_id(1) * kind.tiles.heads, kind.tiles.heads)
    start, length = starts[row], lengths[row]
    num_pages = table.shape[0] // starts.shape[0]
    end = jnp.where(length > 0, start + length, 0)  # first position that the row does not own
    last_seen = start + lax.div(first_row + kind.tiles.rows - 1, kind.group)
    end_block = lax.div(jnp.minimum(end, last_seen + 1) + kind.block - 1, kind.block)
    first_block = jnp.int32(0)
    if kind.window:
        first_seen = start + lax.div(first_row, kind.group) - kind.window + 1
        first_block = lax.div(jnp.maximum(first_seen, 0), kind.block)

    def each_page(index: Array, act: Callable[[Any], None]) -> None:
        """Acts on the copies of a block's pages; pages that the row does not own have none."""
        slot = lax.rem(index, _AHEAD)
        for part in range(kind.block // kind.page_size):
            position = index * kind.block + part * kind.page_size

            @pl.when(position < end)
            def _(position: Array = position, part: int = part) -> None:
                page = table[row * num_pages + lax.div(position, kind.page_size)]
                place = pl.ds(part * kind.page_size, kind.page_size)
                ways = (k_pages, k_blocks), (v_pages, v_blocks)
                for which, (pages, blocks) in enumerate(ways):
                    source, target = pages.at[heads, page], blocks.at[slot, :, place]
                    act(pltpu.make_async_copy(source, target, arrived.at[slot, which]))

    top[...] = jnp.full(top.shape, online.NOTHING, jnp.int32)
    total[...] = jnp.zeros(total.shape, jnp.float32)
    sums[...] = jnp.zeros(sums.shape, jnp.float32)
    pl.when(first_block < end_block)(lambda: each_page(first_block, lambda copy: copy.start()))

    def one_block(index: Array, _: None) -> None:
        @pl.when(index + 1 < end_block)
        def _() -> None:
            each_page(index + 1, lambda copy: copy.start())

        each_page(index, lambda copy: copy.wait())
        slot = lax.rem(index, _AHEAD)
        _reduce(
            q[0],
            kind.load(k_blocks[slot]),
            kind.load(v_blocks[slot]),
            (top, total, sums),
            visible=_visible(first_row, index * kind.block, start, end, kind),
            is_owned=_positions((1, kind.block, 1), 1, index * kind.block) < end,
            soft_cap=kind.soft_cap,
        )

    lax.fori_loop(first_block, end_block, one_block, None)
    out[0] = online.finished(total[...], sums[...])


def _positions(shape: tuple[int, ...], axis: int, first: Array) -> Array:
    return first + lax.broadcasted_iota(jnp.int32, shape, axis)


def _visible(first_row: Array, first_key: Array, start: Array, end: Array, kind: _Kind) -> Array:
    """Which keys of a block each query of a tile sees: [1, R, S]."""
    shape = (1, kind.tiles.rows, kind.block)
    last = start + lax.div(_positions(shape, 1, first_row), kind.group)
    key = _positions(shape, 2, first_key)
    seen = (key <= last) & (key < end)
    return seen & (key > last - kind.window) if kind.window else seen


def _reduce(
    q_KRH: Array,
    k_KSH: Array,
    v_KSH: Array,
    softmax: tuple[Any, Any, Any],
    *,
    visible: Array,
    is_owned: Array,
    soft_cap: float,
) -> None:
    """Takes one more block of keys into an unfinished softmax."""
    top, total, sums = softmax
    precision = lax.Precision.HIGHEST if v_KSH.dtype == jnp.float32 else None
    dot = functools.partial(
        lax.dot_general, precision=precision, preferred_element_type=jnp.float32
    )
    logits = dot(q_KRH, k_KSH, (((2,), (2,)), ((0,), (0,))))
    logits = jnp.where(visible, online.capped(logits, soft_cap), -jnp.inf)
    old = top[...]
    new = online.new_top(old, jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp2(logits - online.base(new))
    v_KSH = jnp.where(is_owned, v_KSH, jnp.zeros((), v_KSH.dtype))
    faded = online.fade(old, new)
    top[...] = new
    total[...] = total[...] * faded + jnp.sum(weights, axis=-1, keepdims=True)
    product = dot(weights.astype(v_KSH.dtype), v_KSH, (((2,), (1,)), ((0,), (0,))))
    sums[...] = sums[...] * faded + product
