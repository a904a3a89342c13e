"""What the scheduler promises, one behaviour at a time; tests/sim looks for all else."""

import dataclasses

import pytest

from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.host.request import JAXINFER_DEFAULTS, FinishReason, Request, SamplingParams
from jaxinfer.host.scenario import STEP, Event, Scenario
from jaxinfer.host.scheduler import Plan, Scheduler
from jaxinfer.host.simulator import Simulation


def make_request(name, prompt, **fields):
    sampling = {k: fields.pop(k) for k in ("max_tokens", "ignore_eos") if k in fields}
    sampling = SamplingParams(**sampling).or_else(JAXINFER_DEFAULTS)
    return Request(name, tuple(prompt), sampling, **fields)


class World(Simulation):
    """A simulation whose requests are thought of on the way; it checks their tokens itself."""

    def __init__(self, config, *, overlap):
        config = dataclasses.replace(config, overlap=overlap)
        super().__init__(Scenario(config, requests=(), eos=(13,)))

    def add(self, request):
        requests = (*self.scenario.requests, request)
        self.scenario = dataclasses.replace(self.scenario, requests=requests)
        self.apply(Event("submit", len(requests) - 1))

    def step(self):
        self.apply(STEP)
        return self.last_plan


CONFIG = EngineConfig(
    num_slots=3,
    max_seq_len=64,
    prefill_chunks=(8, 16),
    max_prefill_tokens=16,
    attention_block=16,
    cache=CacheConfig(page_size=4, num_pages=20),
)


def test_decode_goes_on_in_every_step_while_a_long_prompt_prefills():
    world = World(dataclasses.replace(CONFIG, cache=CacheConfig(page_size=4)), overlap=True)
    world.add(make_request("short", [1], max_tokens=20, ignore_eos=True))
    world.step()
    world.add(make_request("long", list(range(50)), max_tokens=2))
    for _ in range(3):
        plan = world.step()
        assert [one.request.request_id for one in plan.decodes][:1] == ["short"]
        assert sum(chunk.size for chunk in plan.chunks) <= 16


def test_priority_goes_first_and_the_last_in_line_is_preempted():
    config = dataclasses.replace(CONFIG, cache=CacheConfig(page_size=4, num_pages=16))
    world = World(config, overlap=False)
    world.add(make_request("low", [1] * 30, max_tokens=20, ignore_eos=True, priority=5))
    world.step()
    world.add(make_request("high", [2] * 24, max_tokens=30, ignore_eos=True))
    low, high = world.sequences
    while high.finish_reason is None:
        world.step()
    assert low.num_preemptions >= 1
    assert high.num_preemptions == 0
    world.drain()


PREFIX = EngineConfig(
    num_slots=2,
    max_seq_len=64,
    prefill_chunks=(8, 16),
    attention_block=16,
    cache=CacheConfig(page_size=4, num_pages=24),
)


def cached(world, request):
    """Runs one request to its end; returns how many of its prompt tokens were found."""
    world.add(request)
    world.drain()
    return world.sequences[-1].num_cached


def test_a_prefix_is_found_at_chunk_edges_by_whoever_may_see_it():
    world = World(PREFIX, overlap=True)
    prompt = list(range(30))
    assert cached(world, make_request("first", prompt, max_tokens=2)) == 0
    assert cached(world, make_request("same", prompt, max_tokens=2)) == 24
    assert cached(world, make_request("edge", prompt[:24], max_tokens=2)) == 16
    assert cached(world, make_request("longer", prompt[:20] + [1] * 9, max_tokens=2)) == 16
    assert cached(world, make_request("other", [9, *prompt], max_tokens=2)) == 0
    assert cached(world, make_request("salt", prompt, max_tokens=2, salt="tenant")) == 0
    assert cached(world, make_request("salt2", prompt, max_tokens=2, salt="tenant")) == 24
    bypass = make_request("bypass", prompt, max_tokens=2, use_prefix_cache=False)
    assert cached(world, bypass) == 0
    stats = world.scheduler.prefix.stats()
    assert stats.num_hit_tokens == 24 + 16 + 16 + 24
    assert 0 < stats.hit_rate < 1
    assert world.scheduler.prefix.flush() > 0
    assert cached(world, make_request("flushed", prompt, max_tokens=2)) == 0


def test_what_a_request_said_can_be_read_by_the_next_turn():
    world = World(PREFIX, overlap=True)
    first = make_request("first", list(range(20)), max_tokens=20, ignore_eos=True)
    cached(world, first)
    said = world.sequences[0].tokens
    assert cached(world, make_request("next", [*said, 1, 2], max_tokens=2)) == 32


def test_running_requests_share_pages_as_soon_as_a_step_has_returned():
    world = World(PREFIX, overlap=True)
    prompt = list(range(24))
    world.add(make_request("a", prompt, max_tokens=30, ignore_eos=True))
    for _ in range(4):
        world.step()
    world.add(make_request("b", [*prompt, 7], max_tokens=3))
    world.step()
    a, b = world.sequences
    assert b.num_cached == 24
    assert a.pages[:6] == b.pages[:6]
    world.drain()


def test_the_least_recently_used_pages_are_evicted_when_the_pool_is_short():
    world = World(PREFIX, overlap=False)
    old, new = list(range(24)), list(range(10, 34))
    cached(world, make_request("old", old, max_tokens=2))
    cached(world, make_request("new", new, max_tokens=2))
    cached(world, make_request("big", list(range(20, 50)) + [3] * 20, max_tokens=8))
    assert world.scheduler.prefix.stats().num_evicted_pages > 0
    assert cached(world, make_request("new2", new, max_tokens=2)) >= 16
    assert cached(world, make_request("old2", old, max_tokens=2)) == 0


def test_pages_of_a_broken_row_are_never_found():
    world = World(PREFIX, overlap=False)
    world.add(make_request("bad", list(range(30)), max_tokens=9))
    world.step()
    assert world.scheduler.prefix.pages
    world.apply(Event("nan", 0))
    assert world.sequences[0].finish_reason is FinishReason.ERROR
    assert world.scheduler.prefix.pages == []


def test_a_long_prompt_is_published_once_a_token_shows_that_it_is_finite():
    config = dataclasses.replace(PREFIX, max_prefill_tokens=16)
    world = World(config, overlap=False)
    world.add(make_request("long", list(range(40)), max_tokens=9))
    world.step()
    assert world.scheduler.prefix.pages == []
    world.step()
    world.step()
    assert len(world.scheduler.prefix.pages) == 10


def test_a_collision_of_digests_finds_nothing():
    scheduler = Scheduler(PREFIX)
    prefix, pages = scheduler.prefix, scheduler.pool.take(1)
    digests = prefix.digests([1, 2, 3, 4], salt="")
    prefix.publish(pages[0], (1, 2, 3, 4), digests[0], parent=b"", salt="")
    assert prefix.match([1, 2, 3, 4], digests) == pages
    assert prefix.match([1, 2, 3, 5], digests) == []


def test_an_empty_scheduler_plans_nothing():
    assert Scheduler(CONFIG).plan() == Plan((), (), (), (), {}, ())


def test_overdue_lists_what_is_past_its_deadline():
    scheduler = Scheduler(CONFIG)
    late = scheduler.add(make_request("late", [1], deadline_s=5.0))
    scheduler.add(make_request("free", [1]))
    assert scheduler.overdue(4.9) == []
    assert scheduler.overdue(5.0) == [late]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_static_batch_begins_in_one_step_and_nobody_joins_it(overlap):
    config = dataclasses.replace(
        CONFIG, batching="static", max_prefill_tokens=8, cache=CacheConfig(page_size=4)
    )
    world = World(config, overlap=overlap)
    for name, max_tokens in (("a", 2), ("b", 12), ("c", 5), ("d", 3)):
        world.add(make_request(name, range(14), max_tokens=max_tokens, ignore_eos=True))
    plan = world.step()
    assert [one.sequence.request.request_id for one in plan.admit] == ["a", "b", "c"]
    assert sum(chunk.size for chunk in plan.chunks) == 3 * 16  # past max_prefill_tokens
    held = []
    while world.scheduler.waiting:
        held.append([one.request.request_id for one in world.scheduler.running])
        plan = world.step()
        assert bool(plan.admit) == (not held[-1])
    assert ["b"] in held  # two slots stood empty while one request was left
    world.drain()
