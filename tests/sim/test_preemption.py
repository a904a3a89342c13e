"""Who gives way: one that loses little, never so often that it would not get on."""

import pytest

from jaxinfer.host.draft import Draft
from jaxinfer.host.scenario import STEP, Event, Scenario
from jaxinfer.host.simulator import Simulation
from jaxinfer.host.world import MAX_PREEMPTIONS
from tests.sim import work
from tests.sim.preemption import last_in_line
from tests.sim.universes import config, request


def preempted_first(*, priority: int = 0) -> int:
    """Who gives way when the first of three grows: 1 has stored 5 tokens, 2 has 32."""
    settings = config(prefix=False, num_pages=6, max_seq_len=40, prefill_chunks=(8, 32))
    requests = (
        request(0, (1,) * 3, 30),
        request(1, (2,), 20),
        request(2, (3,) * 28, 9, priority=priority),
    )
    world = Simulation(Scenario(settings, requests))
    for index in range(3):
        world.apply(Event("submit", index))
        world.apply(STEP)
    while not world.preempted:
        world.apply(STEP)
    order = next(iter(world.preempted))
    world.drain()
    return order


def test_the_one_that_loses_far_less_gives_way_before_the_last_in_line(monkeypatch):
    assert preempted_first() == 1
    monkeypatch.setattr(Draft, "_victim", last_in_line)
    assert preempted_first() == 2


def test_a_lower_priority_gives_way_first_however_much_it_loses():
    assert preempted_first(priority=1) == 2


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_less_is_computed_twice_than_with_the_last_in_line(workers, prefix, at_once):
    chosen, last = workers.map(work.run_overload, [True, False], [prefix] * 2, [at_once] * 2)
    assert chosen.num_preemptions > 300
    assert chosen.num_tokens < last.num_tokens
    assert chosen.most_of_one <= MAX_PREEMPTIONS
