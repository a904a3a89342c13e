"""What a Hugging Face folder says beside its weights: tokenizer, chat template, sampling advice."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxinfer.config import ModelConfig
from jaxinfer.errors import CheckpointError, InvalidRequest
from jaxinfer.host.request import SamplingParams
from jaxinfer.text.assets import TextAssets
from jaxinfer.weights.json_file import Keys, read_json

log = logging.getLogger(__name__)

# Advice that would change the tokens and that SamplingParams can't hold, with the neutral value.
NOT_APPLIED = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beams": 1,
}


def text_assets(folder: Path) -> TextAssets:
    """The tokenizer and its templates."""
    tokenizer_json = _read_text(folder / "tokenizer.json")
    if tokenizer_json is None:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'} is missing; jaxinfer needs the tokenizer as the JSON "
            "of the tokenizers library (save_pretrained of a fast tokenizer writes it)"
        )
    path = folder / "tokenizer_config.json"
    keys = Keys(read_json(path) if path.exists() else {}, path)
    template = _read_text(folder / "chat_template.jinja")
    return TextAssets(
        tokenizer_json=tokenizer_json,
        chat_template=_chat_template(keys) if template is None else template,
        bos_token=_token(keys, "bos_token"),
        eos_token=_token(keys, "eos_token"),
    )


def sampling_defaults(folder: Path) -> SamplingParams:
    """What generation_config.json advises; the same values as Hugging Face would sample with."""
    path = folder / "generation_config.json"
    if not path.exists():
        return SamplingParams()
    keys = Keys(read_json(path), path)
    for key, neutral in NOT_APPLIED.items():
        if keys.get(key) not in (None, neutral):
            log.warning("%s: %s = %r is not applied by jaxinfer", path, key, keys.get(key))
    is_greedy = keys.get("do_sample") is not None and not keys.flag("do_sample")
    if is_greedy:
        return SamplingParams(temperature=0.0)
    try:
        return SamplingParams(
            temperature=_number(keys, "temperature"),
            top_k=None if keys.get("top_k") is None else keys.count("top_k", low=0),
            top_p=_number(keys, "top_p"),
            min_p=_number(keys, "min_p"),
        )
    except InvalidRequest as error:
        raise CheckpointError(f"{path}: {error}") from error


def with_end_tokens(config: ModelConfig, folder: Path, text: TextAssets) -> ModelConfig:
    """The config with every end token: its own, generation_config.json's, and the tokenizer's.

    Chat models often name their end-of-turn token in one of the three only.
    """
    path = folder / "generation_config.json"
    advised = Keys(read_json(path), path).token_ids("eos_token_id") if path.exists() else ()
    named = _added_token_id(text, folder)
    ids = dict.fromkeys((*config.eos_token_ids, *advised, *named))
    for token in ids:
        if token >= config.vocab_size:
            raise CheckpointError(
                f"{folder}: end token {token} is outside the vocabulary of {config.vocab_size}"
            )
    return replace(config, eos_token_ids=tuple(ids))


def _number(keys: Keys, key: str) -> float | None:
    return None if keys.get(key) is None else keys.number(key)


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error


def _chat_template(keys: Keys) -> str | None:
    """The template; of several, the one named default."""
    value = keys.get("chat_template")
    if not isinstance(value, list):
        return keys.text("chat_template")
    named: dict[str, Any] = {}
    for entry in value:
        if not isinstance(entry, dict) or not {"name", "template"} <= set(entry):
            raise keys.unsupported("chat_template", "each entry must have a name and a template")
        named[entry["name"]] = entry["template"]
    template = named.get("default")
    if not isinstance(template, str):
        raise keys.unsupported("chat_template", "one entry must be named default")
    return template


def _token(keys: Keys, key: str) -> str | None:
    value = keys.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise keys.unsupported(key, "it must be a string or an added token with its content")
    return value


def _added_token_id(text: TextAssets, folder: Path) -> tuple[int, ...]:
    """The id of the tokenizer's end token, where it is an added token as end tokens are."""
    path = folder / "tokenizer.json"
    try:
        added = json.loads(text.tokenizer_json)["added_tokens"] if text.eos_token else []
        return tuple(entry["id"] for entry in added if entry["content"] == text.eos_token)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not the JSON of a tokenizer: {error!r}") from error
