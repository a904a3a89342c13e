"""Tiny tokenizers of every kind that jaxinfer reads, and the real one where it is at hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxinfer.text.assets import TextAssets
from jaxinfer.text.gguf_tokenizer import from_metadata
from jaxinfer.text.tokenizer import Tokenizer
from jaxinfer.weights.demo import place

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind.",
    "Pack my box with five dozen liquor jugs; 12345 of them!",
    "Über den Wolken muß die Freiheit wohl grenzenlos sein — naïve café 你好 😀.",
)
REFERENCE = Path(__file__).parents[1] / "golden" / "smollm2-135m" / "reference.json"
KINDS = ("byte_level", "llama", "gemma", "metaspace", "words")


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return Tokenizer(_byte_level())


@pytest.fixture(scope="session")
def llama() -> Tokenizer:
    return Tokenizer(from_metadata(sentence_piece_metadata()))


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each kind of decoder in turn."""
    makers = {
        "byte_level": _byte_level,
        "llama": lambda: from_metadata(sentence_piece_metadata()),
        "gemma": lambda: from_metadata(
            sentence_piece_metadata() | {"tokenizer.ggml.add_space_prefix": False}
        ),
        "metaspace": _metaspace,
        "words": _words,
    }
    return Tokenizer(makers[request.param]())


@pytest.fixture(scope="session")
def sentence_piece() -> dict[str, Any]:
    """GGUF metadata of a small Llama 2 style vocabulary."""
    return sentence_piece_metadata()


@pytest.fixture(scope="session")
def reference() -> Mapping[str, Any]:
    """Token ids of ten prompts, made with another library."""
    return json.loads(REFERENCE.read_text())


@pytest.fixture(scope="session")
def smollm2_json() -> str:
    """The demo model's tokenizer, where a first run has left it in the user's cache."""
    path = place("smollm2-135m") / "tokenizer.json"
    if not path.exists():
        pytest.skip("the demo model isn't in the cache; `jaxinfer generate` once fetches it")
    return path.read_text(encoding="utf-8")


def sentence_piece_metadata() -> dict[str, Any]:
    words = ["▁", "▁t", "▁th", "▁the", "he", "▁d", "▁do", "▁dog", "og", "▁▁", "an", "▁an", "▁and"]
    letters = "abcdefghijklmnopqrstuvwxyz.,!"
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256
    tokens += [*words, *letters, "<think>", "<|im_end|>"]
    types += [1] * (len(words) + len(letters)) + [4, 3]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def _byte_level() -> TextAssets:
    """As Llama 3 and Qwen do it, with the padding of somebody's training run left in."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=alphabet,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    model.train_from_iterator(SENTENCES, trainer)
    model.add_tokens(["<think>", "two words"])
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", model.token_to_id("<s>"))]
    )
    model.enable_padding(length=64)
    model.enable_truncation(8)
    return TextAssets(model.to_str(), bos_token="<s>", eos_token="</s>")


def _metaspace() -> TextAssets:
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<s>"], show_progress=False)
    model.train_from_iterator(SENTENCES, trainer)
    model.add_tokens(["▁▁", "a▁b"])
    return TextAssets(model.to_str())


def _words() -> TextAssets:
    """No decoder at all: tokens are words, joined by spaces."""
    words = ["<s>", "[UNK]", "the", "dog", "doesn't", " mind", "é"]
    model = models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]")
    whole = tokenizers.Tokenizer(model)
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole.add_special_tokens(["<s>"])
    return TextAssets(whole.to_str())
