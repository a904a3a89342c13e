"""The gate of quality stands before every way to run a model, with the same words and way past."""

import ast
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import jaxinfer
from jaxinfer import cli, llm, weights
from jaxinfer.bench import start, variants
from jaxinfer.cli import validate
from jaxinfer.config import Config, EngineConfig, QuantConfig
from jaxinfer.errors import QualityRefused
from jaxinfer.quality import gate
from jaxinfer.quality.compare import Compared
from jaxinfer.quality.report import FORMAT, Report, figures, write
from jaxinfer.weights import checkpoint
from jaxinfer.weights.source import silent
from tests import cli_model

WORDS = r"quality\.json: mean KL 0\.25 > 0\.01 on mine; .*--quant\.gate off"
COMMANDS = (
    "ablate",
    "ablate --workload=W1 --levers=w8a16 --quick",
    "bench bits",
    "bench interference",
    "bench offline",
    "bench offline W3 --requests=2",
    "bench offline --static",
    "bench offline --batch-curve",
    "bench prefix",
    "bench simulated",
    "bench step",
    "chat",
    "generate --prompt=a",
    "serve",
    "simulate --measure",
)


@pytest.fixture(scope="module")
def far(tmp_path_factory) -> Path:
    """A quantised folder whose report misses a bound."""
    folder = tmp_path_factory.mktemp("gate")
    model = weights.load(cli_model.save(folder), dtype="bfloat16")
    path = weights.save(weights.quantised(model, "w8a8"), folder / "far")
    names = ("reference", "candidate", "compute_dtype", "environment", "text_digest")
    said = {name: name for name in names} | {"scheme": "w8a8", "weights": checkpoint.digest(path)}
    some = np.zeros(64, np.float32)
    tops = np.zeros(64, np.int32)
    apart = Compared(some + np.float32(0.25), some - 1, some - 1, tops, tops, tops)
    report = Report(FORMAT, **said, window=8, texts=(figures("mine", [apart]),), kinds=())
    write(report, path / "quality.json")
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_runs_a_model_refuses_one_that_is_too_far(far, capsys, command):
    settings = str(far.parent / "tiny.toml")
    assert cli.run([*command.split(), "-m", str(far), "-c", settings]) == 1
    said = capsys.readouterr()
    assert not said.out.strip()
    assert "mean KL 0.25 > 0.01 on mine" in said.err and "--quant.gate off" in said.err


def test_what_is_measured_in_a_process_is_refused_and_let_in_as_what_is_served(far):
    refused = Config(model=str(far))
    ways = (
        gate.load,
        llm.load_engine,
        lambda config: variants.Variants(config.model).checkpoint(config),
        lambda config: start.start_here(config, model=config.model, store="", jax_cache=""),
    )
    for way in ways:
        with pytest.raises(QualityRefused, match=WORDS):
            way(refused)
    let_in = replace(refused, quant=QuantConfig(gate="off"))
    for found in (gate.load(let_in), variants.Variants(str(far)).checkpoint(let_in)):
        assert found.config.quant == "w8a8"
    moved = replace(refused, quant=QuantConfig(max_kl=0.3))
    assert gate.load(moved).config.quant == "w8a8"


def test_a_measurement_is_let_past_the_gate_by_the_same_setting(far, capsys, monkeypatch):
    def reached(self: variants.Variants, config: Config) -> None:
        assert self.checkpoint(config).config.quant == "w8a8"
        raise QualityRefused("the weights are here")

    monkeypatch.setattr(variants.Variants, "engine", reached)
    for command in (["ablate"], ["bench", "offline"]):
        options = ["-m", str(far), "--quant.gate", "off"]
        assert cli.run([*command, *options]) == 1
        assert "the weights are here" in capsys.readouterr().err


@pytest.mark.full
def test_our_side_of_a_comparison_says_why_it_was_refused(far, capsys):
    other = [sys.executable, "-c", "print('{\"seconds\": 1}')"]
    code = cli.run(["bench", "compare", "W1", "-m", str(far), "--rounds=1", "--", *other])
    said = capsys.readouterr().err
    assert code == 2 and "mean KL 0.25 > 0.01 on mine" in said and "--quant.gate off" in said


def test_what_writes_a_report_loads_a_model_that_the_gate_would_refuse(far):
    config = Config(model=str(far), engine=EngineConfig(compute_dtype="bfloat16"))
    reference = str(far.parent / "tiny")
    first, second = validate.load_both(config, reference, is_stored=True, show=silent)
    assert (first.config.quant, second.config.quant) == ("none", "w8a8")


def test_nobody_else_loads_weights_past_the_gate():
    root = Path(jaxinfer.__file__).parent
    found = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if any(map(_loads_weights, ast.walk(ast.parse(path.read_text()))))
    }
    assert found == {"quality/gate.py", "cli/quantize.py", "cli/validate.py"}


def _loads_weights(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):  # `from jaxinfer.weights import load`
        return node.module == "jaxinfer.weights" and any(one.name == "load" for one in node.names)
    return isinstance(node, ast.Attribute) and ast.unparse(node) in (
        "weights.load",
        "jaxinfer.weights.load",
    )
