"""Every program of an engine through the real compiler for TPUs, which needs no TPU.

Skipped where `libtpu` is not installed (it is no dependency: pip install libtpu).
"""

import math
import os
import re
from dataclasses import replace
from typing import Any

import jax
import pytest

from jaxinfer import compile as programs_of
from jaxinfer.bench.hardware.sizes import LLAMA_8B
from jaxinfer.engine_config import CacheConfig
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
        memory = compiled(recipe, chip).memory_analysis()
        assert memory is not None
        sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(recipe.arguments[1])]
        assert memory.alias_size_in_bytes >= sum(sizes), recipe.shape.name
        assert memory.temp_size_in_bytes < max(sizes), recipe.shape.name


def test_what_lies_between_the_products_of_a_decode_moves_little_through_memory(chip):
    model = replace(LLAMA_8B, num_layers=1, vocab_size=2048)
    cache = CacheConfig(page_size=16, num_pages=4096)
    config = engine("pallas_tpu", prefill_chunks=(128,), decode_rows=(64,), cache=cache)
    recipes = programs_of._every_recipe(model, replace(config, num_slots=64))
    [decode] = [recipe for recipe in recipes if recipe.shape.phase == "decode"]
    pool = f"[{model.num_kv_heads},{cache.num_pages + 1},{cache.page_size},{model.head_dim}]"
    sampled = f",{model.vocab_size}]"
    made = in_memory(str(compiled(decode, chip).as_text()))
    assert sum(pool in kind for _, kind in made) == 2  # keys and values are written in place
    others = [one for one in made if pool not in one[1] and sampled not in one[1]]
    written = sum(_bytes(kind) for _, kind in others)
    params = jax.tree.leaves(decode.arguments[0])
    weights = [leaf for leaf in params if model.vocab_size not in leaf.shape]
    read = sum(leaf.size * leaf.dtype.itemsize for leaf in weights)
    read += 64 * 2048 * 2 * model.num_kv_heads * model.head_dim * 2  # pages of 2k a row
    kind = next(iter(chip.device_set)).device_kind
    print(f"{kind}: {read / 1e6:.0f} MB read, {written / 1e6:.2f} MB written beside pages")
    print(sorted(((_bytes(kind), name, kind) for name, kind in others), reverse=True)[:20])
    assert written < (0.0001 if "v6" in kind else 0.03) * read


def compiled(recipe: Any, chip: jax.sharding.SingleDeviceSharding) -> jax.stages.Compiled:
    """A program as the compiler makes it for the chip."""
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chip), recipe.arguments
    )
    jitted = jax.jit(recipe.function, donate_argnums=recipe.donated, out_shardings=chip)
    return jitted.lower(*arguments).compile()


_NOTHING_NEW = ("parameter", "bitcast", "tuple", "get-tuple-element", "constant")


def in_memory(text: str) -> list[tuple[str, str]]:
    """What a program writes to the chip's memory, not to VMEM: names and types of arrays."""
    entry = text[text.index("\nENTRY") :]
    found = re.findall(r"^ +(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\(", entry, re.M)
    arrays = [
        (name, kind, place)
        for name, kinds, operation in found
        if operation not in _NOTHING_NEW and not operation.endswith("-start")
        for kind, place in re.findall(r"(\w+\[[\d,]*\])(\{[^}]*\})?", kinds)
    ]
    return [(name, kind) for name, kind, place in arrays if "S(" not in place]


def _bytes(kind: str) -> int:
    dtype, sizes = kind[:-1].split("[")
    width = 1 if dtype == "pred" else int(re.sub(r"\D", "", dtype)) // 8
    return width * math.prod(int(size) for size in sizes.split(",") if size)
