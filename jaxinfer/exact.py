"""Small arrays made large: XLA:CPU computes few elements by other code, whose bits differ."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

MIN_ELEMENTS = 4096  # of an array that XLA:CPU sums, and takes the exp of, by its code for many


def enough_rows(width: int, rows: int) -> int:
    """At least `rows`, and so many that an array of rows of `width` elements is large."""
    return max(rows, -(-MIN_ELEMENTS // width))


def with_rows(x: Array, rows: int, *, axis: int = 0) -> Array:
    """With zero rows at the end, so that there are `rows`; the compiler can't see past them."""
    spare = rows - x.shape[axis]
    if spare <= 0:
        return x
    widths = [(0, spare if number == axis else 0) for number in range(x.ndim)]
    return lax.optimization_barrier(jnp.pad(x, widths))


def largest(x: Array) -> Array:
    """The largest absolute value over the last axis, kept as 1, in float32; NaN counts as infinite.

    Of 4,096 elements and more XLA:CPU's maximum leaves NaN out.
    """
    magnitudes = jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)).astype(jnp.float32)
    return jnp.max(magnitudes, axis=-1, keepdims=True)


def mean(x: Array, *, exact: bool = True) -> Array:
    """The mean over the last axis, kept as 1; with `exact` its bits don't depend on the rows."""
    *lead, width = x.shape
    rows = math.prod(lead)
    if not exact:
        return jnp.mean(x, axis=-1, keepdims=True)
    enough = enough_rows(width, rows)
    found = jnp.mean(with_rows(x.reshape(rows, width), enough), axis=-1)
    return found[:rows].reshape(*lead, 1)
