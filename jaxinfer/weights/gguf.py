"""Opens a GGUF file: metadata, tokenizer, and tensors dequantised one at a time.

Every start reads the file anew, into the dtype that is asked for: a hidden copy in the cache would
take four times the disk. `weights.save` converts once, on purpose.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jaxinfer.config import ModelConfig
from jaxinfer.errors import CheckpointError, UnsupportedModel
from jaxinfer.host.request import SamplingParams
from jaxinfer.text import gguf_tokenizer
from jaxinfer.weights import gguf_config
from jaxinfer.weights.source import Source

ROPE_FACTORS = "rope_freqs.weight"
GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
PERMUTED = re.compile(r"\.self_attn\.([qk])_proj\.")


class StrictReader(gguf.GGUFReader):
    """A reader that stops where the file stops; its parent reads on, at worst for ever."""

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise EOFError(f"{end} bytes needed, {len(self.data)} are there")
        return super()._get(int(offset), dtype, count, override_order)


class GgufStore:
    """The tensors of a file by their Hugging Face names, in the Hugging Face layout."""

    def __init__(self, path: Path, tensors: dict[str, Any], config: ModelConfig) -> None:
        self._path = path
        self._config = config
        self._tensors = {
            _hf_name(name): tensor for name, tensor in tensors.items() if name != ROPE_FACTORS
        }

    def names(self) -> Iterable[str]:
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str) -> np.ndarray:
        values = _dequantise(self._tensors[name], self.where(name))
        permuted = PERMUTED.search(name) if self._config.architecture == "llama" else None
        if permuted is None:
            return values
        config = self._config
        return unpermute(values, config.num_heads if permuted[1] == "q" else config.num_kv_heads)

    def where(self, name: str) -> str:
        tensor = self._tensors.get(name)
        return f"{self._path}: tensor {_gguf_name(name) if tensor is None else tensor.name}"


def open_file(path: Path) -> tuple[Source, GgufStore]:
    """Reads the metadata and no weight; a large vocabulary makes this take seconds."""
    reader = _open(path)
    metadata = _metadata(reader, path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factors = tensors.get(ROPE_FACTORS)
    config = gguf_config.translate(
        metadata,
        path,
        tensor_names=frozenset(tensors),
        rope_factors=None
        if factors is None
        else _dequantise(factors, f"{path}: tensor {ROPE_FACTORS}"),
    )
    try:
        text = gguf_tokenizer.from_metadata(
            {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
        )
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error
    source = Source(
        name=path.stem,
        path=path,
        kind="gguf",
        config=config,
        text=text,
        sampling=SamplingParams(),  # the format has no place for advice on sampling
        num_bytes=path.stat().st_size,
    )
    return source, GgufStore(path, tensors, config)


def unpermute(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k from llama.cpp's order (rotated pairs adjacent) to halves, per head."""
    rows, *inner = values.shape
    pairs = values.reshape(num_heads, rows // num_heads // 2, 2, *inner)
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _open(path: Path) -> gguf.GGUFReader:
    try:
        with np.errstate(over="ignore"):
            return StrictReader(path)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, EOFError) as error:
        raise CheckpointError(
            f"{path} is not a whole GGUF file: {error}; copy or download it again"
        ) from error


def _metadata(reader: gguf.GGUFReader, path: Path) -> dict[str, Any]:
    try:
        return {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path} has damaged metadata: {error}") from error


def _dequantise(tensor: Any, where: str) -> np.ndarray:
    """The values in float32 (float16 files too), shaped as in Hugging Face."""
    try:
        with np.errstate(all="ignore"):
            return gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UnsupportedModel(
            f"{where} is stored as {tensor.tensor_type.name}, which the gguf package can't "
            "dequantise"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{where} is damaged: {error}") from error


def _hf_name(name: str) -> str:
    """Unknown names stay as they are, and are refused as such."""
    stem, _, kind = name.rpartition(".")
    if stem in GLOBAL_NAMES:
        return f"{GLOBAL_NAMES[stem]}.{kind}"
    layer = LAYER_NAME.fullmatch(name)
    if layer is None or layer[2] not in LAYER_NAMES:
        return name
    return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{layer[3]}"


def _gguf_name(name: str) -> str:
    """The other way round, for the error about a tensor that is not there."""
    stem, _, kind = name.rpartition(".")
    for own, theirs in GLOBAL_NAMES.items():
        if stem == theirs:
            return f"{own}.{kind}"
    for own, theirs in LAYER_NAMES.items():
        if stem.endswith(f".{theirs}"):
            return f"blk.{stem.split('.')[2]}.{own}.{kind}"
    return name
