"""The Llama family: Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen3, as data, then arithmetic."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int

from jaxinfer.config import ModelConfig
from jaxinfer.dims import Leaf
from jaxinfer.nn import attention, mlp, rope
from jaxinfer.nn.linear import project
from jaxinfer.nn.norm import rms_norm
from jaxinfer.nn.vocabulary import embed
from jaxinfer.parallel import WHOLE, Split
from jaxinfer.spec import ArraySpec


class Layer(NamedTuple):
    """One block."""

    attention_norm: Leaf  # [D]
    attention: attention.Attention
    mlp_norm: Leaf  # [D]
    mlp: mlp.Mlp


class Params(NamedTuple):
    """The whole model."""

    embedding: Leaf  # [V, D]
    layers: tuple[Layer, ...]
    final_norm: Leaf  # [D]
    head: Leaf | None  # [V, D]; None where the embedding serves as the head


def spec(config: ModelConfig) -> Params:
    """Describes every parameter."""
    norm = ArraySpec((config.d_model,), ("embed",), init="ones")
    table = ArraySpec((config.vocab_size, config.d_model), ("vocab", "embed"), contract=1)
    layer = Layer(norm, attention.spec(config), norm, mlp.spec(config))
    return Params(
        embedding=table,
        layers=(layer,) * config.num_layers,
        final_norm=norm,
        head=None if config.tie_embeddings else table,
    )


def forward(
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    attend: attention.Attend,
    *,
    config: ModelConfig,
    exact: bool = True,
    split: Split = WHOLE,
) -> Float[Array, "B T D"]:
    """Runs the blocks; returns the residual stream in float32, before the final norm.

    `attend(layer, q, k, v)` stores the layer's new keys and values and attends to all cached ones.
    Without `exact` a row's bits may depend on how many rows there are: see nn.linear. Where arrays
    are split over devices, `config` describes one device's part; each block sums over them twice.
    """
    x = embed(params.embedding, tokens, axis=split.vocab)
    rotation = rope.angles(positions, config=config)
    for index, layer in enumerate(params.layers):
        x = x + attention.apply(
            layer.attention,
            rms_norm(x, layer.attention_norm, eps=config.norm_eps, exact=exact),
            rotation,
            lambda q, k, v, index=index: attend(index, q, k, v),
            config=config,
            exact=exact,
            axis=split.heads,
        )
        normed = rms_norm(x, layer.mlp_norm, eps=config.norm_eps, exact=exact)
        x = x + mlp.apply(layer.mlp, normed, exact=exact, axis=split.ffw)
    return x


def head(
    params: Params, x: Float[Array, "... D"], *, config: ModelConfig, exact: bool = True
) -> Float[Array, "... V"]:
    """The logits of some rows of the residual stream, of the tokens that this device has."""
    table = params.embedding if params.head is None else params.head
    x = rms_norm(x, params.final_norm, eps=config.norm_eps, exact=exact)
    return project(x, table, exact=exact)
