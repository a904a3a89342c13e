"""Pages in int8: the codes of a head, and behind them the bits of the scale that they share."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from jaxinfer.exact import largest

SCALE_BYTES = 4  # of a float32
_LARGEST = 127
_SMALLEST = 1e-30  # a head whose values are all smaller counts as zero


def pack(x: Float[Array, "... H"]) -> Int8[Array, "... W"]:
    """Each head of each token by its own largest value, so that nothing else changes its bits.

    What is not finite stays so: its scale is not finite either.
    """
    top = largest(x)
    codes = jnp.round(x * jnp.where(top < _SMALLEST, 0.0, _LARGEST / top))
    bits = lax.bitcast_convert_type(top * jnp.float32(1 / _LARGEST), jnp.int8)
    return jnp.concatenate([codes.astype(jnp.int8), bits[..., 0, :]], axis=-1)


def unpack(
    codes: Int8[Array, "... H"], scale: Int8[Array, "... 4"], dtype: DTypeLike
) -> Float[Array, "... H"]:
    """The values that codes stand for, given the bits of their scale; rounded once, to `dtype`."""
    factor = lax.bitcast_convert_type(scale, jnp.float32)[..., None]
    return (codes.astype(jnp.float32) * factor).astype(dtype)
