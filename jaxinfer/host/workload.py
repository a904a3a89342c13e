"""Workloads and what their clients see: TTFT, TPOT, ITL, throughput and goodput.

ttft   first token - request sent
tpot   (last token - first token) / (tokens - 1), for each request of two tokens or more
itl    gaps between tokens, of all requests together
e2e    last token - request sent
goodput   requests a second that meet every bound; those refused meet none
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from jaxinfer.errors import ConfigError


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
class WorkloadSpec:
    """A workload in a few numbers: drawn anew, it is the same. A rate, or else a concurrency."""

    num_requests: int = 64
    concurrency: int | None = None
    rate_per_s: float | None = None
    num_prompt_tokens: tuple[int, int] = (20, 60)
    num_output_tokens: tuple[int, int] = (16, 48)
    num_shared_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.rate_per_s is None) == (self.concurrency is None):
            raise ConfigError("a workload needs a rate or a concurrency, and not both")
        if self.rate_per_s is not None and not 0 < self.rate_per_s < math.inf:
            raise ConfigError(f"the rate is {self.rate_per_s}; it must be above 0 and finite")
        for name in ("num_requests", "concurrency"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} of the workload is {value}; it must be at least 1")
        for name in ("num_prompt_tokens", "num_output_tokens"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ConfigError(
                    f"{name} of the workload is {low}-{high}; it must ascend from at least 1"
                )
        if not 0 <= self.num_shared_tokens < self.num_prompt_tokens[0]:
            raise ConfigError(
                f"{self.num_shared_tokens} shared tokens leave none of their own to prompts of "
                f"{self.num_prompt_tokens[0]}; give fewer, or longer prompts"
            )


NAMED = {
    "short": WorkloadSpec(24, 8),
    "mixed": WorkloadSpec(24, None, 1.0, (10, 500), (8, 64)),
    "shared": WorkloadSpec(12, 4, None, (800, 1000), (16, 32), 768),
}
"""Short requests in a closed loop, all lengths in an open one, long prompts that begin alike."""


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


def draw(spec: WorkloadSpec) -> Workload:
    """The requests of a spec."""
    rng = random.Random(spec.seed)
    lengths = [
        (rng.randint(*spec.num_prompt_tokens), rng.randint(*spec.num_output_tokens))
        for _ in range(spec.num_requests)
    ]
    return replay(lengths, spec)


def replay(lengths: Iterable[tuple[int, int]], spec: WorkloadSpec) -> Workload:
    """Requests of these prompt and output lengths, at the spec's rate or concurrency."""
    rng, at_s = random.Random(f"arrivals {spec.seed}"), 0.0
    arrivals: list[Arrival] = []
    for prompt, output in lengths:
        arrivals.append(Arrival(at_s, prompt, output, min(spec.num_shared_tokens, prompt)))
        at_s += 0.0 if spec.rate_per_s is None else rng.expovariate(spec.rate_per_s)
    return Workload(tuple(arrivals), spec.concurrency)


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
