"""More than the engine can do: it stays at its best, the rest is told at once, and it recovers."""

import asyncio
import time
from collections import Counter
from typing import NamedTuple

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2

from jaxinfer.errors import DeadlinePassed, NeverFits, QueueFull
from jaxinfer.host.request import Request, SamplingParams
from jaxinfer.server.line import Line
from jaxinfer.v1 import inference_pb2 as pb
from tests.server.fake_engine import FakeEngine
from tests.server.serving import detail, with_stub

TOKENS = 8
SLOTS = 8
STEP_S = 0.01
PEAK_PER_S = SLOTS / (TOKENS * STEP_S)  # 100 requests a second, if the machine keeps up


def request(name: str, size: int = 10, deadline_s: float | None = None) -> Request:
    return Request(name, (1,) * size, SamplingParams(), deadline_s=deadline_s)


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def paced(num_waiting: int) -> tuple[Line, Clock]:
    """A line of which one request begins each second, and that has so many left."""
    clock = Clock()
    line = Line(clock=clock)
    for number in range(10 + num_waiting):
        line.enter(request(str(number)))
    for number in range(10):
        clock.now_s = float(number)
        line.begin(str(number))
    return line, clock


def test_the_wait_is_predicted_from_the_pace_of_those_before():
    line, _ = paced(20)
    assert line.wait_s == pytest.approx(20.0) and line.retry_after_s == pytest.approx(10.0)
    line.leave("15")
    assert line.wait_s == pytest.approx(19.0) and line.num_tokens == 190
    line.begin("15")  # it is gone: no news
    assert line.wait_s == pytest.approx(19.0)
    assert Line().wait_s == 0.0  # nothing is known yet


def test_a_deadline_that_can_not_be_met_is_refused_before_it_waits():
    line, clock = paced(20)
    line.check(request("late", deadline_s=clock.now_s + 10.5))  # at twice the pace it can
    with pytest.raises(DeadlinePassed, match="20 requests wait"):
        line.check(request("late", deadline_s=clock.now_s + 9.5))


def test_waiting_tokens_are_bounded():
    line = Line(25, clock=lambda: 0.0)
    line.enter(request("a", 10))
    line.enter(request("b", 10))
    with pytest.raises(QueueFull, match="20 prompt tokens wait") as caught:
        line.check(request("c", 10))
    assert 0 < caught.value.retry_after_s < 60
    line.check(request("c", 5))
    with pytest.raises(NeverFits, match="max_waiting_tokens"):
        line.check(request("c", 26))
    line.begin("a")
    line.check(request("c", 10))


class Load(NamedTuple):
    """What an open-loop load got."""

    good_per_s: float
    codes: Counter
    slowest_refusal_s: float


async def offered(stub, per_s: float, seconds: float) -> Load:
    """Requests at a fixed rate, whatever becomes of them."""
    codes: Counter = Counter()
    refusals: list[float] = []

    async def one() -> None:
        began_s = time.perf_counter()
        try:
            await stub.Generate(pb.GenerateRequest(text="a", stopping={"max_tokens": TOKENS}))
            codes["OK"] += 1
        except grpc.aio.AioRpcError as error:
            codes[error.code().name] += 1
            refusals.append(time.perf_counter() - began_s)
            assert detail(error, error_details_pb2.RetryInfo).HasField("retry_delay")

    tasks, start_s = [], time.perf_counter()
    for number in range(int(per_s * seconds)):
        await asyncio.sleep(max(0.0, start_s + number / per_s - time.perf_counter()))
        tasks.append(asyncio.ensure_future(one()))
    await asyncio.gather(*tasks)
    took_s = time.perf_counter() - start_s
    refusals.sort()
    p99_s = refusals[int(len(refusals) * 0.99)] if refusals else 0.0
    return Load(codes["OK"] / took_s, codes, p99_s)


class Slots(FakeEngine):
    """A fake engine with so many slots; the others wait, and the line is bounded."""

    def _advance(self, sequence):
        first = list(self._live.values())[:SLOTS]
        if sequence in first or sequence.is_cancelled:
            return super()._advance(sequence)
        return None


async def under(stub, server, seconds: float) -> list[tuple[str, Load]]:
    found = [("1x", await offered(stub, PEAK_PER_S, seconds))]
    for factor in (2, 5, 10):
        found.append((f"{factor}x", await offered(stub, PEAK_PER_S * factor, seconds)))
    found.append(("0.5x after", await offered(stub, PEAK_PER_S / 2, seconds)))
    for name, load in found:
        print(f"{name}: {load.good_per_s:.0f}/s, {dict(load.codes)}, {load.slowest_refusal_s:.3f}")
    return found


def check(found: list[tuple[str, Load]]) -> None:
    for _, load in found:
        assert set(load.codes) <= {"OK", "RESOURCE_EXHAUSTED"}
    loads = dict(found)
    assert loads["10x"].codes["RESOURCE_EXHAUSTED"] > loads["10x"].codes["OK"] > 0
    assert set(loads["0.5x after"].codes) == {"OK"}, "it is not normal again"


def test_overload_is_refused_with_a_delay_and_leaves_nothing_behind():
    async def body(stub, server):
        check(await under(stub, server, 0.6))
        assert server.server._hub.live == []

    with_stub(body, kind=Slots, step_s=STEP_S, max_live=2 * SLOTS)


@pytest.mark.full
def test_overload_at_length_keeps_its_goodput_and_its_memory():
    async def body(stub, server):
        before = psutil.Process().memory_info().rss
        found = await under(stub, server, 6.0)
        check(found)
        peak = max(load.good_per_s for name, load in found if name != "0.5x after")
        grown = (psutil.Process().memory_info().rss - before) / 2**20
        shares = {name: round(load.good_per_s / peak, 2) for name, load in found}
        print(f"of the peak: {shares}; {grown:+.1f} MiB")
        assert grown < 32

    with_stub(body, kind=Slots, step_s=STEP_S, max_live=2 * SLOTS)
