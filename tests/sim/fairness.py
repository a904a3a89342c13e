"""Tenants before one engine in virtual time: what the small one sees beside the large one."""

import functools
import heapq
import random
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from jaxinfer.config import EngineConfig
from jaxinfer.errors import QuotaExceeded
from jaxinfer.host.cost_model import CostModel, _request, _VirtualEngine
from jaxinfer.host.loop import Sampled
from jaxinfer.host.workload import Arrival, Timeline, Workload
from jaxinfer.server.tenants import Caller, Lease, Tenants

CONFIG = EngineConfig(num_slots=32, max_seq_len=512, prefill_chunks=(32, 128, 512))
COST = CostModel(step_s=0.010, chunks=((32, 0.021), (512, 0.261)), context_token_s=1e-6)
SMALL, LARGE = 1, 0


class Seen(NamedTuple):
    """What one tenant saw."""

    ttft_s: list[float]
    num_refused: int

    @property
    def p99_s(self) -> float:
        return float(np.percentile(self.ttft_s, 99))


class Edge(_VirtualEngine):
    """The engine of the cost model behind the edge's own Tenants; a group is a tenant."""

    def __init__(self, workload: Workload, config: EngineConfig, *, is_fair: bool) -> None:
        line = config.num_slots + config.max_waiting
        self._tenants = Tenants(clock=lambda: 0.0, line=line if is_fair else 0)
        self._is_fair = is_fair
        self._leases: dict[int, Lease] = {}
        self.by_tenant: dict[int, list[Timeline]] = {SMALL: [], LARGE: []}
        self.refused = {SMALL: 0, LARGE: 0}
        super().__init__(workload, config, COST)

    def _receive(self) -> None:
        while self._on_the_way and self._on_the_way[0][0] <= self._now_s:
            _, sent_s, number, arrival = heapq.heappop(self._on_the_way)
            request = _request(number, arrival)
            caller = Caller(f"tenant {arrival.group}")
            try:
                lease = self._tenants.begin(
                    caller, len(request.prompt), request.sampling.max_tokens
                )
            except QuotaExceeded:
                self.refused[arrival.group] += 1
                continue
            if len(self.scheduler.waiting) >= self._config.max_waiting:
                self.refused[arrival.group] += 1
                lease.end()
                continue
            turn = lease.turn if self._is_fair else 0
            salt = caller.salt("") if self._is_fair else request.salt
            sequence = self.scheduler.add(replace(request, turn=turn, salt=salt))
            timeline = self._live[sequence.order] = Timeline(sent_s)
            lease.num_output_tokens = functools.partial(len, timeline.tokens_s)
            self._leases[sequence.order] = lease
            self.by_tenant[arrival.group].append(timeline)

    def _take(self, sampled: Sampled) -> None:
        super()._take(sampled)
        if sampled.sequence.finish_reason is not None:
            self._leases[sampled.sequence.order].end()


def arrivals(tenant: int, rate_per_s: float, seconds: float) -> list[Arrival]:
    """A tenant's requests, at random times."""
    rng, at_s, found = random.Random(f"tenant {tenant}"), 0.0, []
    while (at_s := at_s + rng.expovariate(rate_per_s)) < seconds:
        found.append(Arrival(at_s, rng.randint(32, 256), rng.randint(16, 64), group=tenant))
    return found


@functools.cache
def capacity_per_s(config: EngineConfig) -> float:
    """Requests a second that the engine serves when more are always waiting."""
    many = [replace(one, at_s=0.0) for one in arrivals(LARGE, 1.0, 120.0)]
    edge = Edge(Workload(tuple(many[:100])), config, is_fair=False)
    edge.run()
    timelines = edge.by_tenant[LARGE]
    return len(timelines) / max(one.tokens_s[-1] for one in timelines)


def seen_by(
    tenant: int,
    *,
    rates_per_s: dict[int, float],
    seconds: float,
    is_fair: bool,
    config: EngineConfig = CONFIG,
) -> Seen:
    """What a tenant sees when these tenants ask at these rates."""
    all_of_them = [
        one for name, rate in rates_per_s.items() for one in arrivals(name, rate, seconds)
    ]
    edge = Edge(Workload(tuple(all_of_them)), config, is_fair=is_fair)
    edge.run()
    times = [one.ttft_s for one in edge.by_tenant[tenant] if one.tokens_s]
    return Seen(times, edge.refused[tenant])
