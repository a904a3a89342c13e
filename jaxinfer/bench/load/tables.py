"""A measurement on the terminal."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jaxinfer.bench.load.events import Figures, Spread, bounds
from jaxinfer.bench.load.saved import Measured, ratios
from jaxinfer.bench.load.sweep import Swept
from jaxinfer.host.workload import SLO

LATE_S = 0.01
LAG_S = 0.05
CACHED = 0.05
SPREADS = (
    ("TTFT", "ttft_s"),
    ("TPOT", "tpot_s"),
    ("ITL", "itl_s"),
    ("e2e", "e2e_s"),
    ("queue", "queue_s"),
    ("prefill", "prefill_s"),
    ("sent late", "lateness_s"),
)
_COMPARED = ("mean", "p50", "p90", "p99")


def shown(measured: Measured) -> RenderableType:
    """All of it."""
    found = measured.figures
    parts: list[RenderableType] = []
    if measured.swept is not None:
        parts += [sweep_table(measured.swept), Text(verdict(measured.swept, measured.slo)), ""]
    parts += [Text(title(measured), style="bold"), times(found)]
    parts += [Text(line) for line in lines(measured)]
    notes = warnings(measured)
    return Group(*parts, *(Text(f"note: {note}", style="yellow") for note in notes))


def title(measured: Measured) -> str:
    """The target and how many requests it got."""
    target = measured.target
    return f"{target.get('model', '')} at {target.get('address', '')}: {measured.workload['load']}"


def times(found: Figures) -> Table:
    """The percentiles, in milliseconds."""
    columns = ("mean", "p50", "p90", "p99", "max")
    table = Table("ms", "count", *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for label, name in SPREADS:
        one: Spread = getattr(found, name)
        if one.count:
            cells = (f"{1e3 * getattr(one, column):.1f}" for column in columns)
            table.add_row(label, str(one.count), *cells)
    return table


def lines(measured: Measured) -> list[str]:
    """What is no spread: counts, rates, goodput."""
    found, slo = measured.figures, measured.slo
    offered = "" if measured.run.concurrency else f" of {found.offered_per_s:.2f} offered"
    failures = ", ".join(f"{count} {status}" for status, count in found.failures.items())
    cached = found.num_cached_tokens / max(found.num_prompt_tokens, 1)
    said = [
        f"{found.num_ok} of {found.num_requests} requests answered in {found.duration_s:.1f} s"
        + (f"; failed: {failures}" if failures else ""),
        f"{found.output_tokens_per_s:.1f} output tokens/s, {found.total_tokens_per_s:.1f} with "
        f"prompts; {found.requests_per_s:.2f} requests/s answered{offered}",
        f"{found.num_prompt_tokens} prompt tokens, {cached:.0%} of them from the prefix cache; "
        f"{found.num_output_tokens} output tokens; {found.num_preemptions} preemptions; "
        f"{found.peak_in_flight} under way at most",
    ]
    if slo != SLO():
        misses = ", ".join(f"{count} beyond {name}" for name, count in found.missed.items())
        said.append(
            f"goodput {found.goodput_per_s:.2f} requests/s: {found.attainment:.1%} of all "
            f"requests within {slo_text(slo)} ({misses}, {sum(found.failures.values())} failed)"
        )
    return said


def sweep_table(swept: Swept) -> Table:
    """One line a rate."""
    table = Table(
        "requests/s",
        "requests",
        "good",
        "goodput/s",
        "TTFT p99 ms",
        "TPOT p99 ms",
        "output tokens/s",
        "failed",
        title="sweep",
        title_justify="left",
    )
    for column in table.columns:
        column.justify = "right"
    for trial in swept.trials:
        found = trial.figures
        table.add_row(
            f"{trial.rate_per_s:.2f}",
            str(found.num_requests),
            f"{found.attainment:.1%}",
            f"{found.goodput_per_s:.2f}",
            f"{1e3 * found.ttft_s.p99:.1f}",
            f"{1e3 * found.tpot_s.p99:.1f}",
            f"{found.output_tokens_per_s:.1f}",
            str(sum(found.failures.values())),
            style="" if trial.is_good else "dim",
        )
    return table


def verdict(swept: Swept, slo: SLO) -> str:
    """What a sweep found, in one sentence."""
    bound = f"{slo_text(slo)} for {swept.share:.0%} of the requests"
    if swept.best is None:
        return f"even {swept.trials[0].rate_per_s:.2f} requests/s did not keep {bound}"
    more = "; no rate was too high, so sweep further up" if swept.is_open else ""
    return f"{swept.best.rate_per_s:.2f} requests/s is the most that kept {bound}{more}"


def slo_text(slo: SLO) -> str:
    """The bounds as the command line takes them."""
    given = [f"{name}={bound:g}" for name, bound in bounds(slo).items() if bound is not None]
    return ",".join(given) or "no bounds"


def warnings(measured: Measured) -> list[str]:
    """What a reader must know before trusting the figures."""
    found, lag = measured.figures, measured.run.lag_s
    notes: list[str] = []
    if found.lateness_s.p99 > LATE_S:
        notes.append(
            f"the client sent late ({1e3 * found.lateness_s.p99:.0f} ms at p99): this is part of "
            "all times above, and no fault of the server"
        )
    if lag.p99 > LAG_S:
        notes.append(
            f"the client's own loop lagged ({1e3 * lag.p99:.0f} ms at p99): it was too busy to "
            "note on time when tokens came; give it a machine of its own"
        )
    cached = found.num_cached_tokens / max(found.num_prompt_tokens, 1)
    if cached > CACHED and measured.workload.get("shared tokens") == 0:
        notes.append(
            f"{cached:.0%} of the prompt tokens were in the server's prefix cache, though these "
            "prompts share nothing: another run sent them before; take another --seed, or "
            "--no-prefix-cache"
        )
    if found.failures:
        kinds = {one.status: one.message for one in measured.run.records if not one.is_ok}
        notes += [f"{status}: {' '.join(said.split())[:200]}" for status, said in kinds.items()]
    return notes


def comparison(ours: Measured, theirs: Measured, name: str) -> Table:
    """Each figure of both, and ours over theirs."""
    other = "; ".join(differences(ours, theirs))
    table = Table(
        "",
        name,
        "this",
        "ratio",
        title="against another run",
        title_justify="left",
        caption=f"not the same load: {other}" if other else "the same load",
        caption_justify="left",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for label, before, now, ratio in _worth_comparing(ratios(ours.figures, theirs.figures)):
        is_seconds = "_s." in label
        scale, unit = (1e3, " ms") if is_seconds else (1.0, "")
        table.add_row(
            label.replace("_s.", " ").replace("_", " ") + unit,
            f"{scale * before:.2f}",
            f"{scale * now:.2f}",
            "-" if ratio is None else f"{ratio:.2f}x",
        )
    return table


def differences(ours: Measured, theirs: Measured) -> list[str]:
    """What of the two loads is not the same."""
    now, before = ours.workload, theirs.workload
    names = [name for name in now | before if now.get(name) != before.get(name)]
    return [f"{name} {before.get(name)}, now {now.get(name)}" for name in names]


def _worth_comparing(
    found: Sequence[tuple[str, float, float, float | None]],
) -> list[tuple[str, float, float, float | None]]:
    kept = []
    for one in found:
        name, _, part = one[0].partition(".")
        is_time = part in _COMPARED and name != "lateness_s"
        is_rate = name in ("attainment", "num_requests", "num_ok") or name.endswith("_per_s")
        if (is_time or is_rate) and (one[1] or one[2]):
            kept.append(one)
    return kept
