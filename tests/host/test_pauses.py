"""Long prompts give way to the requests before them, and to nobody else."""

import dataclasses

import pytest

from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.host.loop import Loop
from jaxinfer.host.request import JAXINFER_DEFAULTS, Request, SamplingParams
from jaxinfer.host.scheduler import Scheduler

CONFIG = EngineConfig(
    num_slots=4,
    max_seq_len=256,
    prefill_chunks=(8, 32),
    max_prefill_tokens=32,
    prefill_per_decode=8,
    attention_block=16,
    cache=CacheConfig(page_size=16),
)


def request(number, num_tokens, *, max_tokens=60):
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True).or_else(JAXINFER_DEFAULTS)
    return Request(f"r{number}", tuple(range(1000 * number, 1000 * number + num_tokens)), sampling)


def plans_of(config, requests, *, steps, late=()):
    """The chunk sizes and the orders that decode, step by step; `late` arrive after two steps."""
    scheduler, seen = Scheduler(config), []
    for one in requests:
        scheduler.add(one)

    def planned(plan):
        chunks = [(chunk.sequence.order, chunk.size) for chunk in plan.chunks]
        seen.append((chunks, [sequence.order for sequence in plan.decodes]))

    loop = Loop(
        scheduler,
        overlap=False,
        dispatch=lambda plan: None,
        read=lambda plan, handle: [[5] * len(plan.sampled)],
        take=lambda sampled: None,
        planned=planned,
    )
    for number in range(steps):
        for one in late if number == 2 else ():
            scheduler.add(one)
        loop.step()
    return seen


def test_a_long_prompt_behind_a_decode_runs_one_chunk_in_as_many_steps_as_pay_for_it():
    seen = plans_of(CONFIG, [request(0, 4)], steps=18, late=[request(1, 120)])
    at = [number for number, (chunks, _) in enumerate(seen) if (1, 32) in chunks]
    assert at == [2, 6, 10, 14]  # 32 tokens, 8 a step
    assert all(0 in decodes for _, decodes in seen), "the decode goes on in every step"
    assert 1 in seen[14][1], "its own decodes follow its last chunk"


def test_a_long_prompt_alone_or_first_in_line_never_waits():
    alone = plans_of(CONFIG, [request(0, 120)], steps=4)
    assert [chunks for chunks, _ in alone] == [[(0, 32)]] * 4
    priority = dataclasses.replace(request(1, 120), priority=-1)
    ahead = plans_of(CONFIG, [request(0, 4)], steps=6, late=[priority])
    first = [chunks for chunks, _ in ahead[2:]]
    assert first in ([[(1, 32)]] * 4, [[], [], [], []]) and first[0], "who ranks first gets on"


def test_short_prompts_are_never_held_up():
    late = [request(1, 120), request(2, 20), request(3, 30)]
    seen = plans_of(CONFIG, [request(0, 4)], steps=7, late=late)
    chunks = [chunks for chunks, _ in seen[2:]]
    assert chunks == [[(1, 32)], [(2, 32)], [(3, 32)], [], [(1, 32)]]


def test_without_a_bound_each_step_may_prefill():
    free = dataclasses.replace(CONFIG, prefill_per_decode=0)
    seen = plans_of(free, [request(0, 4)], steps=6, late=[request(1, 120)])
    assert [chunks for chunks, _ in seen[2:]] == [[(1, 32)]] * 4


def test_a_negative_bound_is_refused():
    with pytest.raises(ConfigError, match="prefill_per_decode is -1; it must be at least 0"):
        dataclasses.replace(CONFIG, prefill_per_decode=-1)
