"""A tiny random model on disk, with tokenizer and chat template: what a command line names."""

import json
from pathlib import Path
from typing import Any

from jaxinfer import weights
from jaxinfer.config import ModelConfig
from jaxinfer.host.request import SamplingParams
from jaxinfer.text.assets import TextAssets
from jaxinfer.weights import Checkpoint
from tests import tiny

CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
SETTINGS = """
[engine]
max_seq_len = 256
prefill_chunks = [8, 16]
compute_dtype = "float32"
attention_block = 32
"""


def save(folder: Path, model: ModelConfig = tiny.MODEL, settings: str = SETTINGS) -> Path:
    """Writes the model and a settings file for it; returns the model's folder."""
    checkpoint = Checkpoint(
        name="tiny",
        config=model,
        params=tiny.params(model=model),
        text=TextAssets(tokenizer_json=tokenizer_json(), chat_template=CHAT_TEMPLATE),
        sampling=SamplingParams(),
    )
    (folder / "tiny.toml").write_text(settings)
    return weights.save(checkpoint, folder / "tiny")


def tokenizer_json() -> str:
    """One token a byte, in the words of the `tokenizers` library."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    document: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {letters[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }
    return json.dumps(document)
