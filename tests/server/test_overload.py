"""More than the engine can do: it stays at its best, the rest is told at once, and it recovers."""

import asyncio
import gc
import json
import subprocess
import sys

import grpc
import pytest
from google.rpc import error_details_pb2

from jaxinfer.errors import DeadlinePassed, NeverFits, QueueFull
from jaxinfer.host.request import Request, SamplingParams
from jaxinfer.server.line import Line
from jaxinfer.v1 import inference_pb2 as pb
from tests.server.apart import ROOT, SLOTS, Slots, apart
from tests.server.fake_engine import FakeEngine, FakeTokenizer
from tests.server.flood import Load, offered
from tests.server.serving import detail, refused, until, with_stub

STEP_S = 0.01
PEAK_PER_S = SLOTS / (8 * STEP_S)  # 100 requests a second of 8 tokens, if the machine keeps up
FACTORS = {"1x": 1.0, "2x": 2.0, "5x": 5.0, "10x": 10.0, "0.5x after": 0.5}
RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


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
    assert line.wait_s() == pytest.approx(20.0) and line.retry_after_s() == pytest.approx(10.0)
    line.leave("15")
    assert line.wait_s() == pytest.approx(19.0) and line.num_tokens == 190
    line.begin("15")  # it is gone: no news
    assert line.wait_s() == pytest.approx(19.0)
    assert Line().wait_s() == 0.0  # nothing is known yet


def test_what_comes_seldom_says_nothing_about_the_pace():
    clock = Clock()
    line = Line(clock=clock)
    for number in range(100):
        clock.now_s = float(number)
        line.enter(request(str(number)))
        clock.now_s += 0.1
        line.begin(str(number))
    for number in range(100, 120):
        line.enter(request(str(number)))
    assert line.wait_s() == 0.0
    for number in range(100, 110):
        line.begin(str(number))
        clock.now_s += 0.1
    assert line.wait_s() == pytest.approx(1.0)


def test_a_line_is_no_longer_than_its_wait_may_be():
    clock = Clock()
    line = Line(max_wait_s=8.0, clock=clock)
    for number in range(20):
        line.enter(request(str(number)))
    line.check(request("nothing is known yet"))
    for number in range(10):
        clock.now_s += 1.0
        line.begin(str(number))
    with pytest.raises(QueueFull, match=r"10 .* 10.0 s, .* 8 s \(server.max_wait_s") as caught:
        line.check(request("one more"))
    assert caught.value.retry_after_s == pytest.approx(5.0)
    for number in range(10, 13):
        line.begin(str(number))
    line.check(request("one more"))


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


def test_a_tenant_waits_for_its_own_line_and_its_turns():
    clock = Clock()
    line = Line(max_wait_s=8.0, clock=clock)
    for number in range(30):
        line.enter(request(str(number)), "big")
    for number in range(10):
        clock.now_s += 1.0
        line.begin(str(number))
    assert line.wait_s("big") == pytest.approx(20.0) and line.wait_s("small") == pytest.approx(1.0)
    with pytest.raises(QueueFull, match="20 requests wait"):
        line.check(request("late"), "big")
    line.check(request("first", deadline_s=clock.now_s + 2.0), "small")
    for number in range(3):
        line.enter(request(f"small {number}"), "small")
    assert line.wait_s("small") == pytest.approx(7.0)  # three of its own, four turns of the other
    for number in range(10, 30):
        line.leave(str(number))
    assert line.wait_s("small") == pytest.approx(3.0) and line.wait_s("big") == pytest.approx(1.0)


async def under(stub, seconds: float) -> dict[str, Load]:
    rates = {name: factor * PEAK_PER_S for name, factor in FACTORS.items()}
    return {name: await offered(stub, rate, seconds) for name, rate in rates.items()}


def check(loads: dict[str, Load]) -> None:
    for load in loads.values():
        assert set(load.codes) <= {"OK", "RESOURCE_EXHAUSTED"} and not load.num_without_delay
    assert loads["10x"].codes["RESOURCE_EXHAUSTED"] > loads["10x"].codes["OK"] > 0
    assert set(loads["0.5x after"].codes) == {"OK"}, "it is not normal again"


def test_overload_is_refused_with_a_delay_and_leaves_nothing_behind():
    async def body(stub, server):
        check(await under(stub, 0.6))
        assert server.server._hub.live == []

    with_stub(body, kind=Slots, step_s=STEP_S, max_live=2 * SLOTS)


def test_a_request_without_a_place_is_refused_before_it_is_tokenised(monkeypatch):
    async def body(stub, server):
        encoded = []

        def encode(self, text, **options):
            encoded.append(text)
            return [1]

        monkeypatch.setattr(FakeTokenizer, "encode", encode)
        first = asyncio.ensure_future(stub.Generate(asked("first")))
        await until(lambda: len(server.engine.submitted) == 1)
        error = await refused(stub.Generate(asked("second")), RESOURCE_EXHAUSTED)
        assert detail(error, error_details_pb2.RetryInfo).HasField("retry_delay")
        error = await refused(stub.Generate(asked("first")), grpc.StatusCode.ALREADY_EXISTS)
        server.engine.gate.set()
        answer = await first
        server.engine.max_live = 0
        assert (await stub.Generate(asked("first"))).output == answer.output  # needs no place
        assert encoded == ["first"] * 3

    def asked(name: str) -> pb.GenerateRequest:
        return pb.GenerateRequest(request_id=name, text=name, sampling={"seed": 1})

    class Shut(FakeEngine):
        def start(self, *args):
            self.gate.clear()
            super().start(*args)

    with_stub(body, kind=Shut, max_live=1)


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_a_refused_call_is_freed_without_the_collector(method):
    """gRPC counts what is not freed as open, and refuses by itself where that is too much."""

    def held() -> int:
        return sum(type(one).__name__ == "_ServicerContext" for one in gc.get_objects())

    async def body(stub, server):
        message = getattr(pb, f"{method}Request")(text="a")
        for _ in range(20):
            call = getattr(stub, method)(message)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (call if method == "Generate" else call.read())
            assert caught.value.code() is RESOURCE_EXHAUSTED
        await until(lambda: held() <= before)

    gc.collect()
    gc.disable()
    try:
        before = held()
        with_stub(body, max_live=0)
    finally:
        gc.enable()


@pytest.mark.full
def test_overload_at_length_keeps_its_goodput_and_its_memory():
    """Server and load each have a process; the bound of a refusal is one for busy machines."""
    rates = ",".join(str(factor * PEAK_PER_S) for factor in FACTORS.values())
    with apart(step_s=STEP_S, max_live=2 * SLOTS) as server:
        before_mb = server.rss_mb
        told = subprocess.run(
            [sys.executable, "-m", "tests.server.flood", server.target, "1", rates, "6", "8"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        grown_mb = server.rss_mb - before_mb
    lines = told.stdout.splitlines()
    loads = {name: Load(**json.loads(line)) for name, line in zip(FACTORS, lines, strict=True)}
    check(loads)
    peak = max(load.good_per_s for load in loads.values())
    for name, load in loads.items():
        print(
            f"{name}: {load.good_per_s:.0f}/s ({load.good_per_s / peak:.0%}), {load.codes}, "
            f"refused in {load.refusal_p50_s * 1e3:.1f} ms, p99 {load.refusal_p99_s * 1e3:.0f} ms, "
            f"answers p99 {load.answer_p99_s * 1e3:.0f} ms, late {load.lag_p99_s * 1e3:.0f} ms"
        )
    print(f"{grown_mb:+.1f} MiB")
    for name in ("2x", "5x", "10x"):
        assert loads[name].good_per_s >= 0.9 * peak, f"{name}: {loads[name]}"
        assert loads[name].refusal_p99_s <= 1.0
    assert grown_mb < 32
