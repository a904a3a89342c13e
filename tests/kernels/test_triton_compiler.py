"""The Triton kernel through Triton's own compiler and ptxas, which need no GPU.

Skipped where `triton` is not installed (it is no dependency: pip install triton). XLA has a
Triton of its own, of another date: what a GPU runs may differ from this in detail.
"""

import re
import subprocess
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.triton import lowering

from jaxinfer.bench.hardware.cases import load_of
from jaxinfer.kernels.paged_attention import pallas_triton
from jaxinfer.kernels.paged_attention.rounded import Rounded
from jaxinfer.kernels.paged_attention.tiles import (
    TRITON_SMEM,
    TritonTiles,
    triton_bytes,
    triton_tiles,
)
from tests.kernels.attention import no_gpu_here

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]
LONGEST, BLOCK, PAGE = 8192, 128, 16


class Compiled(NamedTuple):
    """What a program takes of a GPU, and what is in it."""

    shared: int  # bytes
    registers: int
    stack: int  # bytes of a thread that did not fit registers
    ptx: str


def compiled(folder: Path, capability: int, tiles: TritonTiles, **call: Any) -> Compiled:
    """The kernel as Triton's own compiler makes it for a GPU of that capability."""
    from triton.backends.compiler import GPUTarget

    source = folder / "kernel.ttir"
    source.write_text(program(tiles, **call))
    made = triton.compile(
        str(source),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tiles.warps, "num_stages": tiles.stages},
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([tool, "-res-usage", cubin], check=True, capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    assert found is not None, said.stdout
    return Compiled(made.metadata.shared, int(found[1]), int(found[2]), made.asm["ptx"])


def program(
    tiles: TritonTiles, *, dtype: str, head_dim: int, queries: int = 1, **options: Any
) -> str:
    """What jax hands to Triton, as text."""
    pool: Any = jax.ShapeDtypeStruct((8, 4096, PAGE, head_dim), dtype)
    if dtype == "int8":
        pool = Rounded(pool, jax.ShapeDtypeStruct((8, 4096, 1, PAGE), jnp.float32))
    row = jax.ShapeDtypeStruct((4,), jnp.int32)
    table = jax.ShapeDtypeStruct((4, LONGEST // PAGE), jnp.int32)
    q = jax.ShapeDtypeStruct((4, queries, 32, head_dim), jnp.float32)
    attend = partial(
        pallas_triton.paged_attention,
        block=BLOCK,
        load=load_of(dtype),
        tiles=tuple(tiles),
        **options,
    )
    texts = []
    to_triton = lowering.lower_jaxpr_to_triton_module

    def kept(*arguments: Any, **named: Any) -> Any:
        made = to_triton(*arguments, **named)
        texts.append(made.module.operation.get_asm())
        return made

    with mock.patch.object(lowering, "lower_jaxpr_to_triton_module", kept), no_gpu_here():
        traced = jax.jit(attend).trace(q, pool, pool, table, row, row)
        traced.lower(lowering_platforms=("cuda",))
    [text] = texts
    return text


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
def test_the_sizes_of_the_rule_fit_and_spill_nothing(tmp_path, dtype, head_dim, capability):
    tiles = triton_tiles(LONGEST, head_dim, block=BLOCK, dtype=dtype)
    found = compiled(tmp_path, capability, tiles, dtype=dtype, head_dim=head_dim)
    print(f"sm_{capability} {dtype} heads of {head_dim}: {found._replace(ptx='')}")
    assert found.stack == 0
    # Pages arrive by copies that go on while the block before is computed.
    assert "cp.async.cg.shared.global" in found.ptx
    assert re.search("wgmma.mma|mma.sync", found.ptx) or dtype == "float32"
    assert found.shared <= TRITON_SMEM
    if capability < 90:  # for Hopper Triton keeps more, and has more
        assert found.shared <= triton_bytes(tiles, head_dim, dtype=dtype)


@pytest.mark.parametrize("capability", [80, 89])
def test_a_chunk_with_a_window_and_a_soft_cap_does_too(tmp_path, capability):
    tiles = triton_tiles(LONGEST, 128, block=BLOCK)
    call = {"dtype": "bfloat16", "head_dim": 128, "queries": 64, "window": 100, "soft_cap": 30.0}
    assert compiled(tmp_path, capability, tiles, **call).stack == 0


@pytest.mark.parametrize("sizes", [(16, 64, 1024, 8, 5), (64, 64, 1024, 4, 5), (32, 32, 512, 4, 2)])
def test_shared_memory_is_what_was_expected_of_chosen_sizes(tmp_path, sizes):
    tiles = TritonTiles(*sizes)
    found = compiled(tmp_path, 80, tiles, dtype="bfloat16", head_dim=128)
    expected = triton_bytes(tiles, 128)
    assert 0.9 * expected < found.shared <= expected
