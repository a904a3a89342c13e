"""Clients that no one here wrote, through the real gateway to real servers with the demo model."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from jaxinfer import demo, weights
from jaxinfer.client import Client
from jaxinfer.client.admin import AdminClient
from jaxinfer.server import openai_door
from tests.server.demo_server import MODEL, serving

pytest.importorskip("smg")
import httpx  # noqa: E402
import openai  # noqa: E402
import psutil  # noqa: E402

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not weights.is_ready("smollm2-135m"), reason="the demo model is not here"),
]
ASKED = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def door():
    """A server with its door, and a client of it."""
    port, admin = openai_door._free_port(), openai_door._free_port()
    options = ("--openai", str(port), "--server.admin-port", str(admin))
    with serving(*options) as (process, ready):
        said = demo._event(process, "openai")
        with openai.OpenAI(base_url=said["url"], api_key=said["key"], max_retries=0) as client:
            yield process, ready, said, client


def until(condition) -> None:
    """Waits for something to come true."""
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, "it did not come true"
        time.sleep(0.05)


def test_models_chat_completions_and_responses(door):
    _, ready, _, client = door
    assert [model.id for model in client.models.list()] == [MODEL]
    with Client(ready["target"]) as native:
        same = native.generate(messages=ASKED, max_tokens=16, temperature=0.0)
    chat = client.chat.completions.create(
        model=MODEL, messages=ASKED, max_tokens=16, temperature=0, logprobs=True
    )
    (choice,) = chat.choices
    assert choice.message.content == same.text == ANSWER
    assert choice.finish_reason == "stop"
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (37, 8)
    texts = [one.token for one in choice.logprobs.content]
    assert "".join(texts).startswith(ANSWER)
    completion = client.completions.create(
        model=MODEL, prompt=["The sky is", "One two"], max_tokens=4, temperature=0
    )
    with Client(ready["target"]) as native:
        for choice, prompt in zip(completion.choices, ("The sky is", "One two"), strict=True):
            found = native.generate(prompt, max_tokens=4, temperature=0.0)
            assert choice.text == found.text and choice.finish_reason == "length"
    response = client.responses.create(
        model=MODEL, input=ASKED[0]["content"], max_output_tokens=16, temperature=0
    )
    assert response.output_text == ANSWER


def test_a_stream_has_the_same_text_and_ends_with_its_usage(door):
    *_, client = door
    events = list(
        client.chat.completions.create(
            model=MODEL,
            messages=ASKED,
            max_tokens=16,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(texts) == ANSWER and len(texts) > 3
    assert events[-1].usage.completion_tokens == 8
    ends = [event.choices[0].finish_reason for event in events if event.choices]
    assert ends[-1] == "stop"


def test_a_stop_string_and_a_seed_work_as_they_do_over_grpc(door):
    _, ready, _, client = door
    stopped = client.chat.completions.create(
        model=MODEL, messages=ASKED, max_tokens=16, temperature=0, stop=["Paris"]
    )
    assert stopped.choices[0].message.content == "The capital of France is "
    drawn = client.completions.create(
        model=MODEL, prompt="The sky is", max_tokens=16, temperature=0.9, top_p=0.8, seed=7
    )
    with Client(ready["target"]) as native:
        same = native.generate("The sky is", max_tokens=16, temperature=0.9, top_p=0.8, seed=7)
    assert same.text != native_greedy(ready["target"])
    assert drawn.choices[0].text == same.text


def native_greedy(target: str) -> str:
    with Client(target) as native:
        return native.generate("The sky is", max_tokens=16, temperature=0.0).text


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("sampling_params.n", {"n": 2}),
        ("sampling_params.frequency_penalty", {"frequency_penalty": 0.5}),
        ("sampling_params.presence_penalty", {"presence_penalty": 0.5}),
        ("sampling_params.repetition_penalty", {"extra_body": {"repetition_penalty": 1.1}}),
        ("sampling_params.json_schema", {"response_format": {"type": "json_object"}}),
        ("sampling_params.regex", {"extra_body": {"regex": "a+"}}),
        ("sampling_params.logprobs", {"logprobs": True, "top_logprobs": 2}),
        ("maximum context length", {"messages": [{"role": "user", "content": "a b " * 600}]}),
    ],
)
def test_what_is_not_served_is_a_400_that_names_it(door, name, more):
    *_, client = door
    with pytest.raises(openai.BadRequestError, match=name):
        asked = {"model": MODEL, "messages": ASKED, "max_tokens": 4}
        client.chat.completions.create(**asked | more)


def test_anthropics_protocol_streams_and_answers(door):
    _, _, said, _ = door
    headers = {"authorization": f"Bearer {said['key']}", "anthropic-version": "2023-06-01"}
    body = {"model": MODEL, "max_tokens": 16, "temperature": 0, "messages": ASKED}
    with httpx.Client(base_url=said["url"], headers=headers, timeout=60) as client:
        message = client.post("/messages", json=body).raise_for_status().json()
        assert message["content"][0]["text"] == ANSWER
        assert message["stop_reason"] == "end_turn"
        assert message["usage"]["output_tokens"] == 8
        with client.stream("POST", "/messages", json=body | {"stream": True}) as stream:
            events = [json.loads(line[6:]) for line in stream.iter_lines() if line[:6] == "data: "]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    texts = [delta["text"] for delta in deltas]
    assert "".join(texts) == ANSWER and events[-1]["type"] == "message_stop"


def test_a_client_that_leaves_in_the_middle_frees_its_request(door):
    _, ready, _, client = door
    with AdminClient(ready["admin"]) as operators:
        before = operators.load().num_output_tokens
        stream = client.completions.create(
            model=MODEL,
            prompt="Count: one two",
            max_tokens=490,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        assert operators.load().num_running == 1
        stream.close()
        until(lambda: operators.load().num_running == 0)
        assert operators.load().num_output_tokens - before < 490


def test_the_key_is_asked_for_and_is_on_no_command_line(door):
    process, _, said, _ = door
    stranger = openai.OpenAI(base_url=said["url"], api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("jaxinfer.server.openai_child" in child.cmdline() for child in children)
    for one in (psutil.Process(process.pid), *children):
        assert said["key"] not in " ".join(one.cmdline())
        assert said["key"] not in str(one.environ())
    # Who has a client's key still can't send the requests of others elsewhere.
    url = said["url"].removesuffix("/v1")
    headers = {"authorization": f"Bearer {said['key']}"}
    found = httpx.post(f"{url}/workers", json={"url": "grpc://127.0.0.1:1"}, headers=headers)
    assert found.status_code == 401
    sockets = [one for child in children for one in child.net_connections()]
    assert {one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


def test_the_printed_curl_works_and_a_dead_gateway_comes_back(door):
    process, _, said, client = door
    (child,) = psutil.Process(process.pid).children()
    child.kill()
    child.wait()

    def answers() -> bool:
        done = subprocess.run(shlex.split(said["curl"]), capture_output=True, text=True)
        return done.returncode == 0 and "chat.completion" in done.stdout

    until(answers)
    assert [model.id for model in client.models.list()] == [MODEL]


def test_sigterm_lets_a_stream_finish_and_leaves_no_child():
    port = openai_door._free_port()
    with serving("--openai", str(port), "--server.drain-grace-s", "20") as (process, _):
        said = demo._event(process, "openai")
        (child,) = psutil.Process(process.pid).children()
        with openai.OpenAI(base_url=said["url"], api_key=said["key"], max_retries=0) as client:
            stream = client.completions.create(
                model=MODEL,
                prompt="Count: one two",
                max_tokens=100,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            events = iter(stream)
            next(events)
            process.send_signal(signal.SIGTERM)
            assert list(events)[-1].choices[0].finish_reason == "length"
        assert process.wait(timeout=PATIENCE_S) == 0
        assert not child.is_running()


def test_a_killed_server_takes_its_gateway_along():
    with serving("--openai", str(openai_door._free_port())) as (process, _):
        demo._event(process, "openai")
        (child,) = psutil.Process(process.pid).children()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        until(lambda: not child.is_running())


def test_of_two_servers_one_is_killed_and_the_next_four_requests_are_answered():
    with ExitStack() as stack:
        (first, one), (_, other) = [stack.enter_context(serving()) for _ in range(2)]
        urls = [openai_door.worker_url("127.0.0.1", ready["port"]) for ready in (one, other)]
        port, key = openai_door._free_port(), "k" * 32
        command = [sys.executable, "-m", "jaxinfer.server.openai_child"]
        gateway = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, text=True))
        stack.callback(gateway.kill)
        settings = openai_door.settings_of(port, key, urls, 1.0)
        gateway.stdin.write(json.dumps(settings) + "\n")
        gateway.stdin.flush()
        root = f"http://127.0.0.1:{port}"
        until(lambda: healthy(root) == 2)
        with openai.OpenAI(base_url=f"{root}/v1", api_key=key, max_retries=0) as client:
            ask = {"model": MODEL, "messages": ASKED, "max_tokens": 16, "temperature": 0}
            for _ in range(4):
                client.chat.completions.create(**ask)
            first.kill()
            first.wait()
            for _ in range(4):
                answer = client.chat.completions.create(**ask)
                assert answer.choices[0].message.content == ANSWER


def healthy(root: str) -> int:
    try:
        return httpx.get(f"{root}/readiness").json().get("healthy_workers", 0)
    except httpx.TransportError:
        return 0
