"""The scheduler under a fake device: a token is a hash of all that its row can read in its pages."""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.config import CacheConfig, EngineConfig
from jaxinfer.host.request import JAXINFER_DEFAULTS, FinishReason, Request, SamplingParams
from jaxinfer.host.scheduler import Plan, Scheduler

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
    return Request(name, tuple(prompt), SamplingParams(**sampling).or_else(JAXINFER_DEFAULTS), **fields)


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
        scheduler.pool.num_free,
    )


def check_plan(plan, config):
    padded = [chunk.size for chunk in plan.chunks]
    assert sum(padded) <= max([config.max_prefill_tokens, *padded[:1]]), "too much prefill"
    assert len({id(sequence) for sequence in plan.decodes}) == len(plan.decodes)
    assert len(plan.decodes) <= config.num_slots
    for chunk in plan.chunks:
        assert 1 <= chunk.length <= chunk.size
        assert chunk.start % config.prefill_chunks[-1] == 0, "edges must depend on the prompt only"
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
    left = [
        make_request(
            f"r{number}",
            [rng.randrange(50) for _ in range(rng.randint(1, 50))],
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
    assert world.scheduler.pool.num_free == num_pages
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


def test_an_empty_scheduler_plans_nothing():
    assert Scheduler(CONFIG).plan() == Plan((), (), (), (), {})


def test_overdue_lists_what_is_past_its_deadline():
    scheduler = Scheduler(CONFIG)
    late = scheduler.add(make_request("late", [1], deadline_s=5.0))
    scheduler.add(make_request("free", [1]))
    assert scheduler.overdue(4.9) == []
    assert scheduler.overdue(5.0) == [late]
