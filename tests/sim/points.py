"""Cancel, deadline, failure and NaN at every step of every request."""

import dataclasses
from collections.abc import Iterator

from jaxinfer.host.request import FinishReason
from jaxinfer.host.scenario import PHASES, STEP, Event, Scenario
from jaxinfer.host.simulator import run
from tests.sim.universes import config, request


def bases() -> list[Scenario]:
    """The same requests with and without overlap, in pools from tight to ample."""
    return [
        _base(overlap=overlap, page_size=page_size, num_pages=num_pages)
        for overlap in (True, False)
        for page_size, num_pages in ((8, 6), (8, 12), (4, 10), (4, 16), (2, 24))
    ]


def points(scenario: Scenario) -> Iterator[Scenario]:
    """The scenario with one thing more, at each place where it can come."""
    num_more = run(scenario).num_events - len(scenario.events)
    steps = (*scenario.events, *[STEP] * num_more)
    for at in range(len(steps) + 1):
        for event in (
            Event("fail"),
            Event("fail", phase="read"),
            Event("fail", phase="part"),
            Event("flush"),
        ):
            yield _with_event(scenario, steps, at, event)
        for index in range(len(scenario.requests)):
            yield _with_event(scenario, steps, at, Event("nan", index))
            yield _with_deadline(scenario, steps, at, index)
            for phase in PHASES:
                yield _with_event(scenario, steps, at, Event("cancel", index, phase))


def check(scenario: Scenario) -> str:
    """Runs one point to its end, which checks pages, slots and ends; says what it has ended."""
    simulation = run(scenario)
    assert simulation.scheduler.pool.num_available == scenario.config.num_pages
    assert len(simulation.ended) == len(simulation.sequences) == len(scenario.requests)
    others = [one for one in simulation.ended.values() if one is not FinishReason.LENGTH]
    assert len(others) <= 1
    return others[0].value if others else ""


def _base(*, overlap: bool, page_size: int, num_pages: int) -> Scenario:
    """Six requests that share, grow, wait and preempt; they arrive over the first steps."""
    shared = tuple(range(16))
    requests = (
        request(0, (*shared, *range(30, 37)), 6),
        request(1, (*shared, *range(30, 37)), 9),
        request(2, (*shared[:8], 1, 2, 3), 12),
        request(3, tuple(range(20, 36)), 5, priority=1),
        request(4, (*shared, 5), 7, use_prefix_cache=False),
        request(5, (7,), 10, salt="a"),
    )
    settings = config(
        overlap=overlap, page_size=page_size, num_pages=num_pages, prefill_chunks=(8, 16)
    )
    arrivals = [Event("submit", 0), Event("submit", 1), STEP, Event("submit", 2), STEP]
    arrivals += [Event("submit", 3), Event("submit", 4), STEP, STEP, Event("submit", 5)]
    return Scenario(settings, requests, tuple(arrivals))


def _with_event(scenario: Scenario, steps: tuple[Event, ...], at: int, event: Event) -> Scenario:
    return dataclasses.replace(scenario, events=(*steps[:at], event, *steps[at:]))


def _with_deadline(scenario: Scenario, steps: tuple[Event, ...], at: int, index: int) -> Scenario:
    requests = list(scenario.requests)
    requests[index] = dataclasses.replace(requests[index], deadline_s=1.0)
    changed = dataclasses.replace(scenario, requests=tuple(requests))
    return _with_event(changed, steps, at, Event("time", at=1.0))
