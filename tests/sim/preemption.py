"""Overload: more requests than pages, and what is computed twice because of it."""

import random
from collections import Counter
from typing import NamedTuple

from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.host.draft import Draft
from jaxinfer.host.loop import Loop
from jaxinfer.host.plan import Plan
from jaxinfer.host.scheduler import Scheduler
from tests.sim.universes import request

NUM_REQUESTS = 14


class Lost(NamedTuple):
    """Tokens that were prefilled beyond the prompts, and preemptions."""

    num_tokens: int
    num_preemptions: int
    most_of_one: int


def run(seed: int, *, prefix: bool, at_once: bool) -> Lost:
    """One overload; the requests come all at once, or over the first 120 steps."""
    rng = random.Random(seed)
    scheduler = Scheduler(
        EngineConfig(
            num_slots=8,
            max_seq_len=128,
            prefill_chunks=(8, 16),
            max_prefill_tokens=32,
            attention_block=8,
            cache=CacheConfig(page_size=8, num_pages=rng.choice([20, 28, 40]), prefix=prefix),
        )
    )
    lengths, answers = ([4, 10, 30, 60], [4, 20, 60]) if at_once else ([4, 10, 30, 100], [10, 25])
    line = sorted(0 if at_once else rng.randrange(120) for _ in range(NUM_REQUESTS))
    plans: list[Plan] = []

    loop = Loop(
        scheduler,
        overlap=True,
        dispatch=lambda plan: None,
        read=lambda plan, handle: [[7] * len(plan.sampled)],
        take=lambda sampled: None,
        planned=plans.append,
    )
    num_steps = num_prompts = 0
    while scheduler.running or scheduler.waiting or line:
        while line and line[0] <= num_steps:
            line.pop(0)
            prompt = tuple(rng.choices(range(50), k=rng.choice(lengths)))
            num_prompts += len(prompt)
            scheduler.add(request(scheduler.num_arrived, prompt, rng.choice(answers)))
        loop.step()
        num_steps += 1
    num_prefilled = sum(chunk.length for plan in plans for chunk in plan.chunks)
    times = Counter(sequence.order for plan in plans for sequence in plan.preempt)
    assert scheduler.num_preemptions == times.total()
    return Lost(num_prefilled - num_prompts, times.total(), max(times.values(), default=0))


def last_in_line(draft: Draft, victims, num_missing) -> object:
    """The policy to compare with."""
    return max(victims, key=lambda one: one.rank)
