"""The trade-off matrix for people: on the terminal, and as a page."""

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxinfer.bench.ablate.measure import Ratio, Report, Row
from jaxinfer.bench.load.tables import slo_text
from jaxinfer.bench.page import Page, Sheet

COLUMNS = {
    "ttft_ms": "TTFT",
    "tpot_ms": "TPOT",
    "itl_p99_ms": "P99",
    "tokens_per_s": "tok/s",
    "goodput_per_s": "good/s",
}
HIGHER_IS_BETTER = ("tokens_per_s", "goodput_per_s")
CLEAR = 0.02
"""A ratio this near to 1 is no difference, however small its spread."""
NOTES = (
    "TTFT, TPOT: medians in ms. P99: of the gaps between tokens, in ms. MB: as planned.",
    "Rows under a bold one: times its figures, ± half of the middle half of the rounds.",
    "quality: exact is the same bits as given. Where weights or pages are rounded, mean KL and "
    "top-1 agreement with the checkpoint as it is, on text; else the share of equal tokens.",
)


def matrix(report: Report) -> Group:
    """For the terminal: eighty columns are enough."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("lever", min_width=14)
    for name in (*COLUMNS.values(), "MB", "quality"):
        table.add_column(name, justify="right")
    for number, row in enumerate(report.rows):
        following = report.rows[number + 1 : number + 2]
        is_last = any(one.kind == "plain" for one in following)
        table.add_row(*_cells(row), end_section=is_last)
    return Group(
        Text(title(report), style="bold"),
        Text(_circumstances(report)),
        table,
        *(Text(note, style="dim") for note in NOTES),
        Text(),
        _said(report),
        *(Text(line, style="dim") for line in _left_out(report)),
    )


def title(report: Report) -> str:
    """Model, workload and bounds."""
    return f"{report.model}: {report.workload}, goodput at {slo_text(report.slo)}"


def _circumstances(report: Report) -> str:
    rounds = "one round" if report.rounds == 1 else f"{report.rounds} rounds"
    return f"{report.said}; {report.num_slots} slots; {rounds}"


def page(report: Report) -> Page:
    """The same as a page, with what each variant changes."""
    rows = tuple(
        (
            row.name,
            *(_words(row, name) for name in COLUMNS),
            _memory(row),
            "\n".join(_quality(row)),
            "\n".join(row.changed),
        )
        for row in report.rows
    )
    matrix = Sheet(
        title="What each lever is worth",
        columns=("lever", *COLUMNS.values(), "MB", "quality", "settings"),
        rows=rows,
        notes=NOTES,
        texts=frozenset({len(COLUMNS) + 3}),
        marks=_marks(report),
    )
    levers = Sheet(
        "The levers",
        ("lever", "what it does"),
        tuple(report.levers.items()),
        notes=_left_out(report),
        texts=frozenset({1}),
    )
    given = report.rows[0].values
    return Page(
        title=title(report),
        lines=(_circumstances(report),),
        tiles=(
            ("as given", f"{given['tokens_per_s']:.0f}", "tokens/s"),
            ("TTFT p50", f"{given['ttft_ms']:.0f}", "ms"),
            ("TPOT p50", f"{given['tpot_ms']:.1f}", "ms"),
        ),
        sheets=(matrix, levers),
    )


def as_dict(report: Report) -> dict[str, Any]:
    """For JSON."""
    found = asdict(report)
    for row, one in zip(report.rows, found["rows"], strict=True):
        one["ratios"] = {name: ratio._asdict() for name, ratio in row.ratios.items()}
        one["quality"] = None if row.quality is None else row.quality._asdict()
    return found


def _marks(report: Report) -> dict[tuple[int, int], str]:
    """Rows that others are compared with stand out, and what is clearly better or worse."""
    found = {}
    for number, row in enumerate(report.rows):
        if not row.ratios:
            found.update({(number, column): "head" for column in range(len(COLUMNS) + 3)})
        for column, name in enumerate(COLUMNS, start=1):
            if colour := _colour(row, name):
                found[number, column] = {"green": "good", "red": "bad"}[colour]
    return found


def _said(report: Report) -> Table:
    """What each lever does, its name in a column of its own."""
    found = Table.grid(padding=(0, 2, 0, 0))
    for name, said in report.levers.items():
        found.add_row(Text(name, style="dim"), Text(said, style="dim"))
    return found


def _left_out(report: Report) -> tuple[str, ...]:
    return tuple(f"left out, {name}: {reason}" for name, reason in report.left_out.items())


def _cells(row: Row) -> list[Text]:
    style = "bold" if not row.ratios else ""
    figures = [Text(_words(row, name), style=style or _colour(row, name)) for name in COLUMNS]
    lines = _quality(row)
    return [
        Text(row.name, style=style),
        *figures,
        Text(_memory(row), style=style),
        Text("\n".join(lines)),
    ]


def _words(row: Row, name: str) -> str:
    if not row.ratios:
        value = row.values[name]
        return f"{value:.2f}" if name == "goodput_per_s" else f"{value:.1f}"
    ratio = row.ratios.get(name)
    if ratio is None:
        return "-"
    return f"{ratio.middle:.2f}" + (f"\n±{_half(ratio):.2f}" if _is_spread(ratio) else "")


def _memory(row: Row) -> str:
    return f"{row.memory_ratio:.2f}" if row.ratios else f"{row.memory_mb:.0f}"


def _quality(row: Row) -> list[str]:
    if row.quality is not None:
        return [f"KL {row.quality.kl:.4f}", f"{row.quality.top1:.1%}"]
    if row.same_bits:
        return ["exact"]
    return ["tokens", f"{row.same_tokens:.1%}"]


def _colour(row: Row, name: str) -> str:
    """Green where the variant is clearly better than what it is compared with, red where worse."""
    ratio = row.ratios.get(name)
    if ratio is None or not _is_spread(ratio) or abs(ratio.middle - 1) < max(CLEAR, _half(ratio)):
        return ""
    return "green" if (ratio.middle > 1) == (name in HIGHER_IS_BETTER) else "red"


def _is_spread(ratio: Ratio) -> bool:
    """Whether there were several rounds: one says nothing of how clear a difference is."""
    return ratio.low < ratio.high


def _half(ratio: Ratio) -> float:
    return (ratio.high - ratio.low) / 2
