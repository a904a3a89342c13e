"""Normalisation."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxinfer.dims import Leaf


def rms_norm(x: Float[Array, "... D"], weight: Leaf, *, eps: float) -> Float[Array, "... D"]:
    """x / rms(x) * weight, in float32 (Zhang and Sennrich 2019)."""
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * lax.rsqrt(mean_square + eps) * weight.astype(x.dtype)
