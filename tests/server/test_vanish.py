"""Clients that vanish in the middle of a stream: what they held is free right after."""

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys

import grpc
import psutil
import pytest

from jaxinfer.edge_config import ServerConfig
from jaxinfer.engine import Engine
from jaxinfer.host.request import JAXINFER_DEFAULTS, Request
from jaxinfer.runner import EngineThread
from jaxinfer.server.app import Server
from jaxinfer.server.served import ServedModel
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import inference_pb2_grpc
from tests import tiny
from tests.server.fake_engine import FakeTokenizer, expected_text
from tests.server.serving import until, with_stub

STEPS_UNTIL_FREE = 1  # of those that begin after the news
WAYS = ("reset", "half-close", "goodbye", "cancel", "closed channel")
PATH = b"/jaxinfer.v1.InferenceService/GenerateStream"


def frame(kind: int, flags: int, stream: int, data: bytes = b"") -> bytes:
    """One frame of HTTP/2."""
    return len(data).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + data


def header(name: bytes, value: bytes) -> bytes:
    """One header of HPACK, literal, without indexing and without Huffman."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def opening(message: bytes) -> bytes:
    """Everything that a client says to ask for one stream."""
    names = {b":method": b"POST", b":scheme": b"http", b":path": PATH, b":authority": b"x"}
    names |= {b"content-type": b"application/grpc", b"te": b"trailers"}
    block = b"".join(header(name, value) for name, value in names.items())
    body = b"\0" + len(message).to_bytes(4, "big") + message
    start = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)
    return start + frame(1, 4, 1, block) + frame(0, 1, 1, body)


def message(number: int) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(
        text="a", request_id=f"gone {number}", stopping={"max_tokens": 500}
    )


async def raw(target: str, number: int, way: str, go: asyncio.Event) -> None:
    """A stream over a plain socket, left without a word, or with the wrong one."""
    host, _, port = target.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(opening(message(number).SerializeToString()))
    assert await reader.read(4096)
    await go.wait()
    plain = writer.get_extra_info("socket")
    match way:
        case "reset":  # no FIN: what is under way is lost, as when a machine dies
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        case "half-close":
            writer.write_eof()
            await asyncio.sleep(0.2)
            writer.close()
        case _:
            writer.write(frame(7, 0, 0, bytes(8)))
            writer.close()


async def by_grpc(target: str, number: int, way: str, go: asyncio.Event) -> None:
    """A stream of a real client that cancels it, or closes its channel under it."""
    async with grpc.aio.insecure_channel(target) as wire:
        call = inference_pb2_grpc.InferenceServiceStub(wire).GenerateStream(message(number))
        await call.read()
        await go.wait()
        if way == "cancel":
            call.cancel()


async def vanish(stub, server, count: int, at_once: int = 60) -> None:
    """So many come and vanish in every way; a bystander's text is what it always is."""
    engine, hub = server.engine, server.server._hub
    for start in range(0, count, at_once):
        bystander = asyncio.ensure_future(
            stub.Generate(
                pb.GenerateRequest(text="by", sampling={"seed": 0}, stopping={"max_tokens": 9})
            )
        )
        go, numbers = asyncio.Event(), range(start, min(count, start + at_once))
        clients = [
            asyncio.ensure_future(
                (raw if number % 5 < 3 else by_grpc)(server.target, number, WAYS[number % 5], go)
            )
            for number in numbers
        ]
        wanted = {f"gone {number}" for number in numbers}
        await until(lambda wanted=wanted: wanted <= set(hub.live), 30.0)
        go.set()
        await asyncio.gather(*clients)
        await until(lambda: hub.live == [], 30.0)
        assert (await bystander).output.text == expected_text("by", 9, seed=0)
    assert sorted(engine.cancelled) == sorted(f"gone {number}" for number in range(count))
    assert engine._live == {} and len(hub.line._waiting) == hub.line.num_tokens == 0
    slowest = max(engine.steps_after_cancel.values())
    assert slowest <= STEPS_UNTIL_FREE, f"{slowest} steps between a cancel and its end"


def test_sixty_clients_vanish_and_all_is_free_in_the_next_step():
    with_stub(lambda stub, server: vanish(stub, server, 60), step_s=0.01)


@pytest.mark.full
def test_a_thousand_clients_vanish():
    with_stub(lambda stub, server: vanish(stub, server, 1000), step_s=0.01)


class Counting(Engine):
    """Knows which of its steps had begun when a request's slot and pages were free."""

    num_begun = 0

    def __init__(self, *arguments, **options) -> None:
        self.freed_at: dict[str, int] = {}
        super().__init__(*arguments, **options)

    def step(self, **options):
        self.num_begun += 1
        return super().step(**options)

    def cancel(self, request_id: str) -> None:
        super().cancel(request_id)
        held = [*self._scheduler.running, *self._scheduler.waiting]
        assert request_id not in {one.request.request_id for one in held}
        self.check_integrity()
        self.freed_at[request_id] = self.num_begun


class Told(EngineThread):
    """Knows which steps had begun when the news of a leaver came."""

    def __init__(self, engine: Counting, deliver) -> None:
        super().__init__(engine, deliver)
        self.counting = engine
        self.told_at: dict[str, int] = {}
        self.seen: set[str] = set()

    def submit(self, request: Request) -> None:
        super().submit(request)
        self.seen.add(request.request_id)

    def cancel(self, request_id: str) -> None:
        self.told_at[request_id] = self.counting.num_begun
        super().cancel(request_id)


async def vanish_from_the_real_engine(engine: Counting, count: int, at_once: int = 60) -> None:
    """So many come and vanish, most of them in line and 8 with slots and pages."""
    threads: list[Told] = []

    def make_engine(deliver) -> Told:
        threads.append(Told(engine, deliver))
        return threads[0]

    served = ServedModel("tiny", tiny.MODEL, FakeTokenizer(), engine.limits, JAXINFER_DEFAULTS)
    server = Server(served, make_engine, ServerConfig(port=0))
    target = f"127.0.0.1:{await server.start()}"
    try:
        for start in range(0, count, at_once):
            go, numbers = asyncio.Event(), range(start, min(count, start + at_once))
            clients = [
                asyncio.ensure_future(
                    (raw if number % 5 < 3 else by_grpc)(target, number, WAYS[number % 5], go)
                )
                for number in numbers
            ]
            wanted = {f"gone {number}" for number in numbers}
            await until(lambda wanted=wanted: wanted <= threads[0].seen, 60.0)
            go.set()
            await asyncio.gather(*clients)
            await until(lambda: server._hub.live == [], 60.0)
            stats = engine.stats()
            assert (stats.num_running, stats.num_waiting) == (0, 0)
            assert stats.num_free_pages == stats.num_pages
    finally:
        await server.stop(1.0)
    told, freed = threads[0].told_at, engine.freed_at
    assert told.keys() == freed.keys() and len(told) >= count // 2
    steps = [freed[name] - told[name] for name in told]
    print(f"{len(told)} of {count} vanished before their end; steps until free: {max(steps)}")
    assert max(steps) <= STEPS_UNTIL_FREE


def counting_engine() -> Counting:
    """Of the tiny model, whose answers end after some 250 tokens."""
    config = tiny.engine_config()
    return Counting(tiny.params(), tiny.MODEL, tiny.TokenText(), config, store=tiny.store())


def test_slots_and_pages_of_the_real_engine_are_free_before_the_next_step_but_one():
    asyncio.run(vanish_from_the_real_engine(counting_engine(), 60))


@pytest.mark.full
def test_a_thousand_clients_vanish_from_the_real_engine():
    asyncio.run(vanish_from_the_real_engine(counting_engine(), 1000))


VICTIM = """
import sys, threading
from jaxinfer.client import Client
client = Client(sys.argv[1])
for _ in range(9):
    threading.Thread(target=lambda: list(client.stream("a", max_tokens=500))).start()
"""


def test_the_streams_of_a_killed_process_are_free():
    async def body(stub, server):
        victim = subprocess.Popen([sys.executable, "-c", VICTIM, server.target])
        await until(lambda: len(server.server._hub.live) == 9, 30.0)
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
        await until(lambda: server.server._hub.live == [])
        assert len(server.engine.cancelled) == 9 and server.engine._live == {}
        assert max(server.engine.steps_after_cancel.values()) <= STEPS_UNTIL_FREE

    with_stub(body, step_s=0.01)


@pytest.mark.full
def test_twenty_thousand_cancels_leave_no_memory_behind():
    async def cancelled(stub) -> None:
        call = stub.GenerateStream(pb.GenerateStreamRequest(text="a", stopping={"max_tokens": 500}))
        await call.read()
        call.cancel()

    async def body(stub, server):
        sizes = []
        for number in range(440):
            await asyncio.gather(*(cancelled(stub) for _ in range(50)))
            await until(lambda: server.server._hub.live == [], 30.0)
            server.engine.cancelled.clear()
            server.engine.submitted.clear()
            server.engine.steps_after_cancel.clear()
            if number in (39, 439):
                sizes.append(psutil.Process().memory_info().rss)
        grown = (sizes[1] - sizes[0]) / 2**20
        print(f"20,000 cancels: {grown:+.1f} MiB")
        assert grown <= 5

    with_stub(body, step_s=0.001)
