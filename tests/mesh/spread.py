"""A tiny model over virtual devices, and what its programs and arrays say of that."""

import re
from collections import Counter
from typing import Any

import jax
import numpy as np

from jaxinfer import config, models, sharding, spec
from jaxinfer.config import MeshConfig, ModelConfig
from jaxinfer.nn import heads
from jaxinfer.weights.assemble import put_leaf
from tests import tiny

_COLLECTIVE = re.compile(
    r"= (\S+) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\("
)


def mesh_of(num_devices: int) -> MeshConfig:
    """The mesh of a preset."""
    return config.load(f"mesh/tensor-{num_devices}", environ={}).mesh


def spread(num_devices: int, model: ModelConfig = tiny.MODEL) -> tuple[ModelConfig, Any]:
    """The tiny model and its weights, as a mesh of so many devices holds them."""
    params = tiny.params(model=model)
    if num_devices == 1:
        return model, params
    mesh = mesh_of(num_devices)
    wide, place = sharding.fit(model, mesh), sharding.placement(mesh)
    specs = jax.tree.leaves(models.spec_of(wide), is_leaf=spec.is_spec)
    leaves, tree = jax.tree.flatten(params)
    placed = [
        put_leaf(heads.regroup(np.asarray(leaf), one.axes, model, wide), one, place)
        for leaf, one in zip(leaves, specs, strict=True)
    ]
    return wide, jax.tree.unflatten(tree, placed)


def collectives(text: str) -> Counter[tuple[str, str]]:
    """(kind, shape) of everything in a compiled program that devices do together."""
    found = _COLLECTIVE.findall(text)
    return Counter((kind, shape.partition("{")[0]) for shape, kind in found)


def bytes_by_device(tree: Any) -> dict[int, int]:
    """What each device holds of some arrays."""
    held: Counter[int] = Counter()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    return dict(held)
