"""The largest few logits of each row, in native code: what XLA:CPU finds on one thread."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.kernels import native


def likeliest(
    logits: Float[Array, "B V"], count: int
) -> tuple[Float[Array, "B W"], Int[Array, "B W"]]:
    """What lax.top_k returns, bit for bit; of a row with NaN, places that mean nothing."""
    shape = (logits.shape[0], count)
    out = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)
    found, places = jax.ffi.ffi_call(native.library().target("likeliest"), out)(logits)
    return found, places
