"""The tuner: what it takes, what it leaves out, and that an engine can read what it wrote."""

import json
from contextlib import nullcontext
from dataclasses import replace

import jax.numpy as jnp
import pytest

from jaxinfer import cli
from jaxinfer.bench import kernel_cases
from jaxinfer.bench.hardware import tuning
from jaxinfer.bench.hardware.sizes import TOY, Load, Turns
from jaxinfer.bench.hardware.tuning import Tried
from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.kernels.paged_attention import Needs, tuned
from tests import cli_model, tiny
from tests.kernels import mosaic_gpu

GPU = Needs("gpu", "9.0", "bfloat16", head_dim=64, page_size=16, block=64)
CPU = GPU._replace(platform="cpu", capability="")
ENGINE = EngineConfig(
    attention="pallas_gpu", attention_block=64, cache=CacheConfig(page_size=16), max_seq_len=128
)
LOADS = (Load(2, 100, page_size=16), Load(1, 100, queries=20, page_size=16))


def test_the_fastest_sizes_win_and_those_that_are_off_do_not():
    rule, fast, wrong = (
        Tried((), (1.0, 1.0)),
        Tried((64, 256, 3), (0.8, 0.9)),
        Tried((64, 512, 2), ()),
    )
    wrong = replace(wrong, why_not="its results are 1.0e+00 off")
    assert tuning._best((rule, fast, wrong)) is fast


def test_the_rule_stays_where_nothing_is_clearly_faster():
    rule, close = Tried((), (1.0, 1.0)), Tried((64, 256, 3), (1.05, 0.94))
    assert tuning._best((rule, close)) is rule


def test_the_kernel_is_the_one_that_is_asked_for_or_the_one_of_this_device():
    assert tuning.backend_here(replace(ENGINE, attention="auto"), GPU) == "pallas_gpu"
    assert tuning.backend_here(ENGINE, GPU) == "pallas_gpu"
    with pytest.raises(ConfigError, match="no attention kernel with tiles .* needs a GPU, and th"):
        tuning.backend_here(ENGINE, CPU)


def test_a_machine_without_such_a_kernel_says_so(tmp_path, capsys):
    model = cli_model.save(tmp_path)
    assert cli.run(["tune", "-m", str(model), "--out", str(tmp_path / "tiles.toml")]) == 2
    said = capsys.readouterr().err
    assert "pallas_tpu needs a TPU" in said and "pallas_gpu needs a GPU" in said
    assert not (tmp_path / "tiles.toml").exists()


def fake_kernel(monkeypatch, act):
    """Stands in for the kernel: `act(tiles)` is added to what it returns."""

    def through_layers(engine, repeats):
        return lambda q, *_: q + repeats * act(engine.attention_tiles)

    monkeypatch.setattr(kernel_cases, "through_layers", through_layers)


def run(**options):
    plain = {
        "loads": LOADS,
        "device": "here",
        "rounds": 2,
        "turns": Turns(1, 2),
        "place": nullcontext,
    }
    return tuning.tune(TOY, ENGINE, GPU, **(plain | options))


def test_sizes_with_other_results_or_that_fail_are_left_out_and_say_why(monkeypatch):
    def act(sizes):
        if sizes and sizes[2] == 3:
            raise ValueError("too many registers")
        return jnp.float32(100.0 if sizes and sizes[2] == 6 else 0.0)

    fake_kernel(monkeypatch, act)
    found = run(most=4)
    why = {one.sizes: one.why_not for one in found.tried}
    assert why[()] == "" and len(why) == 5
    assert all(("registers" in text) == (sizes[2] == 3) for sizes, text in why.items() if sizes)
    assert all(("off" in text) == (sizes[2] == 6) for sizes, text in why.items() if sizes)
    assert found.entry.sizes[2] in (2, 4)
    assert all(len(one.ratios) == len(LOADS) for one in found.tried if not one.why_not)


@pytest.mark.full
def test_what_the_gpu_kernel_was_tuned_to_is_taken_by_an_engine(tmp_path):
    found = run(place=mosaic_gpu.interpreter, most=3)
    assert [one.why_not for one in found.tried] == [""] * 4
    path = tmp_path / "tiles.toml"
    tuned.write(path, [found.entry])
    engine = tiny.engine_config(
        attention="pallas_gpu", attention_block=64, tiles=str(path), compute_dtype="bfloat16"
    )
    settled = tuned.settle(engine, GPU, group=2, device="here")
    assert settled.attention_tiles == found.entry.sizes


@pytest.mark.full
def test_the_command_writes_a_file_that_reads_back(tmp_path, capsys):
    model = cli_model.save(tmp_path)
    out = tmp_path / "tiles.toml"
    arguments = ["tune", "--tiny", "-m", str(model), "-c", str(tmp_path / "tiny.toml")]
    arguments += ["--batches=2", "--context=40", "--chunk=8", "--rounds=1", "-o", str(out)]
    assert cli.run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (entry,) = tuned.read(out)
    assert list(entry.sizes) == found["entry"]["sizes"]
    assert entry.place.device == "interpreter" and entry.backend == "pallas_tpu"
    assert cli.run(arguments) == 0  # again, over its own file
    assert tuned.read(out)[0].place == entry.place
    out.write_text("tiles = 3\n")
    assert cli.run(arguments) == 2
