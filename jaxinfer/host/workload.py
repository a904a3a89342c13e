"""Workloads and what their clients see: TTFT, TPOT, ITL, throughput and goodput.

ttft   first token - request sent
tpot   (last token - first token) / (tokens - 1), for each request of two tokens or more
itl    gaps between tokens, of all requests together
e2e    last token - request sent
goodput   requests a second that meet every bound; those refused meet none
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Arrival:
    """One request to come."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_shared_tokens: int = 0
    """First tokens of the prompt that all requests of the same group have in common."""
    group: int = 0
    priority: int = 0


@dataclass(frozen=True)
class Workload:
    """Requests, sent when they arrive or, with a concurrency, when one before them has ended."""

    arrivals: tuple[Arrival, ...]
    concurrency: int | None = None


@dataclass(frozen=True)
class SLO:
    """Bounds that a request must keep to count as good; None bounds nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


@dataclass
class Timeline:
    """When one request was sent and when each of its tokens came."""

    sent_s: float
    tokens_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.tokens_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        """Time to the last token."""
        return self.tokens_s[-1] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per token after the first; None where there was one."""
        gaps = len(self.tokens_s) - 1
        return (self.tokens_s[-1] - self.tokens_s[0]) / gaps if gaps else None

    def is_good(self, slo: SLO) -> bool:
        """Whether every bound is kept."""
        pairs = ((self.ttft_s, slo.ttft_s), (self.tpot_s, slo.tpot_s), (self.e2e_s, slo.e2e_s))
        return all(bound is None or (value or 0.0) <= bound for value, bound in pairs)


@dataclass(frozen=True)
class Summary:
    """Mean and percentiles, linearly interpolated; all 0 where nothing was counted."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Prediction:
    """What the clients of a workload see, and what it takes to serve them."""

    ttft_s: Summary
    tpot_s: Summary
    itl_s: Summary
    e2e_s: Summary
    duration_s: float
    num_requests: int
    num_refused: int
    requests_per_s: float
    output_tokens_per_s: float
    goodput_per_s: float
    num_steps: int = 0
    num_preemptions: int = 0
    hit_rate: float = 0.0
    peak_pages: int = 0


def open_loop(
    num_requests: int,
    *,
    rate_per_s: float,
    num_prompt_tokens: tuple[int, int],
    num_output_tokens: tuple[int, int],
    num_shared_tokens: int = 0,
    seed: int = 0,
) -> Workload:
    """Poisson arrivals; lengths are drawn evenly from their bounds, both included."""
    rng, at_s = random.Random(seed), 0.0
    arrivals: list[Arrival] = []
    for _ in range(num_requests):
        prompt, output = rng.randint(*num_prompt_tokens), rng.randint(*num_output_tokens)
        arrivals.append(Arrival(at_s, prompt, output, num_shared_tokens))
        at_s += rng.expovariate(rate_per_s)
    return Workload(tuple(arrivals))


def closed_loop(
    num_requests: int,
    *,
    concurrency: int,
    num_prompt_tokens: tuple[int, int],
    num_output_tokens: tuple[int, int],
    num_shared_tokens: int = 0,
    seed: int = 0,
) -> Workload:
    """That many streams, each sending its next request when its last one has ended."""
    rng = random.Random(seed)
    arrivals = tuple(
        Arrival(
            0.0, rng.randint(*num_prompt_tokens), rng.randint(*num_output_tokens), num_shared_tokens
        )
        for _ in range(num_requests)
    )
    return Workload(arrivals, concurrency)


def summarise(
    timelines: Iterable[Timeline],
    *,
    slo: SLO,
    num_refused: int = 0,
    num_steps: int = 0,
    num_preemptions: int = 0,
    hit_rate: float = 0.0,
    peak_pages: int = 0,
) -> Prediction:
    """The figures of requests that have ended; for measured ones as well as for predicted ones."""
    ended = [one for one in timelines if one.tokens_s]
    first_s = min((one.sent_s for one in ended), default=0.0)
    duration_s = max((one.tokens_s[-1] for one in ended), default=0.0) - first_s
    per_s = 1 / duration_s if duration_s else 0.0
    gaps = [np.diff(one.tokens_s) for one in ended]
    return Prediction(
        ttft_s=_summary([one.ttft_s for one in ended]),
        tpot_s=_summary([one.tpot_s for one in ended if one.tpot_s is not None]),
        itl_s=_summary(np.concatenate(gaps).tolist() if gaps else []),
        e2e_s=_summary([one.e2e_s for one in ended]),
        duration_s=duration_s,
        num_requests=len(ended),
        num_refused=num_refused,
        requests_per_s=len(ended) * per_s,
        output_tokens_per_s=sum(len(one.tokens_s) for one in ended) * per_s,
        goodput_per_s=sum(one.is_good(slo) for one in ended) * per_s,
        num_steps=num_steps,
        num_preemptions=num_preemptions,
        hit_rate=hit_rate,
        peak_pages=peak_pages,
    )


def _summary(values: list[float]) -> Summary:
    if not values:
        return Summary(0.0, 0.0, 0.0, 0.0)
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return Summary(float(np.mean(values)), p50, p90, p99)
