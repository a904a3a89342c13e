"""One description of every array: its shape, its dtype, its axes by name, its first value."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxinfer.errors import CheckpointError


class ArraySpec(NamedTuple):
    """What one leaf of a tree must be."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical names, looked up in the rules of a mesh
    dtype: DTypeLike | None = None  # None: the dtype of the whole tree
    init: Literal["normal", "ones", "zeros"] = "normal"
    contract: int = 0  # the last axes that a product with it sums over; 0: it is no matrix


def is_spec(leaf: object) -> bool:
    """Tells a spec from a tree of specs."""
    return isinstance(leaf, ArraySpec)


def map_specs(function: Callable[[ArraySpec], Any], specs: Any) -> Any:
    """The tree that `function` makes of a tree of specs."""
    return jax.tree.map(function, specs, is_leaf=is_spec)


def paths(specs: Any) -> dict[str, ArraySpec]:
    """Every spec of a tree by its dotted path, in the tree's order."""
    flat, _ = jax.tree.flatten_with_path(specs, is_leaf=is_spec)
    return {dotted(path): leaf for path, leaf in flat}


def dotted(path: tuple[Any, ...]) -> str:
    """The name of a leaf: `layers.3.attention.qkv`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def abstract(specs: Any, dtype: DTypeLike) -> Any:
    """The tree of shapes and dtypes, without memory."""
    return map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype or dtype), specs)


def num_bytes(specs: Any, dtype: DTypeLike) -> int:
    """Bytes of the whole tree."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract(specs, dtype))
    )


def initialise(specs: Any, key: jax.Array, dtype: DTypeLike) -> Any:
    """Random weights for a tree of specs, each leaf scaled by its last axis."""
    leaves, tree = jax.tree.flatten(specs, is_leaf=is_spec)

    def one(spec: ArraySpec, leaf_key: jax.Array) -> jax.Array:
        kind = spec.dtype or dtype
        if spec.init == "zeros":
            return jnp.zeros(spec.shape, kind)
        if spec.init == "ones":
            return jnp.ones(spec.shape, kind)
        scale = spec.shape[-1] ** -0.5
        return (scale * jax.random.normal(leaf_key, spec.shape, jnp.float32)).astype(kind)

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [one(*pair) for pair in zip(leaves, keys, strict=True)])


def check(specs: Any, tree: Any, dtype: DTypeLike) -> None:
    """Raises CheckpointError at the first leaf whose shape or dtype is not as described."""
    wanted = paths(specs)
    found = {dotted(path): leaf for path, leaf in jax.tree.flatten_with_path(tree)[0]}
    for name in (*wanted, *found):
        if name not in found or name not in wanted:
            state = "missing" if name not in found else "not a part of this model"
            raise CheckpointError(f"parameter {name} is {state}")
        spec, leaf = wanted[name], found[name]
        if spec.shape != leaf.shape or jnp.dtype(spec.dtype or dtype) != leaf.dtype:
            raise CheckpointError(
                f"parameter {name} is {leaf.dtype}{list(leaf.shape)}, "
                f"but the model needs {jnp.dtype(spec.dtype or dtype)}{list(spec.shape)}"
            )
