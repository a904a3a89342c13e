"""The gated feed-forward layer."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from jaxinfer import parallel
from jaxinfer.config import ModelConfig
from jaxinfer.dims import Leaf
from jaxinfer.nn.linear import project
from jaxinfer.parallel import Axis
from jaxinfer.spec import ArraySpec


class Mlp(NamedTuple):
    """Gate and up lie in one array, so that one matmul reads both."""

    gate_up: Leaf  # [2, F, D]
    down: Leaf  # [D, F]


def spec(config: ModelConfig) -> Mlp:
    """Describes the parameters."""
    return Mlp(
        gate_up=ArraySpec((2, config.d_ff, config.d_model), (None, "ffw", "embed"), contract=1),
        down=ArraySpec((config.d_model, config.d_ff), ("embed", "ffw"), contract=1),
    )


def apply(
    params: Mlp, x: Float[Array, "B T D"], *, exact: bool = True, axis: Axis = None
) -> Float[Array, "B T D"]:
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020); `axis` is that of F, if split."""
    both = project(x, params.gate_up, exact=exact)
    out = project(jax.nn.silu(both[..., 0, :]) * both[..., 1, :], params.down, exact=exact)
    return parallel.all_sum(out, axis)
