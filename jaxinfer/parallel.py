"""Arrays split over devices, seen from inside a program: sums and gathers; nothing where whole."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Axis = str | None
"""The mesh axis that something is split along; None where every device has all of it."""


class Ordered(str):
    """An axis whose sums are added up here, device after device.

    A ring adds each stretch of an array in another order, so that a row's bits would depend on its
    place.
    """


class Split(NamedTuple):
    """What a program's devices have parts of: the sizes that it sees are those of one part."""

    heads: Axis = None  # query and kv heads, and with them the pages
    ffw: Axis = None
    vocab: Axis = None


WHOLE = Split()


def all_sum(x: Array, axis: Axis) -> Array:
    """The sum of what the devices have."""
    if not isinstance(axis, Ordered):
        return x if axis is None else lax.psum(x, axis)
    total, *parts = lax.all_gather(x, axis)
    for part in parts:
        total = total + part
    return total


def all_max(x: Array, axis: Axis) -> Array:
    """The largest of what the devices have, entry by entry."""
    return x if axis is None else lax.pmax(x, axis)


def gather(x: Array, axis: Axis, dimension: int = -1) -> Array:
    """The parts of all devices end to end along a dimension."""
    return x if axis is None else lax.all_gather(x, axis, axis=dimension % x.ndim, tiled=True)


def first(count: int, axis: str) -> Array:
    """The place in the whole of this device's first entry, where each device has `count`."""
    return lax.axis_index(axis) * count


def own(ids: Int[Array, "..."], count: int, axis: str) -> tuple[Array, Array]:
    """Which ids this device has among its `count`, and their places; 0 for another's."""
    places = ids - first(count, axis)
    is_own = (places >= 0) & (places < count)
    return is_own, jnp.where(is_own, places, 0)


def pick(x: Float[Array, "B V"], ids: Int[Array, " B"], axis: Axis) -> Float[Array, " B"]:
    """The entry of each row at the id given for it, whoever has it."""
    if axis is None:
        return jnp.take_along_axis(x, ids[:, None], axis=1)[:, 0]
    is_own, places = own(ids, x.shape[1], axis)
    found = jnp.take_along_axis(x, places[:, None], axis=1)[:, 0]
    return lax.psum(jnp.where(is_own, found, 0), axis)
