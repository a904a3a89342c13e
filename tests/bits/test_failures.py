"""A step that fails at any point costs nobody a bit; a row of NaN ends alone."""

import random
from collections.abc import Iterator

import pytest

from jaxinfer.engine import Engine
from jaxinfer.host.request import FinishReason, Request
from jaxinfer.host.sequence import Sequence
from tests.bits import world
from tests.bits.world import Answer, Faults, Kind

NUM_STEPS = 200
REQUESTS = world.make_requests(48, seed=9)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return world.shared_engine(Kind(request.param))


@pytest.fixture(scope="module")
def expected(engine: Engine) -> dict[str, Answer]:
    return {one.request_id: world.alone(engine, one) for one in REQUESTS}


def arrivals() -> Iterator[list[Request]]:
    """One request every fourth step."""
    for one in REQUESTS:
        yield from ([one], [], [], [])


EVERY_20TH = [(place, ("dispatch", "read")[place // 20 % 2]) for place in range(0, NUM_STEPS, 20)]
EVERY_ONE = [(place, phase) for place in range(NUM_STEPS) for phase in ("dispatch", "read")]


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(EVERY_20TH, id="every 20th"),
        pytest.param(EVERY_ONE, id="every one", marks=pytest.mark.full),
    ],
)
def test_a_failure_at_any_step_changes_no_bit(
    engine: Engine, expected: dict[str, Answer], wanted: list[tuple[int, str]]
) -> None:
    differing = 0
    with Faults(engine) as faults:
        for place, phase in wanted:
            engine.flush_prefix_cache()
            before = world.counts(engine)
            failed_before = faults.num_failed

            def plant(step: int, place: int = place, phase: str = phase) -> None:
                if step == place:
                    faults.plant(phase)

            answers = world.drive(engine, arrivals(), plant)
            seen = world.counts(engine) - before
            assert seen["steps"] >= NUM_STEPS
            assert seen["recoveries"] == faults.num_failed - failed_before == 1, (place, phase)
            assert list(sorted(answers)) == sorted(expected)
            assert {one.reason for one in answers.values()} == {FinishReason.LENGTH}
            differing += sum(
                world.differing_bits(answers[name], expected[name]) for name in expected
            )
    assert differing == 0


def test_a_row_of_nan_ends_alone_and_leaves_nothing_behind(
    engine: Engine, expected: dict[str, Answer]
) -> None:
    rng, spoiled = random.Random(3), {}

    def spoil(step: int) -> None:
        """NaN in the page that a sequence is writing, which nobody else can know."""
        scheduler = engine._scheduler
        free_to_spoil = [one for one in scheduler.running if _private_page(engine, one) is not None]
        if step % 12 == 5 and free_to_spoil:
            victim = rng.choice(free_to_spoil)
            page = _private_page(engine, victim)
            assert page is not None
            world.poison(engine, [page])
            spoiled[victim.request.request_id] = victim

    engine.flush_prefix_cache()
    answers = world.drive(engine, arrivals(), spoil)
    failed = {name for name, one in answers.items() if one.reason is FinishReason.ERROR}
    assert len(failed) >= 5
    assert failed <= set(spoiled)
    for name in set(spoiled) - failed:
        assert spoiled[name].num_preemptions or _ended_at_once(answers[name], expected[name])
    for name in failed:
        size = len(answers[name].tokens)
        assert answers[name].tokens == expected[name].tokens[:size]
        assert answers[name].logprobs == expected[name].logprobs[:size]
    rest = set(expected) - failed
    assert sum(world.differing_bits(answers[name], expected[name]) for name in rest) == 0
    again = asked_again(engine)
    assert sum(world.differing_bits(again[name], expected[name]) for name in expected) == 0


def asked_again(engine: Engine) -> dict[str, Answer]:
    """The same requests over whatever the prefix cache has kept."""
    before = world.counts(engine)["cached_tokens"]
    answers = world.drive(engine, arrivals())
    assert world.counts(engine)["cached_tokens"] > before
    return answers


def _private_page(engine: Engine, sequence: Sequence) -> int | None:
    """The page that holds the last stored token, where it is the sequence's own and unknown."""
    place = (sequence.num_stored - 1) // engine.config.cache.page_size
    if not 0 <= place < len(sequence.pages):
        return None
    page = sequence.pages[place]
    is_shared = engine._scheduler.pool.num_owners(page) > 1
    return None if is_shared or page in engine._scheduler.prefix.pages else page


def _ended_at_once(answer: Answer, expected: Answer) -> bool:
    """Whether the spoiled page was not read any more: all tokens were sampled already."""
    return answer == expected
