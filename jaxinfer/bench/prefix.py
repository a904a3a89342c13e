"""Time to the first token of prompts that begin alike, with the prefix cache and without it."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any, NamedTuple

from rich.table import Table

from jaxinfer.engine import Engine
from jaxinfer.errors import ConfigError
from jaxinfer.host.request import JAXINFER_DEFAULTS, Request, SamplingParams

BAR = 5.0
_OUTPUT_TOKENS = 4
Show = Callable[[str, int, int], None]


class Load(NamedTuple):
    """The requests of one round."""

    num_shared: int = 768
    num_own: int = 32
    num_requests: int = 16
    concurrency: int = 1


@dataclass(frozen=True)
class Report:
    """Everything of one run."""

    model: str
    load: Load
    ttft_ms: float
    """With the cache: the mean of all requests of all rounds, the cold first ones included."""
    ttft_without_ms: float
    hit_rate: float
    """Of all prompt tokens, how many came from the cache."""
    ratios: tuple[float, ...]
    """Without the cache over with it, round by round."""

    @property
    def ratio(self) -> float:
        """How many times sooner the first token comes."""
        return self.ttft_without_ms / self.ttft_ms

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "load": self.load._asdict(), "ratio": self.ratio, "bar": BAR}


def measure(
    engine: Engine,
    *,
    name: str,
    load: Load = Load(),  # noqa: B008
    rounds: int = 3,
    progress: Show = lambda stage, done, total: None,
) -> Report:
    """Each round sends the requests once with the cache, from empty, and once past it."""
    check(engine, load)
    found: dict[bool, list[float]] = {True: [], False: []}
    ratios, queried, hits = [], 0, 0
    for number in range(rounds):
        means = {}
        for uses_cache in (True, False) if number % 2 else (False, True):
            engine.flush_prefix_cache()
            before = engine.stats()
            requests = requests_of(
                load, vocab_size=engine.model.vocab_size, seed=number, uses_cache=uses_cache
            )
            times = first_tokens_s(engine, requests, concurrency=load.concurrency)
            after = engine.stats()
            means[uses_cache] = mean(times)
            found[uses_cache] += times
            if uses_cache:
                queried += after.num_queried_tokens - before.num_queried_tokens
                hits += after.num_cached_tokens - before.num_cached_tokens
        ratios.append(means[False] / means[True])
        progress("measure", number + 1, rounds)
    return Report(
        model=name,
        load=load,
        ttft_ms=1e3 * mean(found[True]),
        ttft_without_ms=1e3 * mean(found[False]),
        hit_rate=hits / queried,
        ratios=tuple(ratios),
    )


def requests_of(load: Load, *, vocab_size: int, seed: int, uses_cache: bool) -> list[Request]:
    """Prompts that begin alike and differ afterwards."""
    rng = random.Random(seed)
    shared = tuple(rng.randrange(vocab_size) for _ in range(load.num_shared))
    sampling = SamplingParams(
        temperature=0.0, max_tokens=_OUTPUT_TOKENS, ignore_eos=True, seed=0
    ).or_else(JAXINFER_DEFAULTS)
    return [
        Request(
            f"prefix-{number}",
            (*shared, *(rng.randrange(vocab_size) for _ in range(load.num_own))),
            sampling,
            use_prefix_cache=uses_cache,
        )
        for number in range(load.num_requests)
    ]


def first_tokens_s(engine: Engine, requests: list[Request], *, concurrency: int) -> list[float]:
    """Seconds to the first token of each; a request is sent when one before it has ended."""
    unsent, times = deque(requests), []
    for _ in range(min(concurrency, len(unsent))):
        engine.submit(unsent.popleft())
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason is None:
                continue
            first_s = output.timings.first_token_s
            assert first_s is not None, output
            times.append(first_s - output.timings.arrived_s)
            if unsent:
                engine.submit(unsent.popleft())
    return times


def check(engine: Engine, load: Load) -> None:
    """Raises ConfigError where the engine can't run such requests, or keeps no prefixes."""
    if not engine.config.cache.prefix:
        raise ConfigError("engine.cache.prefix is false: there is no prefix cache to measure")
    if min(load) < 1:
        raise ConfigError(f"every count must be at least 1: {load}")
    needed = load.num_shared + load.num_own + _OUTPUT_TOKENS
    if needed > engine.config.max_seq_len:
        raise ConfigError(
            f"these requests have {needed} tokens; set engine.max_seq_len to at least that "
            f"(it is {engine.config.max_seq_len})"
        )


def table(report: Report) -> Table:
    """With the cache and without it."""
    load = report.load
    title = (
        f"{report.model}: {load.num_requests} requests, {load.num_shared} shared tokens + "
        f"{load.num_own} own, {load.concurrency} at once"
    )
    found = Table("prefix cache", "mean TTFT ms", "tokens from cache", title=title)
    found.title_justify = "left"
    for column in found.columns[1:]:
        column.justify = "right"
    found.add_row("on", f"{report.ttft_ms:.1f}", f"{report.hit_rate:.1%}")
    found.add_row("off", f"{report.ttft_without_ms:.1f}", "-")
    found.add_section()
    spread = f"{min(report.ratios):.1f} to {max(report.ratios):.1f} in {len(report.ratios)} rounds"
    found.add_row("times sooner", f"{report.ratio:.1f}", spread)
    found.add_row("at least", f"{BAR:.1f}", "yes" if report.ratio >= BAR else "no")
    return found
