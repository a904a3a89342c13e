"""The rows of a table that has one for each token, whole or split over devices."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer import parallel
from jaxinfer.dims import Leaf
from jaxinfer.nn import linear
from jaxinfer.parallel import Axis


def embed(table: Leaf, tokens: Int[Array, "B T"], *, axis: Axis = None) -> Float[Array, "B T D"]:
    """The rows for some token ids, in float32; each comes from the device that has it."""
    if axis is None:
        return linear.embed(table, tokens)
    is_own, places = parallel.own(tokens, table.shape[0], axis)
    rows = jnp.where(is_own[..., None], linear.embed(table, places), 0.0)
    return parallel.all_sum(rows, axis)
