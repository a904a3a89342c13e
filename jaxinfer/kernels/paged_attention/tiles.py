"""Tile sizes of the kernels: by rule what fits, largest first, and all that could be tried."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxinfer.kernels.paged_attention.needs import Needs

Sizes = tuple[int, ...]
"""Chosen sizes of a kernel: its named tuple here as plain numbers, () for those of the rule."""
TPU_VMEM = 12 * 2**20  # of 16 MiB that a kernel may take unasked; compilers need some themselves
_TPU_LANES = 128
_TPU_MOST_ROWS = 256


class TpuTiles(NamedTuple):
    """What one program of the TPU kernel holds."""

    heads: int  # kv heads; a divisor of all
    rows: int  # of queries, for each kv head


def tpu_tiles(
    rows: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    block: int,
    dtype: DTypeLike,
    chosen: Sizes = (),
) -> TpuTiles:
    """As many heads as fit with the fewest rows, since one copy brings a page of all of them;
    then as many rows as fit. Chosen ones are upper bounds: a mesh leaves fewer heads."""
    least = _tpu_least_rows(dtype)
    most = TpuTiles(*chosen) if chosen else TpuTiles(num_kv_heads, _TPU_MOST_ROWS)
    wanted = min(most.rows, -(-rows // least) * least)
    for heads in _divisors(num_kv_heads, most.heads):
        for tile in range(wanted, 0, -least):
            if tpu_bytes(TpuTiles(heads, tile), head_dim, block=block, dtype=dtype) <= TPU_VMEM:
                return TpuTiles(heads, tile)
    return TpuTiles(1, least)


def tpu_bytes(tiles: TpuTiles, head_dim: int, *, block: int, dtype: DTypeLike) -> int:
    """About what a program takes in VMEM; the last axis of every array is whole lanes."""
    size = jnp.dtype(dtype).itemsize
    lanes = -(-head_dim // _TPU_LANES) * _TPU_LANES
    keys = -(-block // _TPU_LANES) * _TPU_LANES
    pages = tiles.heads * block * lanes * (4 * size + 8)  # two blocks of k and v, and as values
    if size == 1:
        pages += tiles.heads * 4 * keys * 8 * 4  # a row of scales takes eight
    size = max(size, 2)  # of queries and weights beside int8 pages
    row = lanes * (2 * size + 4 * 4) + keys * (3 * 4 + size) + 2 * _TPU_LANES * 4
    return pages + tiles.heads * tiles.rows * row


GPU_SMEM = 227 * 1024  # what a program on a Hopper GPU can have
_GPU_KEYS = 64  # what wgmma sums over at once; twice that may need more registers than there are
_GPU_MOST_STAGES = 4
_GPU_LEAST_SPLIT = 512
_GPU_MOST_SPLITS = 16
_GPU_MOST_CHOSEN_SPLITS = 64  # each is a step of the merge
_GPU_ALIGNED = 4096  # what arrays lose to alignment, and barriers


class GpuTiles(NamedTuple):
    """How a program of the Hopper kernel goes through a row's keys."""

    keys: int  # reduced at a time
    split: int  # keys of a program; must not depend on the batch: bits do on it
    stages: int  # blocks of keys in shared memory


def gpu_tiles(
    longest: int,
    head_dim: int,
    *,
    block: int,
    dtype: DTypeLike = jnp.bfloat16,
    chosen: Sizes = (),
) -> GpuTiles:
    """Splits of 512 keys, or of a sixteenth of the longest sequence; as many stages as leave room
    for a second program beside, and two at least. Chosen splits grow with the longest sequence
    too, later."""
    if chosen:
        tiles = GpuTiles(*chosen)
        return tiles._replace(split=_split(tiles.split, longest, _GPU_MOST_CHOSEN_SPLITS, block))
    keys = min(_GPU_KEYS, block)
    split = _split(_GPU_LEAST_SPLIT, longest, _GPU_MOST_SPLITS, block)
    fitting = [
        stages
        for stages in range(2, _GPU_MOST_STAGES + 1)
        if gpu_bytes(GpuTiles(keys, split, stages), head_dim, dtype=dtype) <= GPU_SMEM // 2
    ]
    return GpuTiles(keys, split, max(fitting, default=2))


def gpu_bytes(tiles: GpuTiles, head_dim: int, *, dtype: DTypeLike = jnp.bfloat16) -> int:
    """What a program takes of shared memory: int8 codes with their scales, and as values."""
    is_rounded = jnp.dtype(dtype) == jnp.int8
    head = head_dim + 4 if is_rounded else 2 * head_dim
    pages = 2 * tiles.stages * tiles.keys * head
    pages += 2 * tiles.keys * head_dim * is_rounded
    rows = 64 * (head_dim * 2 + 64 * 4 + 8)
    return pages + rows + _GPU_ALIGNED


TRITON_SMEM = 99 * 1024  # what a program can have on a GPU of 8.6 or 8.9; others have more
TRITON_LEAST = 16  # of rows and of keys, for a product


class TritonTiles(NamedTuple):
    """How a program of the Triton kernel goes through a row's keys."""

    rows: int  # of queries; the same in every program, so that the bits of a query are
    keys: int  # reduced at a time
    split: int  # keys of a program; must not depend on the batch: bits do on it
    warps: int
    stages: int  # of the compiler's pipeline


def triton_tiles(
    longest: int,
    head_dim: int,
    *,
    block: int,
    dtype: DTypeLike = jnp.bfloat16,
    chosen: Sizes = (),
) -> TritonTiles:
    """Splits as on Hopper, and what leaves room for a second program and spills no registers.

    In float32 there are no tensor cores to fill, and rows without a query would cost time.
    """
    if chosen:
        tiles = TritonTiles(*chosen)
        return tiles._replace(split=_split(tiles.split, longest, _GPU_MOST_CHOSEN_SPLITS, block))
    is_single = jnp.dtype(dtype) == jnp.float32
    return TritonTiles(
        rows=16 if is_single else 64,
        keys=min(32, block & -block),
        split=_split(_GPU_LEAST_SPLIT, longest, _GPU_MOST_SPLITS, block),
        warps=8 if is_single or head_dim > 64 else 4,
        stages=3,  # the page table's entries come one ahead of the pages, those one of the products
    )


def triton_bytes(tiles: TritonTiles, head_dim: int, *, dtype: DTypeLike = jnp.bfloat16) -> int:
    """About what a program takes of shared memory: queries, weights, and blocks on their way."""
    size = jnp.dtype(dtype).itemsize
    rows = tiles.rows * (head_dim + tiles.keys) * max(size, 2)
    key = 2 * head_dim * size + 2 * 4 * (size == 1) + 8  # with its scales and its page
    return rows + max(1, (tiles.stages - 1) // 2) * tiles.keys * key


FIELDS: dict[str, tuple[str, ...]] = {
    "pallas_tpu": TpuTiles._fields,
    "pallas_gpu": GpuTiles._fields,
    "pallas_triton": TritonTiles._fields,
}
"""The kernels that have tiles, and what their sizes are called."""


def misfit(backend: str, sizes: Sizes, needs: Needs) -> str:
    """Why a kernel can't take these sizes; "" where it can."""
    if backend not in FIELDS:
        return f"{backend} has no tiles"
    names = FIELDS[backend]
    if len(sizes) != len(names) or min(sizes) < 1:
        return f"{backend} takes {len(names)} sizes of at least 1: {', '.join(names)}"
    reason, need, room = _MISFITS[backend](sizes, needs)
    return reason or (
        f"they take {need} bytes on the chip, which has {room}" if need > room else ""
    )


def _tpu_misfit(sizes: Sizes, needs: Needs) -> tuple[str, int, int]:
    asked, least = TpuTiles(*sizes), _tpu_least_rows(needs.dtype)
    reason = f"rows must be a multiple of {least} in {needs.dtype}" if asked.rows % least else ""
    need = tpu_bytes(asked, needs.head_dim, block=needs.block, dtype=needs.dtype)
    return reason, need, TPU_VMEM


def _gpu_misfit(sizes: Sizes, needs: Needs) -> tuple[str, int, int]:
    tiles, block, reason = GpuTiles(*sizes), needs.block, ""
    if (
        tiles.keys % _GPU_KEYS
        or tiles.keys % needs.page_size
        or block % tiles.keys
        or tiles.split % block
    ):
        reason = (
            f"keys must be a multiple of {_GPU_KEYS} and of engine.cache.page_size = "
            f"{needs.page_size}, and divide engine.attention_block = {block}, which must "
            "divide split"
        )
    elif tiles.stages < 2:
        reason = "stages must be at least 2, so that one arrives while another is used"
    return reason, gpu_bytes(tiles, needs.head_dim, dtype=needs.dtype), GPU_SMEM


def _triton_misfit(sizes: Sizes, needs: Needs) -> tuple[str, int, int]:
    tiles, block, reason = TritonTiles(*sizes), needs.block, ""
    if any(one & (one - 1) for one in (tiles.rows, tiles.keys, tiles.warps)):
        reason = "rows, keys and warps must be powers of two"
    elif min(tiles.rows, tiles.keys) < TRITON_LEAST or tiles.warps > 16:
        reason = f"rows and keys must be at least {TRITON_LEAST}, and warps at most 16"
    elif block % tiles.keys or tiles.split % block:
        reason = f"keys must divide engine.attention_block = {block}, which must divide split"
    return reason, triton_bytes(tiles, needs.head_dim, dtype=needs.dtype), TRITON_SMEM


_MISFITS: dict[str, Callable[[Sizes, Needs], tuple[str, int, int]]] = {
    "pallas_tpu": _tpu_misfit,
    "pallas_gpu": _gpu_misfit,
    "pallas_triton": _triton_misfit,
}


def candidates(backend: str, needs: Needs, *, num_kv_heads: int, longest: int) -> tuple[Sizes, ...]:
    """All sizes that are worth a try; none for a kernel without tiles."""
    if backend == "pallas_tpu":
        rows = (16, 32, 64, 128, 256)
        ways = itertools.product(_divisors(num_kv_heads, num_kv_heads), rows)
    elif backend == "pallas_gpu":
        splits = _splits(needs.block, longest)
        ways = itertools.product((_GPU_KEYS, 2 * _GPU_KEYS), splits, (2, 3, 4, 6))
    elif backend == "pallas_triton":
        splits = _splits(needs.block, longest)[-3:]
        ways = itertools.product((16, 64), (32, 64), splits, (4, 8), (3, 5))
    else:
        return ()
    return tuple(sizes for sizes in ways if not misfit(backend, sizes, needs))


def _splits(block: int, longest: int) -> list[int]:
    splits = [count * block for count in (1, 2, 4, 8, 16)]
    return [split for split in splits if split <= longest] or [block]


def _split(least: int, longest: int, most: int, block: int) -> int:
    return -(-max(least, -(-longest // most)) // block) * block


def _tpu_least_rows(dtype: DTypeLike) -> int:
    """Rows of a vector register; queries beside int8 pages are bfloat16 at least."""
    return 32 // max(2, jnp.dtype(dtype).itemsize)


def _divisors(number: int, most: int) -> list[int]:
    return [one for one in range(min(number, most), 0, -1) if number % one == 0]
