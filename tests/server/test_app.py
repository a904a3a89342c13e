"""The server's life: ports, health, reflection, limits, draining, signals."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from jaxinfer.cli.options import Common
from jaxinfer.cli.serve import serve
from jaxinfer.edge_config import ServerConfig
from jaxinfer.errors import ConfigError, EngineFailed, JaxinferError
from jaxinfer.server import app, service
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import inference_pb2_grpc
from tests.server.fake_engine import MODEL, FakeEngine, expected_text, served
from tests.server.serving import running

ROOT = Path(__file__).parents[2]


def test_a_second_server_on_a_port_fails_at_once():
    async def body():
        async with running() as first:
            port = int(first.target.rpartition(":")[2])
            with pytest.raises(ConfigError, match=f"port {port} is taken"):
                await app.Server(served(), FakeEngine, ServerConfig(port=port)).start()

    asyncio.run(body())


def test_serve_finds_a_taken_port_before_it_looks_for_a_model(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        missing = str(tmp_path / "no model")
        with pytest.raises(ConfigError, match=f"port {port} is taken.*server.port"):
            serve(common=Common(model=missing, overrides=(f"server.port={port}",)))
    with pytest.raises(JaxinferError, match="no model") as caught:
        serve(common=Common(model=missing, overrides=(f"server.port={port}",)))
    assert "taken" not in str(caught.value).replace(missing, "")


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
def test_a_host_that_is_not_here_is_a_config_error(host):
    async def body():
        with pytest.raises(ConfigError, match="server.host"):
            await app.Server(served(), FakeEngine, ServerConfig(host=host, port=0)).start()

    asyncio.run(body())


def test_health_says_serving_only_when_told():
    async def body():
        server = app.Server(served(), FakeEngine, ServerConfig(port=0))
        port = await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as wire:
            stub = health_pb2_grpc.HealthStub(wire)
            for told in (False, True, False):
                await server.set_serving(told)
                for name in (MODEL, *service.NAMES):
                    reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                    assert (reply.status == health_pb2.HealthCheckResponse.SERVING) is told
                reply = await stub.Check(health_pb2.HealthCheckRequest())
                assert reply.status == health_pb2.HealthCheckResponse.SERVING  # it lives
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Check(health_pb2.HealthCheckRequest(service="nonsense"))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        await server.stop(0.1)

    asyncio.run(body())


def test_it_is_not_ready_from_the_first_moment():
    async def body():
        server = app.Server(served(), FakeEngine, ServerConfig(port=0))
        port = await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as wire:
            ask = health_pb2.HealthCheckRequest(service=MODEL)
            reply = await health_pb2_grpc.HealthStub(wire).Check(ask)
            assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.stop(0.1)

    asyncio.run(body())


def test_reflection_lists_the_services():
    async def body():
        async with running() as server, grpc.aio.insecure_channel(server.target) as wire:
            stub = reflection_pb2_grpc.ServerReflectionStub(wire)
            ask = reflection_pb2.ServerReflectionRequest(list_services="")
            (reply,) = [reply async for reply in stub.ServerReflectionInfo(iter([ask]))]
            names = {found.name for found in reply.list_services_response.service}
            assert {*service.NAMES, "grpc.health.v1.Health"} <= names

    asyncio.run(body())


def test_a_message_over_the_limit_is_refused():
    async def body():
        config = ServerConfig(port=0, max_message_bytes=2000)
        async with (
            running(config=config) as server,
            grpc.aio.insecure_channel(server.target) as wire,
        ):
            stub = inference_pb2_grpc.InferenceServiceStub(wire)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(pb.GenerateRequest(text="x" * 3000))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    asyncio.run(body())


def test_draining_finishes_what_runs_and_refuses_what_is_new():
    async def body():
        async with (
            running(step_s=0.005) as server,
            grpc.aio.insecure_channel(server.target) as wire,
        ):
            stub = inference_pb2_grpc.InferenceServiceStub(wire)
            message = pb.GenerateStreamRequest(
                text="a", sampling={"seed": 0}, stopping={"max_tokens": 60}
            )
            stream = aiter(stub.GenerateStream(message))
            assert (await anext(stream)).HasField("started")
            stopping = asyncio.ensure_future(server.server.stop(10.0))
            await asyncio.sleep(0.05)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(pb.GenerateRequest(text="b"))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            ask = health_pb2.HealthCheckRequest(service=MODEL)
            reply = await health_pb2_grpc.HealthStub(wire).Check(ask)
            assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING
            text = "".join([event.delta.text async for event in stream])
            assert text == expected_text("a", 60)
            await stopping

    asyncio.run(body())


def test_what_outlives_the_grace_ends_as_unavailable():
    async def body():
        async with running(step_s=0.01) as server, grpc.aio.insecure_channel(server.target) as wire:
            stub = inference_pb2_grpc.InferenceServiceStub(wire)
            call = stub.Generate(pb.GenerateRequest(text="a", stopping={"max_tokens": 400}))
            unary = asyncio.ensure_future(_code(call))
            await asyncio.sleep(0.1)
            began_s = time.monotonic()
            await server.server.stop(0.1)
            assert await unary is grpc.StatusCode.UNAVAILABLE
            assert time.monotonic() - began_s < 2.5

    asyncio.run(body())


def test_the_end_of_the_engines_thread_ends_the_server():
    made = []

    def make_engine(deliver):
        made.append(FakeEngine(deliver))
        return made[-1]

    def ready(port):
        threading.Timer(0.1, made[0].stop).start()

    with pytest.raises(EngineFailed, match="thread ended"):
        app.run(served(), make_engine, ServerConfig(port=0), ready=ready)


SERVE = """
import functools, sys
from jaxinfer.edge_config import ServerConfig
from jaxinfer.server import app
from tests.server.fake_engine import FakeEngine, served
app.run(
    served(), functools.partial(FakeEngine, step_s=0.01), ServerConfig(port=0, drain_grace_s=5),
    ready=lambda port: print(port, flush=True),
)
print("stopped", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_stops(number):
    with _serving_process() as (process, port):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as wire:
            stub = inference_pb2_grpc.InferenceServiceStub(wire)
            message = pb.GenerateStreamRequest(
                text="a", sampling={"seed": 0}, stopping={"max_tokens": 50}
            )
            stream = stub.GenerateStream(message)
            next(stream)
            os.kill(process.pid, number)
            assert "".join(event.delta.text for event in stream) == expected_text("a", 50)
        out, err = process.communicate(timeout=10)
        assert (process.returncode, out, err) == (0, "stopped\n", "")


@contextlib.contextmanager
def _serving_process():
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


async def _code(call) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK
