"""A server on loopback with a fake engine, for `async with` and for threads."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import NamedTuple

import grpc
import pytest
from google.rpc import status_pb2

from jaxinfer.edge_config import SecurityConfig, ServerConfig
from jaxinfer.host.request import Request, SamplingParams
from jaxinfer.server.admin import Explain
from jaxinfer.server.app import NO_FACTS, Server
from jaxinfer.server.facts import Facts
from jaxinfer.server.status import DETAILS_KEY
from jaxinfer.text.assets import TextAssets
from jaxinfer.v1 import inference_pb2_grpc
from tests.server.fake_engine import FakeEngine, served

OWN = (("grpc.use_local_subchannel_pool", 1),)
"""Of a channel: a connection that no other channel of this process shares."""


class Running(NamedTuple):
    target: str
    server: Server
    engine: FakeEngine


@asynccontextmanager
async def running(
    *,
    config: ServerConfig | None = None,
    security: SecurityConfig | None = None,
    defaults: SamplingParams | None = None,
    grace_s: float = 0.2,
    text: TextAssets | None = None,
    restored: Sequence[tuple[Request, int]] = (),
    facts: Facts = NO_FACTS,
    explain: Explain | None = None,
    kind: type[FakeEngine] = FakeEngine,
    **dials,
) -> AsyncIterator[Running]:
    engines = []

    def make_engine(deliver):
        engines.append(kind(deliver, restored=restored, **dials))
        return engines[-1]

    server = Server(
        replace(served(defaults=defaults), text=text),
        make_engine,
        config or ServerConfig(port=0),
        security=security or SecurityConfig(),
        restored=[request for request, _ in restored],
        facts=facts,
        explain=explain,
    )
    port = await server.start()
    await server.set_serving(True)
    try:
        yield Running(f"127.0.0.1:{port}", server, engines[0])
    finally:
        await server.stop(grace_s)


@contextmanager
def running_in_thread(**options) -> Iterator[Running]:
    """The same on another thread's loop, for the sync client."""
    begun, found = threading.Event(), []

    async def serve() -> None:
        async with running(**options) as server:
            end = asyncio.Event()
            found.extend([server, asyncio.get_running_loop(), end])
            begun.set()
            await end.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert begun.wait(30)
        yield found[0]
    finally:
        if found:
            found[1].call_soon_threadsafe(found[2].set)
        thread.join(30)


def free_port() -> int:
    """For settings in which 0 does not mean a free one."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


async def until(condition, timeout_s: float = 30.0) -> None:
    """Waits for a condition; an AssertionError where it does not come true."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def detail(error: grpc.aio.AioRpcError, kind):
    """One of the rich details of a failed call."""
    found = kind()
    for key, value in error.trailing_metadata():
        if key == DETAILS_KEY:
            for packed in status_pb2.Status.FromString(value).details:
                packed.Unpack(found)
    return found


async def refused(call, code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    """Awaits a call that must fail with a code."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is code, caught.value
    return caught.value


def with_stub(body, **options):
    """Runs `body(stub, server)` against a running server."""

    async def main():
        async with running(**options) as server, grpc.aio.insecure_channel(server.target) as wire:
            await body(inference_pb2_grpc.InferenceServiceStub(wire), server)

    asyncio.run(main())
