"""Figures of a comparison, the bounds, the file, and the gate before a load."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxinfer.config import QuantConfig, Scheme
from jaxinfer.errors import CheckpointError, InvalidRequest, QualityRefused
from jaxinfer.host.request import SamplingParams
from jaxinfer.quality import gate, texts
from jaxinfer.quality.compare import Compared
from jaxinfer.quality.report import FORMAT, Figures, Interval, Report, figures, missed, read, write
from jaxinfer.quality.texts import Document
from jaxinfer.text.assets import TextAssets
from jaxinfer.weights import Source, checkpoint
from tests import tiny


def piece(count: int, *, seed: int, harm: float = 0.0) -> Compared:
    """A window of made-up tokens; `harm` of them get another top token and lose 0.5 nats."""
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(2.0, count).astype(np.float32)
    top = rng.integers(0, 50, count)
    is_hit = rng.random(count) < harm
    return Compared(
        kl=np.where(is_hit, 0.25, 0.001).astype(np.float32),
        reference_logprob=logprobs,
        candidate_logprob=logprobs - np.float32(0.5) * is_hit,
        reference_top=top,
        candidate_top=np.where(is_hit, top + 50, top),
        targets=np.where(rng.random(count) < 0.5, top, 1000),
    )


def report(one: Figures) -> Report:
    names = ("reference", "candidate", "scheme", "weights", "compute_dtype", "environment")
    said = {name: name for name in names} | {"scheme": "w8a8"}
    return Report(FORMAT, **said, text_digest="0", window=8, texts=(one,), kinds=())


def described(folder: Path, scheme: Scheme) -> Source:
    config = replace(tiny.MODEL, quant=scheme)
    text = TextAssets(tokenizer_json="{}")
    return Source("tiny", folder, "jaxinfer", config, text, SamplingParams(), num_bytes=0)


def test_figures_are_those_of_all_tokens():
    pieces = [piece(100, seed=1, harm=0.1), piece(37, seed=2), piece(400, seed=3, harm=0.3)]
    found = figures("some", pieces)
    whole = Compared(*map(np.concatenate, zip(*pieces, strict=True)))
    assert found.num_tokens == 537
    assert found.kl.value == pytest.approx(np.mean(whole.kl), rel=1e-6)
    agreed = np.mean(whole.reference_top == whole.candidate_top)
    assert found.top1.value == pytest.approx(agreed) and agreed < 0.9
    perplexities = [math.exp(-np.mean(whole[place], dtype=float)) for place in (1, 2)]
    assert found.reference_perplexity == pytest.approx(perplexities[0], rel=1e-6)
    ratio = perplexities[1] / perplexities[0]
    assert found.perplexity_ratio.value == pytest.approx(ratio, rel=1e-6)
    assert found.kl_p999 == pytest.approx(0.25)
    for one in (found.kl, found.top1, found.perplexity_ratio):
        assert one.low < one.value < one.high
    hit = whole.reference_top != whole.candidate_top
    assert found.num_lost == np.sum(hit & (whole.reference_top == whole.targets)) > 0
    assert found.num_gained == 0
    assert found.mcnemar_p == pytest.approx(2 * 0.5**found.num_lost)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    truth = 0.2 * 0.25 + 0.8 * 0.001
    covered = 0
    for trial in range(60):
        pieces = [piece(50, seed=1000 * trial + number, harm=0.2) for number in range(30)]
        interval = figures("x", pieces).kl
        covered += interval.low <= truth <= interval.high
    assert covered >= 51  # 57 expected


def test_as_many_lost_as_gained_is_chance():
    lost = piece(200, seed=1, harm=0.4)
    gained = lost._replace(reference_top=lost.candidate_top, candidate_top=lost.reference_top)
    both = figures("x", [lost, gained])
    assert both.num_lost == both.num_gained > 10
    assert both.mcnemar_p == 1.0
    assert both.perplexity_ratio.value > 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"kl": Interval(0.0101, 0.0, 1.0)}, ["mean KL 0.0101 > 0.01 on mine"]),
        ({"top1": Interval(0.969, 0.0, 1.0)}, ["top-1 agreement 96.90% < 97% on mine"]),
        (
            {"perplexity_ratio": Interval(1.021, 1.0, 2.0)},
            ["perplexity ratio 1.0210 > 1.02 on mine"],
        ),
        ({"kl": Interval(math.nan, 0.0, 1.0)}, ["mean KL nan > 0.01 on mine"]),
    ],
)
def test_a_bound_that_is_missed_is_named(change, words):
    good = replace(
        figures("mine", [piece(100, seed=1)]),
        kl=Interval(0.01, 0.0, 1.0),
        top1=Interval(0.97, 0.0, 1.0),
        perplexity_ratio=Interval(1.02, 1.0, 2.0),
    )
    assert list(missed(report(replace(good, **change)), QuantConfig())) == words


def test_a_report_comes_back_from_its_file(tmp_path):
    path = tmp_path / "quality.json"
    made = report(figures("mine", [piece(100, seed=1, harm=0.2)]))
    write(made, path)
    assert read(path) == made
    document = json.loads(path.read_text())
    del document["texts"][0]["kl"]["low"]
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"quality.json: texts\[0\]: kl: low is missing"):
        read(path)


def test_the_gate_lets_in_what_is_near_and_refuses_what_is_far(tmp_path):
    (tmp_path / checkpoint.MODEL).write_text("{}")
    source = described(tmp_path, "w8a8")
    budget, strict, off = (QuantConfig(gate=name) for name in ("budget", "report", "off"))
    gate.check(source, budget)
    with pytest.raises(QualityRefused, match="no quality report of these weights as w8a8"):
        gate.check(source, strict)
    near = report(figures("mine", [piece(100, seed=1)]))
    near = replace(near, weights=checkpoint.digest(tmp_path))
    write(near, gate.place(source))
    gate.check(source, budget)
    gate.check(source, strict)
    far = replace(near, texts=(figures("mine", [piece(100, seed=1, harm=0.5)]),))
    write(far, gate.place(source))
    with pytest.raises(QualityRefused, match=r"mean KL .* > 0.01 on mine; .*--quant.gate off"):
        gate.check(source, budget)
    gate.check(source, off)
    gate.check(source, replace(budget, max_kl=1.0, min_top1=0.0, max_perplexity_ratio=9.0))
    gate.check(described(tmp_path, "w8a16"), budget)  # the report speaks of w8a8
    (tmp_path / checkpoint.MODEL).write_text('{"other": 1}')
    assert gate.find(source) is None, "the weights are others now"
    gate.check(described(tmp_path, "none"), strict)


class Letters:
    """A token a letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_windows_are_pieces_of_one_document_each_and_a_short_run_has_the_same_mix():
    documents = [Document("a" * 1000, "one"), Document("b", "two"), Document("c" * 505, "three")]
    every = texts.windows(documents, Letters(), size=100, max_tokens=10_000)
    assert [len(one.tokens) for one in every] == [100] * 15 + [5]
    assert all(len(set(one.tokens.tolist())) == 1 for one in every)
    some = texts.windows(documents, Letters(), size=100, max_tokens=600)
    assert sum(len(one.tokens) - 1 for one in some) <= 600
    assert {one.kind for one in some} == {"one", "three"}
    assert texts.digest(some) != texts.digest(every)
    assert texts.windows([Document("x")], Letters(), size=8, max_tokens=9) == []


def test_bundled_text_has_all_kinds_and_says_where_it_is_from():
    documents = [json.loads(line) for line in texts.BUNDLED.read_text("utf-8").splitlines()]
    kinds = {"story", "play", "code", "documentation", "records", "sums"}
    assert {one["kind"] for one in documents} == kinds
    for one in documents:
        assert any(word in one["source"] for word in ("public domain", "Apache-2.0", "generated"))
    assert sum(len(one.text) for one in texts.bundled()) > 200_000


def test_a_users_file_is_text_or_jsonl(tmp_path):
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("Größe\n")
    lines.write_text('{"text": "one"}\n{"text": "two", "id": 3}\n')
    assert texts.read(plain) == [Document("Größe\n")]
    assert texts.read(lines) == [Document("one"), Document("two")]
    lines.write_text('{"text": "one"}\n["two"]\n')
    with pytest.raises(InvalidRequest, match=r"b.jsonl, line 2: it must be an object"):
        texts.read(lines)
    plain.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequest, match=r"--text .*a.txt can't be read"):
        texts.read(plain)
