"""The highest rate that a server keeps its bounds at: doubling up, then halving in between."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from jaxinfer.bench.load.drive import Run
from jaxinfer.bench.load.events import Figures

PRECISION = 1.1


@dataclass(frozen=True)
class Trial:
    """One rate."""

    rate_per_s: float
    figures: Figures
    run: Run
    is_good: bool
    """Whether enough of its requests met every bound."""


@dataclass(frozen=True)
class Swept:
    """All rates that were tried, from low to high."""

    trials: tuple[Trial, ...]
    share: float
    """Of the requests, how many must meet every bound."""

    @property
    def best(self) -> Trial | None:
        """The highest good rate below the lowest bad one; None where the lowest was bad."""
        best = None
        for trial in self.trials:
            if not trial.is_good:
                break
            best = trial
        return best

    @property
    def is_open(self) -> bool:
        """Whether the highest rate was good too, so that the end was not found."""
        return bool(self.trials) and all(trial.is_good for trial in self.trials)


async def sweep(
    measure: Callable[[float, int], Awaitable[tuple[Run, Figures]]],
    *,
    low: float,
    high: float,
    share: float,
    precision: float = PRECISION,
) -> Swept:
    """Measures rates with `measure(rate, number)` until the edge lies between two near ones."""
    trials: list[Trial] = []

    async def is_good(rate: float) -> bool:
        run, found = await measure(rate, len(trials))
        trials.append(Trial(rate, found, run, found.attainment >= share))
        return trials[-1].is_good

    rate, good, bad = low, 0.0, 0.0
    while not bad and good < high:
        if await is_good(rate):
            good, rate = rate, min(rate * 2, high)
        else:
            bad = rate
    while good and bad / good > precision:
        rate = (good * bad) ** 0.5
        if await is_good(rate):
            good = rate
        else:
            bad = rate
    return Swept(tuple(sorted(trials, key=lambda trial: trial.rate_per_s)), share)
