"""One measurement from beginning to end: a warm-up that doesn't count, then a load or a sweep."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxinfer.bench.load.calls import Recipe, at_rate, calls_of
from jaxinfer.bench.load.drive import Run, drive
from jaxinfer.bench.load.events import Figures, figures
from jaxinfer.bench.load.lengths import Lengths
from jaxinfer.bench.load.sweep import Swept, sweep
from jaxinfer.bench.load.target import Target
from jaxinfer.errors import ClientError
from jaxinfer.host.workload import SLO

WARM_TOKENS = 16
WARM_SEED = 1_000_000
Show = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Rates:
    """What a sweep tries."""

    low: float
    high: float
    share: float
    """Of the requests, how many must meet every bound."""
    seconds: float | None
    """How long each rate is held; None takes as many requests as the recipe says."""


async def measure(
    target: Target,
    recipe: Recipe,
    *,
    vocab_size: int | None,
    slo: SLO,
    num_warmup: int = 0,
    rates: Rates | None = None,
    progress: Show = lambda stage, done, total: None,
) -> tuple[Run, Swept | None]:
    """Sends a recipe's load, or with `rates` one load after another; prompts differ among those."""
    if num_warmup:
        await _warm_up(target, recipe, num_warmup, vocab_size, progress)
    if rates is None:
        calls = calls_of(recipe, vocab_size=vocab_size)
        concurrency = recipe.concurrency
        return await drive(target, calls, concurrency=concurrency, progress=progress), None

    async def trial(rate_per_s: float, number: int) -> tuple[Run, Figures]:
        # New prompts each time: those of the last trial are in the server's prefix cache.
        this = at_rate(recipe, rate_per_s, seconds=rates.seconds)
        calls = calls_of(this, vocab_size=vocab_size, prompt_seed=recipe.seed + 1000 * (number + 1))
        run = await drive(target, calls, stage=f"{rate_per_s:.2f}/s", progress=progress)
        return run, figures(run.records, slo)

    swept = await sweep(trial, low=rates.low, high=rates.high, share=rates.share)
    chosen = swept.best or swept.trials[0]
    return chosen.run, swept


async def _warm_up(
    target: Target, recipe: Recipe, count: int, vocab_size: int | None, progress: Show
) -> None:
    """Short answers to prompts that no later request shares."""
    most = min(recipe.output.high, WARM_TOKENS)
    warm = replace(
        recipe,
        rows=(),
        has_times=False,
        rate_per_s=None,
        num_requests=count,
        output=Lengths(min(recipe.output.low, most), most),
    )
    calls = calls_of(warm, vocab_size=vocab_size, prompt_seed=recipe.seed + WARM_SEED)
    run = await drive(target, calls, concurrency=count, stage="warm-up", progress=progress)
    if not any(one.is_ok for one in run.records):
        first = run.records[0]
        raise ClientError(
            f"no request of the warm-up was answered: {first.status}: {first.message}",
            code=first.status,
        )
