"""The end of a server: by a signal under load, by a failing engine, by a step that never ends."""

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxinfer.edge_config import ServerConfig
from jaxinfer.errors import EngineFailed
from jaxinfer.server import app
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import inference_pb2_grpc
from tests.server.fake_engine import MODEL, FakeEngine, expected_text, served
from tests.server.serving import detail, until

ROOT = Path(__file__).parents[2]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
FLIP_S = 0.1
SERVE = """
import sys
from tests.server.test_lifecycle import serve
serve(grace_s=float(sys.argv[1]))
print("stopped", flush=True)
"""


def serve(grace_s: float) -> None:
    """What the process under test does."""
    app.run(
        served(),
        lambda deliver: FakeEngine(deliver, step_s=0.004),
        ServerConfig(port=0, drain_grace_s=grace_s),
        ready=lambda port: print(port, flush=True),
    )


class Outcome(NamedTuple):
    """What one client saw of one request."""

    text: str
    is_complete: bool
    code: grpc.StatusCode
    retry_s: int


class Load(threading.Thread):
    """Clients that ask one thing after another on a connection of their own, until told to end."""

    def __init__(self, port: int, *, count: int, seed: int) -> None:
        super().__init__(daemon=True)
        self._channels = [grpc.insecure_channel(f"127.0.0.1:{port}") for _ in range(count)]
        self._clients = [
            threading.Thread(target=self._ask, args=(channel, random.Random(seed + at)))
            for at, channel in enumerate(self._channels)
        ]
        self._end = threading.Event()
        self.outcomes: list[tuple[str, int, Outcome]] = []
        for client in self._clients:
            client.start()

    def finish(self) -> None:
        """No new requests; returns when all clients have their answers."""
        self._end.set()
        for client in self._clients:
            client.join(30)
            assert not client.is_alive(), "a client hangs"
        for channel in self._channels:
            channel.close()

    def _ask(self, channel: grpc.Channel, rng: random.Random) -> None:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        while not self._end.is_set():
            prompt, count = f"{rng.random()}", rng.randint(1, 60)
            message = pb.GenerateStreamRequest(
                text=prompt, sampling={"seed": 0}, stopping={"max_tokens": count}
            )
            outcome = _outcome(stub.GenerateStream(message, timeout=20))
            self.outcomes.append((prompt, count, outcome))
            if outcome.code is not grpc.StatusCode.OK:
                return


def _outcome(stream) -> Outcome:
    text, is_complete = "", False
    try:
        for event in stream:
            text += event.delta.text
            is_complete |= event.HasField("summary")
    except grpc.RpcError as error:
        retry = detail(error, error_details_pb2.RetryInfo).retry_delay.seconds
        return Outcome(text, is_complete, error.code(), retry)
    return Outcome(text, is_complete, grpc.StatusCode.OK, 0)


class Follower(threading.Thread):
    """Watches readiness and notes when it changed."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self._call = health_pb2_grpc.HealthStub(self._channel).Watch(
            health_pb2.HealthCheckRequest(service=MODEL)
        )
        self.seen = [(next(self._call).status, time.monotonic())]
        self.start()

    def run(self) -> None:
        try:
            for reply in self._call:
                self.seen.append((reply.status, time.monotonic()))
        except grpc.RpcError:
            pass

    def close(self) -> None:
        self.join(10)
        self._channel.close()


@contextmanager
def process(grace_s: float):
    child = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(grace_s)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield child, int(child.stdout.readline())
    finally:
        child.kill()
        child.communicate()


def terminate_under_load(seed: int) -> tuple[int, float]:
    """One server, six clients, SIGTERM; returns how many were refused, and seconds to the flip."""
    rng = random.Random(seed)
    with process(10.0) as (child, port):
        follower = Follower(port)
        load = Load(port, count=6, seed=seed)
        time.sleep(rng.uniform(0.0, 0.5))
        sent_s = time.monotonic()
        os.kill(child.pid, signal.SIGTERM)
        out, err = child.communicate(timeout=30)
        load.finish()
        follower.close()
    assert (child.returncode, out, err) == (0, "stopped\n", "")
    num_refused = 0
    for prompt, count, found in load.outcomes:
        if found.code is grpc.StatusCode.OK:
            assert found.is_complete and found.text == expected_text(prompt, count)
            continue
        # Refused before it began, never cut: by the server while it drained, or as it was gone.
        assert found.code is grpc.StatusCode.UNAVAILABLE, found
        assert found.text == "" and not found.is_complete
        num_refused += found.retry_s == 1
    assert [status for status, _ in follower.seen] == [SERVING, NOT_SERVING]
    return num_refused, follower.seen[1][1] - sent_s


def check_terminations(count: int, *, flip_s: float) -> None:
    found = [terminate_under_load(seed) for seed in range(count)]
    assert sum(num_refused for num_refused, _ in found) >= count
    assert max(seconds for _, seconds in found) <= flip_s, found


def test_sigterm_under_load_cuts_no_stream():
    check_terminations(2, flip_s=10 * FLIP_S)  # the machine may be busy with other tests


@pytest.mark.full
def test_a_hundred_sigterms_cut_no_stream():
    check_terminations(100, flip_s=FLIP_S)


def test_what_outlives_the_grace_ends_with_a_status_and_the_exit_is_still_clean():
    with process(0.3) as (child, port):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            message = pb.GenerateStreamRequest(text="a", stopping={"max_tokens": 400})
            stream = stub.GenerateStream(message)
            next(stream)
            os.kill(child.pid, signal.SIGTERM)
            found = _outcome(stream)
        out, err = child.communicate(timeout=20)
        assert (child.returncode, out) == (0, "stopped\n")
        assert re.search("1 requests were not done in 0.3 s", err)
        assert (found.code, found.retry_s) == (grpc.StatusCode.UNAVAILABLE, 1)


class Serving(NamedTuple):
    """A server that app.serve takes from start to end, in this process."""

    engine: FakeEngine
    stub: inference_pb2_grpc.InferenceServiceStub
    wire: grpc.aio.Channel
    health: list[tuple[str, int, float]]
    ends: asyncio.Future


def run_to_its_end(body, **config):
    """Runs `body(serving)` beside a whole server; returns what the server raised, if anything."""

    async def main():
        engines, ports = [], asyncio.Queue()

        def make_engine(deliver):
            engines.append(FakeEngine(deliver, step_s=0.005))
            return engines[-1]

        settings = ServerConfig(port=0, **config)
        server = app.Server(served(), make_engine, settings)
        ends = asyncio.ensure_future(app.serve(server, settings, ports.put_nowait, None))
        port = await ports.get()
        seen: list[tuple[str, int, float]] = []
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as wire:
            followers = [asyncio.create_task(follow(wire, name, seen)) for name in ("", MODEL)]
            await until(lambda: len(seen) == 2)
            stub = inference_pb2_grpc.InferenceServiceStub(wire)
            await body(Serving(engines[0], stub, wire, seen, ends))
            (result,) = await asyncio.gather(ends, return_exceptions=True)
            for follower in followers:
                follower.cancel()
            return result

    return asyncio.run(main())


async def follow(wire, name, seen):
    call = health_pb2_grpc.HealthStub(wire).Watch(health_pb2.HealthCheckRequest(service=name))
    async for reply in call:
        seen.append((name, reply.status, time.monotonic()))


async def outcome(call) -> Outcome:
    text, is_complete = "", False
    try:
        async for event in call:
            text += event.delta.text
            is_complete |= event.HasField("summary")
    except grpc.aio.AioRpcError as error:
        retry = detail(error, error_details_pb2.RetryInfo).retry_delay.seconds
        return Outcome(text, is_complete, error.code(), retry)
    return Outcome(text, is_complete, grpc.StatusCode.OK, 0)


def ask(text: str, count: int = 400) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(text=text, sampling={"seed": 0}, stopping={"max_tokens": count})


def test_a_failing_engine_ends_streams_with_a_status_and_the_server_with_the_reason():
    async def body(serving):
        streams = [asyncio.create_task(outcome(serving.stub.GenerateStream(ask("a"))))] * 1
        streams += [
            asyncio.create_task(outcome(serving.stub.GenerateStream(ask(f"{n}"))))
            for n in range(19)
        ]
        await until(lambda: len(serving.engine.submitted) == 20)
        crashed_s = time.monotonic()
        serving.engine.crash(RuntimeError("the device is on fire"))
        await until(lambda: len(serving.health) == 4)
        assert {one[:2] for one in serving.health[2:]} == {("", NOT_SERVING), (MODEL, NOT_SERVING)}
        assert all(at - crashed_s < 1.0 for _, _, at in serving.health[2:])
        late = await outcome(serving.stub.GenerateStream(ask("late")))
        assert late.code is grpc.StatusCode.UNAVAILABLE and late.text == ""
        for found in await asyncio.gather(*streams):
            assert found.code is grpc.StatusCode.INTERNAL

    error = run_to_its_end(body)
    assert isinstance(error, EngineFailed)
    assert str(error) == "the engine's thread ended: the device is on fire"


def test_new_calls_are_refused_with_a_time_as_soon_as_the_engine_has_failed():
    """Also before the server stops to listen: the handlers run on and say UNAVAILABLE."""

    async def main():
        engines = []
        server = app.Server(
            served(),
            lambda deliver: engines.append(FakeEngine(deliver)) or engines[-1],
            ServerConfig(port=0),
        )
        port = await server.start()
        await server.set_serving(True)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as wire:
            stub = inference_pb2_grpc.InferenceServiceStub(wire)
            engines[0].crash(RuntimeError("planted"))
            with pytest.raises(EngineFailed, match="planted"):
                await server.wait(asyncio.Event())
            found = await outcome(stub.GenerateStream(ask("late")))
            assert (found.code, found.retry_s) == (grpc.StatusCode.UNAVAILABLE, 1)
            checked = await health_pb2_grpc.HealthStub(wire).Check(health_pb2.HealthCheckRequest())
            assert checked.status == NOT_SERVING
        await server.stop(0.1)

    asyncio.run(main())


def test_an_engine_that_fails_while_the_server_drains_is_an_error_too():
    async def body(serving):
        stream = asyncio.create_task(outcome(serving.stub.GenerateStream(ask("a"))))
        await until(lambda: serving.engine.num_deliveries > 2)
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: len(serving.health) == 3)
        serving.engine.crash(RuntimeError("planted"))
        assert (await stream).code is grpc.StatusCode.INTERNAL

    assert isinstance(run_to_its_end(body), EngineFailed)


def test_a_step_that_never_ends_does_not_keep_the_server_from_its_end(monkeypatch):
    monkeypatch.setattr(app, "STEP_GRACE_S", 0.2)
    engines = []

    async def body(serving):
        engines.append(serving.engine)
        stream = asyncio.create_task(outcome(serving.stub.GenerateStream(ask("a"))))
        await until(lambda: serving.engine.num_deliveries > 2)
        serving.engine.gate.clear()
        os.kill(os.getpid(), signal.SIGTERM)
        found = await stream
        assert (found.code, found.retry_s) == (grpc.StatusCode.UNAVAILABLE, 1)

    error = run_to_its_end(body, drain_grace_s=0.1)
    engines[0].gate.set()
    assert isinstance(error, EngineFailed) and "hangs in a step" in str(error)


def test_a_reader_who_is_slow_gets_the_rest_within_the_grace():
    """The engine is done long before; what it said still belongs to its reader."""

    async def body(serving):
        stream = serving.stub.GenerateStream(ask("a", 40))
        first = await anext(aiter(stream))
        assert first.HasField("started")
        await until(lambda: not serving.engine.pulse.has_work)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(1.5)
        found = await outcome(stream)
        assert found.is_complete and found.text == expected_text("a", 40)

    assert run_to_its_end(body, drain_grace_s=10.0) is None
