"""A tenant that asks ten times its share beside one that does not."""

from dataclasses import replace

import pytest

from tests.sim.fairness import CONFIG, LARGE, SMALL, capacity_per_s, seen_by

SMALLER = replace(CONFIG, num_slots=8)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (CONFIG, 0.4),
        pytest.param(CONFIG, 0.1, marks=pytest.mark.full),
        pytest.param(SMALLER, 0.1, marks=pytest.mark.full),
        pytest.param(SMALLER, 0.4, marks=pytest.mark.full),
    ],
)
def test_a_flood_of_one_tenant_is_hardly_felt_by_another(config, part):
    """Twice the solo figure is a step under way and fuller steps; in arrival order it is 30x."""
    capacity = capacity_per_s(config)
    rates = {SMALL: part * capacity, LARGE: 10 * capacity / 2}
    seconds = 60 / rates[SMALL]
    solo = seen_by(
        SMALL, rates_per_s={SMALL: rates[SMALL]}, seconds=seconds, is_fair=True, config=config
    )
    fair, first_come = (
        seen_by(SMALL, rates_per_s=rates, seconds=seconds, is_fair=is_fair, config=config)
        for is_fair in (True, False)
    )
    assert fair.num_refused == 0 and len(fair.ttft_s) == len(solo.ttft_s) > 40
    assert fair.p99_s <= 2.5 * solo.p99_s
    assert first_come.num_refused > 0
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
        seen_by(LARGE, rates_per_s=rates, seconds=20.0, is_fair=is_fair)
        for is_fair in (True, False)
    )
    assert fair == first_come
