"""Levers: each can be switched both ways, and the matrix says what came of it."""

import dataclasses
import json

import jax
import pytest
from rich.console import Console

from jaxinfer import cli, fingerprint
from jaxinfer.bench import page, variants
from jaxinfer.bench.ablate import judged, levers, measure, shown
from jaxinfer.bench.workloads import Call, Workload
from jaxinfer.cli.ablate import ablate
from jaxinfer.config import Config, EngineConfig, QuantConfig
from jaxinfer.errors import ConfigError
from jaxinfer.host.workload import SLO
from jaxinfer.kernels import native
from tests import cli_model, tiny
from tests.bench import small

needs_native = pytest.mark.skipif(
    bool(native.refusal()), reason=f"no native kernels: {native.refusal()}"
)
LOAD = Workload(
    "few",
    "four requests",
    lambda repeat: tuple(
        Call(tuple(range(repeat % 5, 30 + repeat % 5)), count) for count in (3, 8, 5, 4)
    ),
)


@pytest.mark.parametrize("lever", levers.LEVERS, ids=lambda lever: lever.name)
def test_every_lever_goes_off_and_on_again(lever):
    for config in (Config(), levers.plain(Config(), levers.LEVERS)):
        on, off = lever.on(config), lever.off(config)
        assert on != off
        assert lever.is_on(on) and not lever.is_on(off)
        assert lever.on(on) == on and lever.off(off) == off
        assert lever.is_on(lever.on(off)) and not lever.is_on(lever.off(on))


def test_what_is_on_goes_off_and_what_is_off_goes_on():
    some = levers.find(("overlap", "w8a8"))
    found = measure.variants(Config(), some, alone=True)
    assert [(one.name, one.kind) for one in found] == [
        ("as given", "given"),
        ("without overlap", "switched"),
        ("with w8a8", "switched"),
        ("all off", "plain"),
        ("only overlap", "alone"),
        ("only w8a8", "alone"),
    ]
    assert found[3].config == found[1].config and found[4].config == found[0].config
    quantised = Config(quant=QuantConfig(scheme="w8a8"))
    names = [one.name for one in measure.variants(quantised, some, alone=False)]
    assert names == ["as given", "without overlap", "without w8a8"]


def test_quantisation_schemes_do_not_switch_each_other_off():
    given = Config(quant=QuantConfig(scheme="w8a16"))
    lever = levers.find(("w8a8",))[0]
    assert not lever.is_on(given) and lever.off(given) == given
    assert lever.on(given).quant.scheme == "w8a8"


def kernels_of(config: Config) -> tuple[str, str]:
    """Who attends and who multiplies in an engine with these settings."""
    engine = fingerprint.settle(tiny.MODEL, config.engine, jax.devices()[:1]).engine
    return engine.attention, engine.products


@needs_native
def test_levers_of_kernels_change_who_attends_and_who_multiplies():
    attention, products = levers.find(("attention kernel", "native products"))
    plain = levers.plain(Config(), levers.LEVERS)
    assert kernels_of(plain) == ("reference", "xla")
    assert kernels_of(attention.on(plain)) == ("native", "xla")
    if not native.lacks("avx512_bf16"):
        assert kernels_of(products.on(plain)) == ("reference", "native")
    given = Config(engine=EngineConfig(attention="native", products="native"))
    assert attention.on(given) == products.on(given) == given
    assert attention.off(given).engine.attention == "reference"
    assert products.off(given).engine.products == "xla"
    tuned = Config(engine=EngineConfig(attention="pallas_gpu", tiles="mine.json"))
    assert attention.off(tuned).engine.tiles == "", "the reference has no tiles"


def test_levers_that_make_no_difference_are_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(native, "refusal", lambda: "no C++ compiler is installed")
    stored = dataclasses.replace(tiny.MODEL, quant="w8a8")
    found, left_out = levers.usable(levers.LEVERS, Config(), stored)
    assert set(left_out) == {"attention kernel", "native products", "w8a8"}
    assert not {lever.name for lever in found} & set(left_out)
    assert "can't be had: no C++ compiler" in left_out["attention kernel"]
    assert left_out["native products"] == "no C++ compiler is installed"
    assert left_out["w8a8"] == "the checkpoint is w8a8 already"
    kernels = levers.find(("attention kernel", "native products"))
    with pytest.raises(ConfigError, match=r"no lever is left to switch: attention kernel: native"):
        levers.usable(kernels, Config(), tiny.MODEL)
    one_size = Config(engine=EngineConfig(prefill_chunks=(512,)))
    rows = levers.find(("overlap", "prefill rows"))
    assert levers.usable(rows, one_size, tiny.MODEL)[1] == {
        "prefill rows": "no chunk of [512] is small enough to have rows"
    }
    given = Config(engine=EngineConfig(compute_dtype="float32"))
    products = levers.find(("overlap", "native products"))
    assert levers.usable(products, given, tiny.MODEL)[1] == {
        "native products": "weights in float32 are XLA's"
    }


@needs_native
def test_where_native_code_is_had_its_levers_are_there():
    given = Config(quant=QuantConfig(scheme="w8a8"))
    assert levers.usable(levers.LEVERS, given, tiny.MODEL) == (levers.LEVERS, {})


def test_the_commands_help_names_every_lever():
    said = " ".join(str(ablate.__doc__).split())
    assert all(lever.name in said for lever in levers.LEVERS)


def test_a_lever_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no lever 'turbo'; there are: batching, overlap"):
        levers.find(("overlap", "turbo"))


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate")
    model = str(cli_model.save(folder))
    made = variants.Variants(model)
    made._store = tiny.store()
    return made, Config(model=model, engine=small.config()), folder


def measured(setting, names, *, judge=lambda config: None):
    made, config, _ = setting
    return measure.measure(
        made,
        config,
        levers.find(names),
        LOAD,
        model="tiny",
        left_out={"native products": "no C++ compiler is installed"},
        rounds=2,
        slo=SLO(ttft_s=9.0),
        judge=judge,
    )


def judge_rounded(config: Config) -> measure.Quality | None:
    """Stands in for a comparison on text."""
    is_full = config.quant.scheme == "none" and config.engine.cache.dtype == "auto"
    return None if is_full else measure.Quality(0.0051, 0.951, 1.004)


@pytest.fixture(scope="module")
def report(setting):
    return measured(setting, ("batching", "overlap", "int8 pages"), judge=judge_rounded)


def test_the_matrix_has_a_row_for_every_state_of_the_levers(report):
    rows = {row.name: row for row in report.rows}
    assert len(rows) == len(report.rows) == 8
    assert not rows["as given"].ratios and not rows["all off"].ratios
    for name in ("without batching", "only batching"):
        assert set(rows[name].ratios) == set(measure.FIGURES)
        assert all(ratio.low <= ratio.middle <= ratio.high for ratio in rows[name].ratios.values())
    assert rows["without overlap"].changed == ("engine.overlap=false",)


def test_levers_that_change_no_numbers_are_exact_and_the_others_are_judged(report):
    rows = {row.name: row for row in report.rows}
    for name in ("as given", "without batching", "without overlap", "all off"):
        assert rows[name].same_bits and rows[name].same_tokens == 1 and rows[name].quality is None
    for name in ("with int8 pages", "only int8 pages"):
        assert rows[name].quality == (0.0051, 0.951, 1.004) and not rows[name].same_bits
    assert rows["with int8 pages"].memory_ratio < 1 and rows["without overlap"].memory_ratio == 1


@pytest.mark.full
def test_rounded_weights_and_pages_are_judged_against_the_full_model(setting):
    judge = judged.Judge(setting[0], max_tokens=64, window=32)
    report = measured(setting, ("w8a8", "w8a16", "int8 pages"), judge=judge)
    rows = {row.name: row for row in report.rows}
    assert rows["as given"].quality is None
    for name in ("with w8a8", "with int8 pages", "only w8a8", "only int8 pages"):
        quality = rows[name].quality
        assert quality is not None and quality.kl > 0 and 0 < quality.top1 <= 1
        assert not rows[name].same_bits
    fine, coarse = rows["with w8a16"].quality, rows["with w8a8"].quality
    assert fine is not None and coarse is not None and fine.kl < coarse.kl
    assert rows["with w8a8"].memory_mb < rows["as given"].memory_mb


@pytest.mark.parametrize("width", [80, 120])
def test_the_matrix_fits_on_a_terminal(report, width):
    console = Console(width=width)
    with console.capture() as captured:
        console.print(shown.matrix(report))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    assert max(map(len, lines)) <= width
    header = next(line for line in lines if line.startswith("lever"))
    assert header.split() == [
        *("lever", "TTFT", "TPOT", "P99", "tok/s", "good/s", "MB", "quality"),
    ]
    row = next(line for line in lines if line.startswith("with int8 pages"))
    assert "KL" in row and "…" not in row
    assert sum("exact" in line.split() for line in lines) >= 5
    assert "left out, native products: no C++ compiler is installed" in lines


def test_json_and_page_have_every_row(report):
    found = json.loads(json.dumps(shown.as_dict(report)))
    assert [row["name"] for row in found["rows"]] == [row.name for row in report.rows]
    assert found["rows"][1]["ratios"]["tokens_per_s"]["middle"] > 0
    html = page.html(shown.page(report))
    assert found["left_out"] == {"native products": "no C++ compiler is installed"}
    assert "left out, native products: no C++" in html
    assert all(row.name in html for row in report.rows) and "engine.overlap=false" in html


def test_a_page_marks_what_is_clearly_better_or_worse_and_what_it_is_compared_with(report):
    slower = {name: measure.Ratio(1.9, 2.0, 2.1) for name in measure.FIGURES}
    rows = (report.rows[0], dataclasses.replace(report.rows[1], ratios=slower))
    marks = shown.page(dataclasses.replace(report, rows=rows)).sheets[0].marks
    assert {mark for (row, _), mark in marks.items() if row == 0} == {"head"}
    assert [marks[1, column] for column in range(1, 6)] == ["bad", "bad", "bad", "good", "good"]
    once = {name: measure.Ratio(2.0, 2.0, 2.0) for name in measure.FIGURES}
    rows = (rows[0], dataclasses.replace(rows[1], ratios=once))
    sheet = shown.page(dataclasses.replace(report, rows=rows, rounds=1)).sheets[0]
    assert {row for row, _ in sheet.marks} == {0}, "one round has no spread"
    assert sheet.rows[1][1] == "2.00"


def test_only_one_engine_has_pages_at_a_time(setting):
    made, config, _ = setting
    engines = []

    class Watched:
        def engine(self, config: Config):
            assert not any(one.device.cache is not None for one in engines)
            engines.append(made.engine(config))
            return engines[-1]

    overlap = levers.find(("overlap",))
    measure.measure(Watched(), config, overlap, LOAD, model="tiny", rounds=1, alone=False)
    assert len(engines) == 2 and all(one.device.cache is None for one in engines)


def test_the_command_prints_the_matrix(setting, capsys, monkeypatch):
    made, config, folder = setting
    engine = made.engine(config)
    monkeypatch.setattr(variants.Variants, "engine", lambda self, config: engine)
    options = ["-m", config.model, "-c", str(folder / "tiny.toml")]
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "abc"}\n{"prompt": "defg"}\n')
    code = cli.run(
        [
            *("ablate", "--workload", str(prompts), "--levers=overlap", "--quick"),
            *("--rounds=1", "--output-tokens=3", *options),
        ]
    )
    out = capsys.readouterr().out
    assert code == 0 and "without overlap" in out and "exact" in out and "all off" not in out


def test_the_command_refuses_a_lever_that_is_not_there(setting, capsys):
    assert cli.run(["ablate", "--levers=turbo"]) == 2
    assert "no lever 'turbo'" in capsys.readouterr().err


def test_interleaving_is_bounded_only_where_it_is_on():
    off = levers.plain(Config(), levers.find(("interleaving",))).engine
    assert off == dataclasses.replace(
        EngineConfig(), max_prefill_tokens=2**30, prefill_per_decode=0
    )
