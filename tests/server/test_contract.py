"""The published table of statuses: every row, provoked over gRPC in every phase where it can be.

The engine's phases are told apart by what the client has seen: queued is before any token while
another request holds the only slot, prefill is after Started, decode after the first token.
"""

import asyncio
import re
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from google.rpc import error_details_pb2 as details_pb2
from google.rpc import status_pb2

from jaxinfer.edge_config import ServerConfig
from jaxinfer.errors import EngineFailed
from jaxinfer.server.status import DETAILS_KEY, PUSHBACK_KEY
from jaxinfer.v1 import inference_pb2 as pb
from tests.server.fake_engine import LIMITS
from tests.server.serving import detail, until, with_stub

ROOT = Path(__file__).parents[2]
Code = grpc.StatusCode
LONG: dict[str, Any] = {"text": "a", "sampling": {"seed": 0}, "stopping": {"max_tokens": 480}}


class Row(NamedTuple):
    """What a situation has to give: code, reason, and the kinds of details beside ErrorInfo."""

    code: grpc.StatusCode
    reason: str
    details: frozenset[str] = frozenset()
    has_pushback: bool = False


FIELD = frozenset({"BadRequest"})
RETRY = frozenset({"RetryInfo"})
TABLE = {
    "a field out of range": Row(Code.INVALID_ARGUMENT, "INVALID_REQUEST", FIELD),
    "bytes that can't be read": Row(Code.INVALID_ARGUMENT, "INVALID_REQUEST", FIELD),
    "an unknown token id": Row(Code.INVALID_ARGUMENT, "INVALID_REQUEST", FIELD),
    "a prompt above the model's limit": Row(Code.INVALID_ARGUMENT, "INVALID_REQUEST", FIELD),
    "another request under a finished id": Row(Code.INVALID_ARGUMENT, "INVALID_REQUEST", FIELD),
    "a request that can never be let in": Row(
        Code.FAILED_PRECONDITION, "NEVER_FITS", frozenset({"PreconditionFailure"})
    ),
    "the line is full of requests": Row(
        Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", RETRY | {"QuotaFailure"}, True
    ),
    "the line is full of tokens": Row(
        Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", RETRY | {"QuotaFailure"}, True
    ),
    "a message too large": Row(Code.RESOURCE_EXHAUSTED, ""),
    "draining": Row(Code.UNAVAILABLE, "DRAINING", RETRY, True),
    "stopped while it ran": Row(Code.UNAVAILABLE, "DRAINING", RETRY, True),
    "the deadline passed": Row(Code.DEADLINE_EXCEEDED, "DEADLINE_PASSED"),
    "a live id again": Row(Code.ALREADY_EXISTS, "DUPLICATE_REQUEST", FIELD),
    "an unknown model": Row(Code.NOT_FOUND, "UNKNOWN_MODEL", FIELD),
    "the client cancelled": Row(Code.CANCELLED, ""),
    "the engine failed": Row(Code.INTERNAL, "ENGINE_FAILED"),
    "an unexpected error": Row(Code.INTERNAL, "INTERNAL"),
}


def check(error: grpc.aio.AioRpcError, situation: str) -> None:
    """A failed call is its row of the table."""
    wanted = TABLE[situation]
    metadata = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(metadata.get(DETAILS_KEY, b""))
    kinds = {packed.TypeName().rpartition(".")[2] for packed in status.details}
    assert error.code() is wanted.code, (situation, error)
    if wanted.code is Code.DEADLINE_EXCEEDED and "Deadline Exceeded" in (error.details() or ""):
        return  # the client's own clock was first, perhaps while the server's answer came in
    assert kinds - {"ErrorInfo"} == wanted.details, (situation, kinds)
    assert detail(error, details_pb2.ErrorInfo).reason == wanted.reason, situation
    assert (PUSHBACK_KEY in metadata) == wanted.has_pushback, situation
    if wanted.has_pushback:
        delay_s = detail(error, details_pb2.RetryInfo).retry_delay.ToTimedelta().total_seconds()
        assert 0 < delay_s <= 60 and int(metadata[PUSHBACK_KEY]) >= delay_s * 1000
    assert not wanted.reason or status.message == error.details() != ""


async def ended(call: Any) -> grpc.aio.AioRpcError:
    """How a unary call or a stream fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if isinstance(call, grpc.aio.UnaryStreamCall):
            while await call.read() is not grpc.aio.EOF:
                continue
        else:
            await call
    return caught.value


async def both(stub: Any, situation: str, **fields: Any) -> None:
    """The row holds for the unary method and for the stream."""
    check(await ended(stub.Generate(pb.GenerateRequest(**fields))), situation)
    check(await ended(stub.GenerateStream(pb.GenerateStreamRequest(**fields))), situation)


def test_requests_that_are_wrong():
    async def body(stub, server):
        await both(stub, "a field out of range", text="a", sampling={"temperature": -1.0})
        await both(stub, "an unknown token id", token_ids={"ids": [300]})
        await both(stub, "a prompt above the model's limit", text="x" * LIMITS.max_seq_len)
        await both(stub, "an unknown model", text="a", model="gpt")
        await stub.Generate(pb.GenerateRequest(text="a", request_id="one"))
        await both(stub, "another request under a finished id", text="b", request_id="one")
        async with grpc.aio.insecure_channel(server.target) as wire:
            for call in (wire.unary_unary, wire.unary_stream):
                path = "/jaxinfer.v1.InferenceService/Generate"
                path += "Stream" * (call == wire.unary_stream)
                check(await ended(call(path)(b"\xff\xfe")), "bytes that can't be read")
                check(await ended(call(path)(b"x" * 5_000_000)), "a message too large")

    with_stub(body)


async def begun(stub: Any, phase: str, **fields: Any) -> Any:
    """A long stream in a phase."""
    call = stub.GenerateStream(pb.GenerateStreamRequest(**(LONG | fields)))
    if phase != "queued":
        assert (await call.read()).HasField("started")
    if phase == "decode":
        assert (await call.read()).HasField("delta")
    return call


PHASES = ("queued", "prefill", "decode")


@pytest.mark.parametrize("phase", PHASES)
def test_what_comes_beside_a_live_request(phase):
    async def body(stub, server):
        call = await begun(stub, phase, request_id="one")
        await until(lambda: server.server._hub.live == ["one"])
        await both(stub, "a live id again", text="a", request_id="one")
        await both(stub, "the line is full of requests", text="a")
        call.cancel()

    with_stub(body, step_s=0.02, max_live=1)


def test_a_line_that_is_full_of_tokens_and_a_prompt_that_never_fits():
    async def body(stub, server):
        call = stub.GenerateStream(pb.GenerateStreamRequest(text="a" * 30))
        await until(lambda: server.engine.submitted)
        await both(stub, "the line is full of tokens", text="a" * 30)
        await both(stub, "a request that can never be let in", text="a" * 60)
        call.cancel()

    with_stub(body, step_s=1.0, config=ServerConfig(port=0, max_waiting_tokens=50))


@pytest.mark.parametrize("phase", PHASES)
def test_ends_from_outside(phase):
    async def body(stub, server):
        slow = stub.GenerateStream(pb.GenerateStreamRequest(**LONG), timeout=0.3)
        check(await ended(slow), "the deadline passed")
        check(
            await ended(stub.Generate(pb.GenerateRequest(**LONG), timeout=0.3)),
            "the deadline passed",
        )
        call = await begun(stub, phase)
        await until(lambda: server.server._hub.live)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.read()
        assert await call.code() is TABLE["the client cancelled"].code
        await until(lambda: server.server._hub.live == [])

    with_stub(body, step_s=0.02)


@pytest.mark.parametrize("phase", PHASES)
def test_an_engine_that_fails(phase):
    async def body(stub, server):
        call = await begun(stub, phase)
        await until(lambda: server.server._hub.live)
        server.engine.fail_with = "XlaRuntimeError at 0x7f001234"
        error = await ended(call)
        check(error, "the engine failed")
        assert "0x7f" not in error.details() and re.search(r"error \w{8}$", error.details())

    with_stub(body, step_s=0.02)


@pytest.mark.parametrize("phase", PHASES)
def test_a_server_that_stops(phase):
    async def body(stub, server):
        call = await begun(stub, phase)
        await until(lambda: server.server._hub.live)
        end = asyncio.ensure_future(ended(call))
        server.engine.refuse()
        await both(stub, "draining", text="b")
        await server.server.stop(0.05)
        check(await end, "stopped while it ran")

    with_stub(body, step_s=0.02)


def test_errors_that_nobody_foresaw():
    async def body(stub, server):
        server.engine.submit_error = ZeroDivisionError("secret")
        await both(stub, "an unexpected error", text="a")
        server.engine.submit_error = EngineFailed("secret")
        await both(stub, "the engine failed", text="a")

    with_stub(body)


def test_the_page_shows_the_table():
    page = (ROOT / "docs" / "serving.md").read_text()
    section = page.partition("## Limits and status codes")[2].partition("\n## ")[0]
    for situation, row in TABLE.items():
        line = next((one for one in section.splitlines() if one.startswith(f"| {situation} |")), "")
        assert line, situation
        shown = {*row.details, row.code.name, *filter(None, [row.reason])}
        assert all(word in line for word in shown), (situation, line)
