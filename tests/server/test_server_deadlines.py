"""Random deadlines through the real server and the real engine: nothing is computed after one."""

import asyncio
import collections
import random

import pytest

from jaxinfer.engine import Engine
from jaxinfer.errors import DeadlinePassed
from jaxinfer.host.plan import Plan
from tests import tiny
from tests.server.real import serve

PROMPTS = [[3 + number, 5, 7] * (1 + number % 5) for number in range(20)]
NUM_TOKENS = 12
AT_ONCE = 100  # for 8 slots
LONGEST_S = 1.0  # of three in four deadlines
PLENTY_S = 120.0  # of the others


class Watched(Engine):
    """Counts what its steps do for requests whose deadline had passed when the step began."""

    def __init__(self, *arguments, **options) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self._began_s = 0.0
        super().__init__(*arguments, **options)

    def step(self, **options):
        self._began_s = self._clock()  # before the step looks for itself
        outputs = super().step(**options)
        for live in self._live.values():
            self.counts["outlived"] += self._is_late(live.request)
        return outputs

    def _planned(self, plan: Plan) -> None:
        taking_part = [*(chunk.sequence for chunk in plan.chunks), *plan.decodes]
        self.counts["planned"] += len(taking_part)
        for sequence in taking_part:
            self.counts["computed late"] += self._is_late(sequence.request)
        for sequence in self._scheduler.waiting:
            self.counts["late in line"] += self._is_late(sequence.request)
        super()._planned(plan)

    def _is_late(self, request) -> bool:
        return request.deadline_s is not None and request.deadline_s <= self._began_s


def run(count: int, *, seed: int) -> collections.Counter[str]:
    """So many requests, each with a deadline of its own; what the engine did, and what came."""
    config = tiny.engine_config()
    engine = Watched(tiny.params(), tiny.MODEL, tiny.TokenText(), config, store=tiny.store())
    asked = [
        tiny.make_request(f"r{number}", prompt, max_tokens=NUM_TOKENS)
        for number, prompt in enumerate(PROMPTS)
    ]
    answers = tiny.run(engine, asked)
    engine.counts.clear()
    rng = random.Random(seed)

    async def one(client, number: int, turn: asyncio.Semaphore) -> str:
        place = number % len(PROMPTS)
        timeout_s = rng.uniform(0.0, LONGEST_S) if number % 4 else PLENTY_S
        sampling = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        async with turn:
            try:
                found = await client.generate(
                    token_ids=PROMPTS[place], timeout_s=timeout_s, **sampling
                )
            except DeadlinePassed:
                return "deadline"
        assert tuple(found.token_ids) == answers[f"r{place}"].tokens
        return "whole"

    async def all_of_them(client) -> list[str]:
        turn = asyncio.Semaphore(AT_ONCE)
        return await asyncio.gather(*(one(client, number, turn) for number in range(count)))

    engine.counts.update(serve(engine, all_of_them))
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_pages == stats.num_pages
    return engine.counts


def check(count: int, *, seed: int) -> None:
    found = run(count, seed=seed)
    print(f"{count} deadlines: {dict(found)}")
    assert found["whole"] + found["deadline"] == count
    assert found["whole"] >= count // 4 and found["deadline"] >= count // 50
    assert found["planned"] > 0
    assert (found["computed late"], found["late in line"], found["outlived"]) == (0, 0, 0)


def test_nothing_is_computed_after_a_deadline_and_nothing_late_stays_in_line():
    check(500, seed=1)


@pytest.mark.full
def test_ten_thousand_deadlines():
    check(10_000, seed=2)
