"""A measurement as JSON, and what came of it against another one."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxinfer.bench.load.drive import Run
from jaxinfer.bench.load.events import Figures, Record, Spread, figures
from jaxinfer.bench.load.sweep import Swept, Trial
from jaxinfer.errors import ConfigError
from jaxinfer.host.workload import SLO

FORMAT = "jaxinfer load 1"


@dataclass(frozen=True)
class Measured:
    """All of one measurement: what was asked, of whom, and what they saw."""

    command: str
    target: dict[str, str]
    workload: dict[str, Any]
    slo: SLO
    run: Run
    """Of a sweep, the best trial, or the lowest where none was good."""
    swept: Swept | None = None

    @property
    def figures(self) -> Figures:
        """They follow from the requests."""
        return figures(self.run.records, self.slo)


def to_dict(measured: Measured) -> dict[str, Any]:
    """JSON values; of a sweep's other trials the figures only."""
    swept = measured.swept
    return {
        "format": FORMAT,
        "command": measured.command,
        "started": measured.run.started,
        "target": measured.target,
        "workload": measured.workload,
        "slo": asdict(measured.slo),
        "figures": asdict(measured.figures),
        "client_lag_s": asdict(measured.run.lag_s),
        "concurrency": measured.run.concurrency,
        "sweep": None if swept is None else _swept_dict(swept),
        "requests": [asdict(one) for one in measured.run.records],
    }


def read(path: Path) -> Measured:
    """What `to_dict` wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ConfigError(f"{path} is no file of `jaxinfer bench serve --save`: no {FORMAT!r}")
    try:
        return _from_dict(found)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {error!r}; measure again") from error


def ratios(ours: Figures, theirs: Figures) -> list[tuple[str, float, float, float | None]]:
    """Name, theirs, ours, and ours over theirs; None where theirs is 0."""
    flat, other = flatten(asdict(ours)), flatten(asdict(theirs))
    return [
        (name, other[name], value, value / other[name] if other[name] else None)
        for name, value in flat.items()
        if name in other
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """All numbers by their dotted names."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = float(value)
    return found


def _swept_dict(swept: Swept) -> dict[str, Any]:
    best = swept.best
    return {
        "share": swept.share,
        "best_rate_per_s": None if best is None else best.rate_per_s,
        "is_open": swept.is_open,
        "trials": [
            {
                "rate_per_s": one.rate_per_s,
                "is_good": one.is_good,
                "figures": asdict(one.figures),
                "started": one.run.started,
                "client_lag_s": asdict(one.run.lag_s),
            }
            for one in swept.trials
        ],
    }


def _from_dict(found: dict[str, Any]) -> Measured:
    records = tuple(Record(**one) for one in found["requests"])
    lag_s = Spread(**found["client_lag_s"])
    run = Run(found["started"], records, lag_s, found["concurrency"])
    swept = None
    if found["sweep"] is not None:
        trials = (_trial(one) for one in found["sweep"]["trials"])
        swept = Swept(tuple(trials), found["sweep"]["share"])
    return Measured(
        command=found["command"],
        target=found["target"],
        workload=found["workload"],
        slo=SLO(**found["slo"]),
        run=run,
        swept=swept,
    )


def _trial(found: dict[str, Any]) -> Trial:
    values = found["figures"]
    spreads = {name: Spread(**one) for name, one in values.items() if name in _SPREADS}
    return Trial(
        found["rate_per_s"],
        Figures(**(values | spreads)),
        Run(found["started"], (), Spread(**found["client_lag_s"])),
        found["is_good"],
    )


_SPREADS = tuple(name for name, kind in Figures.__annotations__.items() if kind is Spread)
