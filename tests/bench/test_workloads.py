"""The workloads are the same tokens everywhere, and an engine is made to fit them."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxinfer.bench import workloads
from jaxinfer.config import EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.text.assets import TextAssets
from jaxinfer.text.tokenizer import Tokenizer
from tests import cli_model

PEERS = Path(__file__).parents[3] / "shared" / "peers" / "workloads.py"


@pytest.mark.skipif(not PEERS.is_file(), reason="the peers' programs are not beside this checkout")
@pytest.mark.parametrize("name", ["W1", "W2", "W3", "W4"])
def test_the_peers_programs_make_the_same_requests(name, monkeypatch):
    spec = importlib.util.spec_from_file_location("peers_workloads", PEERS)
    assert spec is not None and spec.loader is not None
    peers = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, peers)
    spec.loader.exec_module(peers)
    ours = workloads.named(name, vocab_size=49_152)
    for repeat in (0, 1, 1000):
        theirs = [(tuple(one.ids), one.n_out) for one in peers.requests(name, repeat)]
        assert [tuple(call) for call in ours.calls(repeat)] == theirs


def test_lengths_are_those_of_the_workload_and_tokens_differ_by_repeat():
    sizes = {}
    for name in workloads.NAMES:
        load = workloads.named(name, vocab_size=49_152)
        first, second = load.calls(0), load.calls(1)
        assert load.calls(0) == first
        assert [(len(a.prompt), a.num_output_tokens) for a in first] == [
            (len(b.prompt), b.num_output_tokens) for b in second
        ]
        assert all(a.prompt[0] != b.prompt[0] for a, b in zip(first, second, strict=True))
        sizes[name] = (len(first), sum(len(call.prompt) for call in first))
    assert sizes["W1"] == (1, 128) and sizes["W2"] == (1, 1024) and sizes["W4"] == (16, 12_800)
    assert sizes["W3"][0] == 32 and sizes["W5"][0] == 64


def test_the_first_tokens_are_these():
    first = {name: workloads.named(name, vocab_size=49_152).calls(0)[0] for name in workloads.NAMES}
    assert {name: call.prompt[:3] for name, call in first.items()} == {
        "W1": (43134, 48154, 46018),
        "W2": (35722, 40696, 8635),
        "W3": (38525, 40008, 33734),
        "W4": (22530, 30023, 45183),
        "W5": (8901, 36137, 15295),
    }
    assert [call.num_output_tokens for call in first.values()] == [128, 32, 61, 16, 116]


def test_prompts_of_w4_share_768_tokens_and_nothing_after():
    calls = workloads.named("W4", vocab_size=49_152).calls(0)
    assert len({call.prompt[:768] for call in calls}) == 1
    assert len({call.prompt[768] for call in calls}) == 16


def test_answers_of_w5_are_as_long_as_a_geometric_distribution_says():
    calls = workloads.named("W5", vocab_size=49_152).calls(0)
    lengths = [call.num_output_tokens for call in calls]
    assert min(lengths) >= 1 and max(lengths) <= 512
    draws = workloads._Draws("many", 0)
    many = np.array([draws.length(96, 512) for _ in range(20_000)])
    stays = 1 - 1 / 96  # after each token, but for the last that is allowed
    assert abs(many.mean() / (96 * (1 - stays**512)) - 1) < 0.03
    for length in (1, 32, 96, 256, 511):
        assert abs((many > length).mean() - stays**length) < 0.015
    assert {draws.length(1, 9) for _ in range(9)} == {1}


def test_tokens_are_folded_into_a_small_vocabulary():
    small = workloads.named("W1", vocab_size=256).calls(0)[0]
    large = workloads.named("W1", vocab_size=49_152).calls(0)[0]
    assert small.prompt == tuple(token % 256 for token in large.prompt)


@pytest.fixture(scope="module")
def tokenizer():
    assets = TextAssets(tokenizer_json=cli_model.tokenizer_json(), chat_template="")
    return Tokenizer(assets)


def test_lines_of_a_file_are_requests(tmp_path, tokenizer):
    lines = [{"prompt": "ab"}, {"token_ids": [1, 2, 3], "num_output_tokens": 5}]
    lines += [{"turns": ["xyz", "later"]}]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    load = workloads.from_file(path, tokenizer, num_output_tokens=7, chat=False)
    first, second, third = load.calls(0)
    assert first == workloads.Call(tuple(tokenizer.encode("ab")), 7)
    assert second == workloads.Call((1, 2, 3), 5)
    assert third.prompt == tuple(tokenizer.encode("xyz"))
    assert workloads.first(load, 2).calls(3) == (first, second)


def test_a_line_without_a_prompt_is_refused(tmp_path, tokenizer):
    path = tmp_path / "some.jsonl"
    path.write_text('{"num_prompt_tokens": 5}\n')
    with pytest.raises(ConfigError, match="every line needs a prompt"):
        workloads.from_file(path, tokenizer, num_output_tokens=7, chat=False)


def test_an_engine_gets_slots_and_room_for_the_workload_unless_they_were_asked_for():
    load = workloads.named("W4", vocab_size=49_152)
    config = EngineConfig(num_slots=4, max_seq_len=2048)
    fitted = workloads.fitted(config, load, keep=frozenset())
    assert (fitted.num_slots, fitted.max_seq_len, fitted.row_counts) == (16, 896, (1, 8, 16))
    kept = workloads.fitted(config, load, keep=frozenset({"num_slots", "max_seq_len"}))
    assert kept == config
    short = EngineConfig(max_seq_len=512)
    with pytest.raises(ConfigError, match="a request of 816 tokens; engine.max_seq_len is 512"):
        workloads.fitted(short, load, keep=frozenset({"max_seq_len"}))


def test_what_is_no_workload_is_refused():
    with pytest.raises(ConfigError, match="no workload 'W9'; there are: W1, W2, W3, W4"):
        workloads.named("W9", vocab_size=256)
    with pytest.raises(ConfigError, match="--requests is 0"):
        workloads.first(workloads.named("W1", vocab_size=256), 0)
