"""Tokens and logprobs keep their bits whatever happens around a request: the tiny model."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from jaxinfer.engine import Engine
from jaxinfer.host.request import FinishReason, Request
from tests.bits import world
from tests.bits.world import Answer, Faults, Kind

# Distinct requests, and arrivals at each set-up and dtype.
FEWEST, FEW, MANY = (12, 30), (60, 125), (300, 1250)


def chaos(
    engine: Engine, requests: list[Request], expected: dict[str, Answer], *, count: int, seed: int
) -> Counter[str]:
    """Arrivals, cancels, flushes and failures at random; the differing bits and what happened."""
    rng, seen, before = random.Random(seed), Counter[str](), world.counts(engine)
    faults, order, live = Faults(engine), {}, []
    chunk = engine.config.prefill_chunks[-1]

    def arrive() -> list[Request]:
        new = []
        for _ in range(min(rng.choice((0, 0, 0, 1, 1, 2, 9)), count - len(order))):
            one = rng.choice(requests)
            name = f"{len(order)}/{one.request_id}"
            order[name] = one.request_id
            changes = {"use_prefix_cache": rng.random() < 0.8, "priority": rng.choice((0, 0, 1))}
            new.append(replace(one, request_id=name, **changes))
            seen["chunked"] += len(one.prompt) > chunk
        live.extend(one.request_id for one in new)
        return new

    def between(step: int) -> None:
        if live and rng.random() < 0.03:
            engine.cancel(live[-rng.randint(1, min(len(live), 20))])
        if rng.random() < 0.005:
            seen["flushed"] += engine.flush_prefix_cache() > 0
        if step % 60 == 59:
            faults.plant(rng.choice(("dispatch", "read")))

    def arrivals() -> Iterator[list[Request]]:
        while len(order) < count:
            yield arrive()

    with faults:
        answers = world.drive(engine, arrivals(), between)
    assert len(answers) == count
    for name, answer in answers.items():
        cancelled = answer.reason is FinishReason.CANCELLED
        seen["cancelled"] += cancelled
        assert cancelled or answer.reason is FinishReason.LENGTH
        seen["differing_bits"] += world.differing_bits(answer, expected[order[name]])
    seen.update(requests=count, failures=faults.num_failed)
    return seen + (world.counts(engine) - before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("size", "setups"),
    [
        pytest.param(FEW, (0, 1), id="few"),
        pytest.param(MANY, (0, 1, 2, 3), id="many", marks=pytest.mark.full),
    ],
)
def test_no_bit_differs_from_alone(
    dtype: str, size: tuple[int, int], setups: tuple[int, ...]
) -> None:
    check(Kind(dtype), size, setups)


@pytest.mark.parametrize(
    ("dtype", "size", "setups"),
    [
        pytest.param("bfloat16", FEWEST, (0,), id="few"),
        pytest.param("float32", MANY, (0, 1), id="many-float32", marks=pytest.mark.full),
        pytest.param("bfloat16", MANY, (0, 1), id="many-bfloat16", marks=pytest.mark.full),
    ],
)
def test_no_bit_differs_from_alone_with_int8_pages(
    dtype: str, size: tuple[int, int], setups: tuple[int, ...]
) -> None:
    check(Kind(dtype, pages="int8"), size, setups)


@pytest.mark.full  # in the first tier tests/kernels has an engine with each of them
@world.native_only
@pytest.mark.parametrize("kind", world.NATIVE_KINDS, ids=str)
def test_no_bit_differs_from_alone_with_native_kernels(kind: Kind) -> None:
    setups = world.SETUPS if kind.pages == "auto" else world.INT8_SETUPS
    check(kind, MANY, tuple(range(len(setups))))


def check(kind: Kind, size: tuple[int, int], setups: tuple[int, ...]) -> None:
    """Fails where an answer has other bits than alone, or where too little has happened."""
    num_distinct, num_arrivals = size
    requests = world.make_requests(num_distinct, seed=5)
    seen, expected = Counter[str](), {}
    for setup in setups:
        engine = world.shared_engine(kind, setup)
        if not expected:
            expected = {one.request_id: world.alone(engine, one) for one in requests}
        seen += chaos(engine, requests, expected, count=num_arrivals, seed=setup)
    print(kind, dict(seen))
    assert seen["differing_bits"] == 0, dict(seen)
    assert seen["compiles"] == 0
    assert seen["requests"] == num_arrivals * len(setups)
    for event, share in {
        "preemptions": 0.5,
        "cached_tokens": 5.0,
        "evicted_pages": 0.2,
        "chunked": 0.2,
        "cancelled": 0.02,
        "recoveries": 0.02,
    }.items():
        assert seen[event] >= share * seen["requests"], f"too few {event}: {dict(seen)}"
    assert seen["recoveries"] == seen["failures"]


def test_a_single_bit_is_counted() -> None:
    one = Answer((1, 2), (-0.5, -1.5))
    assert world.differing_bits(one, one) == 0
    assert world.differing_bits(one, Answer((1, 2), (-0.5, -1.5000001))) == 1
    assert world.differing_bits(one, Answer((1, 3), (-0.5, -1.5))) == 1
    assert world.differing_bits(Answer((1,), (-0.5,)), one) == 64
    assert world.differing_bits(one, Answer((1,), (-0.5,))) == 64
    assert world.differing_bits(Answer((1,), (-0.5,), FinishReason.CANCELLED), one) == 0


@pytest.mark.parametrize("pages", ["auto", "int8"])
def test_poison_would_be_seen(pages: str) -> None:
    engine = world.shared_engine(Kind("bfloat16", pages=pages))
    request = world.make_requests(1, seed=1)[0]

    def spoil(step: int) -> None:
        if step == 1:
            world.poison(engine, range(engine.config.num_pages))

    assert world.drive(engine, [[request]], spoil)["r0"].reason is FinishReason.ERROR
