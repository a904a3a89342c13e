"""A tenant that asks ten times its share beside one that does not."""

import random
from dataclasses import replace

import pytest

from jaxinfer.host.simulator import run
from tests.sim.fairness import CONFIG, LARGE, SMALL, capacity_per_s, seen_by
from tests.sim.swarm import random_scenario

SMALLER = replace(CONFIG, num_slots=8)


@pytest.mark.parametrize(
    ("config", "part", "count"),
    [
        (CONFIG, 0.3, 400),
        pytest.param(CONFIG, 0.3, 1000, marks=pytest.mark.full),
        pytest.param(CONFIG, 0.2, 1000, marks=pytest.mark.full),
        pytest.param(CONFIG, 0.1, 1000, marks=pytest.mark.full),
        pytest.param(CONFIG, 0.05, 1000, marks=pytest.mark.full),
        pytest.param(SMALLER, 0.1, 1000, marks=pytest.mark.full),
        pytest.param(SMALLER, 0.05, 1000, marks=pytest.mark.full),
    ],
)
def test_a_flood_of_one_tenant_is_hardly_felt_by_another(config, part, count):
    """At most one short step of the flood's, under way or next, lies before each of its prompts.

    `part` is of the engine's capacity, of which its share is a half. In arrival order its figure
    is above 30 times the one alone.
    """
    capacity = capacity_per_s(config)
    rates = {SMALL: part * capacity, LARGE: 10 * capacity / 2}
    seconds = count / rates[SMALL]
    solo = seen_by(
        SMALL, rates_per_s={SMALL: rates[SMALL]}, seconds=seconds, is_fair=True, config=config
    )
    fair = seen_by(SMALL, rates_per_s=rates, seconds=seconds, is_fair=True, config=config)
    first_come = seen_by(
        SMALL, rates_per_s=rates, seconds=60 / rates[SMALL], is_fair=False, config=config
    )
    assert fair.num_refused == 0 and len(fair.ttft_s) == len(solo.ttft_s) > 0.8 * count
    print(f"{part} of {config.num_slots} slots: p99 {fair.p99_s / solo.p99_s:.2f} times solo")
    assert fair.p99_s <= 1.5 * solo.p99_s
    assert first_come.num_refused > 20
    assert first_come.p99_s >= 30 * solo.p99_s


def test_two_floods_share_the_engine_evenly():
    capacity = capacity_per_s(CONFIG)
    rates = {SMALL: 2 * capacity, LARGE: 8 * capacity}
    small, large = (
        seen_by(tenant, rates_per_s=rates, seconds=20.0, is_fair=True) for tenant in rates
    )
    assert len(small.ttft_s) == pytest.approx(len(large.ttft_s), rel=0.15)


def test_turns_cost_one_tenant_alone_nothing():
    rates = {LARGE: 2 * capacity_per_s(CONFIG)}
    fair, first_come = (
        seen_by(LARGE, rates_per_s=rates, seconds=12.0, is_fair=is_fair)
        for is_fair in (True, False)
    )
    assert fair == first_come


def test_tenants_break_no_invariant():
    """Random scenarios, failures and preemptions included, each request of one of two tenants."""
    for seed in range(60):
        rng, turns, requests = random.Random(f"turns {seed}"), {"a": 0, "b": 0}, []
        scenario = random_scenario(seed)
        for request in scenario.requests:
            tenant = rng.choice("ab")
            turns[tenant] += rng.randint(1, 40)
            requests.append(replace(request, turn=turns[tenant], salt=tenant + request.salt))
        simulation = run(replace(scenario, requests=tuple(requests)))
        assert not simulation.scheduler.chunks_under_way
