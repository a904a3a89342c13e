"""The benchmarks on a tiny model: what they count, print and refuse; never how fast it is."""

import asyncio
import json
from typing import Any

import pytest
from rich.console import Console

from jaxinfer import cli
from jaxinfer.bench import bits, clients, edge, interference, prefix, simulated
from jaxinfer.bench.load import calls
from jaxinfer.engine_config import CacheConfig
from jaxinfer.errors import ConfigError
from jaxinfer.host.cost_model import from_json
from jaxinfer.host.request import JAXINFER_DEFAULTS
from jaxinfer.host.workload import WorkloadSpec, draw
from jaxinfer.llm import LoadedEngine
from tests import cli_model, tiny
from tests.server.fake_engine import FakeTokenizer


@pytest.fixture(scope="module")
def engine():
    return tiny.make_engine(prefill_per_decode=16)


@pytest.fixture(scope="module")
def loaded(engine):
    tokenizer: Any = FakeTokenizer()
    return LoadedEngine(engine, tokenizer, tiny.MODEL, "tiny", JAXINFER_DEFAULTS)


def lines_of(table):
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table)
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 100
    return lines


def test_prefix_counts_the_tokens_that_came_from_the_cache(engine):
    load = prefix.Load(num_shared=64, num_own=8, num_requests=5, concurrency=1)
    report = prefix.measure(engine, name="tiny", load=load, rounds=2)
    assert report.hit_rate == 4 * 64 / (5 * 72)  # all but the first of each round
    assert len(report.ratios) == 2 and report.ratio > 0
    text = "\n".join(lines_of(prefix.table(report)))
    assert "71.1%" in text and "at least" in text
    assert json.loads(json.dumps(report.as_dict()))["load"]["num_shared"] == 64
    assert not engine.has_work


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (prefix.Load(num_shared=250), "286 tokens; set engine.max_seq_len"),
        (prefix.Load(num_shared=0), "at least 1"),
    ],
)
def test_prefix_refuses_what_the_engine_can_not_run(engine, load, words):
    with pytest.raises(ConfigError, match=words):
        prefix.measure(engine, name="tiny", load=load)


def test_prefix_needs_a_prefix_cache():
    off = tiny.make_engine(cache=CacheConfig(prefix=False))
    with pytest.raises(ConfigError, match="there is no prefix cache"):
        prefix.measure(off, name="tiny")


def test_bits_times_each_load_in_the_program_that_fits_it(engine, monkeypatch):
    run = bits._Decode.seconds

    def a_millisecond_a_row(decode: bits._Decode) -> float:
        assert run(decode) > 0
        return decode.rows / 1e3

    monkeypatch.setattr(bits._Decode, "seconds", a_millisecond_a_row)
    report = bits.measure(engine, name="tiny", context=32, actives=(1, 3, 32), rounds=2)
    one, three = report.prices  # 32 are more than the slots
    assert (one.active, one.exact_rows, one.fast_rows, one.price) == (1, 1, 1, 0)
    assert (three.active, three.exact_rows, three.fast_rows) == (3, 8, 3)
    assert (three.exact_ms, three.fast_ms) == (8, 3)
    assert three.low == three.price == three.high == pytest.approx(8 / 3 - 1)
    assert any("exact ms" in line for line in lines_of(bits.table(report)))
    assert json.loads(json.dumps(report.as_dict()))["bar"] == bits.BAR


def test_interference_measures_streams_beside_a_prompt_and_leaves_the_engine_empty(engine):
    sizes: dict[str, Any] = {"num_streams": 3, "num_prompt_tokens": 200, "num_alone_steps": 4}
    report = interference.measure(engine, name="tiny", rounds=2, **sizes)
    assert len(report.rounds) == 2
    assert all(one.beside_tokens_per_s > 0 and one.ttft_beside_s > 0 for one in report.rounds)
    assert report.kept == sum(one.kept for one in report.rounds) / 2
    assert not engine.has_work and engine.stats().num_running == 0
    lines = lines_of(interference.table(report))
    assert "prefill_per_decode 16" in lines[0]
    assert "at least 50%" in "\n".join(lines)


def test_interference_needs_a_slot_more_than_streams_and_room_for_the_prompt(engine):
    for num_streams, num_tokens in ((8, 100), (2, 256)):
        with pytest.raises(ConfigError, match="need engine.num_slots of"):
            interference.measure(
                engine, name="tiny", num_streams=num_streams, num_prompt_tokens=num_tokens
            )
    roomy = interference.roomy(engine.config, num_streams=8, num_prompt_tokens=1000)
    interference.check(roomy, num_streams=8, num_prompt_tokens=1000)


SPECS = {
    "closed": WorkloadSpec(6, 3, None, (4, 20), (3, 8)),
    "open": WorkloadSpec(5, None, 1.0, (4, 60), (2, 6)),
    "shared": WorkloadSpec(4, 2, None, (70, 90), (2, 4), 64),
}


def test_simulated_compares_three_figures_of_each_workload(loaded):
    report = simulated.measure(loaded, specs=SPECS, rounds=1)
    assert [(one.workload, one.figure) for one in report.compared] == [
        (name, figure) for name in SPECS for figure in simulated.FIGURES
    ]
    assert all(one.predicted > 0 and one.measured >= 0 for one in report.compared)
    assert set(report.rates_per_s) == {"open"}
    assert report.num_steps > 20 and report.cost.edge_s > 0
    assert report.worst == max(abs(one.error) for one in report.compared)
    lines = lines_of(simulated.table(report))
    assert sum("TPOT ms" in line for line in lines) == 3
    assert not loaded.engine.has_work


def test_simulated_refuses_workloads_that_do_not_fit(loaded):
    with pytest.raises(ConfigError, match="workload mixed has sequences of 564 tokens"):
        simulated.measure(loaded)


def test_clients_get_every_token_and_see_shared_prefixes(loaded):
    async def scenario(client):
        return await clients.play(client, draw(SPECS["shared"]), vocab_size=256)

    loaded.engine.flush_prefix_cache()
    before = loaded.engine.stats().num_cached_tokens
    lines = asyncio.run(clients.serve(loaded, scenario))
    counts = sorted(len(line.tokens_s) for line in lines)
    assert counts == sorted(one.num_output_tokens for one in draw(SPECS["shared"]).arrivals)
    assert all(line.ttft_s > 0 for line in lines)
    assert loaded.engine.stats().num_cached_tokens >= before + 2 * 64
    first, second, *_ = calls.prompts_of(draw(SPECS["shared"]), vocab_size=256, seed=1)
    assert first[:64] == second[:64] and first[64:] != second[64:]


def test_calibration_fits_into_any_engine():
    for max_seq_len in (24, 256, 4096):
        for spec in simulated.calibration_specs(max_seq_len):
            assert spec.num_prompt_tokens[1] + spec.num_output_tokens[1] <= max_seq_len


def run(capsys, *argv):
    code = cli.run(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_commands_load_measure_and_print(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(tiny.cache_dir()))
    model = ("-m", str(cli_model.save(tmp_path)), "-c", str(tmp_path / "tiny.toml"))
    sizes = ("--shared", "64", "--own", "8", "--requests", "3", "--rounds", "1")
    code, out, _ = run(capsys, "bench", "prefix", *model, *sizes, "--json")
    assert code == 0 and json.loads(out)["hit_rate"] > 0
    sizes = ("--streams", "2", "--prompt", "100", "--rounds", "1")
    code, out, _ = run(capsys, "bench", "interference", *model, *sizes)
    assert code == 0 and "2 streams and a prompt of 100 tokens" in out


def test_a_cost_model_that_is_measured_now_is_used(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(tiny.cache_dir()))
    model = ("-m", str(cli_model.save(tmp_path)), "-c", str(tmp_path / "tiny.toml"))
    code, out, _ = run(capsys, "simulate", *model, "--measure", "--json")
    found = json.loads(out)
    assert code == 0 and from_json(json.dumps(found["cost"])).step_s > 0
    assert found["predictions"][0]["num_requests"] == 24


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("prefix --rounds 0", "--rounds is 0; it must be at least 1"),
        ("interference --streams 0", "--streams is 0; it must be at least 1"),
        ("simulated --save /nowhere/cost.json", "there is no folder /nowhere"),
    ],
)
def test_bad_numbers_are_refused_before_a_model_is_loaded(capsys, argv, words):
    code, out, err = run(capsys, "bench", *argv.split())
    assert (code, out) == (2, "") and words in err


def test_edge_counts_every_token_that_a_real_server_streams():
    load = edge.Load(streams=3, step_s=0.002, tokens=7, seconds=0.3, warm_s=0.2)
    report = edge.measure(load, rounds=1)
    (found,) = report.rounds
    assert 0 < found.messages_per_s <= found.tokens_per_s == report.tokens_per_s
    assert found.server_us_per_message >= found.server_us_per_token > 0
    assert found.gap_p99_ms >= found.gap_p50_ms > 0 and found.made_per_s > 0
    assert json.loads(json.dumps(report.as_dict()))["load"]["streams"] == 3
    assert "3 streams" in lines_of(edge.table(report))[0]


@pytest.mark.parametrize("flags", [("--streams", "0"), ("--step-ms", "-1"), ("--seconds", "0")])
def test_edge_refuses_loads_that_are_none(flags, capsys):
    assert cli.run(["bench", "edge", *flags]) == 2
    assert flags[0] in capsys.readouterr().err
