"""A prefix that is being stored is waited for, where that saves more than a step."""

from dataclasses import replace

import pytest

from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.host.scenario import STEP, Event, Scenario
from jaxinfer.host.simulator import Simulation
from tests import tiny

CONFIG = EngineConfig(
    num_slots=4,
    max_seq_len=128,
    prefill_chunks=(8, 16),
    max_prefill_tokens=32,
    attention_block=16,
    cache=CacheConfig(page_size=4),
)
SHARED = tuple(range(48))


def chunks_of(config, prompts, *, salts=("", "")):
    """The sizes of all chunks of the first prompt, and of the second, which comes with it."""
    requests = tuple(
        replace(tiny.make_request(str(number), prompt, max_tokens=4), salt=salt)
        for number, (prompt, salt) in enumerate(zip(prompts, salts, strict=True))
    )
    simulation = Simulation(Scenario(config, requests))
    for number in range(len(requests)):
        simulation.apply(Event("submit", number))
    found: dict[int, list[int]] = {number: [] for number in range(len(requests))}
    while not simulation.is_empty:
        simulation.apply(STEP)
        plan = simulation.last_plan
        for chunk in plan.chunks if plan is not None else ():
            found[chunk.sequence.order].append(chunk.size)
    return found[0], found[1]


@pytest.mark.parametrize("overlap", [True, False])
def test_who_comes_with_another_prefills_only_what_is_its_own(overlap):
    prompts = ((*SHARED, 1), (*SHARED, 2))
    first, second = chunks_of(replace(CONFIG, overlap=overlap), prompts)
    assert sum(first) >= 49 and second == [8]


@pytest.mark.parametrize(
    ("changes", "prompts", "salts"),
    [
        ({"cache": CacheConfig(page_size=4, prefix=False)}, (SHARED, SHARED), ("", "")),
        ({}, (SHARED, SHARED), ("a", "b")),
        ({"max_prefill_tokens": 16}, ((7, 8), (7, 8)), ("", "")),
    ],
    ids=["no cache", "another tenant", "too short"],
)
def test_nobody_waits_for_what_it_can_not_have(changes, prompts, salts):
    first, second = chunks_of(replace(CONFIG, **changes), prompts, salts=salts)
    assert sum(first) == sum(second) >= len(prompts[1])
