"""Products of few rows with int8 weights for Hopper GPUs: weights by TMA, int8 `wgmma`, exact sums.

One program is 64 outputs of a weight against all rows, over a part of the channels: weights are
read once and wait for nobody, rows come from the cache of the chip. Sums are whole numbers, so
parts and tiles change no bit, and XLA's product of the same codes is the same to the last one.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int8, Int32

from jaxinfer.dims import Leaf

MAX_ROWS = 128  # more are better off with larger tiles
_OUTPUTS = 64  # of a program: what one warpgroup multiplies at a time
_CHANNELS = 128  # that one copy brings of each output
_LEAST_ROWS = 8
_PROGRAMS = 264  # two for each of the 132 processors of an H100 or H200
_MOST_STAGES = 8
_BYTES = 100 * 1024  # of blocks on their way: two programs fit a processor
_TILED = plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128)
_TILED_I32 = plgpu.TilingTransform((8, 8)), plgpu.SwizzleTransform(32)


class _Kind(NamedTuple):
    """What is the same for every program of a call."""

    blocks: int  # of channels
    part: int  # blocks of a program
    stages: int


def fits(rows: int, outputs: int, channels: int) -> bool:
    """Whether there is a kernel for a product; others are XLA's, with the same sums."""
    return rows <= MAX_ROWS and not outputs % _OUTPUTS and not channels % _CHANNELS


def sums(rows: Int8[Array, "rows K"], table: Leaf) -> Int32[Array, "rows N"]:
    """The products of all rows with all of the table's ([N, K]), which `fits`."""
    count, channels = rows.shape
    outputs = table.shape[0]
    padded = max(_LEAST_ROWS, 1 << (count - 1).bit_length())  # wgmma takes no 40 int8 rows
    kind, num_parts = _kind(padded, outputs, channels // _CHANNELS)
    run = plgpu.kernel(
        functools.partial(_kernel, kind=kind),
        out_type=jax.ShapeDtypeStruct((num_parts, outputs, padded), jnp.int32),
        scratch_types=dict(
            x_blocks=plgpu.SMEM((kind.stages, padded, _CHANNELS), jnp.int8, transforms=_TILED),
            w_blocks=plgpu.SMEM((kind.stages, _OUTPUTS, _CHANNELS), jnp.int8, transforms=_TILED),
            found=plgpu.SMEM((_OUTPUTS, padded), jnp.int32, transforms=_TILED_I32),
            arrived=plgpu.Barrier(num_arrivals=2, num_barriers=kind.stages),
        ),
        grid=(outputs // _OUTPUTS, num_parts),
        grid_names=("outputs", "part"),
    )
    parts = run(jnp.pad(rows, ((0, padded - count), (0, 0))), table)
    return jnp.sum(parts, axis=0)[:, :count].T


def _kind(rows: int, outputs: int, blocks: int) -> tuple[_Kind, int]:
    """Parts of channels where outputs alone are too few programs; and how many parts."""
    wanted = min(blocks, -(-_PROGRAMS // (outputs // _OUTPUTS)))
    part = -(-blocks // wanted)
    stages = min(_MOST_STAGES, part + 1, _BYTES // ((rows + _OUTPUTS) * _CHANNELS))
    return _Kind(blocks, part, max(2, stages)), -(-blocks // part)


def _kernel(
    x: Any,
    weights: Any,
    out: Any,
    *,
    x_blocks: Any,
    w_blocks: Any,
    found: Any,
    arrived: Any,
    kind: _Kind,
) -> None:
    part = lax.axis_index("part")
    outputs = pl.ds(lax.axis_index("outputs") * _OUTPUTS, _OUTPUTS)
    first = part * kind.part
    end = jnp.minimum(first + kind.part, kind.blocks)

    def fetch(index: Array) -> None:
        slot = lax.rem(index - first, kind.stages)
        channels = pl.ds(index * _CHANNELS, _CHANNELS)
        plgpu.copy_gmem_to_smem(weights.at[outputs, channels], w_blocks.at[slot], arrived.at[slot])
        plgpu.copy_gmem_to_smem(x.at[:, channels], x_blocks.at[slot], arrived.at[slot])

    pl.loop(first, jnp.minimum(first + kind.stages, end))(fetch)

    def multiply(total: Any) -> Array:
        @pl.loop(first, end)
        def _(index: Array) -> None:
            slot = lax.rem(index - first, kind.stages)
            plgpu.barrier_wait(arrived.at[slot])
            columns = x_blocks.at[slot].transpose((1, 0))
            plgpu.wgmma(total, w_blocks.at[slot], columns)
            plgpu.wgmma_wait(1)  # the block before is done with
            following = index - 1 + kind.stages
            pl.when((index > first) & (following < end))(lambda: fetch(following))

        return total[...]

    accumulator = plgpu.WGMMAAccumulatorRef((_OUTPUTS, x.shape[0]), jnp.int32)
    found[...] = pl.run_scoped(multiply, accumulator)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(found, out.at[part, outputs])
    plgpu.wait_smem_to_gmem(0)
