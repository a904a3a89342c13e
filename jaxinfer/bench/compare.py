"""A workload here and in another program, in turns on one machine: what counts is the ratio."""

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from jaxinfer.bench.page import Page, Sheet, quartiles, spread
from jaxinfer.bench.probes import Probes
from jaxinfer.errors import ConfigError

FIGURES = {
    "ttft_ms": "TTFT, ms",
    "mean_ttft_ms": "mean TTFT, ms",
    "decode_tok_s": "decode, tokens/s",
    "out_tok_s": "output, tokens/s",
    "seconds": "seconds",
    "peak_rss_mb": "peak memory, MB",
}
"""What both sides may print, by name: times and memory are better low, rates high."""
BUSY = 0.8
"""A round whose probe of bandwidth is below this share of the best one saw a busy machine."""
Line = dict[str, Any]
Run = Callable[[Sequence[str]], Line]
Show = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Round:
    """Both sides once, one right after the other."""

    ours: Line
    theirs: Line
    copy_gb_per_s: float
    """The lower one of two probes: before the first side and before the second."""


@dataclass(frozen=True)
class Compared:
    """One figure on both sides."""

    name: str
    ours: float
    theirs: float
    ratios: tuple[float, ...]
    """How many times better ours is, round by round: above 1 it is ahead."""


@dataclass(frozen=True)
class Report:
    """Everything of one comparison."""

    workload: str
    ours: str
    theirs: str
    command: tuple[str, ...]
    rounds: tuple[Round, ...]

    @property
    def figures(self) -> tuple[Compared, ...]:
        """Those that both sides printed in every round."""
        return tuple(
            _compared(name, self.rounds)
            for name in FIGURES
            if all(_is_there(name, one) for one in self.rounds)
        )

    @property
    def num_busy(self) -> int:
        """Rounds that saw a busy machine."""
        best = max(one.copy_gb_per_s for one in self.rounds)
        return sum(one.copy_gb_per_s < BUSY * best for one in self.rounds)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = []
        for one in self.figures:
            low, middle, high = quartiles(one.ratios)
            found.append({**asdict(one), "ratio": middle, "low": low, "high": high})
        return {**asdict(self), "figures": found, "num_busy": self.num_busy}


def measure(
    ours: Sequence[str],
    theirs: Sequence[str],
    *,
    workload: str,
    rounds: int = 5,
    run: Run | None = None,
    progress: Show = lambda stage, done, total: None,
) -> Report:
    """Rounds of A B, B A, A B...: each side is a new process every time."""
    run, probes, found = run or run_command, Probes(), []
    for number in range(rounds):
        sides = {"ours": ours, "theirs": theirs}
        lines: dict[str, Line] = {}
        speeds = []
        for name in list(sides)[:: -1 if number % 2 else 1]:
            speeds.append(probes.copy_bytes_per_s() / 1e9)
            lines[name] = run(sides[name])
            progress("compare", 2 * number + len(lines), 2 * rounds)
        found.append(Round(lines["ours"], lines["theirs"], min(speeds)))
    return Report(
        workload=workload,
        ours=_name(found[0].ours),
        theirs=_name(found[0].theirs),
        command=tuple(theirs),
        rounds=tuple(found),
    )


def run_command(command: Sequence[str]) -> Line:
    """The last JSON object that a command prints in a line of its own."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"{command[0]!r} can't be run: {error.strerror}") from error
    for line in reversed(done.stdout.splitlines()):
        found = _object(line)
        if found is not None and not done.returncode:
            return found
    said = " ".join(done.stderr.splitlines()[-3:])[-300:]
    raise ConfigError(
        f"{' '.join(command)!r:.200} ended with {done.returncode} and printed no JSON object in a "
        f'line of its own, such as {{"seconds": 1.5, "out_tok_s": 90}}; it said: {said}'
    )


def page(report: Report) -> Page:
    """The ratios."""
    figures = report.figures
    notes = [
        f"medians of {len(report.rounds)} rounds, each side a new process in each; "
        "above 1 ours is ahead",
    ]
    if report.num_busy:
        notes.append(f"in {report.num_busy} of them the machine was busy with something else")
    sheet = Sheet(
        title=f"{report.workload}: {report.ours} against {report.theirs}",
        columns=("", "ours", "theirs", "ahead", "middle half"),
        rows=tuple(
            (
                FIGURES[one.name],
                _number(one.ours),
                _number(one.theirs),
                f"{quartiles(one.ratios)[1]:.2f}",
                spread(one.ratios),
            )
            for one in figures
        ),
        notes=tuple(notes),
    )
    return Page(
        title=sheet.title,
        lines=(" ".join(report.command),),
        tiles=tuple(
            (FIGURES[one.name], f"{quartiles(one.ratios)[1]:.2f}", "times ahead")
            for one in figures
            if one.name in ("ttft_ms", "decode_tok_s", "out_tok_s", "peak_rss_mb")
        ),
        sheets=(sheet,),
    )


def _object(line: str) -> Line | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _is_there(name: str, one: Round) -> bool:
    values = one.ours.get(name), one.theirs.get(name)
    return all(
        isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        for value in values
    )


def _compared(name: str, rounds: Sequence[Round]) -> Compared:
    pairs = [(float(one.ours[name]), float(one.theirs[name])) for one in rounds]
    is_rate = name.endswith("tok_s")
    return Compared(
        name=name,
        ours=median(ours for ours, _ in pairs),
        theirs=median(theirs for _, theirs in pairs),
        ratios=tuple(ours / theirs if is_rate else theirs / ours for ours, theirs in pairs),
    )


def _name(line: Line) -> str:
    parts = (str(line[key]) for key in ("peer", "variant") if line.get(key))
    return " ".join(parts) or "the other"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
