"""The operators' port: every call, its refusals, and that only this machine reaches it."""

import asyncio
import functools
import socket
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from jaxinfer.cli import run as jaxinfer
from jaxinfer.client import AsyncClient
from jaxinfer.client.admin import AdminClient
from jaxinfer.config import Config, override
from jaxinfer.edge_config import ServerConfig
from jaxinfer.errors import (
    ConfigError,
    Draining,
    EndedByOperator,
    InvalidRequest,
    OutOfTurn,
    UnknownRequest,
)
from jaxinfer.server import address, app
from jaxinfer.server.admin import Admin
from jaxinfer.server.facts import Facts
from jaxinfer.server.profiling import Profiler
from jaxinfer.v1 import admin_pb2 as pb
from jaxinfer.v1 import inference_pb2
from tests.server.fake_engine import MODEL, FakeEngine, served
from tests.server.serving import detail, free_port, refused, running, until

FACTS = Facts("1 x cpu", "[engine]\n", ("prefill_8", "decode_8"), ("decode_1 differs",))


def operated(body, **options):
    """Runs `body(admin, client, server)`; the admin client is the sync one, on another thread."""

    async def main():
        config = ServerConfig(port=0, admin_port=free_port())
        async with running(config=config, **options) as server:
            client = AsyncClient(server.target)
            with AdminClient(f"127.0.0.1:{config.admin_port}", timeout_s=10.0) as admin:
                await body(Elsewhere(admin), client, server)
            await client.close()

    asyncio.run(main())


class Elsewhere:
    """The sync client's methods, awaited on another thread."""

    def __init__(self, admin: AdminClient) -> None:
        self.admin = admin

    def __getattr__(self, name: str):
        return functools.partial(asyncio.to_thread, getattr(self.admin, name))


def long(client: AsyncClient, name: str, count: int = 400):
    return asyncio.ensure_future(client.generate("a", request_id=name, max_tokens=count, seed=0))


def test_info_says_what_the_server_is():
    async def body(admin, client, server):
        found = await admin.info()
        assert (found.model, found.device, found.programs) == (MODEL, "1 x cpu", FACTS.programs)
        assert (found.config_toml, found.broken_promises) == ("[engine]\n", FACTS.broken_promises)
        assert found.version and found.uptime_s > 0 and found.num_compiles_after_start == 0

    operated(body, facts=FACTS)


def test_load_says_what_is_live():
    async def body(admin, client, server):
        assert (await admin.load()).is_serving
        answers = [long(client, name) for name in ("a", "b")]
        await until(lambda: len(server.engine.submitted) == 2)
        found = await admin.load()
        assert sorted(found.live_request_ids) == ["a", "b"]
        assert (found.num_running, found.num_slots, found.is_draining) == (2, 8, False)
        server.engine.gate.clear()
        await asyncio.sleep(0.5)
        assert (await admin.load()).stalled_s > 0.2
        server.engine.gate.set()
        await admin.abort(everything=True)
        for answer in answers:
            with pytest.raises(EndedByOperator):
                await answer
        await until(lambda: not server.engine.pulse.has_work)
        assert (await admin.load()).live_request_ids == ()

    operated(body, step_s=0.01)


def test_abort_ends_those_that_are_named_and_no_others():
    async def body(admin, client, server):
        ended, kept = long(client, "ended"), long(client, "kept", 100)
        await until(lambda: len(server.engine.submitted) == 2)
        assert await admin.abort(["ended", "unknown", "ended"]) == ["ended"]
        with pytest.raises(EndedByOperator, match="an operator ended"):
            await ended
        assert len((await kept).token_ids) == 100
        assert server.engine.cancelled == ["ended"]
        for wrong in ({}, {"request_ids": ["a"], "everything": True}):
            with pytest.raises(InvalidRequest, match="request_ids"):
                await admin.abort(**wrong)

    operated(body, step_s=0.005)


def test_a_stream_that_an_operator_ends_is_not_asked_again_by_a_client_that_resumes():
    async def body(admin, client, server):
        async def read():
            async for _ in client.stream("a", request_id="s", max_tokens=400, resume_s=5.0):
                pass

        reading = asyncio.ensure_future(read())
        await until(lambda: server.engine.num_deliveries > 2)
        assert await admin.abort(["s"]) == ["s"]
        with pytest.raises(EndedByOperator):
            await reading
        assert len(server.engine.submitted) == 1

    operated(body, step_s=0.005)


def test_drain_refuses_what_is_new_until_resume():
    async def body(admin, client, server):
        answer = long(client, "old", 100)
        await until(lambda: len(server.engine.submitted) == 1)
        assert await admin.drain() == 1
        assert await client.health(MODEL) == "NOT_SERVING" and await client.health() == "SERVING"
        found = await admin.load()
        assert found.is_draining and not found.is_serving
        with pytest.raises(Draining):
            await client.generate("b")
        failure = await refused(
            client._inference.Generate(inference_pb2.GenerateRequest(text="b")),
            grpc.StatusCode.UNAVAILABLE,
        )
        assert retry_s(failure) == 1
        assert await admin.drain(wait_s=10.0) == 0
        assert len((await answer).token_ids) == 100
        await admin.resume()
        assert await client.health(MODEL) == "SERVING"
        assert len((await client.generate("b", max_tokens=3)).token_ids) == 3

    operated(body, step_s=0.005)


def test_a_drain_waits_no_longer_than_told_and_ends_with_resume():
    async def body(admin, client, server):
        answer = long(client, "old")
        await until(lambda: len(server.engine.submitted) == 1)
        assert await admin.drain(wait_s=0.1) == 1
        waiting = asyncio.ensure_future(admin.drain(wait_s=60.0))
        await asyncio.sleep(0.1)
        await admin.resume()
        assert await waiting == 1
        for wait_s in (-1.0, float("nan"), float("inf")):
            with pytest.raises(InvalidRequest, match="wait_s"):
                await admin.drain(wait_s=wait_s)
        await admin.abort(everything=True)
        with pytest.raises(EndedByOperator):
            await answer

    operated(body, step_s=0.01)


def test_a_server_that_stops_can_not_be_resumed():
    async def body(admin, client, server):
        answer = long(client, "old", 60)
        await until(lambda: len(server.engine.submitted) == 1)
        stopping = asyncio.ensure_future(server.server.stop(5.0))
        await until(lambda: not server.server._door.is_serving)
        with pytest.raises(Draining, match="stops"):
            await admin.resume()
        assert len((await answer).token_ids) == 60
        await stopping

    operated(body, step_s=0.01)


def test_calls_that_do_not_fit_say_why():
    async def body(admin, client, server):
        assert await admin.flush() == 3 and server.engine.num_flushed == 1
        with pytest.raises(OutOfTurn, match=r"journal\.folder"):
            await admin.rotate_journal()
        with pytest.raises(OutOfTurn, match="no timelines"):
            await admin.explain("a")
        with pytest.raises(OutOfTurn, match="no trace runs"):
            await admin.stop_profile()
        for max_s in (0.0, -1.0, 1e9, float("nan")):
            with pytest.raises(InvalidRequest, match="max_s"):
                await admin.start_profile(max_s)
        call = admin.admin._channel.unary_unary("/jaxinfer.v1.AdminService/GetLoad")
        with pytest.raises(grpc.RpcError) as caught:
            await asyncio.to_thread(call, b"\xff\xff")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    operated(body)


def test_a_request_is_explained_by_who_knows_it():
    happenings = [pb.Happening(at_s=0.5, seconds=0.25, kind="prefill", text="8 tokens", step=3)]

    async def body(admin, client, server):
        (found,) = await admin.explain("a")
        assert (found.at_s, found.seconds, found.kind, found.step) == (0.5, 0.25, "prefill", 3)
        with pytest.raises(UnknownRequest, match="'b'"):
            await admin.explain("b")

    operated(body, explain=lambda name: happenings if name == "a" else None)


def test_one_trace_at_a_time_and_each_ends():
    """With a profiler that only counts; the real one is in the test with the real engine."""
    began, ended = [], []

    async def main():
        profiler = Profiler(begin=began.append, end=lambda: ended.append(1))
        folder = await profiler.start(60.0)
        assert began == [folder] and folder.is_dir() and folder.stat().st_mode & 0o077 == 0
        with pytest.raises(OutOfTurn, match=f"runs already, into {folder}"):
            await profiler.start(1.0)
        assert await profiler.stop() == folder and ended == [1]
        second = await profiler.start(0.05)
        assert second != folder
        await until(lambda: len(ended) == 2)
        assert await profiler.stop() == second  # it had ended by itself; told once
        with pytest.raises(OutOfTurn):
            await profiler.stop()
        await profiler.start(60.0)
        await profiler.close()
        assert len(ended) == 3
        for path in began:
            path.rmdir()

    asyncio.run(main())


def test_a_profiler_that_others_use_is_a_clear_refusal():
    def busy(folder: Path) -> None:
        raise RuntimeError("Only one profile may be run at a time.")

    async def main():
        with pytest.raises(OutOfTurn, match="Only one profile"):
            await Profiler(begin=busy, end=lambda: None).start(1.0)

    asyncio.run(main())


def test_without_a_port_there_is_no_admin_service():
    async def main():
        async with running() as server:
            wire = grpc.aio.insecure_channel(server.target)
            call = wire.unary_unary("/jaxinfer.v1.AdminService/Drain")
            await refused(call(b""), grpc.StatusCode.UNIMPLEMENTED)
            await wire.close()

    asyncio.run(main())


def test_it_listens_on_loopback_whatever_the_host_is():
    async def main():
        back = free_port()
        config = ServerConfig(host="0.0.0.0", port=0, admin_port=back)
        security = override(Config(), "security.allow_insecure=true").security
        server = app.Server(served(), FakeEngine, config, security=security)
        port = await server.start()
        for host, there in (("127.0.0.1", port), ("127.0.0.2", port), ("127.0.0.1", back)):
            socket.create_connection((host, there), timeout=5).close()
        with pytest.raises(ConnectionRefusedError):  # as at every address but its own
            socket.create_connection(("127.0.0.2", back), timeout=5)
        await server.stop(0.1)

    asyncio.run(main())


def test_ports_that_can_not_be_are_said_before_the_start():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} is taken.*server\.admin_port"):
            address.check_address(ServerConfig(port=0, admin_port=port))
    with pytest.raises(ConfigError, match=r"server\.admin_port is 4711"):
        address.check_address(ServerConfig(port=4711, admin_port=4711))


def test_every_method_of_the_proto_has_a_handler():
    names = {method.name for method in pb.DESCRIPTOR.services_by_name["AdminService"].methods}
    handlers = Admin.handlers(object.__new__(Admin))._method_handlers
    assert {name.rpartition("/")[2] for name in handlers} == names


def test_the_command_line_asks_the_same(capsys, tmp_path):
    async def body(admin, client, server):
        where = ["--address", admin.admin._target]

        async def said(*arguments: str, code: int = 0) -> str:
            assert await asyncio.to_thread(jaxinfer, ["admin", *arguments, *where]) == code
            return "".join(capsys.readouterr())

        assert "fake" in await said("info") and "decode_1 differs" in await said("info")
        assert await said("info", "--config") == "[engine]\n"
        assert '"is_serving": true' in await said("load", "--json")
        answer = long(client, "live", 100)
        await until(lambda: len(server.engine.submitted) == 1)
        assert "live" in await said("load")
        assert "1 requests still run" in await said("drain")
        assert "0 requests" in await said("drain", "--wait-s", "10")
        await answer
        assert "again" in await said("resume")
        assert "3 pages" in await said("flush")
        assert "journal.folder" in await said("rotate", code=1)
        assert '{"aborted": [], "not_live": ["x"]}' in await said("abort", "x", "--json")

    operated(body, step_s=0.005, facts=FACTS)
    assert jaxinfer(["admin", "load"]) == 2
    assert "--address" in capsys.readouterr().err


def retry_s(failure: grpc.aio.AioRpcError) -> int:
    return detail(failure, error_details_pb2.RetryInfo).retry_delay.seconds
