"""The watch: progress counts, idle time never does, and health follows within its limit."""

import asyncio
import logging
import random
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxinfer.edge_config import ServerConfig
from jaxinfer.runner import Pulse
from jaxinfer.server import service
from jaxinfer.server.watch import LOOK_S, MAX_GAP_S, Watch
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import inference_pb2_grpc
from tests.server.fake_engine import MODEL
from tests.server.serving import running, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def watch(limit_s: float) -> tuple[Watch, Clock]:
    clock = Clock()
    return Watch(limit_s, clock=clock), clock


def test_work_without_progress_is_a_stall_once_the_limit_has_passed():
    one, clock = watch(5.0)
    changes = []
    for look in range(80):
        if one.look(Pulse(7, True)):
            changes.append(look * LOOK_S)
        clock.now_s += LOOK_S
    assert one.is_stalled
    assert len(changes) == 1 and 5.0 < changes[0] <= 5.0 + 2 * LOOK_S + 1e-9
    assert one.look(Pulse(8, True))
    assert not one.is_stalled and one.stalled_s == 0.0


@pytest.mark.parametrize("hours", [2, pytest.param(48, marks=pytest.mark.full)])
def test_no_false_alarm_under_any_load(hours):
    """Steps as long as the limit allows, idle hours, and bursts."""
    rng = random.Random(0)
    one, clock = watch(30.0)
    steps, has_work, until_s = 0, False, 0.0
    while clock.now_s < 100.0 + 3600 * hours:
        if clock.now_s >= until_s:
            steps += has_work
            has_work = rng.random() < 0.7
            longest_s = 29.5 if has_work else 3600.0
            until_s = clock.now_s + rng.choice([0.01, 1.0, longest_s])
        assert not one.look(Pulse(steps, has_work)), clock.now_s
        clock.now_s += LOOK_S


def test_a_limit_of_zero_is_none():
    one, clock = watch(0.0)
    for _ in range(100):
        assert not one.look(Pulse(0, True))
        clock.now_s += 1000.0
    assert one.stalled_s > 0.0


def test_time_in_which_nobody_looked_does_not_count():
    """A process that was stopped for an hour, in the middle of a step, is not stalled."""
    one, clock = watch(5.0)
    one.look(Pulse(3, True))
    clock.now_s += 3600.0
    assert not one.look(Pulse(3, True))
    assert one.stalled_s == MAX_GAP_S


def test_work_that_has_just_begun_starts_from_nothing():
    one, clock = watch(5.0)
    one.look(Pulse(3, False))
    clock.now_s += 0.9
    one.look(Pulse(3, True))
    assert one.stalled_s == 0.0


@pytest.mark.parametrize("limit_s", [0.3])
def test_health_says_so_within_the_limit_and_a_second_and_takes_it_back(caplog, limit_s):
    async def body():
        config = ServerConfig(port=0, stall_limit_s=limit_s)
        async with (
            running(config=config, step_s=0.005) as server,
            grpc.aio.insecure_channel(server.target) as wire,
        ):
            seen = []

            async def follow(name: str) -> None:
                ask = health_pb2.HealthCheckRequest(service=name)
                async for reply in health_pb2_grpc.HealthStub(wire).Watch(ask):
                    seen.append((name, reply.status, time.monotonic()))

            names = (MODEL, service.NAMES[0], "")
            followers = [asyncio.create_task(follow(name)) for name in names]
            await until(lambda: len(seen) == 3)
            await asyncio.sleep(2 * limit_s)  # idle is no stall
            stub = inference_pb2_grpc.InferenceServiceStub(wire)
            ask = pb.GenerateRequest(request_id="slow", text="a", stopping={"max_tokens": 60})
            answer = asyncio.ensure_future(stub.Generate(ask))
            await until(lambda: server.engine.num_deliveries > 3)
            assert len(seen) == 3
            server.engine.gate.clear()
            stalled_s = time.monotonic()
            await until(lambda: len(seen) == 5)
            server.engine.gate.set()
            opened_s = time.monotonic()
            await until(lambda: len(seen) == 7)
            await answer
            for follower in followers:
                follower.cancel()
            assert {one[:2] for one in seen[:3]} == {(name, SERVING) for name in names}
            assert {one[:2] for one in seen[3:5]} == {(name, NOT_SERVING) for name in names[:2]}
            assert {one[:2] for one in seen[5:]} == {(name, SERVING) for name in names[:2]}
            assert all(limit_s < at - stalled_s + 0.1 < limit_s + 1.1 for _, _, at in seen[3:5])
            assert all(at - opened_s < 1.0 for _, _, at in seen[5:])

    with caplog.at_level(logging.WARNING, logger="jaxinfer.server"):
        asyncio.run(body())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "no step has ended" in said[0] and "1 running" in said[0] and "slow" in said[0]
    assert "SERVING again" in said[1]


def test_slow_answers_with_progress_are_never_a_stall():
    async def body():
        config = ServerConfig(port=0, stall_limit_s=0.3)
        async with (
            running(config=config, step_s=0.1) as server,
            grpc.aio.insecure_channel(server.target) as wire,
        ):
            seen = []

            async def follow() -> None:
                ask = health_pb2.HealthCheckRequest(service=MODEL)
                async for reply in health_pb2_grpc.HealthStub(wire).Watch(ask):
                    seen.append(reply.status)

            follower = asyncio.create_task(follow())
            stub = inference_pb2_grpc.InferenceServiceStub(wire)
            asks = [pb.GenerateRequest(text=f"{n}", stopping={"max_tokens": 12}) for n in range(40)]
            await asyncio.gather(*(stub.Generate(ask) for ask in asks))
            follower.cancel()
            assert seen == [SERVING]

    asyncio.run(body())


def test_a_watcher_that_reads_nothing_delays_nobody():
    """Health never waits for those who watch it, and says the newest status when they read."""

    async def body():
        async with running() as server, grpc.aio.insecure_channel(server.target) as wire:
            stub = health_pb2_grpc.HealthStub(wire)
            ask = health_pb2.HealthCheckRequest(service=MODEL)
            deaf = [stub.Watch(ask) for _ in range(50)]
            await asyncio.gather(*(call.read() for call in deaf))
            for number in range(2000):
                await server.server.set_serving(bool(number % 2))
                if number % 100 == 0:
                    await asyncio.sleep(0)
            await server.server.set_serving(False)
            assert (await stub.Check(ask)).status == NOT_SERVING
            for call in deaf:
                newest = await call.read()
                while newest.status != NOT_SERVING:
                    newest = await call.read()

    asyncio.run(body())
