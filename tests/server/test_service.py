"""What calls get and how they end, through a real server on loopback."""

import asyncio
import json
import sys
import time
from pathlib import Path

import grpc
import pytest

from jaxinfer.host.request import SamplingParams
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import model_pb2, model_pb2_grpc
from tests.server.fake_engine import expected_logprobs, expected_text, expected_tokens
from tests.server.serving import refused, until, with_stub

ROOT = Path(__file__).parents[2]
SERVICE = "/jaxinfer.v1.InferenceService"


def test_a_stream_is_started_deltas_finished_summary():
    async def body(stub, server):
        message = pb.GenerateStreamRequest(
            text="hello",
            request_id="mine",
            sampling={"seed": 3},
            stopping={"max_tokens": 5},
            output={"token_ids": True, "logprobs": True},
        )
        events = [event async for event in stub.GenerateStream(message)]
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds[0] == "started" and kinds[-2:] == ["finished", "summary"]
        assert set(kinds[1:-2]) == {"delta"}
        started, deltas = events[0].started, [event.delta for event in events[1:-2]]
        assert (started.request_id, started.model) == ("mine", "fake")
        assert started.num_prompt_tokens == 6
        assert "".join(delta.text for delta in deltas) == expected_text("hello", 5, seed=3)
        ids = [token for delta in deltas for token in delta.token_ids]
        assert ids == expected_tokens([1, *b"hello"], 5, seed=3)
        assert [value for delta in deltas for value in delta.logprobs] == (expected_logprobs(5))
        assert events[-2].finished.reason == pb.FINISH_REASON_LENGTH
        usage = events[-1].summary.usage
        assert (usage.num_prompt_tokens, usage.num_output_tokens) == (6, 5)
        times = events[-1].summary.timings
        assert all(value >= 0 for _, value in times.ListFields()) and times.HasField("total_s")

    with_stub(body)


def test_a_unary_reply_holds_what_a_stream_says():
    async def body(stub, server):
        fields = {"text": "hello", "sampling": {"seed": 3}, "request_id": "x"}
        events = [event async for event in stub.GenerateStream(pb.GenerateStreamRequest(**fields))]
        reply = await stub.Generate(pb.GenerateRequest(**fields))
        assert reply.started == events[0].started
        assert reply.output.text == "".join(event.delta.text for event in events)
        assert not reply.output.token_ids and not reply.output.logprobs  # only what was asked
        assert reply.finished == events[-2].finished
        assert reply.summary.usage == events[-1].summary.usage

    with_stub(body)


def test_effective_parameters_are_request_then_model_then_default():
    async def body(stub, server):
        message = pb.GenerateRequest(
            text="a", sampling={"temperature": 0.7}, stopping={"ignore_eos": True}, priority=-2
        )
        found = (await stub.Generate(message)).started.parameters
        assert found.sampling.temperature == 0.7  # asked
        assert (found.sampling.top_p, found.stopping.max_tokens) == (0.9, 4)  # the model's
        assert (found.sampling.top_k, found.sampling.min_p) == (0, 0.0)  # ours
        assert found.stopping.ignore_eos and found.output.text and found.priority == -2
        assert found.sampling.HasField("seed")
        again = (await stub.Generate(message)).started.parameters
        assert again.sampling.seed != found.sampling.seed  # drawn for each request
        assert server.engine.submitted[0].sampling.seed == found.sampling.seed
        assert server.engine.submitted[0].priority == -2

    with_stub(body, defaults=SamplingParams(top_p=0.9, temperature=0.3, max_tokens=4))


def test_stops_are_reported():
    async def body(stub, server):
        letter = expected_text("hello", 6)[4]
        cut = expected_text("hello", 6).index(letter)
        message = pb.GenerateRequest(text="hello", sampling={"seed": 0})
        message.stopping.stop.append(letter)
        reply = await stub.Generate(message)
        assert reply.output.text == expected_text("hello", cut)
        assert reply.finished.reason == pb.FINISH_REASON_STOP_STRING
        assert reply.finished.stop_string == letter
        message.stopping.ClearField("stop")
        message.stopping.stop_token_ids.append(ord(letter))
        reply = await stub.Generate(message)
        assert reply.finished.reason == pb.FINISH_REASON_STOP_TOKEN
        assert reply.finished.stop_token_id == ord(letter)

    with_stub(body)


def test_64_streams_at_once_each_get_their_own_text():
    async def one(stub, number):
        message = pb.GenerateStreamRequest(
            text=f"prompt {number}", sampling={"seed": number}, stopping={"max_tokens": 20}
        )
        events = [event async for event in stub.GenerateStream(message)]
        text = "".join(event.delta.text for event in events)
        assert text == expected_text(f"prompt {number}", 20, seed=number)

    async def body(stub, server):
        await asyncio.gather(*(one(stub, number) for number in range(64)))

    with_stub(body, step_s=0.002)


def test_a_slow_reader_gets_larger_deltas():
    async def body(stub, server):
        message = pb.GenerateStreamRequest(
            text="hello", sampling={"seed": 1}, stopping={"max_tokens": 200}
        )
        stream = aiter(stub.GenerateStream(message))
        await anext(stream)
        time.sleep(0.5)  # the server shares this loop, so nothing is read or sent meanwhile
        events = [event async for event in stream]
        deltas = [event.delta.text for event in events if event.HasField("delta")]
        assert "".join(deltas) == expected_text("hello", 200, seed=1)
        assert server.engine.num_deliveries == 200 and len(deltas) < 20

    with_stub(body, step_s=0.001)


@pytest.mark.parametrize("num_read", [0, 1, 3])
def test_a_client_that_leaves_ends_its_request(num_read):
    async def body(stub, server):
        message = pb.GenerateStreamRequest(
            text="a", request_id="gone", stopping={"max_tokens": 400}
        )
        stream = stub.GenerateStream(message)
        for _ in range(num_read):
            await stream.read()
        await until(lambda: server.engine.submitted)
        stream.cancel()
        await until(lambda: server.engine.cancelled == ["gone"], 1.0)
        await until(lambda: server.server._hub.live == [], 1.0)

    with_stub(body, step_s=0.01)


VICTIM = """
import sys, threading
from jaxinfer.client import Client
client = Client(sys.argv[1])
threading.Thread(target=client.generate, args=("a",), kwargs={"max_tokens": 400}).start()
for _ in client.stream("a", max_tokens=400):
    pass
"""


def test_a_client_that_is_killed_ends_its_requests():
    async def body(stub, server):
        command = (sys.executable, "-c", VICTIM, server.target)
        victim = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
        await until(lambda: len(server.engine.submitted) == 2)
        victim.kill()
        await victim.wait()
        await until(lambda: len(server.engine.cancelled) == 2, 1.0)
        await until(lambda: server.server._hub.live == [], 1.0)

    with_stub(body, step_s=0.01)


def test_a_request_that_ends_by_itself_is_not_cancelled():
    async def body(stub, server):
        await stub.Generate(pb.GenerateRequest(text="a"))
        async for _ in stub.GenerateStream(pb.GenerateStreamRequest(text="a")):
            pass
        await asyncio.sleep(0.05)
        assert server.engine.cancelled == []

    with_stub(body)


def test_a_deadline_reaches_the_engine_and_ends_the_call():
    async def body(stub, server):
        message = pb.GenerateRequest(text="a", stopping={"max_tokens": 400})
        await refused(stub.Generate(message, timeout=0.2), grpc.StatusCode.DEADLINE_EXCEEDED)
        assert server.engine.submitted[0].deadline_s is not None
        await until(lambda: server.server._hub.live == [], 1.0)
        await stub.Generate(pb.GenerateRequest(text="a", stopping={"max_tokens": 1}))
        assert server.engine.submitted[1].deadline_s is None

    with_stub(body, step_s=0.01)


def test_the_engines_own_deadline_is_a_status_after_the_last_event():
    async def body(stub, server):
        server.engine.fail_with = "boom in /secret/file.py"
        stream = stub.GenerateStream(pb.GenerateStreamRequest(text="a"))
        kinds = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for event in stream:
                kinds.append(event.WhichOneof("event"))
                if kinds[-1] == "finished":
                    assert event.finished.reason == pb.FINISH_REASON_ERROR
        assert kinds == ["started", "finished", "summary"]
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in caught.value.details()
        server.engine.fail_with = ""
        assert (await stub.Generate(pb.GenerateRequest(text="a"))).output.text

    with_stub(body)


def test_chat_goes_through_the_template_with_all_it_was_given():
    async def body(stub, server):
        chat = {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "assistant", "fields_json": json.dumps({"tool_calls": [1]})},
            ],
            "tools_json": '[{"b": 1, "a": 1.0}]',
            "template_kwargs_json": '{"thinking": false}',
        }
        reply = await stub.Tokenize(pb.TokenizeRequest(chat=chat))
        text = (await stub.Detokenize(pb.DetokenizeRequest(token_ids=reply.token_ids))).text
        assert text == (
            "system:be brief\nassistant:None\ntools=[{'b': 1, 'a': 1.0}]\nthinking=False\n"
            "assistant:"
        )
        chat["add_generation_prompt"] = False
        shorter = await stub.Tokenize(pb.TokenizeRequest(chat=chat))
        assert len(shorter.token_ids) == len(reply.token_ids) - len("\nassistant:")

    with_stub(body)


def test_tokens_go_there_and_back():
    async def body(stub, server):
        with_special = await stub.Tokenize(pb.TokenizeRequest(text="héllo"))
        without = await stub.Tokenize(pb.TokenizeRequest(text="héllo", add_special=False))
        assert list(with_special.token_ids) == [1, *without.token_ids]
        message = pb.DetokenizeRequest(token_ids=with_special.token_ids)
        assert (await stub.Detokenize(message)).text == "héllo"
        message.skip_special = False
        assert (await stub.Detokenize(message)).text == "<s>héllo"
        await refused(
            stub.Detokenize(pb.DetokenizeRequest(token_ids=[256])),
            grpc.StatusCode.INVALID_ARGUMENT,
        )
        chat = {"messages": [{"role": "user", "content": "a"}]}
        await refused(
            stub.Tokenize(pb.TokenizeRequest(chat=chat, add_special=True)),
            grpc.StatusCode.INVALID_ARGUMENT,
        )

    with_stub(body)


def test_the_model_is_described():
    async def body(_, server):
        async with grpc.aio.insecure_channel(server.target) as wire:
            stub = model_pb2_grpc.ModelServiceStub(wire)
            (model,) = (await stub.ListModels(model_pb2.ListModelsRequest())).models
            found = (await stub.GetModel(model_pb2.GetModelRequest())).model
            assert found == model and model.name == "fake"
            assert (model.max_seq_len, model.vocab_size) == (512, 256)
            assert model.defaults.stopping.max_tokens == 8
            assert not model.defaults.sampling.HasField("seed")
            await refused(
                stub.GetModel(model_pb2.GetModelRequest(model="x")), grpc.StatusCode.NOT_FOUND
            )

    with_stub(body)
