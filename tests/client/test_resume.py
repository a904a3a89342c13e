"""Clients whose server or connection goes away in the middle of an answer."""

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer.client import AsyncClient, Client, Completed, Delta
from jaxinfer.client.resume import Attempts
from jaxinfer.client.translate import StreamReader, to_request
from jaxinfer.edge_config import ServerConfig
from jaxinfer.errors import (
    DeadlinePassed,
    Draining,
    DuplicateRequest,
    EngineFailed,
    InvalidRequest,
    QueueFull,
    Unreachable,
)
from jaxinfer.v1 import inference_pb2 as pb
from tests.server.fake_engine import (
    expected_logprobs,
    expected_text,
    expected_tokens,
    multibyte_tokens,
)
from tests.server.serving import running, until

ROOT = Path(__file__).parents[2]
ASKED = {"seed": 7, "max_tokens": 60, "logprobs": True, "temperature": 0.5, "resume_s": 20.0}


def port_of(server) -> int:
    return int(server.target.rpartition(":")[2])


def check(events, tokens=expected_tokens):
    """The stream is the one that a server which never stopped would have given."""
    *deltas, last = events
    assert all(isinstance(delta, Delta) for delta in deltas) and isinstance(last, Completed)
    done, ids = last.completion, tuple(tokens([1, *b"hello"], 60, seed=7))
    text = bytes(ids).decode(errors="replace")
    assert done.token_ids == tuple(token for delta in deltas for token in delta.token_ids) == ids
    assert done.text == "".join(delta.text for delta in deltas) == text
    assert done.logprobs == tuple(expected_logprobs(60))
    assert done.usage.num_output_tokens == 60 and done.parameters.seed == 7
    assert done.finish_reason == "length"


async def read(target: str, seen: list, **options) -> None:
    async with AsyncClient(target) as client:
        async for event in client.stream("hello", **(ASKED | options)):
            seen.append(event)


def read_in_thread(target: str, seen: list, **options):
    def body():
        with Client(target) as client:
            seen.extend(client.stream("hello", **(ASKED | options)))

    return asyncio.to_thread(body)


@pytest.mark.parametrize("tokens", [expected_tokens, multibyte_tokens])
@pytest.mark.parametrize("num_saved", [None, 0, 4])
def test_a_stream_outlives_its_server(num_saved, tokens):
    async def body():
        seen = []
        async with running(step_s=0.01, grace_s=0.0, tokens=tokens) as first:
            reading = asyncio.ensure_future(read(first.target, seen))
            await until(lambda: len(seen) >= 5)
        assert len(seen) < 60 and not reading.done()
        asked = first.engine.submitted[0]
        restored = [] if num_saved is None else [(asked, num_saved)]
        config = ServerConfig(port=port_of(first))
        async with running(config=config, restored=restored, tokens=tokens) as second:
            await reading
        check(seen, tokens)
        assert [one.sampling for one in second.engine.submitted] == (
            [asked.sampling] if num_saved is None else []
        )

    asyncio.run(body())


def test_a_stream_of_the_sync_client_outlives_its_server():
    async def body():
        seen = []
        async with running(step_s=0.01, grace_s=0.0) as first:
            reading = asyncio.ensure_future(read_in_thread(first.target, seen))
            await until(lambda: first.engine.num_deliveries >= 5)
        restored = [(first.engine.submitted[0], 2)]
        async with running(config=ServerConfig(port=port_of(first)), restored=restored) as second:
            await reading
        check(seen)
        assert second.engine.submitted == []

    asyncio.run(body())


SERVE = """
import functools, sys
from jaxinfer.edge_config import ServerConfig
from jaxinfer.server import app
from tests.server.fake_engine import FakeEngine, served
app.run(
    served(), functools.partial(FakeEngine, step_s=0.02), ServerConfig(port=int(sys.argv[1])),
    ready=lambda port: print(port, flush=True),
)
"""


@contextlib.asynccontextmanager
async def process(port: int = 0):
    command = (sys.executable, "-c", SERVE, str(port))
    child = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        yield child, int(await child.stdout.readline())
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


def test_a_stream_outlives_a_killed_server():
    async def body():
        seen = []
        async with process() as (child, port):
            reading = asyncio.ensure_future(read(f"127.0.0.1:{port}", seen))
            await until(lambda: len(seen) >= 5)
            child.kill()
            await child.wait()
        async with process(port):
            await reading
        check(seen)

    asyncio.run(body())


def test_a_stream_outlives_its_connection():
    wires = []

    async def relay(reader, writer):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def body():
        seen = []
        async with running(step_s=0.01) as server:

            async def connect(reader, writer):
                inner_reader, inner_writer = await asyncio.open_connection(
                    "127.0.0.1", port_of(server)
                )
                wires.append((writer, inner_writer))
                await asyncio.gather(relay(reader, inner_writer), relay(inner_reader, writer))

            proxy = await asyncio.start_server(connect, "127.0.0.1", 0)
            target = f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
            reading = asyncio.ensure_future(read(target, seen))
            for num_seen in (3, 8):  # it is cut twice
                await until(lambda num_seen=num_seen: len(seen) >= num_seen)
                for wire in wires[-1]:
                    wire.transport.abort()
            await reading
            proxy.close()
            assert len(wires) >= 3 and len(server.engine.submitted) == 3
            assert server.engine.cancelled == [server.engine.submitted[0].request_id] * 2
        check(seen)

    asyncio.run(body())


def test_a_server_may_start_after_its_client():
    async def body():
        async with running() as server:
            pass
        seen = []
        reading = asyncio.ensure_future(read(server.target, seen))
        await asyncio.sleep(0.2)
        async with running(config=ServerConfig(port=port_of(server))) as server:
            async with AsyncClient(server.target) as client:
                done = await client.generate("hello", seed=7, max_tokens=60, resume_s=20.0)
            await reading
        check(seen)
        assert done.text == expected_text("hello", 60, seed=7)

    asyncio.run(body())


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_one_reply_outlives_its_server_too(kind):
    async def ask(target):
        async with AsyncClient(target) as client:
            return await client.generate("hello", **ASKED)

    def ask_in_thread(target):
        with Client(target) as client:
            return client.generate("hello", **ASKED)

    async def body():
        async with running(step_s=0.01, grace_s=0.0) as first:
            call = ask if kind == "async" else lambda to: asyncio.to_thread(ask_in_thread, to)
            asking = asyncio.ensure_future(call(first.target))
            await until(lambda: first.engine.num_deliveries >= 5)
        restored = [(first.engine.submitted[0], 4)]
        async with running(config=ServerConfig(port=port_of(first)), restored=restored) as second:
            done = await asking
        assert done.token_ids == tuple(expected_tokens([1, *b"hello"], 60, seed=7))
        assert done.logprobs == tuple(expected_logprobs(60))
        assert second.engine.submitted == []

    asyncio.run(body())


def test_an_error_that_asking_again_would_not_mend_is_raised_at_once():
    async def body():
        async with running() as server, AsyncClient(server.target) as client:
            for kind, options in (
                (InvalidRequest, {"top_k": -1}),
                (InvalidRequest, {"resume_s": -1.0}),
            ):
                with pytest.raises(kind):
                    await client.generate("hello", **(ASKED | options))
            server.engine.fail_with = "boom"
            with pytest.raises(EngineFailed):
                await read(server.target, [])
            assert len(server.engine.submitted) == 1
            with pytest.raises(DeadlinePassed):
                await client.generate("hello", **(ASKED | {"timeout_s": 0.0}))

    asyncio.run(body())


def attempts(**options) -> Attempts[pb.GenerateStreamRequest]:
    now_s = options.pop("now_s", [0.0])
    asked = {"resume_s": 10.0} | options
    message = to_request(pb.GenerateStreamRequest, "hello", asked)
    return Attempts(message, asked, options.get("timeout_s"), clock=lambda: now_s[0])


def test_the_id_and_the_seed_are_drawn_where_they_are_needed_again():
    message = attempts().message
    assert message.request_id and message.sampling.HasField("seed")
    assert not message.HasField("resume")
    mine = attempts(request_id="mine", seed=3).message
    assert (mine.request_id, mine.sampling.seed) == ("mine", 3)
    once = attempts(resume_s=0.0).message
    assert not once.HasField("request_id") and not once.sampling.HasField("seed")


def test_a_taken_id_is_an_error_at_first_and_a_reason_to_wait_later():
    for error in (DuplicateRequest("taken"), QueueFull("full")):
        tries = attempts()
        with pytest.raises(type(error)):
            tries.pause_s(error)
        tries.pause_s(Unreachable("gone"))
        assert 0 < tries.pause_s(error) <= 1


def test_without_resume_s_nothing_is_asked_again():
    for error in (Unreachable("gone"), Draining("stopping")):
        with pytest.raises(type(error)):
            attempts(resume_s=0.0).pause_s(error)


def test_it_gives_up_some_time_after_the_last_news():
    now_s = [0.0]
    tries = attempts(now_s=now_s)
    tries.pause_s(Unreachable("gone"))
    now_s[0] = 9.0
    tries.pause_s(Unreachable("gone"))
    assert tries.passes(Delta("x"))
    now_s[0] = 18.0
    tries.pause_s(Unreachable("gone"))
    now_s[0] = 28.0
    with pytest.raises(Unreachable):
        tries.pause_s(Unreachable("gone"))


def test_the_calls_time_covers_all_attempts():
    now_s = [5.0]
    tries = attempts(now_s=now_s, timeout_s=4.0)
    assert tries.timeout_s == 4.0
    now_s[0] = 7.0
    tries.pause_s(Unreachable("gone"))
    assert tries.timeout_s == 2.0
    now_s[0] = 9.0
    with pytest.raises(DeadlinePassed):
        tries.pause_s(Unreachable("gone"))


def test_the_next_attempt_asks_for_the_same_answer_with_the_values_that_were_in_force():
    reader, tries = StreamReader(), attempts(stop="x", request_id="mine")
    started = pb.Started(request_id="mine", model="fake")
    started.parameters.sampling.MergeFrom(pb.Sampling(seed=9, temperature=0.3, top_k=4))
    started.parameters.stopping.MergeFrom(pb.Stopping(max_tokens=8, stop=["x"]))
    started.parameters.priority = 2
    started.parameters.use_prefix_cache = False
    reader.feed(pb.GenerateStreamResponse(started=started))
    reader.feed(pb.GenerateStreamResponse(delta=pb.Delta(text="é漢", token_ids=[1, 2, 3])))
    tries.pause_s(Unreachable("gone"), reader)
    message = tries.message
    assert message.resume == pb.Resume(num_tokens=3, num_text_bytes=5)
    assert message.sampling == started.parameters.sampling
    assert message.stopping == started.parameters.stopping
    assert (message.text, message.model, message.priority) == ("hello", "fake", 2)
    assert message.HasField("use_prefix_cache") and not message.use_prefix_cache
