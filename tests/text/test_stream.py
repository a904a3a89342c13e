"""Text token by token: always the text of the whole, never a character too early."""

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jaxinfer.errors import InvalidRequest
from jaxinfer.text.stops import StopMatcher
from jaxinfer.text.stream import StreamStep, TextStream
from jaxinfer.text.tokenizer import Tokenizer

ANY = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow],
)
STOPS = st.lists(st.text("abc�", min_size=1, max_size=4), min_size=1, max_size=4)


def everything(stream: TextStream, ids: Sequence[int]) -> str:
    return "".join(stream.push(token_id).text for token_id in ids) + stream.finish()


def draw_ids(data: st.DataObject, tokenizer: Tokenizer) -> list[int]:
    return data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))


def cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The definition: cut before the stop string that ends first, the longest at a tie."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end - len(stop)], stop


@ANY
@given(data=st.data(), skip_special=st.booleans())
def test_the_parts_join_to_the_whole(
    tokenizer: Tokenizer, data: st.DataObject, skip_special: bool
) -> None:
    ids = draw_ids(data, tokenizer)
    whole = tokenizer.decode(ids, skip_special=skip_special)
    assert everything(tokenizer.stream(skip_special=skip_special), ids) == whole


@ANY
@given(data=st.data())
def test_a_stream_goes_on_where_the_prompt_ends(tokenizer: Tokenizer, data: st.DataObject) -> None:
    prompt, ids = draw_ids(data, tokenizer), draw_ids(data, tokenizer)
    before = tokenizer.stream()
    certain = "".join(before.push(token_id).text for token_id in prompt)
    assert certain + everything(tokenizer.stream(prompt), ids) == tokenizer.decode(prompt + ids)


@ANY
@given(data=st.data())
def test_the_last_tokens_of_a_prompt_are_enough(tokenizer: Tokenizer, data: st.DataObject) -> None:
    prompt, ids = draw_ids(data, tokenizer), draw_ids(data, tokenizer)
    prompt += [0] if tokenizer.decode([0]) else []
    start = tokenizer.encode("the dog and", add_special=False)
    whole = everything(tokenizer.stream(start * 20 + prompt), ids)
    assert everything(tokenizer.stream(start + prompt), ids) == whole


@ANY
@given(data=st.data(), stops=st.lists(st.sampled_from(["the", " d", "�", "o", "dog."]), min_size=1))
def test_stop_strings_cut_the_whole(
    tokenizer: Tokenizer, data: st.DataObject, stops: list[str]
) -> None:
    ids = draw_ids(data, tokenizer)
    stream = tokenizer.stream(stop=stops)
    steps = [stream.push(token_id) for token_id in ids]
    text, stop = cut(tokenizer.decode(ids), stops)
    assert "".join(step.text for step in steps) + stream.finish() == text
    if stop != "�":  # half a character at the very end becomes one only in finish()
        assert (steps[-1].stop if steps else None) == stop


@ANY
@given(parts=st.lists(st.text("abc�", max_size=5), max_size=8), stops=STOPS)
@example(parts=["abc", "d"], stops=["abcd", "bc"])
@example(parts=["ab"], stops=["b", "ab"])
@example(parts=["aab"], stops=["ab"])
def test_a_stop_does_not_depend_on_the_parts(parts: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    out, found = "", None
    for part in parts:
        text, found = matcher.push(part)
        out += text
        if found:
            break
        certain = "".join(parts)[: len(out)]
        assert out == certain
    out += "" if found else matcher.finish()
    assert (out, found) == cut("".join(parts), stops)


def test_text_that_may_be_a_stop_string_waits() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("fine.\n") == ("fine.", None)
    assert matcher.push("\nUs") == ("", None)
    assert matcher.push("eful") == ("\n\nUseful", None)
    assert matcher.push("\n\nUser: hi") == ("", "\n\nUser:")


def test_text_that_cannot_be_a_stop_string_is_not_held() -> None:
    matcher = StopMatcher(["aab"])
    assert matcher.push("aaaa") == ("aa", None)
    assert matcher.finish() == "aa"


def test_nothing_comes_after_a_stop(byte_level: Tokenizer) -> None:
    stream = byte_level.stream(stop=("dog",))
    ids = byte_level.encode("lazy dog, indeed", add_special=False)
    steps = [stream.push(token_id) for token_id in ids]
    assert "".join(step.text for step in steps) == "lazy "
    assert steps[-1] == StreamStep("", "dog")
    assert stream.finish() == ""


def test_an_empty_stop_string_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(InvalidRequest) as caught:
        byte_level.stream(stop=("",))
    assert caught.value.field == "stop"


def test_half_a_character_waits_for_its_other_half(byte_level: Tokenizer) -> None:
    ids = [byte_level.token_id(char) for char in "ðŁĺĢ"]  # the four bytes of one emoji
    stream = byte_level.stream()
    texts = [stream.push(token_id).text for token_id in ids if token_id is not None]
    assert texts == ["", "", "", "😀"]
    assert stream.finish() == ""


def test_half_a_character_at_the_end_is_replaced(byte_level: Tokenizer) -> None:
    first = byte_level.token_id("ð")
    assert first is not None
    stream = byte_level.stream()
    assert stream.push(first).text == ""
    assert stream.finish() == "�" == byte_level.decode([first])


def test_a_bad_byte_spares_its_good_neighbours(llama: Tokenizer) -> None:
    """The library would replace all five characters of this run of byte tokens."""
    ids = [llama.token_id(f"<0x{byte:02X}>") for byte in "é!".encode() + b"\xff" + b"ok"]
    assert llama.decode([token_id for token_id in ids if token_id is not None]) == "é!�ok"


def test_the_first_space_goes_only_at_the_start_of_a_text(llama: Tokenizer) -> None:
    ids = llama.encode("the dog", add_special=False)
    assert everything(llama.stream(), ids) == "the dog"
    assert everything(llama.stream([1]), ids) == "the dog"
    assert everything(llama.stream([1, *ids]), ids) == " the dog"


def test_an_id_of_a_padded_vocabulary_adds_nothing(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    assert stream.push(tokenizer.vocab_size + 7) == StreamStep("", None)
    ids = tokenizer.encode("the dog", add_special=False)
    assert everything(stream, ids) == "the dog"
