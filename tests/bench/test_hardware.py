"""The check of hardware: what counts as wrong, what outlives a failure, and all of it, tiny."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer.bench.hardware import check, kernels, part, table
from jaxinfer.bench.hardware.part import Part, Pretended
from jaxinfer.bench.hardware.sizes import BUDGETS, REAL, TINY, work
from jaxinfer.kernels.paged_attention import BACKENDS, Needs
from tests.kernels import mosaic_gpu

ROOT = Path(__file__).parents[2]
DONE = {"status": "done", "seconds": 1.0, "error": "", "facts": {}, "skipped": []}
RIGHT = {"kernel": "pallas_gpu", "dtype": "bfloat16", "case": "decode", "error": 0.01, "ok": True}


def found(*rows, failures=(), **changes):
    return {**DONE, "rows": list(rows), "failures": list(failures), **changes}


def make_part(tmp_path, *, budget_s=100.0, sizes=TINY, **options):
    return Part(tmp_path / "part.json", sizes, budget_s=budget_s, **options)


def saved(tmp_path):
    return json.loads((tmp_path / "part.json").read_text())


def test_a_check_takes_less_than_ten_minutes():
    assert sum(BUDGETS.values()) <= 600


def test_nothing_is_wrong_where_all_rows_are_right_whatever_else_failed():
    broken = found(failures=[{"what": "cudnn, 16 x 2048", "error": "none"}], status="failed")
    parts = {"kernels": found(RIGHT), "attention": broken, "steps": broken, "peers": broken}
    assert check.wrong(parts) == []
    assert check.unproven(parts["kernels"]) == ()


@pytest.mark.parametrize(
    ("kernels", "said"),
    [
        (found({**RIGHT, "ok": False}), "kernels: pallas_gpu, decode"),
        (
            found(RIGHT, failures=[{"what": "pallas_gpu bfloat16, prefill", "error": "boom"}]),
            "kernels: pallas_gpu bfloat16, prefill failed",
        ),
        (
            found(RIGHT, status="stopped: its time was up", running="pallas_gpu bfloat16, prefill"),
            "kernels: stopped: its time was up at pallas_gpu bfloat16, prefill",
        ),
    ],
)
def test_a_kernel_that_is_wrong_fails_or_hangs_is_said_and_not_used_again(kernels, said):
    assert check.wrong({"kernels": kernels}) == [said]
    assert check.unproven(kernels) == ("pallas_gpu",)


def test_the_reference_is_always_used():
    assert check.unproven(found({**RIGHT, "kernel": "reference", "ok": False})) == ()


def test_a_failure_is_kept_with_its_text_and_the_next_thing_is_done(tmp_path):
    one = make_part(tmp_path)

    def fails():
        assert saved(tmp_path)["running"] == "a kernel"
        raise RuntimeError("illegal address")

    assert one.attempt("a kernel", fails) is None
    assert one.attempt("another", lambda: 3) == 3
    one.add(kernel="another")
    assert saved(tmp_path) == {
        "facts": {},
        "rows": [{"kernel": "another"}],
        "failures": [{"what": "a kernel", "error": "RuntimeError: illegal address"}],
        "skipped": [],
    }


def test_what_there_is_no_time_for_is_named(tmp_path):
    one = make_part(tmp_path, budget_s=0.0)
    assert one.attempt("a kernel", lambda: 3) is None
    assert saved(tmp_path)["skipped"] == [{"what": "a kernel", "why": "no time was left for it"}]


def test_a_kernel_that_is_not_for_this_device_or_not_proven_is_left_out_and_said_once(tmp_path):
    one = make_part(tmp_path, sizes=REAL, without=("reference",))
    needs = Needs("cpu", "", "float16", 64, 16, 64)
    assert [one.kernel(name, needs) for name in 2 * BACKENDS] == [None] * 2 * len(BACKENDS)
    skipped = saved(tmp_path)["skipped"]
    assert [entry["what"] for entry in skipped] == list(BACKENDS)
    assert "wrong, failed or hung before" in skipped[0]["why"]


@pytest.mark.parametrize(("status", "code"), [("exit", "failed: exit code 3"), ("hang", "stopped")])
def test_a_part_that_dies_or_hangs_leaves_what_it_had_found(tmp_path, monkeypatch, status, code):
    script = tmp_path / "part.py"
    script.write_text(
        "import sys, time, json, pathlib\n"
        "out = sys.argv[sys.argv.index('--out') + 1]\n"
        "rows = {'facts': {}, 'rows': [{'us': 1}], 'failures': [], 'skipped': []}\n"
        "pathlib.Path(out).write_text(json.dumps(rows))\n"
        "print('the last words', file=sys.stderr, flush=True)\n"
        + ("sys.exit(3)" if status == "exit" else "time.sleep(600)")
    )
    runner = tmp_path / "python"
    runner.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {script} "$@"\n')
    runner.chmod(0o700)
    monkeypatch.setattr(check.sys, "executable", str(runner))
    monkeypatch.setattr(check, "_GRACE_S", 5.0)
    monkeypatch.setitem(BUDGETS, "steps", 1.0)
    options = check.Options(tmp_path / "out.json", ("steps",), is_tiny=True, is_isolated=True)
    got = check.check(options)["parts"]["steps"]
    assert got["status"].startswith(code) and got["rows"] == [{"us": 1}]
    assert "the last words" in got["error"]


def test_a_report_compares_serving_where_both_were_measured():
    ours = found(
        {
            "model": "toy",
            "attention": "native",
            "requests": 4,
            "slots": 2,
            "output_tokens": 18,
            "seconds": 0.01,
            "tokens_per_s": 1800.0,
        }
    )
    theirs = {"peer": "transformers", "model": "toy", "way": "continuous batching", "ms": 15.0}
    peers = found({**theirs, "program": "serving 4 requests", "tokens_per_s": 1200.0})
    report = {"jaxinfer": "0", "seconds": 3.0, "wrong": [], "parts": {"serving": ours}}
    assert "times the tokens/s" not in table.text(report)
    report["parts"]["peers"] = peers
    assert "serving toy: 1.50 times the tokens/s of transformers" in table.text(report)


def test_a_report_says_wrong_things_last():
    report = {
        "jaxinfer": "0",
        "seconds": 3.0,
        "wrong": ["kernels: pallas_gpu, decode"],
        "parts": {"kernels": found({**RIGHT, "ok": False}), "peers": found(status="not run")},
    }
    lines = table.text(report).splitlines()
    assert "  pallas_gpu: 0 of 1 right; largest errors: bfloat16 1.0e-02" in lines
    assert lines[-2:] == ["WRONG: kernels: pallas_gpu, decode", "correctness: failed"]


@pytest.mark.full
def test_a_kernel_that_is_off_is_found_to_be_wrong(tmp_path, monkeypatch):
    real = kernels.prepared

    def off(backend, case, dtype):
        case, call, expected = real(backend, case, dtype)
        return case, call, 1.1 * expected + 0.1

    monkeypatch.setattr(kernels, "prepared", off)
    kernels.measure(make_part(tmp_path))
    assert check.wrong({"kernels": {**DONE, **saved(tmp_path)}})


@pytest.mark.full
def test_all_parts_run_tiny_with_the_gpu_kernel_in_its_interpreter(tmp_path, monkeypatch, capsys):
    gpu = Pretended("gpu", "9.0", mosaic_gpu.interpreter)
    monkeypatch.setitem(part.INTERPRETED, "pallas_gpu", gpu)
    monkeypatch.setattr(check, "BUDGETS", dict.fromkeys(BUDGETS, 1e4))  # this is no measurement
    monkeypatch.setattr(check, "_TOTAL_S", 1e5)
    out = tmp_path / "found.json"
    assert check.main(["--tiny", "--out", str(out)]) == 0
    report, shown = json.loads(out.read_text()), capsys.readouterr().out
    parts = report["parts"]
    assert list(parts) == list(BUDGETS) and report["wrong"] == []
    assert {one["status"] for one in parts.values()} == {"done"}
    assert {row["kernel"] for row in parts["kernels"]["rows"]} == set(BACKENDS)
    assert all(row["ok"] for row in parts["kernels"]["rows"] + parts["bits"]["rows"])
    assert {"reference float32", "reference int8", "pallas_tpu float32"} <= {
        row["kernel"] for row in parts["attention"]["rows"]
    }
    assert [row["kernel"] for row in parts["matmuls"]["rows"]] == ["matmul bf16", "matmul int8"]
    assert [row["program"] for row in parts["steps"]["rows"]] == [
        "decode-1x1",
        "prefill-1x64",
        "decode-2x1",
    ]
    assert all(row["compile_s"] > 0 and row["pages_in_place"] for row in parts["steps"]["rows"])
    assert any("cuDNN" in one["error"] for one in parts["attention"]["failures"])
    (served,) = parts["serving"]["rows"]
    asked = work(TINY.serving, 256)
    assert served["output_tokens"] == sum(one.num_out for one in asked)
    assert parts["peers"]["rows"] or parts["peers"]["skipped"]
    assert "correctness: holds" in shown


BARE = """
import sys
for name in ("jaxtyping", "rich", "jinja2", "cyclopts", "tokenizers", "safetensors", "orbax",
             "gguf", "google.protobuf", "prometheus_client", "uvloop", "markupsafe", "beartype"):
    sys.modules[name] = None
from jaxinfer.bench.hardware.check import main
import importlib
code = main(["--tiny", "--parts", "device", "matmuls", "steps", "--out", sys.argv[1]])
for name in ("kernels", "attention", "bits", "serving", "peers"):
    importlib.import_module("jaxinfer.bench.hardware." + name)
sys.exit(code)
"""


@pytest.mark.full
def test_it_needs_no_more_than_jax_and_numpy(tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, "-c", BARE, str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    parts = json.loads(out.read_text())["parts"]
    assert not any(part["failures"] for part in parts.values())


@pytest.mark.full
def test_the_script_runs_parts_in_processes_of_their_own_from_anywhere(tmp_path):
    out = tmp_path / "found.json"
    script = ROOT / "scripts" / "gpu_check"
    command = [sys.executable, str(script), "--tiny", "--isolated", "--parts", "device", "peers"]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads(out.read_text())["parts"]
    assert {one["status"] for one in parts.values()} == {"done"}
    assert parts["device"]["facts"]["copy_gb_per_s"] > 0
