"""Tile sizes of the kernels: what fits, largest first."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

TPU_VMEM = 12 * 2**20  # of 16 MiB that a kernel may take unasked; compilers need some themselves
_TPU_LANES = 128
_TPU_MOST_ROWS = 256


class TpuTiles(NamedTuple):
    """What one program of the TPU kernel holds."""

    heads: int  # kv heads; a divisor of all
    rows: int  # of queries, for each kv head


def tpu_tiles(
    rows: int, num_kv_heads: int, head_dim: int, *, block: int, dtype: DTypeLike
) -> TpuTiles:
    """As many heads as fit with the fewest rows, since one copy brings a page of all of them;
    then as many rows as fit."""
    least = 32 // jnp.dtype(dtype).itemsize  # rows of a vector register
    wanted = min(_TPU_MOST_ROWS, -(-rows // least) * least)
    divisors = [heads for heads in range(num_kv_heads, 0, -1) if num_kv_heads % heads == 0]
    for heads in divisors:
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
    row = lanes * (2 * size + 4 * 4) + keys * (3 * 4 + size) + 2 * _TPU_LANES * 4
    return pages + tiles.heads * tiles.rows * row


GPU_SMEM = 227 * 1024  # what a program on a Hopper GPU can have
_GPU_KEYS = 64  # more need more registers than there are
_GPU_MOST_STAGES = 4
_GPU_LEAST_SPLIT = 512
_GPU_MOST_SPLITS = 16


class GpuTiles(NamedTuple):
    """How a program of the Hopper kernel goes through a row's keys."""

    keys: int  # reduced at a time
    split: int  # keys of a program; must not depend on the batch: bits do on it
    stages: int  # blocks of keys in shared memory


def gpu_tiles(longest: int, head_dim: int, *, block: int) -> GpuTiles:
    """Splits of 512 keys, or of a sixteenth of the longest sequence; as many stages as leave room
    for a second program beside, and two at least."""
    keys = min(_GPU_KEYS, block)
    split = max(_GPU_LEAST_SPLIT, -(-longest // _GPU_MOST_SPLITS))
    split = -(-split // block) * block
    fitting = [
        stages
        for stages in range(2, _GPU_MOST_STAGES + 1)
        if gpu_bytes(GpuTiles(keys, split, stages), head_dim) <= GPU_SMEM // 2
    ]
    return GpuTiles(keys, split, max(fitting, default=2))


def gpu_bytes(tiles: GpuTiles, head_dim: int) -> int:
    """What a program takes of shared memory."""
    pages = 2 * tiles.stages * tiles.keys * head_dim * 2
    rows = 64 * (head_dim * 2 + 64 * 4 + 8)
    return pages + rows + 1024
