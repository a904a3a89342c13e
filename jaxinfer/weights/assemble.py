"""Tensors on disk -> the params tree, one leaf in host memory at a time."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxinfer import models
from jaxinfer.config import ModelConfig
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.nn import heads
from jaxinfer.quant import (
    Factors,
    Rounding,
    describe,
    digits_of,
    multiply,
    quantise,
    round_to_nearest,
)
from jaxinfer.spec import ArraySpec, check, is_spec, num_bytes, paths
from jaxinfer.weights.names import Part, Recipe, ignored, recipes
from jaxinfer.weights.source import Fit, Progress, Sharding, TensorStore, as_it_is, silent

NO_FACTORS: Mapping[str, Factors] = {}


def load_params(
    store: TensorStore,
    config: ModelConfig,
    *,
    dtype: DTypeLike,
    sharding: Sharding = None,
    fit: Fit = as_it_is,
    progress: Progress = silent,
) -> Any:
    """Builds every leaf from its tensors; each leaves the host before the next one is read.

    The tree is that of `fit(config)`.
    """
    wide = fit(config)
    specs = models.spec_of(wide)
    plain, narrow = (paths(models.module_of(config).spec(one)) for one in (wide, config))
    wanted = recipes(config)
    check_names(store, wanted, config)
    total, done = num_bytes(specs, dtype), 0
    progress("load", done, total)
    leaves = []
    for path, spec in plain.items():
        leaf = assemble_leaf(store, wanted[path], narrow[path], dtype=spec.dtype or dtype)
        leaf = heads.regroup(leaf, spec.axes, config, wide)
        leaves.append(put(path, leaf, spec, scheme=config.quant, sharding=sharding))
        done += sum(part.nbytes for part in jax.tree.leaves(leaves[-1]))
        progress("load", done, total)
    tree = models.module_of(config).spec(wide)
    params = jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_spec), leaves)
    check(specs, params, dtype)
    return params


def check_names(store: TensorStore, wanted: dict[str, Recipe], config: ModelConfig) -> None:
    """Raises CheckpointError for a missing, unknown or wrongly shaped tensor; reads none."""
    found = set(store.names())
    parts = {part.tensor: part for recipe in wanted.values() for part in recipe}
    for name, part in parts.items():
        if name not in found:
            raise CheckpointError(
                f"{store.where(name)} is missing; a {config.architecture} model of "
                f"{config.num_layers} layers needs it"
            )
        if store.shape(name) != part.shape:
            raise CheckpointError(
                f"{store.where(name)} has shape {list(store.shape(name))}, "
                f"but the model's config asks for {list(part.shape)}"
            )
    extra = sorted(found - set(parts) - ignored(found, config))
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise CheckpointError(
            f"{store.where(extra[0])} is not a part of a {config.architecture} model with this "
            f"config{more}; running without it would be another model"
        )


def assemble_leaf(
    store: TensorStore, recipe: Recipe, spec: ArraySpec, *, dtype: DTypeLike
) -> np.ndarray:
    """One leaf in host memory, rounded to `dtype`."""
    kind = jnp.dtype(dtype)
    if len(recipe) == 1 and not recipe[0].place:
        return _values(store, recipe[0], kind).reshape(spec.shape)
    leaf = np.empty(spec.shape, kind)
    filled = 0
    for part in recipe:
        hole = leaf[part.place]
        hole[...] = _values(store, part, kind).reshape(hole.shape)
        filled += hole.size
    assert filled == leaf.size == math.prod(spec.shape), "a recipe must fill its leaf"
    return leaf


def quantise_leaves(
    leaves: list[Any],
    config: ModelConfig,
    *,
    rounding: Rounding = round_to_nearest,
    factors: Mapping[str, Factors] = NO_FACTORS,
    sharding: Sharding = None,
    progress: Progress = silent,
) -> list[Any]:
    """The leaves that `config.quant` makes of plain ones, which are taken out of the list.

    So none is twice in memory for long, where the caller keeps no other reference to them. Leaves
    that have `factors`, by their paths, are multiplied with them before.
    """
    found: list[Any] = []
    for path, spec in paths(models.module_of(config).spec(config)).items():
        leaf = leaves.pop(0)
        changes = factors.get(path, ())
        if spec.contract:
            if not leaf.is_fully_addressable:
                raise ConfigError(
                    f"no process of a group has all of {path}, so that {config.quant} can't be "
                    "made of it here; run jaxinfer quantize, and serve what it writes"
                )
            values = multiply(np.asarray(leaf), changes) if changes else np.asarray(leaf)
            leaf = put(path, values, spec, scheme=config.quant, sharding=sharding, by=rounding)
        elif changes:
            changed = multiply(np.asarray(leaf), changes).astype(leaf.dtype)
            leaf = put_leaf(changed, spec, sharding)
        found.append(leaf)
        progress("quantise", len(found), len(found) + len(leaves))
    return found


def put(
    path: str,
    leaf: np.ndarray,
    spec: ArraySpec,
    *,
    scheme: str,
    sharding: Sharding,
    by: Rounding = round_to_nearest,
) -> Any:
    """A leaf on its devices, quantised on the way where `scheme` asks for that."""
    if scheme == "none" or not spec.contract:
        return put_leaf(leaf, spec, sharding)
    found = quantise(
        path, leaf, contract=spec.contract, digits=digits_of(spec, scheme), rounding=by
    )
    described = describe(spec, scheme)
    return jax.tree.map(lambda part, one: put_leaf(part, one, sharding), found, described)


def put_leaf(leaf: np.ndarray, spec: ArraySpec, sharding: Sharding) -> jax.Array:
    """The leaf on its devices. It waits, so that the host never holds two leaves."""
    where = None if sharding is None else sharding(spec)
    if where is None or where.is_fully_addressable:
        return jax.block_until_ready(jax.device_put(leaf, where))
    # Other processes hold the other parts: each places its own, and none asks the others.
    return jax.block_until_ready(
        jax.make_array_from_callback(leaf.shape, where, lambda place: leaf[place])
    )


def _values(store: TensorStore, part: Part, dtype: np.dtype) -> np.ndarray:
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            values = store.read(part.tensor).astype(dtype, copy=False)
    except (OSError, ValueError, MemoryError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{store.where(part.tensor)} can't be read: {error}") from error
    if values.shape != part.shape:
        raise CheckpointError(
            f"{store.where(part.tensor)} has shape {list(values.shape)} where its header says "
            f"{list(part.shape)}"
        )
    num_bad = count_not_finite(values)
    if num_bad:
        raise CheckpointError(
            f"{store.where(part.tensor)} holds {num_bad} NaN or infinite values out of "
            f"{values.size} (in {dtype.name}); the file is damaged or overflows {dtype.name}"
        )
    return values


def count_not_finite(values: np.ndarray) -> int:
    """How many values are NaN or infinite; for bfloat16 by its bits, many times faster."""
    if values.dtype == jnp.bfloat16:
        exponent = np.uint16(0x7F80)
        return int(np.count_nonzero((values.view(np.uint16) & exponent) == exponent))
    return values.size - int(np.count_nonzero(np.isfinite(values)))
