"""Any OpenAI-like server as a target, against a small one that streams what it is told."""

import asyncio
import json
import sys

import pytest

from jaxinfer.bench.load.calls import Call
from jaxinfer.bench.load.drive import drive
from jaxinfer.bench.load.openai import OpenAiTarget
from jaxinfer.bench.load.target import Ask
from jaxinfer.errors import ConfigError, Unreachable
from tests.bench_load.sse import listening, served, text_event, usage_event

DONE = "data: [DONE]"


def told(body, path):
    """As many words as asked for, two in the last part, then the usage."""
    is_chat, count = path.endswith("chat/completions"), body["max_tokens"]
    lines = [text_event("", is_chat=is_chat)]  # the empty first part that real servers send
    lines += [text_event("word ", is_chat=is_chat) for _ in range(count - 2)]
    lines += [": a comment", text_event("two words", is_chat=is_chat, finish="length")]
    return [*lines, usage_event(7, count), DONE]


def records(answer, calls, ask=None, **options):
    """What the driver notes, and what the server was asked."""
    seen = []

    async def main():
        async with (
            served(answer, seen) as url,
            OpenAiTarget(url, ask or Ask(), **options) as target,
        ):
            return await drive(target, calls, concurrency=2)

    return asyncio.run(main()).records, seen


def test_parts_are_noted_and_tokens_are_those_of_the_usage():
    calls = [Call(number, 0.0, "some words", 5) for number in range(4)]
    found, seen = records(told, calls)
    for one in found:
        assert (one.status, one.num_prompt_tokens, one.num_output_tokens) == ("OK", 7, 5)
        assert (len(one.chunks_s), one.num_cached_tokens) == (4, 2)
        assert one.tpot_s == pytest.approx((one.chunks_s[-1] - one.chunks_s[0]) / 4)
        assert one.queue_s is None
    assert {one["path"] for one in seen} == {"/v1/completions"}


def test_the_server_is_asked_for_what_the_workload_says():
    _, (asked,) = records(told, [Call(3, 0.0, "some words", 5)], key="secret")
    assert asked["prompt"] == "some words" and asked["max_tokens"] == 5
    assert asked["model"] == "tiny" and asked["stream"] and asked["ignore_eos"]
    assert asked["stream_options"] == {"include_usage": True} and asked["seed"] == 3
    assert asked["headers"]["authorization"] == "bearer secret"
    _, (asked,) = records(told, [Call(0, 0.0, (1, 2), 5)], ask=Ask(ignore_eos=False), model="big")
    assert asked["prompt"] == [1, 2] and asked["model"] == "big" and "ignore_eos" not in asked


def test_a_chat_sends_a_message_and_reads_deltas():
    (one,), (asked,) = records(told, [Call(0, 0.0, "hello", 3)], ask=Ask(is_chat=True))
    assert asked["path"] == "/v1/chat/completions" and "prompt" not in asked
    assert asked["messages"] == [{"role": "user", "content": "hello"}]
    assert (one.status, len(one.chunks_s), one.num_output_tokens) == ("OK", 2, 3)


def test_without_a_usage_each_part_counts_as_one_token():
    def answer(body, path):
        return [text_event("a", is_chat=False), text_event("b", is_chat=False), DONE]

    (one,), _ = records(answer, [Call(0, 0.0, "x", 2)])
    assert (one.num_output_tokens, one.num_prompt_tokens) == (2, 0)


@pytest.mark.parametrize(
    ("lines", "status", "words"),
    [
        (["429", json.dumps({"error": "too many"})], "HTTP 429", "too many"),
        (["500", "oh no"], "HTTP 500", "oh no"),
        ([text_event("a", is_chat=False), "cut"], "RemoteProtocolError", "peer closed"),
        ([text_event("a", is_chat=False)], "CUT", "ended before the answer did"),
        (['data: {"error": {"message": "out of memory"}}'], "STREAM_ERROR", "out of memory"),
        (["data: {"], "NOT_JSON", "the stream holds"),
        ([text_event("", is_chat=False, finish="stop"), DONE], "EMPTY", "no token"),
    ],
)
def test_each_failure_has_a_status_and_the_servers_words(lines, status, words):
    (one,), _ = records(lambda body, path: lines, [Call(0, 0.0, "x", 2)])
    assert one.status == status and words in one.message


def test_an_answer_that_takes_too_long_is_a_failure():
    async def silent(reader, writer):
        await reader.read()

    async def main():
        async with (
            listening(silent) as url,
            OpenAiTarget(f"{url}/v1/", Ask(timeout_s=0.2), model="m") as target,
        ):
            return await drive(target, [Call(0, 0.0, "x", 2)])

    (one,) = asyncio.run(main()).records
    assert one.status in ("TIMEOUT", "ReadTimeout")  # both are at 0.2 s


def test_no_server_and_no_url_are_said_at_once():
    async def enter(url):
        async with OpenAiTarget(url, Ask()):
            pass

    with pytest.raises(Unreachable, match="no server answers at http://127.0.0.1:9/v1"):
        asyncio.run(enter("http://127.0.0.1:9"))
    with pytest.raises(ConfigError, match="must be a URL"):
        asyncio.run(enter("localhost:8000"))


def test_without_httpx_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    monkeypatch.delitem(sys.modules, "jaxinfer.bench.load.openai")
    with pytest.raises(ConfigError, match=r"pip install 'jaxinfer\[load\]'"):
        import jaxinfer.bench.load.openai  # noqa: F401
