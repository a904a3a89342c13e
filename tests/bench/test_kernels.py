"""Kernels by themselves: every case there is, with bytes and operations as they are."""

import json

import pytest

from jaxinfer import cli
from jaxinfer.bench import kernel_cases, kernels, page, probes
from tests import cli_model, tiny


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(probes, "_BYTES", 2**20)
    monkeypatch.setattr(kernel_cases, "COLD_BYTES", 2**10)


def test_every_kernel_that_runs_here_is_timed_at_every_size(monkeypatch):
    monkeypatch.setattr("jaxinfer.kernels.native.refusal", lambda: "no compiler")
    report = kernels.measure(
        tiny.MODEL,
        tiny.engine_config(),
        name="tiny",
        batches=(2,),
        contexts=(40,),
        rows=(3,),
        rounds=2,
    )
    assert [(one.kernel, one.size) for one in report.attention] == [
        ("reference float32", "2 x 40"),
        ("reference int8", "2 x 40"),
    ]
    rows = 2 * 2 * 2 * 40  # keys and values, kv heads, sequences, tokens
    assert [one.floor_bytes for one in report.attention] == [
        rows * 16 * 4,
        rows * (16 + 4),  # codes and a scale of four bytes
    ]
    assert [one.floor_bytes for one in report.matmuls] == [size * 64 * 128 for size in (4, 2, 1)]
    assert [one.flops for one in report.matmuls] == [2 * 3 * 64 * 128] * 3
    assert all(one.us > 0 and one.share > 0 for one in (*report.attention, *report.matmuls))
    assert any("pallas_gpu" in reason for reason in report.refused)
    assert any("no compiler" in reason for reason in report.refused)
    assert "matmul int8" in page.html(kernels.page(report))


def test_the_command_refuses_a_count_of_nothing(tmp_path):
    model = cli_model.save(tmp_path)
    assert cli.run(["bench", "kernels", "--rows=0", "-m", str(model)]) == 2


@pytest.mark.full
def test_the_command_prints_one_json_object(tmp_path, capsys):
    model = cli_model.save(tmp_path)
    code = cli.run(
        [
            *("bench", "kernels", "--rounds=1", "--batches=1", "--contexts=20", "--rows=1"),
            *("--json", "-m", str(model), "-c", str(tmp_path / "tiny.toml")),
        ]
    )
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["rounds"] == 1 and len(found["matmuls"]) == 3
