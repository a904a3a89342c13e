"""The archive from which a gateway builds the served model's tokenizer and chat template."""

import hashlib
import io
import json
import zipfile
from typing import Any

from jaxinfer.errors import CheckpointError
from jaxinfer.server.served import ServedModel
from jaxinfer.text.assets import TextAssets

MADE = (1980, 1, 1, 0, 0, 0)  # the same archive each time, so that its digest says something


def archive(served: ServedModel) -> tuple[bytes, str]:
    """The zip file's bytes and their SHA-256; what a Hugging Face folder has of a tokenizer."""
    assert served.text is not None
    files = {
        "tokenizer.json": tokenizer_json(served.text),
        "tokenizer_config.json": json.dumps(tokenizer_config(served), ensure_ascii=False),
        "config.json": json.dumps(model_config(served)),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as written:
        for name, text in files.items():
            entry = zipfile.ZipInfo(name, MADE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            written.writestr(entry, text)
    data = buffer.getvalue()
    return data, hashlib.sha256(data).hexdigest()


def tokenizer_json(text: TextAssets) -> str:
    """The tokenizer, with a step that puts the first token where ours puts it itself."""
    if not text.add_bos:
        return text.tokenizer_json
    document = json.loads(text.tokenizer_json)
    token = text.bos_token
    token_id = _token_id(document, token)
    first = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": token, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [
            {"SpecialToken": {"id": token, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
    before = document.get("post_processor")
    both = {"type": "Sequence", "processors": [before, first]}
    return json.dumps({**document, "post_processor": both if before else first})


def tokenizer_config(served: ServedModel) -> dict[str, Any]:
    """What transformers would read beside the tokenizer; only what we know."""
    assert served.text is not None
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": served.text.add_bos,
        "bos_token": served.text.bos_token,
        "eos_token": served.text.eos_token,
        "chat_template": served.text.chat_template,
        "model_max_length": served.limits.max_seq_len,
    }
    return {name: value for name, value in values.items() if value is not None}


def model_config(served: ServedModel) -> dict[str, Any]:
    """What says which family a model is of, and where its answers end."""
    return {
        "model_type": served.config.architecture,
        "architectures": [served.config.architecture],
        "vocab_size": served.limits.vocab_size,
        "max_position_embeddings": served.limits.max_seq_len,
        "eos_token_id": list(served.limits.eos_token_ids),
    }


def _token_id(document: dict[str, Any], token: str | None) -> int:
    added = {entry["content"]: entry["id"] for entry in document.get("added_tokens", ())}
    vocabulary = document["model"]["vocab"]
    found = added.get(token, vocabulary.get(token) if isinstance(vocabulary, dict) else None)
    if found is None:
        raise CheckpointError(f"bos_token is {token!r}, which the tokenizer's vocabulary lacks")
    return found
