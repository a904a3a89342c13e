"""Every program of an engine through the real compiler for TPUs, which needs no TPU.

Skipped where `libtpu` is not installed (it is no dependency: pip install libtpu).
"""

import os
from dataclasses import replace
from typing import Any

import jax
import pytest

from jaxinfer import compile as programs_of
from jaxinfer.config import CacheConfig
from tests.kernels.test_lowering import MODEL, engine

pytest.importorskip("libtpu", reason="libtpu is not installed")
pytestmark = pytest.mark.full
PROGRAMS = {"prefill_chunks": (128,), "decode_rows": (8,)}


@pytest.fixture(scope="module", params=["v5e:2x2", "v6e:2x2"])
def chip(request: Any) -> jax.sharding.SingleDeviceSharding:
    """Where programs are compiled for: one chip that is not there."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or libtpu asks the cloud which TPU this is
    found = topologies.get_topology_desc(platform="tpu", topology_name=request.param)
    return jax.sharding.SingleDeviceSharding(found.devices[0])


@pytest.mark.parametrize("kept", ["auto", "int8"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_program_compiles_for_a_tpu_and_updates_the_pool_in_place(chip, head_dim, kept):
    # A pool that does not fit VMEM, where the compiler would move a small one to.
    size = 128 if kept == "int8" else 16
    pages = CacheConfig(page_size=size, num_pages=2**23 // head_dim // size, dtype=kept)
    config = engine("pallas_tpu", **PROGRAMS, cache=pages)
    model = replace(MODEL, head_dim=head_dim)
    for recipe in programs_of._every_recipe(model, config):
        if not recipe.donated or recipe.shape.phase == "score":  # whose pool is small
            continue
        arguments = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chip),
            recipe.arguments,
        )
        jitted = jax.jit(recipe.function, donate_argnums=recipe.donated, out_shardings=chip)
        memory = jitted.lower(*arguments).compile().memory_analysis()
        assert memory is not None
        sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments[1])]
        assert memory.alias_size_in_bytes >= sum(sizes), recipe.shape.name
        assert memory.temp_size_in_bytes < max(sizes), recipe.shape.name
