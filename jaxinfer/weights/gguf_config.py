"""Translates the metadata of a GGUF file into a ModelConfig."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.config import ModelConfig, RopeScaling
from jaxinfer.errors import ConfigError, UnsupportedModel
from jaxinfer.nn.rope import inverse_frequencies
from jaxinfer.weights.json_file import Keys

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral files call themselves llama
TRAINED_LENGTHS = (8192, 4096, 2048, 16384, 32768)  # that llama3 stretching may have started from

# Keys (after the architecture's name) that jaxinfer has no arithmetic for: neutral values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
}


def translate(
    metadata: Mapping[str, Any],
    path: Path,
    *,
    tensor_names: frozenset[str],
    rope_factors: np.ndarray | None,
) -> ModelConfig:
    """The ModelConfig of a file; `rope_factors` is its rope_freqs.weight, if it has one."""
    whole = Keys(metadata, path)
    architecture = whole.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise whole.unsupported("general.architecture", f"it must be {' or '.join(ARCHITECTURES)}")
    if whole.count("split.count", 1, low=0) > 1:
        raise whole.unsupported("split.count", "merge the parts into one file first")
    keys = _under(metadata, path, f"{architecture}.")
    for key, allowed in NEUTRAL.items():
        if key in keys and keys[key] not in allowed:
            raise keys.unsupported(key, f"it must be {allowed[-1]!r} or absent")
    heads, width = keys.count("attention.head_count"), keys.count("embedding_length")
    layers = keys.count("block_count")
    head_dim = _head_dim(keys, width, heads)
    tokens = metadata.get("tokenizer.ggml.tokens") or ()
    try:
        config = ModelConfig(
            architecture=architecture,
            vocab_size=keys.count("vocab_size", len(tokens)),
            num_layers=layers,
            d_model=width,
            d_ff=keys.count("feed_forward_length"),
            num_heads=heads,
            num_kv_heads=keys.count("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_positions=keys.count("context_length"),
            norm_eps=_shortest(keys.number("attention.layer_norm_rms_epsilon")),
            rope_theta=_shortest(keys.number("rope.freq_base", 10000.0)),
            rope_scaling=_rope_scaling(keys),
            tie_embeddings="output.weight" not in tensor_names,
            qkv_bias="blk.0.attn_q.bias" in tensor_names,
            output_bias="blk.0.attn_output.bias" in tensor_names,
            qk_norm=architecture == "qwen3",
            layer_windows=_windows(keys, architecture, layers),
            bos_token_id=whole.token_id("tokenizer.ggml.bos_token_id"),
            eos_token_ids=_end_tokens(whole),
        )
    except ConfigError as error:
        raise UnsupportedModel(f"{path}: {error}") from error
    return config if rope_factors is None else _with_rope_factors(config, rope_factors, path)


def _under(metadata: Mapping[str, Any], path: Path, prefix: str) -> Keys:
    inner = {
        key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)
    }
    return Keys(inner, path, prefix)


def _shortest(value: float) -> float:
    """The shortest decimal with the same float32, so that 9.99999974e-06 reads 1e-05 again."""
    return float(str(np.float32(value)))


def _head_dim(keys: Keys, width: int, heads: int) -> int:
    head_dim = keys.count("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.count(key, head_dim) != head_dim:
            raise keys.unsupported(key, f"it must be the head size, {head_dim}")
    return head_dim


def _rope_scaling(keys: Keys) -> RopeScaling:
    kind = keys.text("rope.scaling.type")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if kind is None:
        kind = "linear" if factor not in (0.0, 1.0) else "none"
    if kind not in ("none", "linear"):
        raise keys.unsupported("rope.scaling.type", "it must be none or linear")
    return RopeScaling() if kind == "none" else RopeScaling(kind="linear", factor=factor)


def _windows(keys: Keys, architecture: str, layers: int) -> tuple[int, ...]:
    """A window in a llama file is Mistral's, on every layer."""
    window = keys.count("attention.sliding_window", 0, low=0)
    if window and architecture != "llama":
        raise keys.unsupported("attention.sliding_window", "the file says not in which layers")
    return (window,) * layers if window else ()


def _end_tokens(whole: Keys) -> tuple[int, ...]:
    """The end of text, of a turn, and of a message, each once."""
    kinds = ("eos", "eot", "eom")
    ids = (whole.token_id(f"tokenizer.ggml.{kind}_token_id") for kind in kinds)
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def _with_rope_factors(config: ModelConfig, factors: np.ndarray, path: Path) -> ModelConfig:
    """Recognises the stretching of Llama 3.1 in the divisors of the frequencies.

    A GGUF file stores these divisors and not the numbers that they were computed from, so the
    known ones are tried.
    """
    plain = inverse_frequencies(config)
    top = float(factors.max(initial=1.0))
    tries = [
        RopeScaling(),
        RopeScaling(kind="linear", factor=top),
        *(RopeScaling("llama3", top, 1.0, 4.0, length) for length in TRAINED_LENGTHS),
    ]
    for scaling in tries:
        stretched = inverse_frequencies(replace(config, rope_scaling=scaling))
        if factors.shape == plain.shape and np.allclose(plain / stretched, factors, rtol=1e-3):
            return replace(config, rope_scaling=scaling)
    raise UnsupportedModel(
        f"{path}: tensor rope_freqs.weight, {list(factors.shape)} with values from "
        f"{factors.min(initial=top):g} to {top:g}, is not the rope scaling of Llama 3.1 (low 1, "
        f"high 4, trained on one of {TRAINED_LENGTHS} tokens); use the Hugging Face folder"
    )
