"""New connections while calls come in that say nothing, and who is connected already."""

import asyncio
import contextvars
import socket
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxinfer.server import turnstile
from jaxinfer.server.status import SAID
from jaxinfer.server.turnstile import CLOSE_AT, FADE_S, HOLD_S, Turnstile, slow_connections
from jaxinfer.v1 import model_pb2, model_pb2_grpc
from tests.server.serving import with_stub

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the filter is Linux's")


class World:
    """A turnstile, its clock, and what it has told the kernel."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.told: list[bool] = []
        self.turnstile = Turnstile(self.told.append, clock=lambda: self.now_s)

    async def call(self, *, speaks: bool) -> None:
        async def handle(details: object) -> object:
            if speaks:
                SAID.get()()
            return details

        task = self.turnstile.intercept_service(handle, "details")
        assert await asyncio.create_task(task, context=contextvars.copy_context()) == "details"

    async def looked(self) -> None:
        """Returns after the next look at the level."""
        await asyncio.sleep(3 * turnstile.LOOK_S)


@pytest.fixture
def world(monkeypatch) -> World:
    monkeypatch.setattr(turnstile, "LOOK_S", 0.005)
    return World()


def test_calls_that_speak_slow_nobody_however_many(world):
    async def body() -> None:
        for _ in range(10 * int(CLOSE_AT)):
            await world.call(speaks=True)

    asyncio.run(body())
    assert world.told == []


def test_silent_calls_now_and_then_slow_nobody(world):
    async def body() -> None:
        for _ in range(4 * int(CLOSE_AT)):
            await world.call(speaks=False)
            world.now_s += 2 * FADE_S / CLOSE_AT

    asyncio.run(body())
    assert world.told == []


def test_a_flood_of_silent_calls_slows_connections_until_it_is_over(world):
    async def body() -> None:
        for _ in range(2 * int(CLOSE_AT)):
            await world.call(speaks=False)
        assert world.told == [True]
        world.now_s += 0.9 * HOLD_S
        await world.looked()
        assert world.told == [True] and world.turnstile.is_slowing
        world.now_s += 0.2 * HOLD_S
        await world.looked()
        assert world.told == [True, False] and not world.turnstile.is_slowing

    asyncio.run(body())


def test_a_flood_that_goes_on_keeps_connections_slow(world):
    async def body() -> None:
        for _ in range(10):
            for _ in range(2 * int(CLOSE_AT)):
                await world.call(speaks=False)
            world.now_s += 0.5 * HOLD_S
            await world.looked()
        assert world.told == [True]
        world.turnstile.close()
        assert world.told == [True, False]
        await world.looked()
        world.turnstile.close()
        assert world.told == [True, False]

    asyncio.run(body())


def num_connected(listener: socket.socket, tries: int) -> int:
    found = 0
    for _ in range(tries):
        with socket.socket() as client:
            client.settimeout(0.02)
            try:
                client.connect(listener.getsockname())
            except TimeoutError:
                continue
            listener.accept()[0].close()
            found += 1
    return found


@on_linux
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_most_new_connections_wait_and_those_there_go_on(host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener, socket.socket(family) as other:
        for one in (listener, other):
            try:
                one.bind((host, 0))
            except OSError:
                pytest.skip(f"no {host} on this machine")
            one.listen(64)
        port = listener.getsockname()[1]
        with socket.create_connection((host, port)) as before:
            accepted, _ = listener.accept()
            with accepted:
                assert slow_connections(port, is_slow=True) == 1
                if family == socket.AF_INET:
                    assert num_connected(listener, 64) < 32 and num_connected(other, 8) == 8
                before.sendall(b"still there")
                assert accepted.recv(64) == b"still there"
                accepted.sendall(b"heard")
                assert before.recv(64) == b"heard"
        assert slow_connections(port, is_slow=False) == 1
        with socket.create_connection((host, port), timeout=10.0):
            listener.accept()[0].close()
    assert slow_connections(port, is_slow=True) == 0


@on_linux
def test_what_was_told_to_a_port_holds_it_no_longer_than_its_owner():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = listener.getsockname()
        slow_connections(address[1], is_slow=True)
    with socket.socket() as again:
        again.bind(address)
        again.listen()
        assert num_connected(again, 8) == 8


def test_calls_that_ask_little_leave_new_connections_as_they_are():
    async def body(stub, server):
        async with grpc.aio.insecure_channel(server.target) as wire:
            health = health_pb2_grpc.HealthStub(wire)
            models = model_pb2_grpc.ModelServiceStub(wire)
            for _ in range(3 * int(CLOSE_AT)):
                await health.Check(health_pb2.HealthCheckRequest())
                await models.ListModels(model_pb2.ListModelsRequest())
                watch = health.Watch(health_pb2.HealthCheckRequest())
                await watch.read()
                watch.cancel()
                assert server.server._turnstile._level <= 2

    with_stub(body)
