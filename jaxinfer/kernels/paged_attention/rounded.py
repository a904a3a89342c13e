"""Pages in int8: the codes of each head of each token, and the scale that they share.

On a CPU the bits of a scale lie behind its codes, where a read finds both. Kernels that copy pages
whole find scales in a pool of their own: rows of codes are whole lanes then, and copies aligned.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from jaxinfer.dims import Leaf
from jaxinfer.exact import largest

SCALE_BYTES = 4  # of a float32
_LARGEST = 127
_SMALLEST = 1e-30  # a head whose values are all smaller counts as zero


class Rounded(NamedTuple):
    """Heads whose scales lie apart; as a pool [K, P, C, H] and [K, P, 1, C]."""

    codes: Leaf
    scales: Leaf  # float32


def round_heads(x: Float[Array, "... H"]) -> Rounded:
    """Each head of each token by its own largest value, so that nothing else changes its bits.

    What is not finite stays so: its scale is not finite either. Scales are [..., 1].
    """
    top = largest(x)
    codes = jnp.round(x * jnp.where(top < _SMALLEST, 0.0, _LARGEST / top))
    return Rounded(codes.astype(jnp.int8), top * jnp.float32(1 / _LARGEST))


def pack(x: Float[Array, "... H"]) -> Int8[Array, "... W"]:
    """The same with the bits of each scale behind its codes."""
    codes, scales = round_heads(x)
    bits = lax.bitcast_convert_type(scales, jnp.int8)
    return jnp.concatenate([codes, bits[..., 0, :]], axis=-1)


def unpack(
    codes: Int8[Array, "... H"], scale: Int8[Array, "... 4"], dtype: DTypeLike
) -> Float[Array, "... H"]:
    """The values that codes stand for, given the bits of their scale; rounded once, to `dtype`."""
    factor = lax.bitcast_convert_type(scale, jnp.float32)[..., None]
    return (codes.astype(jnp.float32) * factor).astype(dtype)


def values_dtype(pages: Leaf, load: Callable[..., Array]) -> Any:
    """What the values of pages are multiplied in, given their `load` (see paged attention)."""
    if not isinstance(pages, Rounded):
        return jax.eval_shape(load, jax.ShapeDtypeStruct((8, 128), pages.dtype)).dtype
    parts = (jax.ShapeDtypeStruct((8, size), jnp.int8) for size in (128, SCALE_BYTES))
    return jax.eval_shape(load, *parts).dtype
