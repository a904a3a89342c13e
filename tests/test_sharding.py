"""Meshes and rules: a lookup, with clear refusals."""

from dataclasses import replace

import jax
import pytest
from jax.sharding import PartitionSpec

from jaxinfer import models, sharding, spec
from jaxinfer.config import MeshConfig
from jaxinfer.errors import ConfigError
from jaxinfer.parallel import WHOLE, Split
from jaxinfer.sharding import layout_of
from jaxinfer.spec import ArraySpec
from tests import tiny

TENSOR = (("heads", "X"), ("kv_heads", "X"), ("ffw", "X"), ("vocab", "X"))
LEAF = ArraySpec((6, 4), ("heads", "embed"))


def test_without_rules_everything_is_replicated():
    assert sharding.placement(MeshConfig())(LEAF).spec == PartitionSpec(None, None)


def test_a_rule_puts_an_axis_along_the_mesh():
    place = sharding.placement(MeshConfig(rules=(("heads", "X"),)))
    assert place(LEAF).spec == PartitionSpec("X", None)
    assert place(LEAF).mesh.shape == {"X": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(shape=(1, 1)), "differ in length"),
        (MeshConfig(shape=(1000,)), "needs 1000 devices"),
        (MeshConfig(rules=(("heads", "Y"),)), "the mesh has"),
        (MeshConfig(rules=(("heads", "X"), ("embed", "X"))), "one mesh axis"),
    ],
)
def test_what_can_not_be_placed_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        sharding.placement(config)(LEAF)


def test_sizes_must_divide():
    config = MeshConfig(shape=(4,), rules=(("heads", "X"),))
    with pytest.raises(ConfigError, match="can't share evenly"):
        sharding.placement(config)(LEAF)
    assert sharding.placement(MeshConfig(shape=(2,), rules=(("heads", "X"),)))(LEAF)


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({}, MeshConfig(shape=(2,)), "mesh.rules is empty"),
        ({}, MeshConfig(shape=(2,), rules=(("embed", "X"),)), "what can be split is heads"),
        ({}, MeshConfig(shape=(2,), rules=(("batch", "X"),)), "`serve` takes replicas"),
        ({}, MeshConfig(shape=(2,), rules=(("heads", "X"),)), "along the same mesh axis"),
        ({"d_ff": 130}, MeshConfig(shape=(4,), rules=TENSOR), "ffw has 130 entries"),
        ({"vocab_size": 257}, MeshConfig(shape=(4,), rules=TENSOR), "vocab has 257 entries"),
        ({"quant": "w8a8"}, MeshConfig(shape=(8,), rules=TENSOR), "use fewer devices"),
    ],
)
def test_a_model_that_a_mesh_can_not_split_is_refused(changes, config, message):
    with pytest.raises(ConfigError, match=message):
        sharding.fit(replace(tiny.MODEL, **changes), config)


def test_one_device_leaves_a_model_as_it_is():
    assert sharding.fit(tiny.MODEL, MeshConfig()) == tiny.MODEL
    layout = layout_of(models.spec_of(tiny.MODEL), tiny.params())
    assert (layout.split, layout.name, layout.local(tiny.MODEL)) == (WHOLE, "", tiny.MODEL)
    assert layout.over_devices(len, (), None) is len


def test_weights_that_lie_as_no_step_takes_them_are_refused():
    mesh = sharding.make_mesh(MeshConfig(shape=(2,)))

    def leaf(*axes: str | None) -> jax.ShapeDtypeStruct:
        where = jax.sharding.NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(LEAF.shape, "float32", sharding=where)

    assert layout_of([LEAF, LEAF], [leaf("X"), leaf("X", None)]).split == Split(heads="X")
    for lie in ([leaf(None, "X")] * 2, [leaf("X"), leaf()]):
        with pytest.raises(ConfigError, match="what can be split is heads"):
            layout_of([LEAF, LEAF], lie)


def test_a_layout_is_what_the_weights_say():
    config = MeshConfig(shape=(2, 4), axes=("X", "Y"), rules=(*TENSOR[:2], ("ffw", "Y")))
    place, specs = sharding.placement(config), models.spec_of(tiny.MODEL)
    params = spec.map_specs(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "float32", sharding=place(leaf)), specs
    )
    layout = layout_of(specs, params)
    assert layout.split == Split(heads="X", ffw="Y")
    assert (layout.size, len(layout.devices)) == (8, 8)
    local = layout.local(tiny.MODEL)
    assert (local.num_heads, local.num_kv_heads, local.d_ff) == (3, 1, 32)
    assert local.vocab_size == tiny.MODEL.vocab_size
