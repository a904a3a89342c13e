"""Ragged paged attention for TPUs: pages by DMA into VMEM, two blocks of them at a time.

One program of the grid is a row's tile of queries, for several kv heads at once. It reduces the
row's keys in blocks, in order; while one block is computed the pages of the next are on their
way. The page table lies in SMEM and only pages that the row owns are read. Codes of int8 pages are
multiplied as they are; their scales are factors of logits and of weights.
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
from jaxinfer.kernels.paged_attention.rounded import Rounded, values_dtype
from jaxinfer.kernels.paged_attention.tiles import TPU_VMEM, TpuTiles, tpu_bytes, tpu_tiles

_DTYPES = ("bfloat16", "float32", "int8")  # Mosaic can't load float16 (libtpu 0.0.42)
_SUBLANES = 8  # rows of a vector register
_LANES = 128
_AHEAD = 2  # blocks of keys in VMEM: one that is computed, one on its way


class _Kind(NamedTuple):
    """What is the same for every row of a call."""

    group: int
    page_size: int
    block: int
    tiles: TpuTiles
    window: int
    soft_cap: float
    load: Callable[..., Array]


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
    load: Callable[..., Array] = lambda stored: stored,
    exact: bool = True,
    tiles: tuple[int, ...] = (),
) -> Float[Array, "B T N H"]:
    """See reference.paged_attention; pages may be wider than heads, with zeros at the end.

    `exact` changes nothing here: rows never share a sum.
    """
    del exact
    batch, num_queries, num_heads, head_dim = q.shape
    stored = k_pages.codes if isinstance(k_pages, Rounded) else k_pages
    num_kv_heads, _, page_size, width = stored.shape
    group, dtype = num_heads // num_kv_heads, values_dtype(k_pages, load)
    sizes = tpu_tiles(
        num_queries * group, num_kv_heads, width, block=block, dtype=stored.dtype, chosen=tiles
    )
    q_BKRH = queries.grouped(q, num_kv_heads, tile=sizes.rows).astype(dtype)
    q_BKRH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, 0), (0, width - head_dim)))
    kind = _Kind(group, page_size, block, sizes, window, soft_cap, load)
    of_tile = pl.BlockSpec((1, *sizes, width), lambda row, heads, tile, *_: (row, heads, tile, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    buffer: Any = pltpu.VMEM((_AHEAD, sizes.heads, block, width), stored.dtype)
    pool: Any = anywhere
    if isinstance(k_pages, Rounded):
        scales = pltpu.VMEM((_AHEAD, sizes.heads, 1, block), jnp.float32)
        buffer, pool = Rounded(buffer, scales), Rounded(anywhere, anywhere)
    out_BKRH = pl.pallas_call(
        functools.partial(_kernel, kind=kind),
        out_shape=jax.ShapeDtypeStruct(q_BKRH.shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, num_kv_heads // sizes.heads, q_BKRH.shape[2] // sizes.rows),
            in_specs=[of_tile, pool, pool],
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
    if needs.dtype == "int8" and (reason := _refusal_of_rounded(needs)):
        return reason
    least = TpuTiles(heads=1, rows=4 * _SUBLANES // max(2, jnp.dtype(needs.dtype).itemsize))
    if tpu_bytes(least, needs.head_dim, block=needs.block, dtype=needs.dtype) > TPU_VMEM:
        return (
            f"can't hold engine.attention_block = {needs.block} keys of {needs.head_dim} "
            f"{needs.dtype} in {TPU_VMEM} bytes of VMEM"
        )
    return ""


def _refusal_of_rounded(needs: Needs) -> str:
    if needs.compute_dtype not in ("bfloat16", "float32"):
        return (
            "multiplies int8 pages in bfloat16 or float32; engine.compute_dtype is "
            f"{needs.compute_dtype}"
        )
    if needs.page_size % _LANES:
        return (
            f"copies int8 pages of a multiple of {_LANES} tokens, not of {needs.page_size}: set "
            f"engine.cache.page_size to {_LANES}"
        )
    return ""


def _kernel(
    table: Any,  # i32 [B * M] in SMEM
    starts: Any,
    lengths: Any,
    q: Any,  # [1, K, R, H]
    k_pages: Any,  # [K, P, C, H], not in VMEM; int8 ones with scales of [K, P, 1, C]
    v_pages: Any,
    out: Any,  # f32 [1, K, R, H]
    k_blocks: Any,  # [2, K, S, H], and scales [2, K, 1, S]
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
                    done = arrived.at[slot, which]
                    if isinstance(pages, Rounded):
                        source, target = pages.scales, blocks.scales.at[slot, :, :, place]
                        act(pltpu.make_async_copy(source.at[heads, page], target, done))
                        pages, blocks = pages.codes, blocks.codes
                    target = blocks.at[slot, :, place]
                    act(pltpu.make_async_copy(pages.at[heads, page], target, done))

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
            _read(k_blocks, slot, q.dtype, kind),
            _read(v_blocks, slot, q.dtype, kind),
            (top, total, sums),
            visible=_visible(first_row, index * kind.block, start, end, kind),
            first_key=index * kind.block,
            end=end,
            soft_cap=kind.soft_cap,
        )

    lax.fori_loop(first_block, end_block, one_block, None)
    out[0] = online.finished(total[...], sums[...])


class _Values(NamedTuple):
    """The keys or values of a block."""

    values: Array  # [K, S, H]
    scales: Array | None  # [K, 1, S], for codes


def _read(blocks: Any, slot: Array, dtype: Any, kind: _Kind) -> _Values:
    if isinstance(blocks, Rounded):
        codes = blocks.codes[slot].astype(jnp.float32)
        return _Values(codes.astype(dtype), blocks.scales[slot])
    return _Values(kind.load(blocks[slot]), None)


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
    keys: _Values,
    values: _Values,
    softmax: tuple[Any, Any, Any],
    *,
    visible: Array,
    first_key: Array,
    end: Array,
    soft_cap: float,
) -> None:
    """Takes one more block of keys into an unfinished softmax."""
    top, total, sums = softmax
    v_KSH, block = values.values, values.values.shape[1]
    precision = lax.Precision.HIGHEST if v_KSH.dtype == jnp.float32 else None
    dot = functools.partial(
        lax.dot_general, precision=precision, preferred_element_type=jnp.float32
    )
    logits = dot(q_KRH, keys.values, (((2,), (2,)), ((0,), (0,))))
    logits = logits if keys.scales is None else logits * keys.scales
    logits = jnp.where(visible, online.capped(logits, soft_cap), -jnp.inf)
    old = top[...]
    new = online.new_top(old, jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp2(logits - online.base(new))
    faded = online.fade(old, new)
    top[...] = new
    total[...] = total[...] * faded + jnp.sum(weights, axis=-1, keepdims=True)
    if values.scales is None:
        is_owned = _positions((1, block, 1), 1, first_key) < end
        v_KSH = jnp.where(is_owned, v_KSH, jnp.zeros((), v_KSH.dtype))
    else:
        is_owned = _positions((1, 1, block), 2, first_key) < end
        weights = weights * jnp.where(is_owned, values.scales, 0.0)
    product = dot(weights.astype(v_KSH.dtype), v_KSH, (((2,), (1,)), ((0,), (0,))))
    sums[...] = sums[...] * faded + product
