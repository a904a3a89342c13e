"""Which pieces of prompts share a program: nothing is lost, nothing costs more, order stays."""

import random
from collections import Counter

import pytest

from jaxinfer.engine_config import EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.host.plan import CHUNK_OVERHEAD, Chunk, chunk_size
from jaxinfer.host.prefills import arrange, prefills
from jaxinfer.host.request import JAXINFER_DEFAULTS, Request, SamplingParams
from jaxinfer.host.scheduler import Scheduler
from jaxinfer.host.sequence import Sequence

CONFIG = EngineConfig(prefill_chunks=(8, 32, 128), prefill_rows=(1, 4), max_prefill_tokens=256)
PLAIN = EngineConfig(prefill_chunks=(8, 32, 128), prefill_rows=(1,), max_prefill_tokens=256)


def request(order, num_tokens):
    prompt = tuple(range(1000 * order, 1000 * order + num_tokens))
    return Request(f"r{order}", prompt, SamplingParams(max_tokens=4).or_else(JAXINFER_DEFAULTS))


def chunks_of(order, num_tokens, *, start=0, config=CONFIG):
    """The chunks of one prompt, as a draft cuts them."""
    sequence = Sequence(order, request(order, start + num_tokens))
    found, end = [], start + num_tokens
    while start < end:
        size = chunk_size(end - start, config.prefill_chunks)
        length = min(size, end - start)
        found.append(Chunk(sequence, start, length, size, start + length == end))
        start += length
    return found


def shown(chunks, config=CONFIG):
    """The programs of these chunks: rows, tokens of a row, and whose piece each row is."""
    return [
        (one.rows, one.size, [chunk.sequence.order for chunk in one.chunks])
        for one in prefills(chunks, config)
    ]


def work(chunks, config):
    return sum(one.num_tokens + CHUNK_OVERHEAD for one in prefills(chunks, config))


def test_short_prompts_go_into_one_program():
    prompts = [chunk for order in range(4) for chunk in chunks_of(order, 5 + order)]
    assert shown(prompts) == [(4, 8, [0, 1, 2, 3])]
    assert shown(prompts, PLAIN) == [(1, 8, [order]) for order in range(4)]


@pytest.mark.parametrize(
    ("count", "rows"),
    [(1, [1]), (2, [4]), (3, [4]), (4, [4]), (5, [4, 1]), (6, [4, 4]), (9, [4, 4, 1])],
)
def test_a_program_has_empty_rows_only_where_that_is_less_work(count, rows):
    prompts = [chunk for order in range(count) for chunk in chunks_of(order, 8)]
    assert [one.rows for one in prefills(prompts, CONFIG)] == rows  # 2 x 40 against 64
    wide = EngineConfig(prefill_chunks=(64, 256), prefill_rows=(1, 4))
    two = [chunk for order in range(2) for chunk in chunks_of(order, 64, config=wide)]
    assert [one.rows for one in prefills(two, wide)] == [1, 1]  # 2 x 96 against 288


def test_what_is_left_of_a_prompt_follows_its_beginning():
    prompts = [*chunks_of(0, 130), *chunks_of(1, 3), *chunks_of(2, 33)]
    arranged = arrange(prompts, CONFIG)
    assert shown(arranged) == [(1, 128, [0]), (1, 32, [2]), (4, 8, [0, 1, 2])]
    assert [one.sampled for one in prefills(arranged, CONFIG)] == [(), (), (0, 1, 2)]


def test_chunks_stay_in_line_where_no_order_is_less_work():
    prompts = [*chunks_of(0, 3), *chunks_of(1, 32)]
    assert arrange(prompts, CONFIG) == tuple(prompts), "who is first has the first token first"


def test_a_chunk_with_a_piece_of_padding_joins_where_that_is_less_work():
    (loose,) = chunks_of(0, 20)
    assert loose.size == 32
    assert arrange([loose], CONFIG) == (loose,), "alone it stays as it is"
    found = arrange([loose, *chunks_of(1, 8)], CONFIG)
    assert shown(found) == [(4, 8, [0, 0, 0, 1])]
    assert [(one.start, one.length, one.is_last) for one in found] == [
        *((0, 8, False), (8, 8, False), (16, 4, True)),
        (0, 8, True),
    ]
    (full,) = chunks_of(2, 25)
    assert arrange([full, *chunks_of(1, 8)], CONFIG)[0] == full, "its padding is less than a piece"


@pytest.mark.parametrize("rows", [(1,), (1, 2), (1, 4), (1, 2, 3, 8, 16)])
def test_any_chunks_keep_their_tokens_and_their_order_and_cost_no_more(rows):
    config = EngineConfig(prefill_chunks=(8, 32, 128), prefill_rows=rows)
    rng = random.Random(0)
    for _ in range(300):
        drafted = [
            chunk
            for order in range(rng.randint(1, 9))
            for chunk in chunks_of(order, rng.randint(1, 150), start=8 * rng.randint(0, 4))
        ][: rng.randint(1, 20)]
        arranged = arrange(drafted, config)
        programs = list(prefills(arranged, config))
        assert tuple(chunk for one in programs for chunk in one.chunks) == arranged
        for one in programs:
            assert len(one.chunks) <= one.rows and one.rows in (1, *config.prefill_row_counts)
            assert all(chunk.length <= chunk.size == one.size for chunk in one.chunks)
            assert one.rows == 1 or one.size == 8
        assert Counter(cells(drafted)) == Counter(cells(arranged))
        for order in {chunk.sequence.order for chunk in drafted}:
            mine = [chunk for chunk in arranged if chunk.sequence.order == order]
            ends = [chunk.start + chunk.length for chunk in mine]
            assert [chunk.start for chunk in mine[1:]] == ends[:-1], "in order, without a gap"
        samples = [chunk.sequence.order for chunk in drafted if chunk.is_last]
        assert sorted(c.sequence.order for c in arranged if c.is_last) == sorted(samples)
        assert work(arranged, config) <= work(drafted, config) <= work(drafted, PLAIN)


def cells(chunks):
    return [(one.sequence.order, one.start + at) for one in chunks for at in range(one.length)]


def test_a_step_of_the_scheduler_arranges_its_chunks():
    scheduler = Scheduler(CONFIG)
    for order, num_tokens in enumerate((20, 8, 40)):
        scheduler.add(request(order, num_tokens))
    plan = scheduler.plan()
    assert shown(plan.chunks) == [(1, 32, [2]), (4, 8, [0, 0, 0, 1]), (1, 8, [2])]
    assert [one.order for one in plan.sampled[:3]] == [0, 1, 2]
    assert len(plan.decodes) == 3, "each goes on with the token that its last piece samples"


def test_row_counts_stay_within_the_largest_chunk():
    assert CONFIG.prefill_row_counts == (1, 4)
    assert EngineConfig(prefill_chunks=(512,)).prefill_row_counts == (1,)
    some = EngineConfig(prefill_chunks=(32, 64), prefill_rows=(1, 2, 4))
    assert some.prefill_row_counts == (1, 2)


@pytest.mark.parametrize("rows", [(), (4,), (1, 4, 4), (4, 1), (0, 1)])
def test_row_counts_that_are_refused(rows):
    with pytest.raises(ConfigError, match=r"engine.prefill_rows is .*must be ascending, and begin"):
        EngineConfig(prefill_rows=rows)
