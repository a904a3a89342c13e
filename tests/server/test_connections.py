"""What the options of the server's connections do, each tried over the wire."""

import asyncio
import time

import grpc
import pytest

from jaxinfer.edge_config import ServerConfig
from jaxinfer.server import app
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import inference_pb2_grpc
from tests.server import abuse
from tests.server.abuse import Wire
from tests.server.fake_engine import expected_text
from tests.server.serving import OWN, refused, until, with_stub

HELLO = pb.GenerateRequest(text="by", sampling={"seed": 0}, stopping={"max_tokens": 9})


def streaming(count: int) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(text="by", sampling={"seed": 0}, stopping={"max_tokens": count})


async def text_of(call) -> str:
    return "".join([event.delta.text async for event in call])


async def is_right(stub) -> bool:
    return (await stub.Generate(HELLO)).output.text == expected_text("by", 9, seed=0)


async def closed(wire: Wire) -> None:
    """Returns once the server has closed a connection."""
    await until(wire.is_closed, 10.0)
    wire.close()


async def told_to_leave(wire: Wire) -> bytes:
    """The last words of a GOAWAY, once it has come."""
    found: list[bytes] = []

    def has_come() -> bool:
        wire.is_closed()
        found[:] = [data[8:] for kind, data in wire.frames() if kind == abuse.GOAWAY]
        return bool(found)

    await until(has_come, 10.0)
    return found[-1]


async def connected(target: str, **options) -> Wire:
    return await asyncio.to_thread(Wire, target, **options)


def test_who_says_nothing_loses_the_connection(monkeypatch):
    monkeypatch.setattr(app, "HANDSHAKE_MS", 300)

    async def body(stub, server):
        silent = await connected(server.target, opening=b"")
        halting = await connected(server.target, opening=abuse.PREFACE[:7])
        polite = await connected(server.target)
        await closed(silent)
        await closed(halting)
        assert not polite.is_closed() and await is_right(stub)
        polite.close()

    with_stub(body)


def test_a_connection_without_calls_is_closed_and_one_with_a_call_is_not(monkeypatch):
    monkeypatch.setattr(app, "CONNECTION_IDLE_MS", 500)

    async def body(stub, server):
        running = asyncio.ensure_future(text_of(stub.GenerateStream(streaming(150))))
        idle = await connected(server.target)
        assert await told_to_leave(idle) == b"connection idle"
        await closed(idle)
        assert await running == expected_text("by", 150, seed=0)

    with_stub(body, step_s=0.01)


def test_an_old_connection_ends_after_its_calls_and_nobody_notices(monkeypatch):
    monkeypatch.setattr(app, "CONNECTION_AGE_MS", 200)

    async def body(stub, server):
        old = await connected(server.target)
        running = asyncio.ensure_future(text_of(stub.GenerateStream(streaming(100))))
        assert await told_to_leave(old) == b"max_age"
        old.close()
        for _ in range(4):
            assert await is_right(stub)
        assert await running == expected_text("by", 100, seed=0)

    with_stub(body, step_s=0.01)


def test_an_old_connection_whose_call_never_ends_is_closed_after_the_grace(monkeypatch):
    monkeypatch.setattr(app, "CONNECTION_AGE_MS", 100)
    monkeypatch.setattr(app, "CONNECTION_GRACE_MS", 200)

    async def body(stub, server):
        call = stub.GenerateStream(streaming(480))
        await refused(text_of(call), grpc.StatusCode.UNAVAILABLE)
        await until(lambda: server.server._hub.live == [])
        assert len(server.engine.cancelled) == 1

    with_stub(body, step_s=0.02)


def test_a_client_that_answers_no_pings_is_gone_and_its_request_too(monkeypatch):
    monkeypatch.setattr(app, "KEEPALIVE_MS", 200)
    monkeypatch.setattr(app, "KEEPALIVE_TIMEOUT_MS", 200)

    async def body(stub, server):
        wire = await connected(server.target, reads=False)
        assert wire.send(abuse.call(1), time.monotonic() + 1)
        await until(lambda: len(server.server._hub.live) == 1)
        await until(lambda: server.server._hub.live == [])
        assert len(server.engine.cancelled) == 1
        await closed(wire)
        assert await is_right(stub)

    with_stub(body, step_s=0.02)


def test_pings_come_too_often_at_the_third_time():
    async def body(stub, server):
        ping = abuse.frame(abuse.PING, 0, 0, bytes(8))
        patient, hasty = await connected(server.target), await connected(server.target)
        for wire, count in ((patient, 2), (hasty, 4)):
            for _ in range(count):
                assert wire.send(ping, time.monotonic() + 1)
                await asyncio.sleep(0.02)
        assert await told_to_leave(hasty) == b"too_many_pings"
        await closed(hasty)
        assert not patient.is_closed() and await is_right(stub)
        patient.close()

    with_stub(body)


def test_calls_beyond_the_limit_of_a_connection_wait_for_those_before_them():
    async def body(stub, server):
        assert await is_right(stub)  # so the client has been told of the limit
        calls = [stub.GenerateStream(streaming(480)) for _ in range(3)]
        await until(lambda: len(server.engine.submitted) == 3)
        async with grpc.aio.insecure_channel(server.target, options=OWN) as other:
            assert await is_right(inference_pb2_grpc.InferenceServiceStub(other))
        assert len(server.engine.submitted) == 4
        calls[0].cancel()
        calls[1].cancel()
        await until(lambda: len(server.engine.submitted) == 5)
        calls[2].cancel()

    with_stub(body, config=ServerConfig(port=0, max_streams=2), step_s=0.02)


def test_a_client_that_ignores_the_limit_of_calls_gets_no_more_than_it_allows():
    async def body(stub, server):
        wire = await connected(server.target)
        calls = b"".join(abuse.call(stream) for stream in range(1, 101, 2))
        assert wire.send(calls, time.monotonic() + 5)
        await until(lambda: len(server.engine.submitted) == 2)
        assert await is_right(stub)
        assert len(server.engine.submitted) == 3
        wire.close(hard=True)
        await until(lambda: server.server._hub.live == [])

    with_stub(body, config=ServerConfig(port=0, max_streams=2), step_s=0.01)


def test_connections_beyond_the_limit_are_closed_until_another_one_ends():
    async def body(stub, server):
        assert await is_right(stub)
        held = await connected(server.target)
        await asyncio.sleep(0.05)
        late = await connected(server.target)
        await closed(late)
        assert not held.is_closed() and await is_right(stub)
        held.close()
        await until_welcome(server.target)

    with_stub(body, config=ServerConfig(port=0, max_connections=2))


async def until_welcome(target: str) -> None:
    """Returns once a new client is served."""
    async with asyncio.timeout(30):
        while True:
            async with grpc.aio.insecure_channel(target, options=OWN) as wire:
                try:
                    assert await is_right(inference_pb2_grpc.InferenceServiceStub(wire))
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.UNAVAILABLE
                    await asyncio.sleep(0.05)
                else:
                    return


@pytest.mark.parametrize("kind", ["one large header", "many headers"])
def test_headers_beyond_the_limit_are_refused_and_hurt_no_other_call(kind):
    async def body(stub, server):
        running = asyncio.ensure_future(text_of(stub.GenerateStream(streaming(60))))
        await until(lambda: len(server.engine.submitted) == 1)
        size = app.MAX_METADATA_BYTES
        parts = 1 if kind == "one large header" else 20
        ok = [(f"x-{number}", "a" * (size // 2 // parts)) for number in range(parts)]
        bad = [(f"x-{number}", "a" * (size // parts)) for number in range(parts)]
        await stub.Generate(HELLO, metadata=ok)
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
        await asyncio.gather(*(refused(stub.Generate(HELLO, metadata=bad), code) for _ in range(5)))
        assert len(server.engine.submitted) == 2
        assert await running == expected_text("by", 60, seed=0)

    with_stub(body, step_s=0.01)
