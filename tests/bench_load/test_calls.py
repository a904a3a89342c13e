"""Arrivals, lengths, prompts and files: the same seed gives the same calls, to the last token."""

import json
from dataclasses import replace
from statistics import mean, median

import pytest

from jaxinfer.bench.load import calls, files
from jaxinfer.bench.load.arrivals import Pattern, pattern_of, times
from jaxinfer.bench.load.calls import Recipe, at_rate, calls_of
from jaxinfer.bench.load.lengths import Lengths, lengths_of
from jaxinfer.errors import ConfigError
from jaxinfer.host.workload import WorkloadSpec, draw

SPEC = WorkloadSpec(40, None, 4.0, (10, 90), (2, 30), 8, seed=7)
RECIPE = Recipe(Lengths(10, 90), Lengths(2, 30), 40, 4.0, num_shared_tokens=8, seed=7)


def write(tmp_path, *rows):
    path = tmp_path / "load.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_poisson_calls_are_the_arrivals_of_the_simulator():
    found = calls_of(RECIPE, vocab_size=256)
    expected = draw(SPEC).arrivals
    assert [one.at_s for one in found] == [one.at_s for one in expected]
    assert [len(one.prompt) for one in found] == [one.num_prompt_tokens for one in expected]
    assert [one.num_output_tokens for one in found] == [one.num_output_tokens for one in expected]


def test_the_same_seed_gives_the_same_calls_and_another_one_does_not():
    assert calls_of(RECIPE, vocab_size=256) == calls_of(RECIPE, vocab_size=256)
    assert calls_of(replace(RECIPE, seed=8), vocab_size=256) != calls_of(RECIPE, vocab_size=256)


def test_another_prompt_seed_changes_nothing_but_made_up_prompts():
    first, second = (calls_of(RECIPE, vocab_size=256, prompt_seed=seed) for seed in (1, 2))
    assert all(one.prompt != other.prompt for one, other in zip(first, second, strict=True))
    assert [replace(one, prompt="") for one in first] == [replace(one, prompt="") for one in second]


@pytest.mark.parametrize("text", ["poisson", "even", "gamma:0.25", "gamma:4", "bursts:8"])
def test_each_pattern_keeps_its_mean_rate(text):
    found = times(pattern_of(text), rate_per_s=5.0, count=20_000, seed=3)
    assert found[0] == 0 and found == sorted(found)
    assert len(found) / found[-1] == pytest.approx(5.0, rel=0.05)


def test_bursts_come_at_once_and_even_ones_at_a_beat():
    found = times(Pattern("bursts", 4.0), rate_per_s=2.0, count=10, seed=0)
    assert [found.count(one) for one in sorted(set(found))] == [4, 4, 2]
    assert times(Pattern("even"), rate_per_s=4.0, count=4, seed=0) == [0.0, 0.25, 0.5, 0.75]


def test_gamma_of_shape_one_spreads_as_poisson_and_less_is_more_uneven():
    def unevenness(shape):
        found = times(Pattern("gamma", shape), rate_per_s=1.0, count=20_000, seed=1)
        gaps = [after - before for before, after in zip(found, found[1:], strict=False)]
        return mean(gap**2 for gap in gaps) / mean(gaps) ** 2 - 1  # 1/shape

    assert unevenness(1.0) == pytest.approx(1.0, rel=0.1)
    assert unevenness(0.25) == pytest.approx(4.0, rel=0.15)


@pytest.mark.parametrize("text", ["fair", "gamma", "gamma:0", "bursts:1.5", "even:3", "bursts:x"])
def test_a_pattern_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="must be poisson, even"):
        pattern_of(text)


def test_lengths_about_a_median_keep_their_range_and_have_a_long_tail():
    lengths = lengths_of("--prompt", "20-2000~300")
    recipe = Recipe(prompt=lengths, num_requests=2000, rate_per_s=1.0)
    drawn = [one.arrival.num_prompt_tokens for one in calls.items_of(recipe)]
    assert min(drawn) >= 20 and max(drawn) <= 2000
    assert median(drawn) == pytest.approx(300, rel=0.1) and mean(drawn) > 1.3 * median(drawn)


@pytest.mark.parametrize("text", ["0", "9-3", "20-60~70", "a", "20~", "-5"])
def test_lengths_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="--prompt is"):
        lengths_of("--prompt", text)


def test_groups_begin_alike_and_differ_after_that():
    found = calls_of(replace(RECIPE, num_groups=3), vocab_size=50_000)
    beginnings = {one.prompt[:8] for one in found}
    assert len(beginnings) == 3
    assert len({one.prompt[8:] for one in found}) == len(found)


def test_without_a_vocabulary_prompts_are_as_many_words():
    tokens, words = calls_of(RECIPE, vocab_size=99), calls_of(RECIPE, vocab_size=None)
    assert [len(one.prompt.split()) for one in words] == [len(one.prompt) for one in tokens]
    assert len({" ".join(one.prompt.split()[:8]) for one in words}) == 1


def test_a_rate_for_so_many_seconds_takes_as_many_requests():
    assert at_rate(RECIPE, 2.5, seconds=10.0).num_requests == 25
    assert at_rate(RECIPE, 2.5).num_requests == 40


def test_a_trace_keeps_its_offsets_in_order_of_time(tmp_path):
    path = write(
        tmp_path,
        {"at_s": 12.5, "num_prompt_tokens": 7, "num_output_tokens": 3, "priority": -2},
        {"at_s": 10.0, "prompt": "Hello", "num_output_tokens": 5},
        {"at_s": 10.25, "token_ids": [5, 6], "num_output_tokens": 1},
    )
    rows, has_times = files.read(path)
    recipe = Recipe(rows=rows, has_times=has_times, num_requests=len(rows))
    found = calls_of(recipe, vocab_size=64)
    assert has_times and [one.at_s for one in found] == [0.0, 0.25, 2.5]
    assert [one.prompt for one in found[:2]] == ["Hello", (5, 6)]
    assert len(found[2].prompt) == 7 and found[2].priority == -2
    assert [one.num_output_tokens for one in found] == [5, 1, 3]


def test_a_trace_at_another_rate_leaves_its_times_aside(tmp_path):
    rows, _ = files.read(write(tmp_path, *({"at_s": n, "prompt": f"p{n}"} for n in range(3))))
    found = calls_of(at_rate(Recipe(rows=rows, num_requests=3), 10.0), vocab_size=9)
    assert [one.prompt for one in found] == ["p0", "p1", "p2"]
    drawn = times(Pattern(), rate_per_s=10.0, count=3, seed=0)
    assert found[1].at_s / found[2].at_s == pytest.approx(drawn[1] / drawn[2])


@pytest.mark.parametrize("count", [2, 7, 500])
def test_a_rate_of_a_sweep_is_exact_however_few_requests_there_are(count):
    found = calls_of(at_rate(replace(RECIPE, num_requests=count), 4.0), vocab_size=9)
    assert found[-1].at_s == pytest.approx((count - 1) / 4)


def test_prompts_of_a_file_come_again_where_more_are_asked_for(tmp_path):
    path = write(tmp_path, {"turns": ["one", "later"], "category": "x"}, {"prompt": "two"})
    rows, has_times = files.read(path)
    found = calls_of(Recipe(rows=rows, num_requests=5, concurrency=2), vocab_size=9)
    assert not has_times
    assert [one.prompt for one in found] == ["one", "two", "one", "two", "one"]
    assert all(16 <= one.num_output_tokens <= 48 for one in found)


def test_equal_blocks_of_a_mooncake_trace_are_equal_tokens(tmp_path):
    path = write(
        tmp_path,
        {"timestamp": 500, "input_length": 600, "output_length": 4, "hash_ids": [1, 2]},
        {"timestamp": 2500, "input_length": 1000, "output_length": 9, "hash_ids": [1, 3]},
    )
    rows, has_times = files.read(path)
    recipe = Recipe(rows=rows, has_times=has_times, num_requests=2)
    first, second = calls_of(recipe, vocab_size=50_000)
    assert (first.at_s, second.at_s) == (0.0, 2.0)
    assert (len(first.prompt), len(second.prompt)) == (600, 1000)
    assert first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512:600] != second.prompt[512:600]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["{"], "line 1 is no JSON"),
        ([[1]], "line 1 must be a JSON object"),
        ([{"prompt": "a"}, {"prompt": ""}], "line 2: the prompt is ''"),
        ([{"category": "x"}], "line 1 has no prompt"),
        ([{"prompt": "a", "at_s": 1}, {"prompt": "b"}], "1 of 2 lines say when"),
        ([{"prompt": "a", "at_s": True}], "at_s is True"),
        ([{"prompt": "a", "num_output_tokens": 0}], "num_output_tokens is 0"),
        ([{"token_ids": [1, -1]}], "token_ids is"),
        ([], "0 of 0 lines"),
    ],
)
def test_a_file_that_is_no_workload_is_refused_with_its_line(tmp_path, rows, words):
    with pytest.raises(ConfigError, match=words):
        files.read(write(tmp_path, *rows))
