"""Queries as the kernels take them: those that share a kv head are rows of one matrix."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.kernels.paged_attention.online import LOG2_E


def grouped(q: Float[Array, "B T N H"], num_kv_heads: int, *, tile: int) -> Float[Array, "B K R H"]:
    """Scaled, so that logits are exponents of two, and padded to whole tiles of rows.

    Row t * G + g of kv head k is query t of head k * G + g.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    group = num_heads // num_kv_heads
    q = (q * (head_dim**-0.5 * LOG2_E)).reshape(batch, num_queries, num_kv_heads, group, head_dim)
    rows = jnp.swapaxes(q, 1, 2).reshape(batch, num_kv_heads, num_queries * group, head_dim)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % tile), (0, 0)))


def ungrouped(
    out: Float[Array, "B K R H"], lengths: Int[Array, " B"], *, num_queries: int, group: int
) -> Float[Array, "B T N H"]:
    """The way back; queries past a row's length are zeros, whatever was computed for them."""
    batch, num_kv_heads, _, head_dim = out.shape
    out = out[:, :, : num_queries * group]
    out = out.reshape(batch, num_kv_heads, num_queries, group, head_dim)
    out = jnp.swapaxes(out, 1, 2).reshape(batch, num_queries, num_kv_heads * group, head_dim)
    is_real = jnp.arange(num_queries)[None, :] < lengths[:, None]
    return jnp.where(is_real[..., None, None], out, 0.0)
