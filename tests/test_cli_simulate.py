"""`jaxinfer simulate`: the same figures as the functions, and what it refuses."""

import json

import pytest

from jaxinfer import cli
from jaxinfer.cli.simulate import LOAD, Load, workload_of
from jaxinfer.config import Config, EngineConfig
from jaxinfer.host.cost_model import CostModel, simulate, to_json
from jaxinfer.host.workload import NAMED, SLO, draw
from tests import cli_model

COST = CostModel(step_s=0.01, chunks=((32, 0.021), (512, 0.261)), context_token_s=1e-6)


@pytest.fixture
def cost(tmp_path):
    path = tmp_path / "cost.json"
    path.write_text(to_json(COST))
    return str(path)


def run(capsys, *argv):
    code = cli.run(argv)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("name", NAMED)
def test_it_says_what_the_simulator_says(capsys, cost, name):
    slo = ("--slo-ttft-ms", "200", "--slo-tpot-ms", "50")
    code, out, _ = run(capsys, "simulate", "-w", name, "--cost", cost, *slo, "--json")
    (found,) = json.loads(out)["predictions"]
    expected = simulate(draw(NAMED[name]), EngineConfig(), COST, slo=SLO(0.2, 0.05))
    assert code == 0
    assert found["ttft_s"]["p99"] == expected.ttft_s.p99
    assert found["goodput_per_s"] == expected.goodput_per_s
    assert found["num_steps"] == expected.num_steps > 0


def test_a_sweep_compares_side_by_side(capsys, cost):
    sweep = ("--sweep", "engine.num-slots=2,8,32", "--requests", "40", "--concurrency", "32")
    code, out, _ = run(capsys, "simulate", "--cost", cost, *sweep, "--json")
    found = json.loads(out)["predictions"]
    assert code == 0
    assert [one["case"] for one in found] == [f"num-slots {count}" for count in (2, 8, 32)]
    speeds = [one["output_tokens_per_s"] for one in found]
    assert speeds == sorted(speeds) and speeds[0] < speeds[2]
    _, out, _ = run(capsys, "simulate", "--cost", cost, *sweep)
    assert "num-slots" in out and "TTFT ms, p99" in out and "peak pages" in out
    assert max(map(len, out.splitlines())) <= 100
    lists = ("--sweep", "engine.prefill-chunks=[32,128],[32,512]")
    found = json.loads(run(capsys, "simulate", "--cost", cost, *lists, "--json")[1])
    assert len(found["predictions"]) == 2


def test_options_change_the_named_workload():
    changed = Load(workload="short", requests=5, rate=2.0, prompt="9", output="3-4", shared=8)
    load = workload_of(changed, Config())
    assert load.concurrency is None and len(load.arrivals) == 5
    assert {one.num_prompt_tokens for one in load.arrivals} == {9}
    assert {one.num_output_tokens for one in load.arrivals} <= {3, 4}
    assert {one.num_shared_tokens for one in load.arrivals} == {8}
    assert workload_of(LOAD, Config()) == draw(NAMED["short"])


def test_a_file_gives_lengths_or_texts(tmp_path):
    model = cli_model.save(tmp_path)
    path = tmp_path / "load.jsonl"
    path.write_text('{"num_prompt_tokens": 7, "num_output_tokens": 3}\n{"num_prompt_tokens": 9}\n')
    load = workload_of(Load(workload=str(path), output="5"), Config())
    lengths = [(one.num_prompt_tokens, one.num_output_tokens) for one in load.arrivals]
    assert lengths == [(7, 3), (9, 5)]
    path.write_text('{"turns": ["hello", "more"]}\n\n{"prompt": "hi"}\n')
    load = workload_of(Load(workload=str(path)), Config(model=str(model)))
    assert [one.num_prompt_tokens for one in load.arrivals] == [5, 2]  # one token a byte
    assert len(workload_of(Load(workload=str(path), requests=1), Config(str(model))).arrivals) == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "give --cost FILE (from `jaxinfer bench simulated --save`) or --measure"),
        ("--cost /nowhere", "--cost /nowhere: "),
        ("--cost COST --measure", "or --measure"),
        ("--cost COST -w long", "--workload is 'long'; it must be short, mixed, shared or"),
        ("--cost COST -w COST", "is no JSONL file"),
        ("--cost COST --rate 1 --concurrency 2", "--rate or --concurrency, not both"),
        ("--cost COST --rate 0", "the rate is 0.0"),
        ("--cost COST --prompt 9-8", "num_prompt_tokens of the workload is 9-8"),
        ("--cost COST --output x", "--output is 'x'; it must be a number or a range"),
        ("--cost COST --shared 40", "40 shared tokens leave none"),
        ("--cost COST --sweep num-slots=3", "--sweep is 'num-slots=3'"),
        ("--cost COST --sweep engine.num-slots", "--sweep is 'engine.num-slots'"),
        ("--cost COST --sweep engine.num-slots=0", "engine.num_slots is 0"),
        ("--cost COST --sweep engine.slots=1", "unknown key engine.slots"),
        ("--cost COST --slo-ttft-ms 0", "--slo-ttft-ms is 0.0; it must be above 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, cost, argv, words):
    code, out, err = run(capsys, "simulate", *argv.replace("COST", cost).split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert words in err


def test_a_file_without_requests_is_refused(capsys, cost, tmp_path):
    for text in ("", "[1]", '{"question": 1}', '{"turns": []}'):
        (tmp_path / "load.jsonl").write_text(text)
        argv = ("simulate", "--cost", cost, "-w", str(tmp_path / "load.jsonl"))
        code, _, err = run(capsys, *argv)
        assert code == 2 and "load.jsonl" in err
