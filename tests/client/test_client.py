"""The client, sync and async, against a real server with a fake engine."""

import asyncio
import contextlib
import subprocess
import sys
import threading
import time

import pytest

from jaxinfer.client import AsyncClient, Client, Completed, Completion, Delta, FinishReason
from jaxinfer.errors import (
    ClientError,
    DeadlinePassed,
    Draining,
    DuplicateRequest,
    EngineFailed,
    InvalidRequest,
    QueueFull,
    UnknownModel,
    Unreachable,
)
from jaxinfer.host.request import SamplingParams
from tests.server.fake_engine import expected_logprobs, expected_text, expected_tokens
from tests.server.serving import running, running_in_thread, until


@pytest.fixture(scope="module")
def target():
    with running_in_thread(step_s=0.002) as server:
        yield server.target


@pytest.fixture
def client(target):
    with Client(target, timeout_s=20.0) as client:
        yield client


def test_generate_returns_the_whole_completion(client):
    done = client.generate(
        "hello", temperature=0, max_tokens=5, seed=7, logprobs=True, request_id="me"
    )
    assert isinstance(done, Completion)
    assert done.text == expected_text("hello", 5, seed=7)
    assert done.token_ids == tuple(expected_tokens([1, *b"hello"], 5, seed=7))
    assert done.logprobs == tuple(expected_logprobs(5))
    assert done.finish_reason is FinishReason.LENGTH and done.stop is None
    assert (done.usage.num_prompt_tokens, done.usage.num_output_tokens) == (6, 5)
    assert done.timings.total_s >= done.timings.ttft_s >= 0
    assert (done.request_id, done.model) == ("me", "fake")
    assert done.parameters == SamplingParams(
        temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=7, max_tokens=5, min_tokens=0
    )
    assert done.stamps.e2e_s > 0 and done.stamps.ttft_s is None


def test_a_stream_is_deltas_then_completed(client):
    *deltas, last = client.stream("hello", max_tokens=5, seed=7, logprobs=True)
    assert all(isinstance(delta, Delta) for delta in deltas) and isinstance(last, Completed)
    done, whole = last.completion, client.generate("hello", max_tokens=5, seed=7, logprobs=True)
    assert "".join(delta.text for delta in deltas) == done.text == whole.text
    assert (done.token_ids, done.logprobs) == (whole.token_ids, whole.logprobs)
    assert (done.parameters, done.usage) == (whole.parameters, whole.usage)
    stamps = done.stamps
    assert 0 < stamps.ttft_s <= stamps.e2e_s
    assert stamps.tpot_s == pytest.approx((stamps.e2e_s - stamps.ttft_s) / 4)


def test_three_ways_to_give_a_prompt(client):
    by_tokens = client.generate(token_ids=[1, *b"hello"], seed=1)
    assert by_tokens.text == client.generate("hello", seed=1).text
    by_chat = client.generate(messages=[{"role": "user", "content": "hi"}], seed=1)
    assert by_chat.text == client.generate("user:hi\nassistant:", seed=1).text
    for options in ({}, {"prompt": "a", "token_ids": [1]}):
        with pytest.raises(InvalidRequest, match="give one of"):
            client.generate(**options)
    with pytest.raises(InvalidRequest, match="tools goes with messages"):
        client.generate("a", tools=[{}])


def test_chat_options_reach_the_template(client):
    messages = [{"role": "user", "content": "hi", "name": "Bo"}]
    done = client.generate(
        messages=messages,
        tools=[{"name": "f"}],
        template_kwargs={"depth": 1},
        add_generation_prompt=False,
        seed=1,
    )
    assert done.text == expected_text("user:hi\ntools=[{'name': 'f'}]\ndepth=1", 8, seed=1)


def test_tokens_models_and_health(client):
    assert client.tokenize("ab") == [1, 97, 98]
    assert client.tokenize("ab", add_special=False) == [97, 98]
    assert client.tokenize(messages=[{"role": "user", "content": "a"}])[1:] == list(
        b"user:a\nassistant:"
    )
    assert client.detokenize([1, 97, 98]) == "ab"
    assert client.detokenize([1, 97], skip_special=False) == "<s>a"
    (model,) = client.models()
    assert model == client.model() == client.model("fake")
    assert (model.name, model.max_seq_len, model.eos_token_ids) == ("fake", 512, (0,))
    assert model.defaults.max_tokens == 8
    assert client.health() == "SERVING"
    client.wait_ready(1.0)


def test_a_stop_string_may_be_given_alone(client):
    letter = expected_text("hello", 8, seed=1)[3]
    done = client.generate("hello", stop=letter, seed=1)
    assert (done.finish_reason, done.stop) == (FinishReason.STOP_STRING, letter)
    assert letter not in done.text


BAD = [
    ({"temperature": float("nan")}, InvalidRequest, "temperature"),
    ({"temperature": "hot"}, InvalidRequest, "temperature"),
    ({"max_tokens": -1}, InvalidRequest, "max_tokens"),
    ({"max_tokens": 2**40}, InvalidRequest, "max_tokens"),
    ({"seed": -1}, InvalidRequest, "seed"),
    ({"stop": ["\ud800"]}, InvalidRequest, "stop"),
    ({"model": "gpt"}, UnknownModel, "model"),
]


@pytest.mark.parametrize(("options", "kind", "field"), BAD, ids=lambda value: str(value)[:30])
def test_errors_are_the_servers_own_and_name_the_argument(client, options, kind, field):
    with pytest.raises(kind) as caught:
        client.generate("a", **options)
    assert type(caught.value) is kind and caught.value.field == field
    with pytest.raises(kind):
        list(client.stream("a", **options))


def test_an_unknown_option_is_named_with_a_suggestion(client):
    with pytest.raises(TypeError, match="'temprature'; did you mean 'temperature'"):
        client.generate("a", temprature=1.0)


def test_a_deadline_is_an_error_of_its_own(client):
    with pytest.raises(DeadlinePassed):
        client.generate("a", max_tokens=400, timeout_s=0.05)
    with pytest.raises(DeadlinePassed):
        list(client.stream("a", max_tokens=400, timeout_s=0.05))


def test_breaking_out_of_a_stream_ends_the_request():
    with running_in_thread(step_s=0.01) as server, Client(server.target) as client:
        for _ in client.stream("a", max_tokens=400, request_id="left"):
            break
        end_s = time.monotonic() + 2
        while server.engine.cancelled != ["left"] and time.monotonic() < end_s:
            time.sleep(0.005)
        assert server.engine.cancelled == ["left"]


def test_refusals_and_faults_come_back_as_what_they_were():
    with running_in_thread(step_s=0.01, max_live=1) as server, Client(server.target) as client:
        stream = client.stream("a", max_tokens=400, request_id="one")
        next(stream)
        with pytest.raises(QueueFull):
            client.generate("b")
        with pytest.raises(DuplicateRequest):
            client.generate("b", request_id="one")
        server.engine.fail_with = "boom"
        with pytest.raises(EngineFailed, match="its log has error"):
            list(stream)
        server.engine.drain(1.0)
        with pytest.raises(Draining):
            client.generate("b")


def test_no_server_is_unreachable():
    with Client("127.0.0.1:1", timeout_s=5.0) as client:
        with pytest.raises(Unreachable, match="127.0.0.1:1"):
            client.generate("a")
        with pytest.raises(Unreachable, match="not ready within"):
            client.wait_ready(0.2)


def test_a_strange_status_is_a_client_error(client):
    with pytest.raises(ClientError) as caught:
        client.health("no.such.Service")
    assert caught.value.code == "NOT_FOUND"


def test_threads_share_a_client(client):
    found = {}

    def ask(number):
        found[number] = client.generate(f"p{number}", seed=number).text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: expected_text(f"p{n}", 8, seed=n) for n in range(16)}


def test_the_async_client_does_all_of_it():
    async def body():
        async with running(step_s=0.002) as server, AsyncClient(server.target) as client:
            await client.wait_ready(5.0)
            done = await client.generate("hello", seed=7, max_tokens=5)
            events = [event async for event in client.stream("hello", seed=7, max_tokens=5)]
            assert events[-1].completion.text == done.text == expected_text("hello", 5, seed=7)
            assert await client.detokenize(await client.tokenize("héllo")) == "héllo"
            assert (await client.models())[0] == await client.model("fake")
            assert await client.health() == "SERVING"
            with pytest.raises(InvalidRequest):
                await client.generate("a", top_k=-1)
            with pytest.raises(DeadlinePassed):
                await client.generate("a", max_tokens=400, timeout_s=0.05)

    asyncio.run(body())


def test_closing_an_async_stream_ends_the_request():
    async def body():
        async with running(step_s=0.01) as server, AsyncClient(server.target) as client:
            stream = client.stream("a", max_tokens=400, request_id="left")
            async with contextlib.aclosing(stream):
                async for _ in stream:
                    break
            await until(lambda: server.engine.cancelled == ["left"], 1.0)

    asyncio.run(body())


def test_64_async_streams_at_once():
    async def one(client, number):
        async for event in client.stream(f"p{number}", seed=number, max_tokens=16):
            last = event
        assert last.completion.text == expected_text(f"p{number}", 16, seed=number)

    async def body():
        async with running(step_s=0.002) as server, AsyncClient(server.target) as client:
            await asyncio.gather(*(one(client, number) for number in range(64)))

    asyncio.run(body())


def test_importing_the_client_imports_no_jax():
    code = "import sys, jaxinfer.client; sys.exit(any(m in sys.modules for m in ('jax', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
