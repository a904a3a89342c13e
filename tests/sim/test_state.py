"""A saved scheduler goes on as the one it was: same plans, same pages, same tokens."""

import pytest

from jaxinfer.host import state
from jaxinfer.host.pages import PagePool
from jaxinfer.host.prefix import PrefixCache
from jaxinfer.host.simulator import Simulation
from tests.sim import work
from tests.sim.swarm import random_scenario


def test_a_loaded_scheduler_plans_as_the_saved_one_would_have(workers):
    found = list(workers.map(work.run_reloads, work.split(1000)))
    assert sum(same for same, _ in found) == 1000
    assert sum(loads for _, loads in found) > 1000


def test_a_step_under_way_can_not_be_saved():
    simulation = Simulation(random_scenario(0))
    scheduler = simulation.scheduler
    scheduler.add(simulation.scenario.requests[0])
    scheduler.begin(scheduler.plan())
    with pytest.raises(AssertionError, match="has a step under way"):
        state.save(scheduler)


def test_pages_without_the_ones_before_them_are_forgotten_before_a_state_is_taken():
    pool = PagePool(8)
    prefix = PrefixCache(pool, page_size=2)
    pages, tokens = pool.take(3), [1, 2, 3, 4, 5, 6]
    digests = prefix.digests(tokens, salt="")
    for place, (page, digest) in enumerate(zip(pages, digests, strict=True)):
        parent = digests[place - 1] if place else b""
        part = tokens[2 * place : 2 * place + 2]
        prefix.publish(page, part, digest, parent=parent, salt="")
    assert prefix.chains() == [(tokens, pages)]
    prefix.forget(pages[1:2])
    assert prefix.chains() == [([1, 2], pages[:1])]
    assert prefix.forget_orphans() == 1
    assert prefix.pages == pages[:1]
    assert prefix.forget_orphans() == 0
