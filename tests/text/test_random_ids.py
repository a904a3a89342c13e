"""Random token ids as they come from a model: the parts of a stream join to the whole text."""

import random
from collections.abc import Iterator

import pytest

from jaxinfer.text.assets import TextAssets
from jaxinfer.text.tokenizer import Tokenizer


def id_lists(draw: random.Random, tokenizer: Tokenizer, count: int) -> Iterator[list[int]]:
    """Lists of any ids, and of those that are parts of characters, which random ids seldom are."""
    size = tokenizer.vocab_size
    partial = [one for one in range(size) if "\ufffd" in tokenizer.decode([one])] or [0]
    for _ in range(count):
        length = draw.randint(1, 24)
        share = draw.choice((0.0, 0.5, 0.95))
        yield [
            draw.choice(partial) if draw.random() < share else draw.randrange(size)
            for _ in range(length)
        ]


def check(tokenizer: Tokenizer, count: int, seed: int) -> int:
    """Checks so many lists, each pushed one by one; returns how many had damaged characters."""
    draw, num_damaged = random.Random(seed), 0
    for ids in id_lists(draw, tokenizer, count):
        tail = ids[: draw.choice((0, 0, 1, 3))]
        stream = tokenizer.stream(tail)
        parts = [stream.push(one).text for one in ids[len(tail) :]]
        parts.append(stream.finish())
        whole, before = tokenizer.decode(ids), tokenizer.decode(tail)
        if not tail:
            assert "".join(parts) == whole, ids
        elif whole.startswith(before) and "\ufffd" not in before:
            assert "".join(parts) == whole[len(before) :], (ids, tail)
        num_damaged += "\ufffd" in whole
    return num_damaged


@pytest.fixture(scope="module")
def smollm2(smollm2_json: str) -> Tokenizer:
    return Tokenizer(TextAssets(smollm2_json))


def test_parts_join_to_the_whole_for_every_kind_of_decoder(tokenizer: Tokenizer) -> None:
    check(tokenizer, 500, seed=1)


def test_parts_join_to_the_whole_for_the_demo_model(smollm2: Tokenizer) -> None:
    assert 100 < check(smollm2, 2000, seed=2) < 1900


@pytest.mark.full
def test_parts_join_to_the_whole_a_hundred_thousand_times(smollm2: Tokenizer) -> None:
    assert check(smollm2, 100_000, seed=3) > 1000
