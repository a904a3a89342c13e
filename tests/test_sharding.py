"""Meshes and rules: a lookup, with clear refusals."""

import jax
import pytest
from jax.sharding import PartitionSpec

from jaxinfer import sharding
from jaxinfer.config import MeshConfig
from jaxinfer.errors import ConfigError
from jaxinfer.spec import ArraySpec

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


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 devices, virtual ones will do")
def test_sizes_must_divide():
    config = MeshConfig(shape=(4,), rules=(("heads", "X"),))
    with pytest.raises(ConfigError, match="can't share evenly"):
        sharding.placement(config)(LEAF)
    assert sharding.placement(MeshConfig(shape=(2,), rules=(("heads", "X"),)))(LEAF)
