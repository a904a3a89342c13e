"""Normalisation."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxinfer.dims import Leaf
from jaxinfer.exact import mean


def rms_norm(
    x: Float[Array, "... D"], weight: Leaf, *, eps: float, exact: bool = True
) -> Float[Array, "... D"]:
    """x / rms(x) * weight, in float32 (Zhang and Sennrich 2019)."""
    mean_square = mean(jnp.square(x), exact=exact)
    return x * lax.rsqrt(mean_square + eps) * weight.astype(x.dtype)
