"""Self-attention of one block: projections, head norms, rotation; the cache is the caller's."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer import parallel
from jaxinfer.config import ModelConfig
from jaxinfer.dims import Leaf
from jaxinfer.nn import rope
from jaxinfer.nn.linear import project
from jaxinfer.nn.norm import rms_norm
from jaxinfer.parallel import Axis
from jaxinfer.spec import ArraySpec

Attend = Callable[..., jax.Array]
"""Stores k and v ([B, T, K, H]) and returns what q ([B, T, N, H]) reads, as [B, T, N, H]."""


class Attention(NamedTuple):
    """Queries, keys and values lie in one array, grouped by kv head: G queries, one k, one v."""

    qkv: Leaf  # [K, G+2, H, D]
    qkv_bias: Leaf | None  # [K, G+2, H]
    q_norm: Leaf | None  # [H]
    k_norm: Leaf | None  # [H]
    output: Leaf  # [D, N, H]
    output_bias: Leaf | None  # [D]


def spec(config: ModelConfig) -> Attention:
    """Describes the parameters."""
    group = config.num_heads // config.num_kv_heads + 2
    rows = (config.num_kv_heads, group, config.head_dim)
    axes = ("kv_heads", None, None)
    head_norm = ArraySpec((config.head_dim,), (None,), init="ones") if config.qk_norm else None
    return Attention(
        qkv=ArraySpec((*rows, config.d_model), (*axes, "embed"), contract=1),
        qkv_bias=ArraySpec(rows, axes, init="zeros") if config.qkv_bias else None,
        q_norm=head_norm,
        k_norm=head_norm,
        output=ArraySpec(
            (config.d_model, config.num_heads, config.head_dim),
            ("embed", "heads", None),
            contract=2,
        ),
        output_bias=ArraySpec((config.d_model,), ("embed",), init="zeros")
        if config.output_bias
        else None,
    )


def apply(
    params: Attention,
    x: Float[Array, "B T D"],
    rotation: rope.Rotation,
    attend: Attend,
    *,
    config: ModelConfig,
    exact: bool = True,
    axis: Axis = None,
) -> Float[Array, "B T D"]:
    """Attends with the new tokens' queries to everything that `attend` has in store.

    Where heads are split along `axis`, the config has those of one device.
    """
    rows, tokens, _ = x.shape
    both = project(x, params.qkv, params.qkv_bias, exact=exact)
    q = both[..., :-2, :].reshape(rows, tokens, config.num_heads, config.head_dim)
    k, v = both[..., -2, :], both[..., -1, :]
    if params.q_norm is not None and params.k_norm is not None:
        q = rms_norm(q, params.q_norm, eps=config.norm_eps, exact=exact)
        k = rms_norm(k, params.k_norm, eps=config.norm_eps, exact=exact)
    out = attend(rope.rotate(q, rotation), rope.rotate(k, rotation), v)
    out = parallel.all_sum(project(out, params.output, contract=2, exact=exact), axis)
    return out if params.output_bias is None else out + params.output_bias.astype(jnp.float32)
