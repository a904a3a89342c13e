"""The scheduler on a fake device, whose token is a hash of all that a row reads in its pages."""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.config import CacheConfig, EngineConfig
from jaxinfer.host.plan import Plan
from jaxinfer.host.request import JAXINFER_DEFAULTS, FinishReason, Request, SamplingParams
from jaxinfer.host.scheduler import Scheduler

EOS = 13


class FakeDevice:
    """Pages that hold tokens. Any mix-up of pages changes the tokens that come out."""

    def __init__(self, config):
        self.page_size = config.cache.page_size
        self.pages = {}
        self.last = {}

    def run(self, plan):
        sampled = []
        for chunk in plan.chunks:
            sequence = chunk.sequence
            tokens = sequence.tokens[chunk.start : chunk.start + chunk.length]
            self._store(sequence, chunk.start, tokens)
            if chunk.is_last:
                sampled.append(self._sample(sequence, chunk.start + chunk.length))
        for sequence in plan.decodes:
            position = sequence.num_stored - 1
            self._store(sequence, position, [self.last[sequence.slot]])
            sampled.append(self._sample(sequence, position + 1))
        return sampled

    def _store(self, sequence, start, tokens):
        for position, token in enumerate(tokens, start):
            page = sequence.pages[position // self.page_size]
            self.pages[page, position % self.page_size] = token

    def _sample(self, sequence, length):
        size = self.page_size
        read = [self.pages[sequence.pages[at // size], at % size] for at in range(length)]
        self.last[sequence.slot] = next_token(read)
        return self.last[sequence.slot]


def next_token(tokens):
    state = 17
    for token in tokens:
        state = (state * 31 + token + 1) % 1_000_003
    return state % 50


def expected_tokens(request, config):
    tokens, sampling = list(request.prompt), request.sampling
    while True:
        tokens.append(next_token(tokens))
        count = len(tokens) - len(request.prompt)
        is_end = tokens[-1] == EOS and not sampling.ignore_eos
        if is_end or count == sampling.max_tokens or len(tokens) == config.max_seq_len:
            return tokens[len(request.prompt) :]


def make_request(name, prompt, **fields):
    sampling = {k: fields.pop(k) for k in ("max_tokens", "ignore_eos") if k in fields}
    return Request(
        name, tuple(prompt), SamplingParams(**sampling).or_else(JAXINFER_DEFAULTS), **fields
    )


class World:
    """A scheduler and a device, with results read one step late as the engine does."""

    def __init__(self, config, *, overlap):
        self.config, self.overlap = config, overlap
        self.scheduler = Scheduler(config, eos_token_ids=(EOS,))
        self.device = FakeDevice(config)
        self.under_way = []
        self.sequences = []

    def add(self, request):
        self.sequences.append(self.scheduler.add(request))

    def step(self):
        before = _picture(self.scheduler)
        plan = self.scheduler.plan()
        assert _picture(self.scheduler) == before, "plan() must only read"
        check_plan(plan, self.config)
        self.scheduler.begin(plan)
        self.scheduler.check_integrity()
        if not plan.is_empty:
            self.under_way.append((plan, self.device.run(plan)))
        while len(self.under_way) > (1 if self.overlap and not plan.is_empty else 0):
            done, tokens = self.under_way.pop(0)
            self.scheduler.retire(done, tokens)
            for sequence, token in zip(done.sampled, tokens, strict=True):
                self.scheduler.commit(sequence, token)
        self.scheduler.check_integrity()
        return plan

    @property
    def is_empty(self):
        return not (self.scheduler.waiting or self.scheduler.running or self.under_way)


def _picture(scheduler):
    held = [*scheduler.waiting, *(one for one in scheduler.slots if one is not None)]
    return (
        [(one.order, one.slot, tuple(one.pages), one.num_stored, one.num_pending) for one in held],
        scheduler.pool.num_available,
    )


def check_plan(plan, config):
    padded = [chunk.size for chunk in plan.chunks]
    assert sum(padded) <= max([config.max_prefill_tokens, *padded[:1]]), "too much prefill"
    assert len({id(sequence) for sequence in plan.decodes}) == len(plan.decodes)
    assert len(plan.decodes) <= config.num_slots
    for chunk in plan.chunks:
        assert 1 <= chunk.length <= chunk.size
        assert chunk.start % config.prefix_step == 0, "chunks begin at edges"
    assert not set(map(id, plan.preempt)) & set(map(id, plan.sampled))


CONFIG = EngineConfig(
    num_slots=3,
    max_seq_len=64,
    prefill_chunks=(8, 16),
    max_prefill_tokens=16,
    attention_block=16,
    cache=CacheConfig(page_size=4, num_pages=20),
)


@pytest.mark.parametrize("overlap", [True, False])
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), num_pages=st.integers(16, 40), num_slots=st.integers(1, 4))
def test_random_schedules_give_every_request_its_own_tokens(overlap, seed, num_pages, num_slots):
    rng = random.Random(seed)
    config = dataclasses.replace(
        CONFIG,
        num_slots=num_slots,
        cache=CacheConfig(page_size=4, num_pages=num_pages),
        max_prefill_tokens=rng.choice([8, 16, 40]),
    )
    world = World(config, overlap=overlap)
    shared = [[rng.randrange(50) for _ in range(rng.choice([0, 8, 30]))] for _ in range(3)]
    left = [
        make_request(
            f"r{number}",
            [*rng.choice(shared), *(rng.randrange(50) for _ in range(rng.randint(1, 20)))],
            max_tokens=rng.choice([1, 2, 5, 20, None]),
            ignore_eos=rng.random() < 0.5,
            priority=rng.choice([0, 0, 1]),
        )
        for number in range(rng.randint(1, 12))
    ]
    for _ in range(5000):
        if left and rng.random() < 0.5:
            world.add(left.pop())
        if rng.random() < 0.03:
            live = [one for one in world.sequences if one.finish_reason is None]
            if live:
                world.scheduler.finish(rng.choice(live), FinishReason.CANCELLED)
        if rng.random() < 0.02:
            world.under_way.clear()
            world.scheduler.restart()
        world.step()
        if not left and world.is_empty:
            break
    assert world.is_empty, "the scheduler makes no progress"
    assert world.scheduler.pool.num_available == num_pages
    for sequence in world.sequences:
        wanted = expected_tokens(sequence.request, config)
        got = sequence.tokens[len(sequence.request.prompt) :]
        if sequence.finish_reason is FinishReason.CANCELLED:
            assert got == wanted[: len(got)]
        else:
            assert got == wanted


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
    while not world.is_empty:
        world.step()
    assert low.tokens[30:] == expected_tokens(low.request, config)


PREFIX = EngineConfig(
    num_slots=2,
    max_seq_len=64,
    prefill_chunks=(8, 16),
    attention_block=16,
    cache=CacheConfig(page_size=4, num_pages=24),
)


def finish(world):
    while not world.is_empty:
        world.step()


def cached(world, request):
    """Runs one request to its end; returns how many of its prompt tokens were found."""
    world.add(request)
    finish(world)
    sequence = world.sequences[-1]
    assert sequence.tokens[len(request.prompt) :] == expected_tokens(request, world.config)
    return sequence.num_cached


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
    finish(world)
    assert b.tokens[25:] == expected_tokens(b.request, PREFIX)


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
    plan = world.scheduler.plan()
    world.scheduler.begin(plan)
    tokens = [-1] * len(plan.sampled)
    world.scheduler.retire(plan, tokens)
    for sequence, token in zip(plan.sampled, tokens, strict=True):
        world.scheduler.commit(sequence, token)
    world.scheduler.check_integrity()
    assert world.sequences[0].finish_reason is FinishReason.ERROR
    assert world.scheduler.prefix.pages == []


def test_a_collision_of_digests_finds_nothing():
    scheduler = Scheduler(PREFIX)
    prefix, pages = scheduler.prefix, scheduler.pool.take(1)
    digests = prefix.digests([1, 2, 3, 4], salt="")
    prefix.publish(pages[0], (1, 2, 3, 4), digests[0])
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
