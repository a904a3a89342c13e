"""Ragged paged attention for Hopper GPUs: pages by TMA into shared memory, products by wgmma.

One program is 64 rows of a row's queries for one kv head, against one split of its keys. Splits
have a fixed size, so that a sequence's sums are the same whatever else is in the batch; what they
come to is merged in order afterwards. The queries of a decode fill only part of the 64 rows:
a decode waits for memory, and the tensor cores have time.

Codes of int8 pages are made bfloat16 on the chip, which is exact; their scales are factors of
logits and of weights.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jaxinfer.dims import Leaf
from jaxinfer.kernels.paged_attention import online, queries, splits
from jaxinfer.kernels.paged_attention.needs import Needs
from jaxinfer.kernels.paged_attention.rounded import Rounded
from jaxinfer.kernels.paged_attention.tiles import GPU_SMEM, GpuTiles, gpu_bytes, gpu_tiles

_ROWS = 64  # of queries in a program: what one warpgroup multiplies at a time
_COLUMNS = 64  # of a head, summed in one array
_DTYPES = ("bfloat16", "float16", "int8")
_TILED = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # two bytes an element
_TILED_F32 = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)
_ALIGNED = 128 // 4  # scales of a page that a copy can put anywhere


class _Kind(NamedTuple):
    """What is the same for every row of a call."""

    shape: splits.Shape
    page_size: int
    stages: int
    soft_cap: float


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
    load: Any = None,
    exact: bool = True,
    tiles: tuple[int, ...] = (),
) -> Float[Array, "B T N H"]:
    """See reference.paged_attention; `load` has no work: pages hold values as they are, or codes.

    `exact` changes nothing here: rows never share a sum.
    """
    del load, exact
    batch, num_queries, num_heads, head_dim = q.shape
    is_rounded = isinstance(k_pages, Rounded)
    stored = k_pages.codes if is_rounded else k_pages
    num_kv_heads, _, page_size, _ = stored.shape
    group, dtype = num_heads // num_kv_heads, jnp.bfloat16 if is_rounded else stored.dtype
    sizes = gpu_tiles(
        page_table.shape[1] * page_size, head_dim, block=block, dtype=stored.dtype, chosen=tiles
    )
    num_splits = -(-page_table.shape[1] * page_size // sizes.split)
    q_BKRH = queries.grouped(q, num_kv_heads, tile=_ROWS).astype(dtype)
    num_tiles = q_BKRH.shape[2] // _ROWS
    blocks = _blocks(sizes, head_dim, stored.dtype)
    copies = sizes.keys // page_size * len(jax.tree.leaves(k_pages))
    arrivals = plgpu.Barrier(num_arrivals=copies, num_barriers=sizes.stages)
    values = plgpu.SMEM((sizes.keys, head_dim), dtype, transforms=_TILED)
    scratch: dict[str, Any] = dict(
        q_tile=plgpu.SMEM((_ROWS, head_dim), dtype, transforms=_TILED),
        k_blocks=blocks,
        v_blocks=blocks,
        values=values if is_rounded else None,
        row_top=plgpu.SMEM((_ROWS,), jnp.int32),
        row_total=plgpu.SMEM((_ROWS,), jnp.float32),
        row_sums=plgpu.SMEM((_ROWS, _COLUMNS), jnp.float32, transforms=_TILED_F32),
        q_arrived=plgpu.Barrier(),
        k_arrived=arrivals,
        v_arrived=arrivals,
    )
    shape = splits.Shape(_ROWS, group, sizes.keys, sizes.split, window)
    of_split = (batch, num_kv_heads, num_splits, num_tiles * _ROWS)
    run = plgpu.kernel(
        functools.partial(_kernel, kind=_Kind(shape, page_size, sizes.stages, soft_cap)),
        out_type=(
            jax.ShapeDtypeStruct(of_split, jnp.int32),
            jax.ShapeDtypeStruct(of_split, jnp.float32),
            jax.ShapeDtypeStruct((*of_split, head_dim), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(num_splits * num_tiles, num_kv_heads, batch),
        grid_names=("work", "head", "row"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    top, total, sums = run(page_table, starts, lengths, q_BKRH, k_pages, v_pages)
    merged = splits.merged(top, total, sums)
    return queries.ungrouped(merged, lengths, num_queries=num_queries, group=group)


def refusal(needs: Needs) -> str:
    """Why this kernel can't serve an engine; "" where it can."""
    if needs.platform != "gpu":
        return f"needs a GPU, and this is a {needs.platform}"
    if needs.capability.split(".")[0] != "9":
        return f"needs a Hopper GPU (9.0), and this one's compute capability is {needs.capability}"
    if needs.dtype not in _DTYPES:
        return f"reads pages of {' or '.join(_DTYPES)}, not of {needs.dtype}"
    if needs.head_dim % _COLUMNS:
        return f"has heads of a multiple of {_COLUMNS}, not of {needs.head_dim}"
    tiles = gpu_tiles(needs.block, needs.head_dim, block=needs.block, dtype=needs.dtype)
    if needs.page_size % 8 or tiles.keys % needs.page_size or needs.block % _COLUMNS:
        return (
            f"reduces {tiles.keys} keys at a time in pages of a multiple of 8 tokens; "
            f"engine.cache.page_size is {needs.page_size}, engine.attention_block {needs.block}"
        )
    if gpu_bytes(tiles, needs.head_dim, dtype=needs.dtype) > GPU_SMEM:
        return f"can't hold heads of {needs.head_dim} in {GPU_SMEM} bytes of shared memory"
    return _refusal_of_rounded(needs) if needs.dtype == "int8" else ""


def _refusal_of_rounded(needs: Needs) -> str:
    if needs.compute_dtype != "bfloat16":
        return f"multiplies int8 pages in bfloat16; engine.compute_dtype is {needs.compute_dtype}"
    if needs.page_size % _ALIGNED:
        return (
            f"copies int8 pages of a multiple of {_ALIGNED} tokens, not of {needs.page_size}: "
            f"set engine.cache.page_size to {_ALIGNED} or {2 * _ALIGNED}"
        )
    return ""


def _blocks(sizes: GpuTiles, head_dim: int, dtype: Any) -> Any:
    """Where the keys or values of several blocks lie in shared memory."""
    shape = (sizes.stages, sizes.keys, head_dim)
    if dtype != jnp.int8:
        return plgpu.SMEM(shape, dtype, transforms=_TILED)
    width = _columns_of_codes(head_dim)
    tiled = plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width)
    scales = plgpu.SMEM((sizes.stages, sizes.keys), jnp.float32)
    return Rounded(plgpu.SMEM(shape, jnp.int8, transforms=tiled), scales)


def _columns_of_codes(head_dim: int) -> int:
    return _COLUMNS if head_dim % (2 * _COLUMNS) else 2 * _COLUMNS


def _kernel(
    table: Any,
    starts: Any,
    lengths: Any,
    q: Any,
    k_pages: Any,
    v_pages: Any,
    top: Any,
    total: Any,
    sums: Any,
    *,
    q_tile: Any,
    k_blocks: Any,
    v_blocks: Any,
    values: Any,
    row_top: Any,
    row_total: Any,
    row_sums: Any,
    q_arrived: Any,
    k_arrived: Any,
    v_arrived: Any,
    kind: _Kind,
) -> None:
    row, head, work = (lax.axis_index(name) for name in ("row", "head", "work"))
    num_splits = top.shape[2]
    tile, split = lax.div(work, num_splits), lax.rem(work, num_splits)
    rows = pl.ds(tile * _ROWS, _ROWS)
    span = splits.span(starts[row], lengths[row], tile * _ROWS, split, kind.shape)

    def fetch(index: Array) -> None:
        """Starts the copies of a block; beyond the row's pages its last one comes again."""
        slot = lax.rem(index - span.first_block, kind.stages)
        last = lax.div(span.end - 1, kind.page_size)

        @pl.loop(0, kind.shape.keys // kind.page_size)
        def _(part: Array) -> None:
            number = lax.div(index * kind.shape.keys, kind.page_size) + part
            page = table[row, jnp.minimum(number, last)]
            place = pl.ds(part * kind.page_size, kind.page_size)
            for pages, blocks, arrived in (
                (k_pages, k_blocks, k_arrived),
                (v_pages, v_blocks, v_arrived),
            ):
                if isinstance(pages, Rounded):
                    source, target = pages.scales.at[head, page, 0], blocks.scales.at[slot, place]
                    plgpu.copy_gmem_to_smem(source, target, arrived.at[slot])
                    pages, blocks = pages.codes, blocks.codes
                plgpu.copy_gmem_to_smem(
                    pages.at[head, page], blocks.at[slot, place], arrived.at[slot]
                )

    is_needed = span.first_block < span.end_block

    @pl.when(is_needed)
    def _() -> None:
        plgpu.copy_gmem_to_smem(q.at[row, head, rows], q_tile, q_arrived)
        first_end = jnp.minimum(span.first_block + kind.stages, span.end_block)
        pl.loop(span.first_block, first_end)(fetch)
        plgpu.barrier_wait(q_arrived)

    def one_block(index: Array, softmax: Any) -> Any:
        slot = lax.rem(index - span.first_block, kind.stages)
        first_key = index * kind.shape.keys
        plgpu.barrier_wait(k_arrived.at[slot])
        k_block, k_scales = _read(k_blocks, slot, values)
        logits = _logits(q_tile, k_block, k_scales, first_key, span, kind)
        plgpu.barrier_wait(v_arrived.at[slot])
        v_block, v_scales = _read(v_blocks, slot, values)
        if v_scales is None:
            is_last = first_key + kind.shape.keys > span.end
            pl.when(is_last)(lambda: _forget(v_block, span.end - first_key))
        else:
            key = _iota(v_scales.shape, 1) + first_key
            v_scales = jnp.where(key < span.end, v_scales, 0.0)
        softmax = _reduce(logits, v_block, v_scales, softmax)
        following = index + kind.stages
        pl.when(following < span.end_block)(lambda: fetch(following))
        return softmax

    done = lax.fori_loop(span.first_block, span.end_block, one_block, _nothing(sums.shape[-1]))
    row_top[...], row_total[...] = done[0], done[1]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(row_top, top.at[row, head, split, rows])
    plgpu.copy_smem_to_gmem(row_total, total.at[row, head, split, rows])

    @pl.when(is_needed)
    def _() -> None:
        for number, part in enumerate(done[2:]):
            row_sums[...] = part
            plgpu.commit_smem()
            columns = pl.ds(number * _COLUMNS, _COLUMNS)
            plgpu.copy_smem_to_gmem(row_sums, sums.at[row, head, split, rows, columns])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    plgpu.wait_smem_to_gmem(0)


def _nothing(head_dim: int) -> tuple[Array, ...]:
    """The softmax of no keys: each row's top, its sum of weights, and sums of columns."""
    by_row = plgpu.Layout.WGMMA.reduce(1)
    return (
        plgpu.layout_cast(jnp.full((_ROWS,), online.NOTHING, jnp.int32), by_row),
        plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), by_row),
        *(
            plgpu.layout_cast(jnp.zeros((_ROWS, _COLUMNS), jnp.float32), plgpu.Layout.WGMMA)
            for _ in range(head_dim // _COLUMNS)
        ),
    )


def _read(blocks: Any, slot: Array, values: Any) -> tuple[Any, Array | None]:
    """A block as values in shared memory, and the factor of each key in every row, if any.

    Codes are made values in place of those of the block before, which nobody reads any more: all
    warps meet before a write and after it.
    """
    if not isinstance(blocks, Rounded):
        return blocks.at[slot], None
    width = _columns_of_codes(values.shape[1])
    for column in range(0, values.shape[1], width):
        part = pl.ds(column, width)
        codes = plgpu.layout_cast(blocks.codes[slot, :, part], plgpu.Layout.WGMMA_UPCAST_2X)
        values[:, part] = plgpu.layout_cast(codes.astype(values.dtype), plgpu.Layout.WGMMA)
    plgpu.commit_smem()
    scales = plgpu.layout_cast(blocks.scales[slot], plgpu.Layout.WGMMA.reduce(0))
    return values, lax.broadcast_in_dim(scales, (_ROWS, values.shape[0]), [1])


def _iota(shape: tuple[int, ...], axis: int) -> Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _logits(
    q_tile: Any,
    k_block: Any,
    scales: Array | None,
    first_key: Array,
    span: splits.Span,
    kind: _Kind,
) -> Array:
    """What the queries of a tile make of a block of keys: -inf where they don't see them."""
    shape = (_ROWS, kind.shape.keys)

    def product(sums: Any) -> Array:
        plgpu.wgmma(sums, q_tile, k_block.transpose((1, 0)))
        return sums[...]

    logits = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    if scales is not None:
        logits = logits * scales
    seen = splits.sees(_iota(shape, 0), _iota(shape, 1) + first_key, span, kind.shape)
    return jnp.where(seen, online.capped(logits, kind.soft_cap), -jnp.inf)


def _forget(v_block: Any, num_keys: Array) -> None:
    """Zeros in place of the values that the row does not own; what they hold may be NaN."""
    for column in range(0, v_block.shape[1], _COLUMNS):
        part = v_block.at[:, pl.ds(column, _COLUMNS)]
        values = part[...]
        is_owned = _iota(part.shape, 0) < num_keys
        part[...] = jnp.where(is_owned, values, jnp.zeros_like(values))
    plgpu.commit_smem()


def _reduce(
    logits: Array, v_block: Any, scales: Array | None, softmax: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Takes one more block of keys into an unfinished softmax."""
    old, total, *parts = softmax
    new = online.new_top(old, jnp.max(logits, axis=1))
    base = lax.broadcast_in_dim(online.base(new), logits.shape, [0])
    weights = jnp.exp2(logits - base)
    faded = online.fade(old, new)
    total = total * faded + jnp.sum(weights, axis=1)
    by_column = lax.broadcast_in_dim(faded, (_ROWS, _COLUMNS), [0])
    narrow = (weights if scales is None else weights * scales).astype(v_block.dtype)
    for number, part in enumerate(parts):
        values = v_block.at[:, pl.ds(number * _COLUMNS, _COLUMNS)]

        def product(sums: Any, values: Any = values) -> Array:
            plgpu.wgmma(sums, narrow, values)
            return sums[...]

        new_part = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((_ROWS, _COLUMNS), jnp.float32))
        parts[number] = part * by_column + new_part
    return (new, total, *parts)
