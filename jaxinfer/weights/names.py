"""Which Hugging Face tensors make which of our leaves."""

from collections.abc import Iterable
from typing import NamedTuple

from jaxinfer.config import ModelConfig


class Part(NamedTuple):
    """One tensor of a leaf: reshaped, it fills `leaf[place]`."""

    tensor: str
    shape: tuple[int, ...]
    place: tuple[int | slice, ...] = ()  # () is the whole leaf


Recipe = tuple[Part, ...]


def recipes(config: ModelConfig) -> dict[str, Recipe]:
    """The parts of every leaf, by the leaf's dotted path."""
    table = (config.vocab_size, config.d_model)
    whole = {
        "embedding": (Part("model.embed_tokens.weight", table),),
        "final_norm": (Part("model.norm.weight", (config.d_model,)),),
    }
    if not config.tie_embeddings:
        whole["head"] = (Part("lm_head.weight", table),)
    for index in range(config.num_layers):
        whole |= {
            f"layers.{index}.{leaf}": recipe
            for leaf, recipe in _layer(config, f"model.layers.{index}.").items()
        }
    return whole


def ignored(names: Iterable[str], config: ModelConfig) -> set[str]:
    """Those names that a checkpoint may hold though no leaf needs them.

    A tied head may be stored twice, and old checkpoints store the rotary frequencies, which
    follow from the config.
    """
    return {
        name
        for name in names
        if (name == "lm_head.weight" and config.tie_embeddings)
        or name.endswith(".rotary_emb.inv_freq")
    }


def _layer(config: ModelConfig, at: str) -> dict[str, Recipe]:
    width, hidden = config.d_model, config.d_ff
    layer = {
        "attention_norm": (Part(f"{at}input_layernorm.weight", (width,)),),
        "attention.qkv": _qkv(config, at, "weight", (width,)),
        "attention.output": (
            Part(f"{at}self_attn.o_proj.weight", (width, config.num_heads * config.head_dim)),
        ),
        "mlp_norm": (Part(f"{at}post_attention_layernorm.weight", (width,)),),
        "mlp.gate_up": (
            Part(f"{at}mlp.gate_proj.weight", (hidden, width), (0,)),
            Part(f"{at}mlp.up_proj.weight", (hidden, width), (1,)),
        ),
        "mlp.down": (Part(f"{at}mlp.down_proj.weight", (width, hidden)),),
    }
    if config.qkv_bias:
        layer["attention.qkv_bias"] = _qkv(config, at, "bias", ())
    if config.output_bias:
        layer["attention.output_bias"] = (Part(f"{at}self_attn.o_proj.bias", (width,)),)
    if config.qk_norm:
        head = (config.head_dim,)
        layer["attention.q_norm"] = (Part(f"{at}self_attn.q_norm.weight", head),)
        layer["attention.k_norm"] = (Part(f"{at}self_attn.k_norm.weight", head),)
    return layer


def _qkv(config: ModelConfig, at: str, kind: str, inner: tuple[int, ...]) -> Recipe:
    """[K, G+2, H, ...]: query head n belongs to kv head n // G, so a reshape groups them."""
    group = config.num_heads // config.num_kv_heads
    queries = (config.num_heads * config.head_dim, *inner)
    keys = (config.num_kv_heads * config.head_dim, *inner)
    every = slice(None)
    return (
        Part(f"{at}self_attn.q_proj.{kind}", queries, (every, slice(0, group))),
        Part(f"{at}self_attn.k_proj.{kind}", keys, (every, group)),
        Part(f"{at}self_attn.v_proj.{kind}", keys, (every, group + 1)),
    )
