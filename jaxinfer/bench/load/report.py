"""One HTML page of a measurement: nothing is loaded from elsewhere, so it can be sent around."""

from pathlib import Path
from typing import Any

import jinja2

from jaxinfer.bench.load import charts, tables
from jaxinfer.bench.load.events import bounds
from jaxinfer.bench.load.saved import Measured
from jaxinfer.bench.page import style
from jaxinfer.host.workload import SLO


def html(measured: Measured) -> str:
    """The page."""
    source = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(style=style(), **facts(measured))


def facts(measured: Measured) -> dict[str, Any]:
    """All that the page says."""
    found, records = measured.figures, measured.run.records
    ok = [one for one in records if one.is_ok]
    has_server_times = found.queue_s.count > 0
    limits = bounds(measured.slo)
    cdfs = [
        ("TTFT", charts.cdf([one.ttft_s for one in ok], limits["ttft"], "time to the first token")),
        (
            "TPOT",
            charts.cdf(
                [one.tpot_s for one in ok if one.tpot_s is not None],
                limits["tpot"],
                "time per token after it",
            ),
        ),
        ("e2e", charts.cdf([one.e2e_s for one in ok], limits["e2e"], "time to the last token")),
    ]
    return {
        "title": tables.title(measured),
        "measured": measured,
        "figures": found,
        "tiles": _tiles(measured),
        "lines": tables.lines(measured),
        "notes": tables.warnings(measured),
        "spreads": [(label, getattr(found, name)) for label, name in tables.SPREADS],
        "cdfs": cdfs,
        "gantt": charts.gantt(records),
        "num_rows": len(charts.thinned(records, charts.MAX_ROWS)),
        "legend": _legend(measured, has_server_times=has_server_times),
        "throughput": charts.throughput(records),
        "in_flight": charts.in_flight(records),
        "sweep": _sweep(measured),
        "settings": [*measured.target.items(), *measured.workload.items()],
    }


def _tiles(measured: Measured) -> list[tuple[str, str, str]]:
    """The few figures that one looks at first: name, value, unit."""
    found = measured.figures
    tiles = [
        ("TTFT p50 / p99", f"{1e3 * found.ttft_s.p50:.0f} / {1e3 * found.ttft_s.p99:.0f}", "ms"),
        ("TPOT p50 / p99", f"{1e3 * found.tpot_s.p50:.1f} / {1e3 * found.tpot_s.p99:.1f}", "ms"),
        ("output", f"{found.output_tokens_per_s:.1f}", "tokens/s"),
        ("answered", f"{found.num_ok} of {found.num_requests}", "requests"),
    ]
    if measured.slo != SLO():
        tiles.append(("goodput", f"{found.goodput_per_s:.2f}", "requests/s"))
        tiles.append(("within the SLOs", f"{found.attainment:.1%}", "of all requests"))
    return tiles


def _legend(measured: Measured, *, has_server_times: bool) -> list[tuple[str, str]]:
    found = measured.figures
    late = [("late", "held back by the client")] if found.lateness_s.max > tables.LATE_S else []
    queue = [("queue", "queue")] if has_server_times else []
    first = ("prefill", "prefill" if has_server_times else "until the first token")
    failed = [("failed", "failed")] if found.failures else []
    return [*late, *queue, first, ("decode", "decode"), *failed]


def _sweep(measured: Measured) -> dict[str, Any] | None:
    swept, slo = measured.swept, measured.slo
    if swept is None:
        return None
    return {
        "verdict": tables.verdict(swept, slo),
        "good": charts.sweep_good(swept),
        "ttft": charts.sweep_times(swept, slo, "ttft"),
        "tpot": charts.sweep_times(swept, slo, "tpot"),
        "trials": swept.trials,
    }
