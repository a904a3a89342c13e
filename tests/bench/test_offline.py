"""Workloads through an engine: what is counted, printed and refused; never how fast it is."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from jaxinfer import cli
from jaxinfer.bench import curve, offline, offline_shown, page, variants
from jaxinfer.bench.workloads import Call, Workload
from jaxinfer.engine import Engine
from jaxinfer.host.workload import SLO
from tests import cli_model, tiny
from tests.bench import small

LOAD = Workload(
    "three",
    "three requests",
    lambda repeat: tuple(
        Call(tuple(range(1 + repeat % 7, 41 + repeat % 7)), count) for count in (4, 9, 6)
    ),
)


@pytest.fixture(scope="module")
def engine():
    return small.make_engine()


@pytest.fixture(scope="module")
def report(engine):
    return offline.measure(engine, LOAD, model="tiny", rounds=3, slo=SLO(ttft_s=1e-9))


def screen_of(sheets, width=100):
    console = Console(width=width)
    with console.capture() as captured:
        for sheet in sheets:
            console.print(page.shown(sheet))
    assert max(map(len, captured.get().splitlines())) <= width
    return captured.get()


def test_every_token_of_every_request_is_counted_once(engine, report):
    for one in report.rounds:
        assert [record.num_output_tokens for record in one.records] == [4, 9, 6]
        assert all(record.chunks_s == sorted(record.chunks_s) for record in one.records)
        assert one.figures.num_output_tokens == 19 and one.figures.num_ok == 3
        assert one.figures.peak_in_flight == 3
        assert one.figures.goodput_per_s == 0  # nobody keeps such a bound
    assert engine.observer is None and not engine.has_work


def test_an_end_token_ends_no_answer(engine):
    answers = offline.serve(engine, LOAD.calls(0))[1]
    ending = replace(tiny.MODEL, eos_token_ids=(answers[1][0][0],))
    config = small.config()
    same = Engine(tiny.params(), ending, tiny.TokenText(), config, store=tiny.store())
    assert offline.serve(same, LOAD.calls(0))[1] == answers


def test_waste_and_padding_are_those_of_the_plans(engine, report):
    assert len({one.page_waste for one in report.rounds}) == 1
    assert 0 < report.rounds[0].page_waste < 16 / 41  # less than a page of each sequence
    assert 0 < report.rounds[0].decode_padding < 1
    one, _ = offline.serve(engine, [Call(tuple(range(64)), 1)])
    assert one.prefill_padding == 0 and one.decode_padding == 0 and one.num_steps == 1
    assert one.page_waste == 0  # 64 tokens are four pages, and the only answer needs no place
    one, _ = offline.serve(engine, [Call(tuple(range(60)), 1)])
    assert one.prefill_padding == pytest.approx(4 / 64)
    assert one.page_waste == pytest.approx(4 / 64)


def test_a_repeat_begins_with_an_empty_prefix_cache(report):
    assert [one.figures.num_cached_tokens for one in report.rounds] == [
        report.rounds[0].figures.num_cached_tokens
    ] * 3


def test_answers_are_those_of_the_engine_alone(engine):
    _, answers = offline.serve(engine, LOAD.calls(0))
    alone = tiny.run(engine, [tiny.make_request("a", LOAD.calls(0)[1].prompt, max_tokens=9)])
    assert answers[1] == (alone["a"].tokens, alone["a"].logprobs)


def test_json_has_the_names_that_peers_print(engine, report):
    found = json.loads(json.dumps(report.as_dict()))
    assert found["peer"] == "jaxinfer" and found["variant"] == "f32" and found["tries"] == 3
    assert found["out_tok_s"] > 0 and found["seconds"] > 0 and found["peak_rss_mb"] > 0
    assert "ttft_ms" not in found  # of one request only
    lone = Workload("one", "one request", lambda repeat: LOAD.calls(repeat)[:1])
    single = offline.measure(engine, lone, model="tiny", rounds=1).as_dict()
    assert single["ttft_ms"] == single["mean_ttft_ms"] > 0 and single["decode_tok_s"] > 0


def test_tables_and_pages_say_the_same(report):
    shown = offline_shown.page(report, SLO(ttft_s=1e-9))
    screen, html = screen_of(shown.sheets), page.html(shown)
    assert "goodput" in screen and "page waste" in screen and "three requests" in screen
    for sheet in shown.sheets:
        for row in sheet.rows:
            assert all(cell.strip() in html for cell in row if "'" not in cell)
    assert html.count("<svg") == 3 and "src=" not in html and "href=" not in html


def test_the_curve_has_a_point_for_each_count(engine):
    found = curve.measure(engine, model="tiny", counts=(1, 2, 4), prompt=8, output=4, rounds=2)
    assert [one.streams for one in found.points] == [1, 2, 4]
    assert all(one.output_tokens_per_s > 0 and one.e2e_ms >= one.ttft_ms for one in found.points)
    assert "streams" in screen_of([curve.sheet(found)])
    assert page.html(curve.page(found)).count("<svg") == 1


def test_static_batches_give_the_same_answers_in_more_steps(engine):
    static = small.make_engine(batching="static")
    one, answers = offline.serve(static, LOAD.calls(0))
    other, same = offline.serve(engine, LOAD.calls(0))
    assert answers == same and one.num_steps > other.num_steps
    found = curve.against_static(engine, static, LOAD, model="tiny", rounds=2)
    assert len(found.ratios) == 2 and found.as_dict()["bar"] == curve.STATIC_BAR
    assert "static, ended rows left out" in screen_of([curve.static_sheet(found)])


def test_a_static_batch_keeps_its_shape_until_its_longest_answer_has_ended(engine):
    shaped = curve.in_shape(LOAD, 2).calls(0)
    plain = LOAD.calls(0)
    assert [call.prompt for call in shaped] == [call.prompt for call in plain]
    wanted = [call.num_output_tokens for call in plain]
    pairs = [wanted[first : first + 2] for first in range(0, len(wanted), 2)]
    longest = [max(pair) for pair in pairs for _ in pair]
    assert [call.num_output_tokens for call in shaped] == longest != wanted
    static = small.make_engine(batching="static")
    rows = offline.serve(static, shaped)[0].decode_padding
    assert rows < offline.serve(static, plain)[0].decode_padding


def test_the_command_measures_a_file_and_writes_a_page(engine, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(variants.Variants, "engine", lambda self, config: engine)
    model = cli_model.save(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "abcdef"}\n{"prompt": "ghi", "num_output_tokens": 3}\n')
    html = tmp_path / "page.html"
    options = ["-m", str(model), "-c", str(tmp_path / "tiny.toml"), "--html", str(html)]
    code = cli.run(
        ["bench", "offline", str(prompts), "--output-tokens=5", "--rounds=1", "--json", *options]
    )
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["num_slots"] == 2
    assert found["rounds"][0]["figures"]["num_output_tokens"] == 8
    assert "prompts" in html.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["W9"], "no workload 'W9'"),
        (["W1", "--rounds=0"], "must be at least 1"),
        (["W1", "--html=nowhere/page.html"], "there is no folder nowhere"),
        (["W1", "--slo=fast"], "--slo is 'fast'"),
    ],
)
def test_the_command_refuses_what_it_can_not_do(tmp_path, capsys, arguments, words):
    model = cli_model.save(tmp_path)
    code = cli.run(["bench", "offline", *arguments, "-m", str(model)])
    assert code == 2 and words in " ".join(capsys.readouterr().err.split())


@pytest.mark.full
@pytest.mark.parametrize("option", ["--batch-curve", "--static", "--slo=ttft=1"])
def test_every_form_of_the_command_runs_on_engines_of_its_own(tmp_path, capsys, option):
    model = cli_model.save(tmp_path)
    options = ["-m", str(model), "-c", str(tmp_path / "tiny.toml"), "--engine.num-slots=2"]
    longer = "--engine.max-seq-len=512"
    code = cli.run(
        ["bench", "offline", "W3", "--requests=4", "--rounds=1", longer, option, *options]
    )
    out = capsys.readouterr().out
    assert code == 0 and "tokens/s" in out
