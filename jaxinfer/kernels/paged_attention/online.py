"""Softmax over keys that come block by block: the arithmetic that the Pallas kernels share.

The running maximum is a whole number, and what was summed before fades by whole powers of two.
That is exact, so it does not matter whether a compiler rounds `old * fade + new` once or twice.
"""

import jax.numpy as jnp
from jax import Array, lax

NOTHING = -(2**24)
"""The top of a row that has seen no key yet; every whole number above it is a float32."""
LOG2_E = 1.4426950408889634


def new_top(top: Array, largest: Array) -> Array:
    """A whole number above `largest`, a row's greatest logit in this block, and not below `top`.

    A row that sees no key in the block has the logit -inf, and keeps its top.
    """
    least = jnp.maximum(largest, float(NOTHING))
    above = jnp.where(least > NOTHING, least.astype(jnp.int32) + 1, NOTHING)
    return jnp.maximum(top, above)


def base(top: Array) -> Array:
    """What to take from logits before 2^: finite where no key was seen, so that -inf stays so."""
    return jnp.where(top > NOTHING, top, 0).astype(jnp.float32)


def fade(old: Array, new: Array) -> Array:
    """2^(old - new) for old <= new, exactly; 0 below the range of float32."""
    bits = (jnp.maximum(old - new, -127) + 127) << 23
    return lax.bitcast_convert_type(bits, jnp.float32)


def capped(logits: Array, soft_cap: float) -> Array:
    """cap * tanh(logits / cap), for logits that are exponents of two."""
    cap = soft_cap * LOG2_E
    return logits if not soft_cap else cap * jnp.tanh(logits * (1 / cap))


def merge(top: Array, total: Array, out: Array) -> Array:
    """The softmax of rows whose keys were reduced in splits: the second to last axis of `out`.

    Splits are added in order, and one that saw no key adds nothing whatever its `out` holds; so
    the bits of a row depend on where splits begin, and not on how many there are.
    """
    merged_top = jnp.max(top, axis=-1)
    sum_of_weights = jnp.zeros(total.shape[:-1], jnp.float32)
    sum_of_values = jnp.zeros((*total.shape[:-1], out.shape[-1]), jnp.float32)
    for split in range(total.shape[-1]):
        share = fade(top[..., split], merged_top)
        seen = total[..., split] > 0
        sum_of_weights += jnp.where(seen, total[..., split] * share, 0.0)
        values = out[..., split, :] * share[..., None]
        sum_of_values += jnp.where(seen[..., None], values, 0.0)
    return finished(sum_of_weights[..., None], sum_of_values)


def finished(total: Array, out: Array) -> Array:
    """The quotient, and zeros for rows that saw no key."""
    return jnp.where(total > 0, out / jnp.where(total > 0, total, 1.0), 0.0)
