"""Deadlines: nothing is spent on a request that is late, or that can't be in time."""

import collections

import pytest

from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.host.pace import Pace
from jaxinfer.host.scheduler import Scheduler
from tests.sim import work
from tests.sim.universes import config, request


def test_random_deadlines(workers):
    check(workers, num_scenarios=400, num_deadlines=1500)


@pytest.mark.full
def test_ten_thousand_random_deadlines(workers):
    check(workers, num_scenarios=2700, num_deadlines=10_000)


def check(workers, *, num_scenarios, num_deadlines):
    found = workers.map(work.run_deadlines, work.split(num_scenarios))
    seen = sum(map(collections.Counter, found), collections.Counter())
    assert seen["deadlines"] >= num_deadlines
    assert seen["late"] == 0, "a step was spent on a request past its deadline"
    assert seen["late in line"] == 0, "one past its deadline was in line when a step was planned"
    assert seen["unmeetable"] > num_deadlines / 20
    assert seen["unmeetable, planned"] <= 0.05 * seen["unmeetable"], seen
    assert seen["ended early"] > num_deadlines / 20


def test_what_even_the_fastest_service_would_not_finish_leaves_the_line():
    scheduler = Scheduler(config(max_seq_len=40, prefix=False))
    hopeless = scheduler.add(request(0, tuple(range(20)), 3, deadline_s=1.9))
    scheduler.add(request(1, tuple(range(20)), 3, deadline_s=2.0))
    scheduler.add(request(2, tuple(range(20)), 3))
    assert scheduler.overdue(0.0) == []
    assert scheduler.overdue(0.0, Pace(prefill_token_s=0.1)) == [hopeless]
    assert scheduler.overdue(0.0, Pace(step_s=0.65)) == [hopeless]  # 3 chunks, one a step
    assert scheduler.overdue(0.0, Pace(prefill_token_s=0.09, step_s=0.6)) == []


def test_one_that_holds_a_slot_is_never_given_up_early():
    scheduler = Scheduler(config(max_seq_len=40))
    scheduler.add(request(0, tuple(range(20)), 3, deadline_s=1.0))
    scheduler.begin(scheduler.plan())
    assert scheduler.overdue(0.5, Pace(prefill_token_s=1.0)) == []


@pytest.mark.parametrize(("page_size", "num_stored"), [(8, 24), (16, 24), (16, 8)])
def test_what_another_has_stored_or_begun_counts_as_done(page_size, num_stored):
    settings = EngineConfig(
        num_slots=2,
        max_seq_len=64,
        prefill_chunks=(8,),
        max_prefill_tokens=num_stored,
        attention_block=16,
        cache=CacheConfig(page_size=page_size, num_pages=16),
    )
    scheduler, prompt = Scheduler(settings), tuple(range(30))
    earlier = scheduler.add(request(0, prompt, 3))
    scheduler.begin(scheduler.plan())
    assert earlier.num_stored == num_stored
    num_left = 32 - num_stored
    scheduler.add(request(1, (*prompt, 1, 2), 3, deadline_s=num_left - 0.5))
    scheduler.add(request(2, (*prompt, 1, 2), 3, deadline_s=num_left + 0.5))
    late = scheduler.overdue(0.0, Pace(prefill_token_s=1.0))
    assert [one.request.request_id for one in late] == ["r1"]
