"""Messages with more parts than a request needs are refused before anything is made of them."""

import asyncio
import threading

import grpc
import pytest

from jaxinfer.edge_config import ServerConfig
from jaxinfer.errors import ConfigError, InvalidRequest
from jaxinfer.server import bounds, translate
from jaxinfer.v1 import admin_pb2, admin_pb2_grpc
from jaxinfer.v1 import inference_pb2 as pb
from tests.server.serving import free_port, refused, running, with_stub

MANY = bounds.MAX_PARTS + 1


@pytest.mark.parametrize(
    "message",
    [
        pb.GenerateRequest(chat={"messages": [pb.ChatMessage()] * MANY}),
        pb.GenerateRequest(stopping={"stop": [""] * MANY}),
    ],
)
def test_more_parts_than_a_request_needs_are_not_read(message, monkeypatch):
    monkeypatch.setattr(bounds, "refuse_unknown", lambda message: pytest.fail("it was read"))
    with pytest.raises(InvalidRequest, match=f"more than {bounds.MAX_PARTS} fields"):
        translate.parse(pb.GenerateRequest, message.SerializeToString())


def test_fields_that_nobody_knows_and_repeated_ones_count_too(monkeypatch):
    monkeypatch.setattr(bounds, "MAX_PARTS", 1000)
    for part in (b"\xf8\x7f\x01", pb.GenerateRequest(sampling={}).SerializeToString()):
        with pytest.raises(InvalidRequest, match="fields and list entries"):
            bounds.check_parts(pb.GenerateRequest.DESCRIPTOR, part * 1001)


def test_large_requests_of_few_parts_pass():
    ids = pb.GenerateRequest(token_ids={"ids": [70_000] * 200_000})
    text = pb.GenerateRequest(text="\x0a" * 1_000_000)
    most = pb.GenerateRequest(chat={"messages": [pb.ChatMessage(role="a", content="b")] * 4096})
    for message in (ids, text, most):
        bounds.check_parts(pb.GenerateRequest.DESCRIPTOR, message.SerializeToString())


def test_damaged_bytes_are_left_to_the_parser():
    data = pb.GenerateRequest(
        chat={"messages": [pb.ChatMessage(role="user")] * 9}
    ).SerializeToString()
    for end in range(len(data)):
        bounds.check_parts(pb.GenerateRequest.DESCRIPTOR, data[:end])
    bounds.check_parts(pb.GenerateRequest.DESCRIPTOR, b"\xff" * 100)
    with pytest.raises(InvalidRequest, match="damaged"):
        translate.parse(pb.GenerateRequest, b"\x0a\xff\xff\xff\xff\x0f" + b"x" * bounds.LARGE_BYTES)


def test_the_bound_on_messages_is_a_setting():
    async def body(stub, server):
        messages = [pb.ChatMessage(role="user", content="a")] * 3
        await stub.Generate(pb.GenerateRequest(chat={"messages": messages[:2]}))
        call = stub.Generate(pb.GenerateRequest(chat={"messages": messages}))
        error = await refused(call, grpc.StatusCode.INVALID_ARGUMENT)
        said.append(error.details())

    said = []
    with_stub(body, config=ServerConfig(port=0, max_chat_messages=2))
    assert "3 messages; at most 2" in said[0] and "server.max_chat_messages" in said[0]
    with pytest.raises(ConfigError, match="server.max_chat_messages is 0"):
        ServerConfig(max_chat_messages=0)


def test_a_request_is_explained_off_the_event_loop():
    threads = []

    def explain(request_id):
        threads.append(threading.current_thread())
        return [admin_pb2.Happening(kind="decode", seconds=1.0)]

    async def main():
        config = ServerConfig(port=0, admin_port=free_port())
        async with (
            running(config=config, explain=explain),
            grpc.aio.insecure_channel(f"127.0.0.1:{config.admin_port}") as wire,
        ):
            stub = admin_pb2_grpc.AdminServiceStub(wire)
            found = await stub.ExplainRequest(admin_pb2.ExplainRequestRequest(request_id="a"))
            return threading.current_thread(), found

    loop_thread, found = asyncio.run(main())
    assert len(found.happenings) == 1 and threads[0] is not loop_thread
