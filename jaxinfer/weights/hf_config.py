"""Strict translation of a Hugging Face config.json into a ModelConfig."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxinfer.config import ModelConfig, RopeScaling
from jaxinfer.errors import ConfigError, UnsupportedModel
from jaxinfer.weights.json_file import Keys

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

# Keys that change the arithmetic in a way that jaxinfer has not: only these values are neutral.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "embedding_multiplier": (None, 1),
    "final_logit_softcapping": (None,),
    "hidden_act": ("silu",),
    "is_encoder_decoder": (None, False),
    "logits_scaling": (None, 1),
    "mlp_bias": (None, False),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "partial_rotary_factor": (None, 1),
    "quantization_config": (None,),
    "residual_multiplier": (None, 1),
    "rope_interleaved": (None, False),
    "use_mrope": (None, False),
}
ROPE_FIELDS = {"llama3": ("low_freq_factor", "high_freq_factor"), "linear": (), "default": ()}


def translate(document: Mapping[str, Any], path: Path) -> ModelConfig:
    """The ModelConfig that `document`, read from `path`, describes.

    Raises UnsupportedModel, naming file, key and value, where jaxinfer would compute another
    model than the one that was trained. Keys that change no number are not looked at.
    """
    keys = Keys(document, path)
    architecture = _architecture(keys)
    _check_neutral(keys)
    heads = keys.count("num_attention_heads")
    width = keys.count("hidden_size")
    layers = keys.count("num_hidden_layers")
    theta, scaling = _rope(keys)
    bias = _biases(keys, architecture)
    try:
        return ModelConfig(
            architecture=architecture,
            vocab_size=keys.count("vocab_size"),
            num_layers=layers,
            d_model=width,
            d_ff=keys.count("intermediate_size"),
            num_heads=heads,
            num_kv_heads=keys.count("num_key_value_heads", heads),
            head_dim=_head_dim(keys, architecture, width, heads),
            max_positions=keys.count("max_position_embeddings"),
            norm_eps=keys.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=keys.flag("tie_word_embeddings"),
            qkv_bias=bias[0],
            output_bias=bias[1],
            qk_norm=architecture == "qwen3",
            layer_windows=_windows(keys, architecture, layers),
            bos_token_id=keys.token_id("bos_token_id"),
            eos_token_ids=keys.token_ids("eos_token_id"),
        )
    except ConfigError as error:
        raise UnsupportedModel(f"{path}: {error}") from error


def _architecture(keys: Keys) -> str:
    names = keys.get("architectures")
    known = ", ".join(ARCHITECTURES)
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise keys.unsupported("architectures", f"it must name one of {known}")
    return ARCHITECTURES[names[0]]


def _check_neutral(keys: Keys) -> None:
    for key, allowed in NEUTRAL.items():
        if key == "hidden_act" and key not in keys:
            continue
        if keys.get(key) not in allowed:
            only = " or ".join(repr(value) for value in allowed if value is not None)
            raise keys.unsupported(key, f"it must be {only or 'absent'}")


def _head_dim(keys: Keys, architecture: str, width: int, heads: int) -> int:
    if architecture == "qwen3":
        return keys.count("head_dim", 128)  # Qwen3Config's own default
    if keys.get("head_dim") is None and width % heads:
        raise keys.unsupported(
            "hidden_size", f"{heads} attention heads don't divide it and head_dim is absent"
        )
    return keys.count("head_dim", width // heads)


def _biases(keys: Keys, architecture: str) -> tuple[bool, bool]:
    """(qkv_bias, output_bias): Qwen2 has the first always, Mistral none."""
    if architecture == "qwen2":
        return True, False
    bias = keys.flag("attention_bias")
    if bias and architecture == "mistral":
        raise keys.unsupported("attention_bias", "a mistral model has none")
    return bias, bias


def _rope(keys: Keys) -> tuple[float, RopeScaling]:
    """Theta and stretching, from `rope_parameters` or from the older pair of keys."""
    new, old = keys.section("rope_parameters"), keys.section("rope_scaling")
    theta = keys.number("rope_theta", 10000.0)
    scaling = RopeScaling() if old is None else _rope_scaling(old)
    if new is None:
        return theta, scaling
    if any(isinstance(value, dict) for value in new.values()):
        raise keys.unsupported("rope_parameters", "one rope for all layers is supported")
    newer = _rope_scaling(new)
    if old is not None and newer != scaling:
        raise keys.unsupported("rope_scaling", "rope_parameters says otherwise; keep one of them")
    return new.number("rope_theta", theta), newer


def _rope_scaling(keys: Keys) -> RopeScaling:
    kind = keys.get("rope_type") or keys.get("type") or "default"
    if kind not in ROPE_FIELDS:
        raise keys.unsupported(
            "rope_type" if "rope_type" in keys else "type",
            f"it must be one of {', '.join(sorted(ROPE_FIELDS))}",
        )
    if keys.get("partial_rotary_factor") not in (None, 1):
        raise keys.unsupported("partial_rotary_factor", "it must be 1")
    if keys.get("mrope_section") is not None:
        raise keys.unsupported("mrope_section", "it must be absent")
    if kind == "default":
        return RopeScaling()
    factor = keys.number("factor", low=1.0)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    low, high = (keys.number(key, low=0.0) for key in ROPE_FIELDS["llama3"])
    if low >= high:
        raise keys.unsupported("low_freq_factor", f"it must be below high_freq_factor = {high}")
    return RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=keys.count("original_max_position_embeddings"),
    )


def _windows(keys: Keys, architecture: str, layers: int) -> tuple[int, ...]:
    """The sliding window of each layer, as the architecture's own rules have it."""
    types = keys.get("layer_types")
    if architecture == "llama":
        slides = [False] * layers if types is None else _slides(keys, layers)
        if any(slides) or keys.get("sliding_window") is not None:
            key = "layer_types" if any(slides) else "sliding_window"
            raise keys.unsupported(key, "a llama model has no sliding window")
        return ()
    window = keys.count("sliding_window", 0, low=0)
    if architecture != "mistral" and not keys.flag("use_sliding_window"):
        window = 0
    if types is not None:
        slides = _slides(keys, layers)
        if any(slides) and not window:
            raise keys.unsupported("layer_types", "it has sliding layers without a sliding_window")
    elif architecture == "mistral":
        slides = [True] * layers
    else:
        first = keys.count("max_window_layers", 28, low=0)
        slides = [index >= first for index in range(layers)]
    return tuple(window * slide for slide in slides) if window and any(slides) else ()


def _slides(keys: Keys, layers: int) -> list[bool]:
    types = keys.get("layer_types")
    known = {"full_attention": False, "sliding_attention": True}
    if not isinstance(types, list) or len(types) != layers or not set(types) <= set(known):
        raise keys.unsupported(
            "layer_types", f"it must list {' or '.join(known)} for each of {layers} layers"
        )
    return [known[kind] for kind in types]
