"""Text to ids and back."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxinfer.errors import CheckpointError, InvalidRequest, UnsupportedModel
from jaxinfer.text.assets import TextAssets
from jaxinfer.text.tokenizer import Tokenizer

TEXT = "The quick brown fox, 你好 😀\n  two words"
ANY = settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_a_text_survives_the_way_there_and_back(byte_level: Tokenizer) -> None:
    assert byte_level.decode(byte_level.encode(TEXT)) == TEXT


def test_special_tokens_come_only_when_asked(byte_level: Tokenizer) -> None:
    bos = byte_level.token_id("<s>")
    assert byte_level.encode(TEXT) == [bos, *byte_level.encode(TEXT, add_special=False)]
    assert byte_level.bos_token_id == bos
    assert byte_level.eos_token_id == byte_level.token_id("</s>")
    assert byte_level.token_id("no such token") is None
    assert bos is not None and byte_level.token(bos) == "<s>"


def test_padding_and_truncation_of_the_json_are_off(byte_level: Tokenizer) -> None:
    assert '"Fixed":64' in byte_level.assets.tokenizer_json
    assert len(byte_level.encode("!")) == 2
    assert len(byte_level.encode(TEXT)) > 8


def test_a_batch_equals_its_texts_alone(tokenizer: Tokenizer) -> None:
    texts = ["the dog", "", "the dog and the dog", "dog"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_bos_is_added_where_the_json_does_not(llama: Tokenizer) -> None:
    assert llama.assets.add_bos
    assert llama.encode("the dog")[0] == 1
    assert llama.encode_batch(["the", "dog"])[1][0] == 1
    assert llama.encode("the dog", add_special=False)[0] != 1


def test_special_tokens_are_skipped_or_kept(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("<s>hi<think>there</s>", add_special=False)
    assert byte_level.decode(ids) == "hi<think>there"
    assert byte_level.decode(ids, skip_special=False) == "<s>hi<think>there</s>"


def test_vocab_size_is_one_above_the_highest_id(byte_level: Tokenizer) -> None:
    assert byte_level.token(byte_level.vocab_size - 1) == "two words"
    assert byte_level.token(byte_level.vocab_size) is None


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_an_id_out_of_range_is_refused(byte_level: Tokenizer, bad: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"token_ids\[1\] is {bad}; .* from 0 to") as caught:
        byte_level.decode([0, bad])
    assert caught.value.field == "token_ids"


def test_half_a_surrogate_pair_is_refused(byte_level: Tokenizer) -> None:
    for encode in (byte_level.encode, lambda text: byte_level.encode_batch(["fine", text])):
        with pytest.raises(InvalidRequest, match=r"'\\ud83d', at character 2") as caught:
            encode("hi\ud83d")
        assert caught.value.field == "text"


def test_a_damaged_json_is_a_checkpoint_error(byte_level: Tokenizer) -> None:
    whole = byte_level.assets.tokenizer_json
    for damaged in ("", "{}", whole[: len(whole) // 2], whole.replace('"BPE"', '"XYZ"')):
        with pytest.raises(CheckpointError, match="can't be read"):
            Tokenizer(TextAssets(damaged))


def test_a_bos_that_is_no_token_is_a_checkpoint_error(byte_level: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match="'<none>'"):
        Tokenizer(TextAssets(byte_level.assets.tokenizer_json, bos_token="<none>", add_bos=True))


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]},
    ],
)
def test_a_decoder_that_cannot_stream_is_refused(byte_level: Tokenizer, decoder: dict) -> None:
    changed = json.loads(byte_level.assets.tokenizer_json) | {"decoder": decoder}
    with pytest.raises(UnsupportedModel, match="decoder"):
        Tokenizer(TextAssets(json.dumps(changed)))


@ANY
@given(data=st.data(), skip_special=st.booleans())
def test_decode_is_that_of_the_library(
    tokenizer: Tokenizer, data: st.DataObject, skip_special: bool
) -> None:
    """Always for byte-level tokens; for byte fallback unless the library gives up on a run."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    library = tokenizers.Tokenizer.from_str(tokenizer.assets.tokenizer_json)
    expected = library.decode(ids, skip_special_tokens=skip_special)
    decoder = json.loads(tokenizer.assets.tokenizer_json)["decoder"]
    if "�" not in expected or "ByteFallback" not in json.dumps(decoder):
        assert tokenizer.decode(ids, skip_special=skip_special) == expected


def test_many_threads_may_share_one(byte_level: Tokenizer) -> None:
    texts = [f"{TEXT} {number}" for number in range(64)]
    alone = [byte_level.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(byte_level.encode, texts)) == alone
        assert list(pool.map(byte_level.decode, alone)) == texts
