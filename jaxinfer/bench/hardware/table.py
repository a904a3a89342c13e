"""What a check has found, as short tables of plain text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
_COLUMNS: dict[str, tuple[tuple[str, Callable[[Row], str]], ...]] = {
    "attention": (
        ("kernel", lambda row: row["kernel"]),
        ("size", lambda row: row["size"]),
        ("page", lambda row: str(row["page_size"])),
        ("us", lambda row: f"{row['us']:.1f}"),
        ("GB/s", lambda row: f"{row['gb_per_s']:.0f}"),
        ("of copy", lambda row: f"{row['of_copy']:.0%}"),
        ("TFLOP/s", lambda row: f"{row['tflops']:.1f}"),
    ),
    "matmuls": (
        ("kernel", lambda row: row["kernel"]),
        ("size", lambda row: row["size"]),
        ("us", lambda row: f"{row['us']:.1f}"),
        ("of copy", lambda row: f"{row['of_copy']:.0%}"),
        ("TFLOP/s", lambda row: f"{row['tflops']:.1f}"),
        ("of peak", lambda row: f"{row['of_bf16_peak']:.0%}"),
    ),
    "steps": (
        ("model", lambda row: row["model"]),
        ("program", lambda row: row["program"]),
        ("attention", lambda row: row["attention"]),
        ("ms", lambda row: f"{row['ms']:.2f}"),
        ("alone", lambda row: f"{row['alone_ms']:.2f}" if "alone_ms" in row else "-"),
        ("of floor", lambda row: f"{row['of_floor']:.0%}"),
        ("tokens/s", lambda row: f"{row['tokens_per_s']:.0f}"),
        ("compile s", lambda row: f"{row['trace_s'] + row['compile_s']:.1f}"),
    ),
    "serving": (
        ("model", lambda row: row["model"]),
        ("attention", lambda row: row["attention"]),
        ("requests", lambda row: str(row["requests"])),
        ("slots", lambda row: str(row["slots"])),
        ("tokens", lambda row: str(row["output_tokens"])),
        ("seconds", lambda row: f"{row['seconds']:.1f}"),
        ("tokens/s", lambda row: f"{row['tokens_per_s']:.0f}"),
    ),
    "peers": (
        ("peer", lambda row: row["peer"]),
        ("model", lambda row: row["model"]),
        ("program", lambda row: row["program"]),
        ("way", lambda row: row["way"]),
        ("ms", lambda row: f"{row['ms']:.2f}"),
        ("tokens/s", lambda row: f"{row['tokens_per_s']:.0f}"),
    ),
}


def text(report: Mapping[str, Any]) -> str:
    """All parts of a report."""
    lines = [f"gpu_check of jaxinfer {report['jaxinfer']}, {report['seconds']:.0f} s"]
    for name, part in report["parts"].items():
        lines += ["", f"{name}: {part['status']} in {part['seconds']:.0f} s"]
        if part["facts"]:
            facts = part["facts"].items()
            lines += [f"  {key}: {_number(value)}" for key, value in facts if value not in ("", {})]
        if name in ("kernels", "bits"):
            lines += _verdicts(part["rows"])
        elif part["rows"]:
            lines += _table(_COLUMNS[name], part["rows"])
        lines += [f"  failed: {one['what']}: {_first(one['error'])}" for one in part["failures"]]
        lines += [f"  not here: {one['what']}: {_first(one['why'])}" for one in part["skipped"]]
        if part.get("error"):
            lines.append(f"  ended by: {_first(part['error'][-300:])}")
    lines += ["", *_against(report["parts"]), *(f"WRONG: {one}" for one in report["wrong"])]
    lines.append("correctness: " + ("failed" if report["wrong"] else "holds"))
    return "\n".join(lines)


def _against(parts: Mapping[str, Any]) -> list[str]:
    """What the same requests took here and elsewhere, where both were measured."""
    own = {row["model"]: row for row in parts.get("serving", {}).get("rows", ())}
    return [
        f"serving {row['model']}: {own[row['model']]['tokens_per_s'] / row['tokens_per_s']:.2f} "
        f"times the tokens/s of {row['peer']}"
        for row in parts.get("peers", {}).get("rows", ())
        if row["program"].startswith("serving") and row["model"] in own
    ]


def _verdicts(rows: Sequence[Row]) -> list[str]:
    """One line a kernel: how many cases, and the largest error of each dtype."""
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        own = [row for row in rows if row["kernel"] == kernel]
        wrong = sum(not row["ok"] for row in own)
        errors = {
            dtype: max(row["error"] for row in own if row.get("dtype") == dtype and "error" in row)
            for dtype in dict.fromkeys(row["dtype"] for row in own if "error" in row)
        }
        said = ", ".join(f"{dtype} {error:.1e}" for dtype, error in errors.items())
        lines.append(f"  {kernel}: {len(own) - wrong} of {len(own)} right; largest errors: {said}")
        for row in own:
            lines += [f"    {promise}" for promise in row.get("broken_promises", ())]
    return lines


def _table(columns: Any, rows: Sequence[Row]) -> list[str]:
    cells = [[name for name, _ in columns]]
    cells += [[shown(row) for _, shown in columns] for row in rows]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]


def _number(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _first(text: str) -> str:
    """The first line that says something, not too long."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= 160 else line[:157] + "..."
