"""Tokenizers from GGUF metadata."""

from collections.abc import Mapping
from typing import Any

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from jaxinfer.errors import CheckpointError, UnsupportedModel
from jaxinfer.text.assets import TextAssets
from jaxinfer.text.gguf_tokenizer import from_metadata
from jaxinfer.text.pretokenizers import PRE_TOKENIZERS
from jaxinfer.text.tokenizer import Tokenizer

SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ġt", "he", "Ġthe", "12", "123", "Ġ1", "<tool>"]
    tokens = ["<|im_start|>", "<|im_end|>", *alphabet, *words]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 3) + [4],
        "tokenizer.ggml.merges": ["Ġ t", "h e", "Ġt he", "1 2", "Ġ 1"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }


def tokens_of(metadata: Mapping[str, Any], text: str) -> list[str | None]:
    tokenizer = Tokenizer(from_metadata(metadata))
    return [tokenizer.token(token_id) for token_id in tokenizer.encode(text)]


def test_the_demo_models_ids_are_those_of_another_library(
    smollm2_json: str, reference: Mapping[str, Any]
) -> None:
    tokenizer = Tokenizer(TextAssets(smollm2_json, SMOLLM2_TEMPLATE))
    for item in reference["items"]:
        if item["kind"] == "chat":
            assert tokenizer.render_chat(item["messages"]) == item["text"]
            assert tokenizer.encode_chat(item["messages"]) == item["ids"]
        else:
            assert tokenizer.encode(item["text"]) == item["ids"]
        assert tokenizer.decode(item["out_ids"], skip_special=False) == item["out_text"]


def test_merges_are_followed() -> None:
    assert tokens_of(byte_level_metadata(), " the the") == ["Ġthe", "Ġthe"]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["Ġ1", "2", "3"]),  # "Ġ123" is one piece; 1 2 merges first only inside it
        ("smollm", ["Ġ", "1", "2", "3"]),
        ("llama-bpe", ["<|im_start|>", "Ġ", "123"]),  # ignore_merges keeps a whole piece
        ("qwen2", ["Ġ", "1", "2", "3"]),
        ("tekken", ["<|im_start|>", "Ġ", "1", "2", "3"]),
        ("default", ["Ġ", "12", "3"]),
    ],
)
def test_numbers_are_cut_as_the_pre_tokenizer_says(pre: str, pieces: list[str]) -> None:
    merges = ["Ġ 1", "1 2"] if pre == "gpt-2" else ["1 2", "Ġ 1"]
    metadata = byte_level_metadata(pre=pre, merges=merges)
    assert tokens_of(metadata, " 123") == pieces


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_the_text(pre: str) -> None:
    text = "We'll see 1234 CamelCase naïve, 你好!\r\n\n\t x  y   \n <a/b> ½"
    tokenizer = Tokenizer(from_metadata(byte_level_metadata(pre=pre)))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_tokens_are_special_and_user_tokens_are_text() -> None:
    tokenizer = Tokenizer(from_metadata(byte_level_metadata()))
    ids = tokenizer.encode("<|im_start|>a<tool>b<|im_end|>")
    names = [tokenizer.token(token_id) for token_id in ids]
    assert names == ["<|im_start|>", "a", "<tool>", "b", "<|im_end|>"]
    assert tokenizer.decode(ids) == "a<tool>b"


def test_every_id_keeps_its_place(sentence_piece: dict[str, Any]) -> None:
    for metadata in (byte_level_metadata(), sentence_piece):
        tokenizer = Tokenizer(from_metadata(metadata))
        tokens = metadata["tokenizer.ggml.tokens"]
        assert [tokenizer.token(place) for place in range(len(tokens))] == tokens
        assert tokenizer.vocab_size == len(tokens)


def test_names_and_template_are_kept() -> None:
    assets = from_metadata(byte_level_metadata() | {"tokenizer.chat_template": "{{ 1 }}"})
    assert (assets.bos_token, assets.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert assets.chat_template == "{{ 1 }}"
    assert not assets.add_bos
    assert from_metadata(byte_level_metadata(add_bos_token=True)).add_bos


def test_sentence_piece_joins_the_best_score_first(sentence_piece: dict[str, Any]) -> None:
    assert tokens_of(sentence_piece, "the dog") == ["<s>", "▁the", "▁dog"]
    assert tokens_of(sentence_piece, "and  an") == ["<s>", "▁and", "▁▁", "an"]
    better = dict(sentence_piece)
    scores = list(better["tokenizer.ggml.scores"])
    for token in ("an", "▁an"):
        scores[better["tokenizer.ggml.tokens"].index(token)] = 1.0
    better["tokenizer.ggml.scores"] = scores
    assert tokens_of(better, "and  an") == ["<s>", "▁and", "▁", "▁an"]


def test_sentence_piece_falls_back_to_bytes(sentence_piece: dict[str, Any]) -> None:
    assert tokens_of(sentence_piece, "é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    tokenizer = Tokenizer(from_metadata(sentence_piece))
    assert tokenizer.decode(tokenizer.encode("the  é 你好")) == "the  é 你好"


def test_sentence_piece_agrees_with_a_plain_reading(sentence_piece: dict[str, Any]) -> None:
    """Against the algorithm written out: join the best neighbours, leftmost first."""
    tokens = sentence_piece["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, sentence_piece["tokenizer.ggml.scores"], strict=True))
    for text in ("the hand and the dog", "thedogand", " and  the", "aannddoogg", "thethehe an"):
        pieces = list("▁" + text.replace(" ", "▁"))
        while True:
            joins = [a + b for a, b in zip(pieces, pieces[1:], strict=False)]
            best = max((scores[join] for join in joins if join in scores), default=None)
            if best is None:
                break
            place = next(i for i, join in enumerate(joins) if scores.get(join) == best)
            pieces[place : place + 2] = [joins[place]]
        assert tokens_of(sentence_piece, text) == ["<s>", *pieces]


def test_no_space_is_put_before_the_text_where_the_file_says_so(
    sentence_piece: dict[str, Any],
) -> None:
    plain = sentence_piece | {"tokenizer.ggml.add_space_prefix": False}
    assert tokens_of(plain, "an")[1:] == ["an"]
    tokenizer = Tokenizer(from_metadata(plain))
    assert tokenizer.decode(tokenizer.encode(" the dog")) == " the dog"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"pre": "martian"}, "tokenizer.ggml.pre is 'martian'"),
        ({"add_eos_token": True}, "add_eos_token"),
    ],
)
def test_an_unknown_kind_is_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedModel, match=text):
        from_metadata(byte_level_metadata(**changes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": 3}, "model is 3"),
        ({"tokens": []}, "tokens is missing or empty"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "'a' twice"),
        ({"token_type": [1]}, "token_type has 1 entries"),
        ({"bos_token_id": 10**6}, "bos_token_id is 1000000"),
        ({"merges": ["a b c"]}, "'a b c'"),
        ({"model": "llama"}, "scores is missing"),
    ],
)
def test_damaged_metadata_is_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        from_metadata(byte_level_metadata(**changes))


def test_the_json_is_one_that_the_library_writes_back_alike() -> None:
    assets = from_metadata(byte_level_metadata())
    again = tokenizers.Tokenizer.from_str(assets.tokenizer_json).to_str()
    tokenizer, copy = Tokenizer(assets), Tokenizer(TextAssets(again))
    assert tokenizer.encode("the 123<tool>") == copy.encode("the 123<tool>")
