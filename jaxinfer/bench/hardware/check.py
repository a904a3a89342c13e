"""Everything that needs hardware in one command: parts in processes of their own, one report.

A kernel that hangs or takes its process with it costs its own part, and no later part uses it.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jaxinfer
from jaxinfer.bench.hardware import bare, table
from jaxinfer.bench.hardware.sizes import BUDGETS, REAL, TINY

_ROOT = Path(jaxinfer.__file__).parents[1]
_GRACE_S = 15.0  # beyond its budget, before a part is stopped
_TOTAL_S = 590.0
_PROVES = ("kernels", "bits")
_EMPTY = {"facts": {}, "rows": [], "failures": [], "skipped": []}


class Options(NamedTuple):
    """What was asked for."""

    out: Path
    parts: tuple[str, ...]
    is_tiny: bool
    is_isolated: bool


def main(argv: Sequence[str]) -> int:
    """Runs the check, or one part of it; 1 where correctness failed or was not shown."""
    given = _parser().parse_args(argv)
    bare.prepare()
    if given.part:
        _run_part(given.part, given.out, given.tiny, given.budget, tuple(given.without))
        return 0
    out = given.out.resolve()
    if not out.parent.is_dir():
        print(f"--out {out}: there is no folder {out.parent}", file=sys.stderr)
        return 2
    isolated = given.isolated or not given.tiny
    report = check(Options(out, tuple(given.parts or BUDGETS), given.tiny, isolated))
    print(table.text(report))
    print(f"written to {out}")
    return 1 if report["wrong"] else 0


def check(options: Options) -> dict[str, Any]:
    """The report, which is in its file after every part."""
    started = time.monotonic()
    report: dict[str, Any] = {
        "jaxinfer": jaxinfer.__version__,
        "is_tiny": options.is_tiny,
        "seconds": 0.0,
        "wrong": [],
        "parts": {},
    }
    for name in options.parts:
        without = unproven(report["parts"].get("kernels"))
        left = _TOTAL_S - (time.monotonic() - started)
        print(f"{name} ...", file=sys.stderr, flush=True)
        report["parts"][name] = _part(name, options, min(BUDGETS[name], left - _GRACE_S), without)
        report["seconds"] = time.monotonic() - started
        report["wrong"] = wrong(report["parts"])
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def wrong(parts: dict[str, Any]) -> list[str]:
    """What is not correct, or should have been shown to be and was not."""
    found = []
    for name in _PROVES:
        part = parts.get(name)
        if part is None:
            continue
        for row in part["rows"]:
            if not row["ok"]:
                found.append(f"{name}: {row['kernel']}, {row.get('case', 'answers in company')}")
        found += [f"{name}: {one['what']} failed" for one in part["failures"]]
        if part["status"] != "done":
            found.append(f"{name}: {part['status']} at {part.get('running', 'its start')}")
    return found


def unproven(kernels: dict[str, Any] | None) -> tuple[str, ...]:
    """The kernels that later parts must not use; the reference always stays."""
    if kernels is None:
        return ()
    bad = {row["kernel"] for row in kernels["rows"] if not row["ok"]}
    bad |= {one["what"].split()[0].rstrip(",") for one in kernels["failures"]}
    if kernels["status"] != "done":
        bad.add(kernels.get("running", "").split(" ")[0].rstrip(","))
    return tuple(sorted(bad - {"reference", ""}))


def _part(name: str, options: Options, budget_s: float, without: tuple[str, ...]) -> dict[str, Any]:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        path = Path(folder) / "part.json"
        if budget_s <= 0:
            status, error = "not run: no time was left", ""
        elif options.is_isolated:
            status, error = _apart(name, path, options, budget_s, without)
        else:
            _run_part(name, path, options.is_tiny, budget_s, without)
            status, error = "done", ""
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else _EMPTY
    seconds = time.monotonic() - started
    return {"status": status, "seconds": seconds, "error": error, **found}


def _apart(
    name: str, path: Path, options: Options, budget_s: float, without: tuple[str, ...]
) -> tuple[str, str]:
    """Runs a part in another process: how it ended, and the last that it said."""
    command = [sys.executable, "-m", "jaxinfer.bench.hardware", "--part", name, "--out", str(path)]
    command += ["--budget", str(budget_s), *(f"--without={one}" for one in without)]
    command += ["--tiny"] if options.is_tiny else []
    try:
        done = subprocess.run(
            command,
            cwd=_ROOT,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=budget_s + _GRACE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        said = error.stderr or b""
        return "stopped: its time was up", said.decode(errors="replace")[-2000:]
    if done.returncode:
        return f"failed: exit code {done.returncode}", done.stderr[-2000:]
    return "done", ""


def _run_part(
    name: str, path: Path, is_tiny: bool, budget_s: float, without: tuple[str, ...]
) -> None:
    from jaxinfer.bench.hardware.part import Part

    part = Part(path, TINY if is_tiny else REAL, budget_s=budget_s, without=without)
    importlib.import_module(f"jaxinfer.bench.hardware.{name}").measure(part)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description="Checks and measures jaxinfer on this device."
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="the JSON file")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for any machine")
    parser.add_argument("--parts", nargs="+", choices=BUDGETS, help="only these")
    parser.add_argument(
        "--isolated", action="store_true", help="with --tiny too, a process for each part"
    )
    parser.add_argument("--part", choices=BUDGETS, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, default=60.0, help=argparse.SUPPRESS)
    parser.add_argument("--without", action="append", default=[], help=argparse.SUPPRESS)
    return parser
