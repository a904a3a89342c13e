"""The pictures of a measurement."""

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

from jaxinfer.bench.load.drawing import LEFT, RIGHT, Plot, bar, svg, text, ticks
from jaxinfer.bench.load.events import Record
from jaxinfer.bench.load.sweep import Swept
from jaxinfer.host.workload import SLO

WIDE, HALF, THIRD = 1080.0, 530.0, 350.0
MAX_ROWS = 400
MAX_POINTS = 400
LEAST_BINS, MOST_BINS = 12, 120


def cdf(values: Sequence[float], bound_s: float | None, name: str) -> Markup:
    """Which share of the requests had at most so many milliseconds."""
    found = np.sort(1e3 * np.asarray(values))
    shares = np.arange(1, len(found) + 1) / max(len(found), 1)
    top = max(float(found[-1]) if len(found) else 0.0, 0.0 if bound_s is None else 1.05e3 * bound_s)
    plot = Plot(THIRD, 240.0, top * 1.14 or 1.0, 1.0, f"{name}, ms", "share of requests")
    picked = np.unique(np.linspace(0, len(found) - 1, MAX_POINTS).astype(int)) if len(found) else []
    points, before = [], 0.0
    for place in picked:
        at, share = float(found[place]), float(shares[place])
        points += [(at, before), (at, share)]
        before = share
    marks = [plot.path(points, "line")]
    for percent in (50, 90, 99) if len(found) else ():
        at = float(np.percentile(found, percent))
        marks.append(plot.dot(at, percent / 100, "point", f"p{percent}: {at:.1f} ms"))
        marks.append(plot.text(at, percent / 100, f"p{percent}"))
    if bound_s is not None:
        marks.append(plot.bound(1e3 * bound_s, f"SLO {1e3 * bound_s:g}"))
    return plot.svg(*marks)


def gantt(records: Sequence[Record]) -> Markup:
    """Each request as a bar over time: held back, waiting, prefilled, decoded."""
    rows = thinned(records, MAX_ROWS)
    high = max(3.0, min(14.0, 900 / max(len(rows), 1)))
    end_s = max((one.ended_s for one in rows), default=1.0) or 1.0
    width = WIDE - LEFT - RIGHT
    height = 20 + high * len(rows) + 34
    floor = 20 + high * len(rows)

    def x(at_s: float) -> float:
        return LEFT + width * at_s / end_s

    marks = []
    for at_s in ticks(end_s, 10):
        marks.append(
            f'<line class="grid" x1="{x(at_s):.1f}" y1="14" x2="{x(at_s):.1f}" y2="{floor:.1f}"/>'
            + text(x(at_s), floor + 15, f"{at_s:g}", "tick", "middle")
        )
    for row, one in enumerate(rows):
        top = 20 + high * row
        bars = "".join(
            bar(x(begin), top, x(end) - x(begin), high * 0.8, kind)
            for kind, begin, end in phases(one)
        )
        marks.append(f"<g><title>{escape(_said(one))}</title>{bars}</g>")
    marks.append(text(LEFT + width / 2, floor + 31, "seconds", "label", "middle"))
    marks.append(text(LEFT - 7, 28.0, "first", "tick", "end"))
    marks.append(text(LEFT - 7, floor - 3, "last", "tick", "end"))
    return svg(WIDE, height, *marks)


def phases(record: Record) -> list[tuple[str, float, float]]:
    """What a request went through, each with its begin and its end."""
    late = ("late", record.planned_s, record.sent_s)
    if not record.is_ok:
        return [late, ("failed", record.sent_s, max(record.ended_s, record.sent_s))]
    first_s, last_s = record.chunks_s[0], record.chunks_s[-1]
    taken_s = min(record.sent_s + (record.queue_s or 0.0), first_s)
    return [
        late,
        ("queue", record.sent_s, taken_s),
        ("prefill", taken_s, first_s),
        ("decode", first_s, last_s),
    ]


def throughput(records: Sequence[Record]) -> Markup:
    """Output tokens a second over time."""
    end_s = max((one.ended_s for one in records), default=0.0) or 1.0
    rates, width_s = tokens_over_time(records, end_s)
    top = 1.08 * max(rates, default=0.0) or 1.0
    plot = Plot(HALF, 240.0, end_s, top, "seconds", "output tokens/s")
    points = []
    for place, rate in enumerate(rates):
        points += [(place * width_s, rate), ((place + 1) * width_s, rate)]
    return plot.svg(plot.path(points, "area", closed=True), plot.path(points, "line"))


def in_flight(records: Sequence[Record]) -> Markup:
    """Requests under way over time, from when they had to go."""
    end_s = max((one.ended_s for one in records), default=0.0) or 1.0
    moves = [(one.planned_s, 1.0) for one in records] + [(one.ended_s, -1.0) for one in records]
    points, now = [], 0.0
    for at_s, step in sorted(moves):
        points += [(at_s, now), (at_s, now + step)]
        now += step
    most = max((count for _, count in points), default=0.0) or 1.0
    plot = Plot(HALF, 240.0, end_s, 1.08 * most, "seconds", "requests under way")
    return plot.svg(plot.path(points, "area second", closed=True), plot.path(points, "line second"))


def tokens_over_time(records: Sequence[Record], end_s: float) -> tuple[list[float], float]:
    """Output tokens a second in equal parts of the run, and how long a part is.

    A part of an answer counts as its share of the answer's tokens.
    """
    times, weights = [], []
    for one in (one for one in records if one.chunks_s):
        times += one.chunks_s
        weights += [one.num_output_tokens / len(one.chunks_s)] * len(one.chunks_s)
    num_bins = round(min(max(end_s, LEAST_BINS), MOST_BINS))  # a second each, where that fits
    counts, _ = np.histogram(times, bins=num_bins, range=(0.0, end_s), weights=weights)
    width_s = end_s / num_bins
    return (counts / width_s).tolist(), width_s


def sweep_good(swept: Swept) -> Markup:
    """Which share of the requests kept the bounds at each rate."""
    top = max(trial.rate_per_s for trial in swept.trials)
    plot = Plot(HALF, 260.0, top * 1.05, 1.04, "requests/s", "share within the SLOs")
    points = [(one.rate_per_s, one.figures.attainment) for one in swept.trials]
    dots = [
        plot.dot(
            one.rate_per_s,
            one.figures.attainment,
            "point" if one.is_good else "point bad",
            f"{one.rate_per_s:.2f} requests/s: {one.figures.attainment:.1%} good",
        )
        for one in swept.trials
    ]
    line = plot.bound(swept.share, f"{swept.share:.0%} needed", across=True)
    return plot.svg(line, plot.path(points, "line"), *dots)


def sweep_times(swept: Swept, slo: SLO, name: str) -> Markup:
    """The p99 of TTFT (`ttft`) or of TPOT (`tpot`) at each rate."""
    spreads = [one.figures.ttft_s if name == "ttft" else one.figures.tpot_s for one in swept.trials]
    bound_s = slo.ttft_s if name == "ttft" else slo.tpot_s
    top = max((1e3 * one.p99 for one in spreads), default=0.0)
    top = max(top, 0.0 if bound_s is None else 1.1e3 * bound_s) * 1.05 or 1.0
    rates = [one.rate_per_s for one in swept.trials]
    plot = Plot(HALF, 260.0, max(rates) * 1.05, top, "requests/s", f"{name.upper()} p99, ms")
    marks = (
        []
        if bound_s is None
        else [plot.bound(1e3 * bound_s, f"SLO {1e3 * bound_s:g} ms", across=True)]
    )
    marks.append(plot.path(zip(rates, (1e3 * one.p99 for one in spreads), strict=True), "line"))
    for rate, one, trial in zip(rates, spreads, swept.trials, strict=True):
        kind = "point" if trial.is_good else "point bad"
        marks.append(plot.dot(rate, 1e3 * one.p99, kind, f"{rate:.2f}/s: {1e3 * one.p99:.1f} ms"))
    return plot.svg(*marks)


def thinned(records: Sequence[Record], most: int) -> list[Record]:
    """All of them, or as many as can be seen, evenly."""
    step = max(1, math.ceil(len(records) / most))
    return list(records[::step])


def _said(record: Record) -> str:
    if not record.is_ok:
        return f"request {record.number}: {record.status} {record.message[:120]}"
    parts = ", ".join(
        f"{kind} {1e3 * (end - begin):.0f} ms" for kind, begin, end in phases(record) if end > begin
    )
    sizes = f"{record.num_prompt_tokens} + {record.num_output_tokens} tokens"
    return f"request {record.number}, {sizes}: {parts}"
