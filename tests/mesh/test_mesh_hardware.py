"""Steps over a mesh, made into programs for the hardware that is not here."""

import os
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jaxinfer import compile as programs_of
from jaxinfer import models, sharding
from jaxinfer.plan import abstract_params
from tests.kernels.attention import no_gpu_here
from tests.kernels.test_lowering import CALLS, FEW, MODEL, PAGES, engine, pages_of
from tests.mesh.spread import collectives, mesh_of

pytestmark = pytest.mark.full
TOPOLOGY = "v5e:2x4"
LARGE = replace(
    MODEL, num_layers=3, vocab_size=2048, d_model=512, d_ff=1024, num_heads=16, num_kv_heads=8
)


@pytest.mark.parametrize("num_devices", [2, 8])
@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("attention", CALLS)
def test_steps_over_a_mesh_are_lowered_with_their_kernel_and_two_sums_a_layer(
    attention, pages, num_devices
):
    platform, call = CALLS[attention]
    config = engine(attention, **FEW, **pages_of(attention, pages))
    mesh = mesh_of(num_devices)
    wide = sharding.fit(MODEL, mesh)
    params = abstract_params(wide, config, mesh)
    layout = programs_of._layout(params, wide)
    for shape in programs_of.shapes(config):
        recipe = programs_of._step_recipe(shape, params, wide, config, layout)
        jitted = jax.jit(recipe.function, donate_argnums=recipe.donated)
        with no_gpu_here():
            traced = jitted.trace(*recipe.arguments)
            text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert call in text
        sums = 2 * MODEL.num_layers + 1
        assert text.count("stablehlo.all_reduce") == sums + 3, shape.name
        donated = text.count("tf.aliasing_output") + text.count("jax.buffer_donor")
        assert donated == len(jax.tree.leaves(recipe.arguments[1]))


def test_a_tpu_of_eight_chips_sums_twice_a_layer():
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or libtpu asks the cloud which TPU this is
    chips = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    rules = mesh_of(8)
    mesh = Mesh(np.array(chips), rules.axes, axis_types=(AxisType.Auto,))
    layout = sharding.Layout(jax.devices()[:1], mesh, dict(rules.rules))
    config = engine("pallas_tpu", **FEW)
    params = layout.abstract(models.spec_of(LARGE), config.compute_dtype)
    for shape in programs_of.shapes(config):
        recipe = programs_of._step_recipe(shape, params, LARGE, config, layout)
        jitted = jax.jit(recipe.function, donate_argnums=recipe.donated)
        compiled = jitted.lower(*recipe.arguments).compile()
        found = collectives(compiled.as_text())
        hidden = f"f32[{shape.rows},{shape.tokens},{LARGE.d_model}]"
        assert found.pop(("all-reduce", hidden)) == 2 * LARGE.num_layers + 1
        assert sum(found.values()) == 5  # a few numbers a row; all logits only where needed
        memory = compiled.memory_analysis()
        assert memory is not None
        pool = sum(
            leaf.sharding.shard_shape(leaf.shape)[0] * leaf.size // leaf.shape[0]
            for leaf in recipe.arguments[1].k + recipe.arguments[1].v
        )
        assert memory.alias_size_in_bytes >= pool * 2  # bfloat16
