"""Requests that can't be served: each gets its status, and hurts no one else."""

import asyncio
import math

import grpc
import pytest
from google.rpc import error_details_pb2

from jaxinfer.errors import EngineFailed
from jaxinfer.server.status import PUSHBACK_KEY
from jaxinfer.v1 import inference_pb2 as pb
from tests.server.fake_engine import LIMITS, expected_text
from tests.server.serving import detail, refused, until, with_stub

SERVICE = "/jaxinfer.v1.InferenceService"

BAD = {
    "no prompt": ({}, "prompt"),
    "empty text": ({"text": ""}, "text"),
    "no tokens": ({"token_ids": {}}, "prompt"),
    "empty chat": ({"chat": {}}, "chat.messages"),
    "bad token": ({"token_ids": {"ids": [5, 999]}}, "prompt"),
    "negative token": ({"token_ids": {"ids": [-1]}}, "prompt"),
    "long prompt": ({"text": "x" * LIMITS.max_seq_len}, "prompt"),
    "nan": ({"text": "a", "sampling": {"temperature": math.nan}}, "sampling.temperature"),
    "infinite": ({"text": "a", "sampling": {"top_p": math.inf}}, "sampling.top_p"),
    "negative max": ({"text": "a", "stopping": {"max_tokens": -1}}, "stopping.max_tokens"),
    "zero max": ({"text": "a", "stopping": {"max_tokens": 0}}, "stopping.max_tokens"),
    "negative top_k": ({"text": "a", "sampling": {"top_k": -3}}, "sampling.top_k"),
    "empty stop": ({"text": "a", "stopping": {"stop": [""]}}, "stopping.stop"),
    "min over max": (
        {"text": "a", "stopping": {"max_tokens": 2, "min_tokens": 3}},
        "stopping.min_tokens",
    ),
    "bad stop id": (
        {"text": "a", "stopping": {"stop_token_ids": [300]}},
        "stopping.stop_token_ids",
    ),
    "empty id": ({"text": "a", "request_id": ""}, "request_id"),
    "long id": ({"text": "a", "request_id": "x" * 300}, "request_id"),
    "tools not json": (
        {"chat": {"messages": [{"role": "user", "content": "a"}], "tools_json": "{"}},
        "chat.tools_json",
    ),
    "tools no array": (
        {"chat": {"messages": [{"role": "user", "content": "a"}], "tools_json": "{}"}},
        "chat.tools_json",
    ),
    "deep json": (
        {"chat": {"messages": [{"role": "user"}], "template_kwargs_json": '{"a":' * 100_000}},
        "chat.template_kwargs_json",
    ),
    "taken kwarg": (
        {"chat": {"messages": [{"role": "user"}], "template_kwargs_json": '{"messages": 1}'}},
        "chat.template_kwargs_json",
    ),
    "no role": ({"chat": {"messages": [{"content": "a"}]}}, "chat.messages[0].role"),
    "template refuses": (
        {"chat": {"messages": [{"role": "narrator", "content": "a"}]}},
        "chat.messages",
    ),
}


def test_bad_requests_name_their_field_and_hurt_no_one():
    async def body(stub, server):
        bystander = asyncio.ensure_future(
            stub.Generate(
                pb.GenerateRequest(text="by", sampling={"seed": 0}, stopping={"max_tokens": 200})
            )
        )
        for name, (fields, wanted) in BAD.items():
            error = await refused(
                stub.Generate(pb.GenerateRequest(**fields)), grpc.StatusCode.INVALID_ARGUMENT
            )
            (violation,) = detail(error, error_details_pb2.BadRequest).field_violations
            assert violation.field == wanted, name
            stream = stub.GenerateStream(pb.GenerateStreamRequest(**fields))
            await refused(stream.read(), grpc.StatusCode.INVALID_ARGUMENT)
        assert (await bystander).output.text == expected_text("by", 200)
        assert server.server._hub.live == []

    with_stub(body, step_s=0.001)


GARBAGE = {
    "noise": b"\xff\xfe\x00garbage",
    "cut short": pb.GenerateRequest(text="hello").SerializeToString()[:-2],
    "not UTF-8": b"\x1a\x02\xc3\x28",
    "not UTF-8 within": b"\x3a\x04\x1a\x02\xc3\x28",
}


@pytest.mark.parametrize("method", ["Generate", "Tokenize", "Detokenize"])
def test_garbage_is_invalid_argument(method):
    async def body(stub, server):
        async with grpc.aio.insecure_channel(server.target) as wire:
            call = wire.unary_unary(f"{SERVICE}/{method}")
            await refused(call(GARBAGE["noise"]), grpc.StatusCode.INVALID_ARGUMENT)
            if method == "Generate":
                stream = wire.unary_stream(f"{SERVICE}/GenerateStream")
                for data in GARBAGE.values():
                    await refused(call(data), grpc.StatusCode.INVALID_ARGUMENT)
                    await refused(stream(data).read(), grpc.StatusCode.INVALID_ARGUMENT)
        assert (await stub.Generate(pb.GenerateRequest(text="a"))).output.text

    with_stub(body)


def test_unknown_fields_are_refused_wherever_they_are():
    extra = b"\xf8\x07\x01"  # field 127, a varint

    def nested(outer: int, inner: bytes) -> bytes:
        return bytes([outer << 3 | 2, len(inner)]) + inner

    base = pb.GenerateRequest(text="a").SerializeToString()
    cases = {
        "the request": base + extra,
        "sampling": base + nested(6, extra),
        "chat.messages": nested(5, nested(1, extra)),
    }

    async def body(stub, server):
        async with grpc.aio.insecure_channel(server.target) as wire:
            call = wire.unary_unary(f"{SERVICE}/Generate")
            for where, data in cases.items():
                error = await refused(call(data), grpc.StatusCode.INVALID_ARGUMENT)
                assert f"{where} has a field numbered 127" in error.details()
        assert not server.engine.submitted

    with_stub(body)


def test_a_wrong_model_is_not_found():
    async def body(stub, server):
        error = await refused(
            stub.Generate(pb.GenerateRequest(text="a", model="gpt")), grpc.StatusCode.NOT_FOUND
        )
        assert "'gpt'" in error.details() and "'fake'" in error.details()
        await refused(
            stub.Tokenize(pb.TokenizeRequest(text="a", model="x")), grpc.StatusCode.NOT_FOUND
        )
        assert (await stub.Generate(pb.GenerateRequest(text="a", model="fake"))).output.text

    with_stub(body)


def test_a_full_queue_says_when_to_come_back():
    async def body(stub, server):
        message = pb.GenerateStreamRequest(text="a", stopping={"max_tokens": 400})
        stream = stub.GenerateStream(message)
        await stream.read()
        error = await refused(
            stub.Generate(pb.GenerateRequest(text="b")), grpc.StatusCode.RESOURCE_EXHAUSTED
        )
        delay = detail(error, error_details_pb2.RetryInfo).retry_delay.ToTimedelta()
        assert 0 < delay.total_seconds() < 60
        assert dict(error.trailing_metadata())[PUSHBACK_KEY] == f"{delay.total_seconds() * 1e3:.0f}"
        assert detail(error, error_details_pb2.ErrorInfo).reason == "QUEUE_FULL"
        stream.cancel()
        await until(lambda: server.server._hub.live == [])

    with_stub(body, step_s=0.005, max_live=1)


def test_a_live_id_is_taken():
    async def body(stub, server):
        message = pb.GenerateStreamRequest(text="a", request_id="one", stopping={"max_tokens": 400})
        stream = stub.GenerateStream(message)
        await stream.read()
        await refused(
            stub.Generate(pb.GenerateRequest(text="b", request_id="one")),
            grpc.StatusCode.ALREADY_EXISTS,
        )
        assert (await stream.read()).HasField("delta")  # the first is unhurt
        stream.cancel()

    with_stub(body, step_s=0.005)


@pytest.mark.parametrize("error", [ZeroDivisionError("/secret"), EngineFailed("XlaError /secret")])
def test_an_unexpected_error_is_internal_and_says_little(error):
    async def body(stub, server):
        server.engine.submit_error = error
        found = await refused(stub.Generate(pb.GenerateRequest(text="a")), grpc.StatusCode.INTERNAL)
        assert "secret" not in found.details() and "error " in found.details()
        assert server.server._hub.live == []

    with_stub(body)
