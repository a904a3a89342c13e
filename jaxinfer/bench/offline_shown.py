"""A workload's figures for people: a table on the terminal, and a page with pictures."""

from collections.abc import Callable

from jaxinfer.bench.load import charts
from jaxinfer.bench.load.events import Spread
from jaxinfer.bench.offline import Report, Round
from jaxinfer.bench.page import Page, Picture, Sheet, spread
from jaxinfer.host.workload import SLO

SPREADS = (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("ITL", "itl_s"), ("e2e", "e2e_s"))


def sheets(report: Report, slo: SLO) -> tuple[Sheet, ...]:
    """Times in percentiles, and the figures of all requests together."""
    return _times(report), _totals(report, slo)


def page(report: Report, slo: SLO) -> Page:
    """The figures, and pictures of the repeat of the median duration."""
    records = report.middle.records
    tiles = (
        ("output", f"{report.of(lambda one: one.figures.output_tokens_per_s):.0f}", "tokens/s"),
        ("TTFT p50", f"{report.of(lambda one: 1e3 * one.figures.ttft_s.p50):.0f}", "ms"),
        ("TPOT p50", f"{report.of(lambda one: 1e3 * one.figures.tpot_s.p50):.1f}", "ms"),
        ("peak memory", f"{report.peak_rss_mb:.0f}", "MB"),
    )
    return Page(
        title=title(report),
        lines=(report.said, f"{report.device}, {report.threads} threads"),
        tiles=tiles,
        sheets=sheets(report, slo),
        pictures=(
            Picture("The requests of the median repeat", charts.gantt(records)),
            Picture("Output tokens a second", charts.throughput(records)),
            Picture("Requests under way", charts.in_flight(records)),
        ),
    )


def title(report: Report) -> str:
    """Model, precision and workload."""
    return f"{report.model}, {report.variant}: {report.workload}"


def _times(report: Report) -> Sheet:
    rows = []
    for label, name in SPREADS:
        pick = _picker(name)
        if not pick(report.rounds[0]).count:
            continue
        cells = (
            report.of(lambda one, pick=pick, column=column: 1e3 * getattr(pick(one), column))
            for column in ("mean", "p50", "p90", "p99", "max")
        )
        rows.append((label, *(f"{cell:.1f}" for cell in cells)))
    return Sheet(
        title=f"{title(report)}: {report.said}",
        columns=("ms", "mean", "p50", "p90", "p99", "max"),
        rows=tuple(rows),
        notes=(f"medians of {len(report.rounds)} repeats, all requests there at the start",),
    )


def _totals(report: Report, slo: SLO) -> Sheet:
    def row(name: str, unit: str, form: str, value: Callable[[Round], float]) -> tuple[str, ...]:
        values = [value(one) for one in report.rounds]
        return name, form.format(report.of(value)), spread(values, form), unit

    rows = [
        row("output", "tokens/s", "{:.1f}", lambda one: one.figures.output_tokens_per_s),
        row("input and output", "tokens/s", "{:.1f}", lambda one: one.figures.total_tokens_per_s),
        row("duration", "s", "{:.2f}", lambda one: one.figures.duration_s),
    ]
    if slo != SLO():
        rows.append(row("goodput", "requests/s", "{:.2f}", lambda one: one.figures.goodput_per_s))
    rows += [
        row("prompt tokens from the cache", "of all", "{:.1%}", _cached),
        row("page waste", "of places", "{:.1%}", lambda one: one.page_waste),
        row("padding of prefills", "of tokens", "{:.1%}", lambda one: one.prefill_padding),
        row("inert rows of decodes", "of rows", "{:.1%}", lambda one: one.decode_padding),
        row("engine's host work", "ms a step", "{:.2f}", lambda one: one.host_ms),
        ("peak memory", f"{report.peak_rss_mb:.0f}", "-", "MB"),
        ("  of the repeats", f"{report.serving_rss_mb:.0f}", "-", "MB"),
    ]
    return Sheet(
        title=f"{report.num_slots} slots, {report.threads} threads, {report.device}",
        columns=("", "median", "middle half", ""),
        rows=tuple(rows),
    )


def _picker(name: str) -> Callable[[Round], Spread]:
    def pick(one: Round) -> Spread:
        return getattr(one.figures, name)

    return pick


def _cached(one: Round) -> float:
    return one.figures.num_cached_tokens / max(one.figures.num_prompt_tokens, 1)
