"""Tiny random models on disk, as Hugging Face and llama.cpp would write them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
ARCHITECTURES = {
    "llama": {"attention_bias": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 16},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 2, "content": "</s>"}, {"id": 5, "content": "<|im_end|>"}],
    "model": {"type": "WordLevel", "vocab": {}, "unk_token": "?"},
}


def config(architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    """A config.json; a change to None drops the key."""
    document = CONFIG | ARCHITECTURES[architecture] | changes
    return {key: value for key, value in document.items() if value is not None}


def tensors(document: Mapping[str, Any], seed: int = 0) -> Tensors:
    """What a checkpoint with this config holds, float32 of values that bfloat16 holds too."""
    architecture = document["architectures"][0]
    width, hidden = document["hidden_size"], document["intermediate_size"]
    head = document["head_dim"]
    queries = document["num_attention_heads"] * head
    keys = document["num_key_value_heads"] * head
    table = (document["vocab_size"], width)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": table,
        "model.norm.weight": (width,),
    }
    if not document["tie_word_embeddings"]:
        shapes["lm_head.weight"] = table
    biased = "qkvo" if document.get("attention_bias") else ""
    biased = "qkv" if architecture == "Qwen2ForCausalLM" else biased
    for index in range(document["num_hidden_layers"]):
        at = f"model.layers.{index}."
        rows = {"q": queries, "k": keys, "v": keys, "o": width}
        for name, size in rows.items():
            shapes[f"{at}self_attn.{name}_proj.weight"] = (size, queries if name == "o" else width)
            if name in biased:
                shapes[f"{at}self_attn.{name}_proj.bias"] = (size,)
        if architecture == "Qwen3ForCausalLM":
            shapes[f"{at}self_attn.q_norm.weight"] = (head,)
            shapes[f"{at}self_attn.k_norm.weight"] = (head,)
        shapes[f"{at}mlp.gate_proj.weight"] = (hidden, width)
        shapes[f"{at}mlp.up_proj.weight"] = (hidden, width)
        shapes[f"{at}mlp.down_proj.weight"] = (width, hidden)
        shapes[f"{at}input_layernorm.weight"] = (width,)
        shapes[f"{at}post_attention_layernorm.weight"] = (width,)
    random = np.random.default_rng(seed)
    return {
        name: (random.integers(-127, 128, shape) / 64).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_hf(
    folder: Path,
    document: Mapping[str, Any] | None = None,
    values: Tensors | None = None,
    *,
    num_shards: int = 0,
) -> Tensors:
    """A folder in one file, or in shards with an index; returns its tensors."""
    document = config() if document is None else document
    values = tensors(document) if values is None else values
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(document))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    if not num_shards:
        save_file(values, folder / "model.safetensors")
        return values
    homes = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = dict(list(values.items())[shard::num_shards])
        save_file(part, folder / file)
        homes |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return values


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The llama.cpp name of a Hugging Face tensor."""
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, index, inner = stem.split(".", 3)
        return f"blk.{index}.{GGUF_NAMES[inner]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def permute(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's converter lays them, written out row by row."""
    rows = values.shape[0] // num_heads
    out = np.empty_like(values)
    for head in range(num_heads):
        for pair in range(rows // 2):
            for half in (0, 1):
                source = head * rows + half * (rows // 2) + pair
                out[head * rows + 2 * pair + half] = values[source]
    return out


def write_gguf(
    path: Path,
    document: Mapping[str, Any],
    values: Tensors,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: Mapping[str, Any] | None = None,
    more: Tensors | None = None,
) -> None:
    """A GGUF file; matrices are stored as `kind`, `extra` are float keys, `more` raw tensors."""
    name = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama"}.get(
        document["architectures"][0],
        document["architectures"][0].removesuffix("ForCausalLM").lower(),
    )
    writer = gguf.GGUFWriter(path, name)
    heads, keys = document["num_attention_heads"], document["num_key_value_heads"]
    writer.add_block_count(document["num_hidden_layers"])
    writer.add_context_length(document["max_position_embeddings"])
    writer.add_embedding_length(document["hidden_size"])
    writer.add_feed_forward_length(document["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_key_length(document["head_dim"])
    writer.add_value_length(document["head_dim"])
    writer.add_rope_dimension_count(document["head_dim"])
    writer.add_rope_freq_base(document["rope_theta"])
    writer.add_layer_norm_rms_eps(document["rms_norm_eps"])
    for key, value in (extra or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        (writer.add_uint32 if isinstance(value, int) else add)(key, value)
    _add_tokenizer(writer, document["vocab_size"])
    for hf_name, value in values.items():
        if name == "llama" and ".q_proj." in hf_name:
            value = permute(value, heads)
        if name == "llama" and ".k_proj." in hf_name:
            value = permute(value, keys)
        if value.ndim == 1:
            writer.add_tensor(gguf_name(hf_name), value)
        else:
            stored = gguf.quants.quantize(value, kind)
            writer.add_tensor(gguf_name(hf_name), stored, raw_dtype=kind)
    for raw_name, value in (more or {}).items():
        writer.add_tensor(raw_name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    tokens = ["<unk>", "<s>", "</s>"]
    tokens += [chr(ord("!") + place) for place in range(vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (vocab_size - 3))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
