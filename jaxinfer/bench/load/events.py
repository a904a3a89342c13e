"""What clients note of each request, and the figures that follow from it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxinfer.host.workload import SLO

OK = "OK"
EMPTY = "EMPTY"
"""The status of an answer that ended well and held no token."""


@dataclass
class Record:
    """One request; seconds from the start of the run."""

    number: int
    planned_s: float
    """When it had to go: all times count from here, so that a late client hides nothing."""
    sent_s: float = 0.0
    chunks_s: list[float] = field(default_factory=list)
    """When each part of the answer came that held something."""
    ended_s: float = 0.0
    status: str = OK
    message: str = ""
    """What the server said of a failure."""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    queue_s: float | None = None
    """By the server's own clock, as is the next; None where it doesn't say."""
    prefill_s: float | None = None

    @property
    def is_ok(self) -> bool:
        """Whether it was answered to its end."""
        return self.status == OK

    @property
    def lateness_s(self) -> float:
        """How long the client itself held it back."""
        return self.sent_s - self.planned_s

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.chunks_s[0] - self.planned_s

    @property
    def e2e_s(self) -> float:
        """Time to the last token."""
        return self.chunks_s[-1] - self.planned_s

    @property
    def tpot_s(self) -> float | None:
        """Time per token after the first; None where there was one."""
        more = self.num_output_tokens - 1
        return (self.chunks_s[-1] - self.chunks_s[0]) / more if more > 0 else None


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles, linearly interpolated; all 0 where nothing was counted."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class Figures:
    """What a run comes to. Times are of requests that were answered; the rest are failures."""

    num_requests: int
    num_ok: int
    failures: dict[str, int]
    """How many ended with each status that is not OK."""
    duration_s: float
    """From the first planned arrival to the last end."""
    offered_per_s: float
    """Requests a second while they came."""
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    goodput_per_s: float
    """Requests a second that met every bound; without bounds, those that were answered."""
    attainment: float
    """Of all requests, failures among them, how many met every bound."""
    missed: dict[str, int]
    """How many answered requests missed each bound."""
    ttft_s: Spread
    tpot_s: Spread
    itl_s: Spread
    """Gaps between parts of an answer, of all answers together."""
    e2e_s: Spread
    queue_s: Spread
    prefill_s: Spread
    lateness_s: Spread
    """How late the client itself sent; it is part of all times above."""
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    peak_in_flight: int


def figures(records: Sequence[Record], slo: SLO) -> Figures:
    """The figures of all requests of a run."""
    ok = [one for one in records if one.is_ok]
    first_s = min((one.planned_s for one in records), default=0.0)
    last_s = max((one.planned_s for one in records), default=0.0)
    duration_s = max((one.ended_s for one in records), default=0.0) - first_s
    per_s = 1 / duration_s if duration_s > 0 else 0.0
    num_good = sum(is_good(one, slo) for one in ok)
    num_prompt = sum(one.num_prompt_tokens for one in ok)
    num_output = sum(one.num_output_tokens for one in ok)
    came_s = last_s - first_s
    return Figures(
        num_requests=len(records),
        num_ok=len(ok),
        failures=dict(Counter(one.status for one in records if not one.is_ok).most_common()),
        duration_s=duration_s,
        offered_per_s=(len(records) - 1) / came_s if came_s > 0 else 0.0,
        requests_per_s=len(ok) * per_s,
        output_tokens_per_s=num_output * per_s,
        total_tokens_per_s=(num_prompt + num_output) * per_s,
        goodput_per_s=num_good * per_s,
        attainment=num_good / len(records) if records else 0.0,
        missed=missed(ok, slo),
        ttft_s=spread(one.ttft_s for one in ok),
        tpot_s=spread(one.tpot_s for one in ok),
        itl_s=spread(gap for one in ok for gap in np.diff(one.chunks_s).tolist()),
        e2e_s=spread(one.e2e_s for one in ok),
        queue_s=spread(one.queue_s for one in ok),
        prefill_s=spread(one.prefill_s for one in ok),
        lateness_s=spread(one.lateness_s for one in records),
        num_prompt_tokens=num_prompt,
        num_output_tokens=num_output,
        num_cached_tokens=sum(one.num_cached_tokens for one in ok),
        num_preemptions=sum(one.num_preemptions for one in ok),
        peak_in_flight=peak_in_flight(records),
    )


def is_good(record: Record, slo: SLO) -> bool:
    """Whether a request was answered and kept every bound."""
    return record.is_ok and not any(missed([record], slo).values())


def missed(records: Iterable[Record], slo: SLO) -> dict[str, int]:
    """How many of these answered requests are beyond each bound that there is."""
    counts = {name: 0 for name, bound in bounds(slo).items() if bound is not None}
    for one in records:
        seen = {"ttft": one.ttft_s, "tpot": one.tpot_s or 0.0, "e2e": one.e2e_s}
        for name in counts:
            bound = bounds(slo)[name]
            counts[name] += bound is not None and seen[name] > bound
    return counts


def bounds(slo: SLO) -> dict[str, float | None]:
    """The bounds by the names that the command line gives them."""
    return {"ttft": slo.ttft_s, "tpot": slo.tpot_s, "e2e": slo.e2e_s}


def spread(values: Iterable[float | None]) -> Spread:
    """What there is of the values, None left out."""
    found = [one for one in values if one is not None]
    if not found:
        return Spread(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    p50, p90, p99 = np.percentile(found, (50, 90, 99)).tolist()
    return Spread(len(found), float(np.mean(found)), p50, p90, p99, max(found))


def peak_in_flight(records: Iterable[Record]) -> int:
    """The most requests that were under way at once, from when they had to go."""
    moves = [(one.planned_s, 1) for one in records] + [(one.ended_s, -1) for one in records]
    most = now = 0
    for _, step in sorted(moves):
        now += step
        most = max(most, now)
    return most
