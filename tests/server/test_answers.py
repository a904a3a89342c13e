"""One request id is one execution: who asks again gets the same answer, and others are refused."""

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2

from jaxinfer.edge_config import ServerConfig
from jaxinfer.errors import InvalidRequest
from jaxinfer.host.request import FinishReason, Output, Request, SamplingParams
from jaxinfer.server.answers import Answers, Draft
from jaxinfer.v1 import inference_pb2 as pb
from tests.server.serving import detail, refused, until, with_stub


def message(request_id: str, **fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="hello", request_id=request_id, **fields)


async def streamed(stub, request: pb.GenerateRequest) -> str:
    asked = pb.GenerateStreamRequest.FromString(request.SerializeToString())
    return "".join([event.delta.text async for event in stub.GenerateStream(asked)])


def test_a_thousand_ids_asked_three_times_run_once_each():
    async def body(stub, server):
        names = [f"id {number}" for number in range(1000)]
        replies: dict[str, pb.GenerateResponse] = {}

        async def ask(name: str) -> None:
            for _ in range(2):
                reply = await stub.Generate(message(name))
                first = replies.setdefault(name, reply)
                assert (reply.output, reply.started) == (first.output, first.started)
            assert await streamed(stub, message(name)) == replies[name].output.text

        for start in range(0, 1000, 50):
            await asyncio.gather(*map(ask, names[start : start + 50]))
        assert sorted(one.request_id for one in server.engine.submitted) == sorted(names)
        assert len({reply.started.parameters.sampling.seed for reply in replies.values()}) == 1000

    with_stub(body)


def test_another_request_under_the_id_of_a_finished_one_is_invalid():
    async def body(stub, server):
        await stub.Generate(message("a", sampling={"seed": 1}))
        for other in (
            message("a", sampling={"seed": 2}),
            message("a", sampling={"seed": 1}, stopping={"max_tokens": 3}),
            pb.GenerateRequest(text="hullo", request_id="a", sampling={"seed": 1}),
        ):
            error = await refused(stub.Generate(other), grpc.StatusCode.INVALID_ARGUMENT)
            assert detail(error, error_details_pb2.BadRequest).field_violations
            assert "hello" not in error.details()
        assert len(server.engine.submitted) == 1

    with_stub(body)


def test_a_resume_of_a_finished_one_goes_on_where_the_client_was():
    async def body(stub, server):
        whole = await stub.Generate(message("a", sampling={"seed": 1}))
        text = whole.output.text
        for count in range(len(text) + 1):
            again = message("a", sampling={"seed": 1}, resume={"num_text_bytes": count})
            assert (await stub.Generate(again)).output.text == text[count:]
            assert await streamed(stub, again) == text[count:]
        assert len(server.engine.submitted) == 1

    with_stub(body)


def test_an_answer_that_was_cut_is_computed_again():
    async def body(stub, server):
        asked = message("a", sampling={"seed": 1}, stopping={"max_tokens": 300})
        call = stub.Generate(asked)
        await until(lambda: server.engine.submitted)
        call.cancel()
        await until(lambda: server.server._hub.live == [])
        assert len((await stub.Generate(asked)).output.text) == 300
        assert len(server.engine.submitted) == 2

    with_stub(body, step_s=0.001)


def test_without_a_time_to_live_nothing_is_kept():
    async def body(stub, server):
        for _ in range(2):
            await stub.Generate(message("a"))
        assert len(server.engine.submitted) == 2

    with_stub(body, config=ServerConfig(port=0, resume_ttl_s=0.0))


def kept(answers: Answers, name: str, text: str = "xyz") -> Request:
    request = Request(name, (1, 2), SamplingParams(seed=1))
    draft, ids = Draft(request), tuple(text.encode())
    last = Output(
        name, ids, (0.0,) * len(ids), text, FinishReason.LENGTH, num_output_tokens=len(ids)
    )
    draft.add(last)
    answers.add(draft, last)
    return request


def test_answers_are_bounded_in_time_count_and_bytes():
    now = [0.0]
    answers = Answers(10.0, clock=lambda: now[0], max_count=3, max_bytes=30_000)
    requests = [kept(answers, str(number)) for number in range(4)]
    assert answers.find(requests[0], is_seeded=True) is None and len(answers) == 3
    found = answers.find(requests[3], is_seeded=True)
    assert found is not None and (found.output.text, found.request) == ("xyz", requests[3])
    kept(answers, "large", "x" * 3000)
    assert answers.num_bytes <= 30_000 or len(answers) == 1
    now[0] = 10.0
    assert answers.find(requests[3], is_seeded=True) is None
    assert (len(answers), answers.num_bytes) == (0, 0)


def test_the_same_id_with_another_prompt_is_refused_by_its_digest():
    answers = Answers(10.0, clock=lambda: 0.0)
    kept(answers, "a")
    with pytest.raises(InvalidRequest, match="another prompt"):
        answers.find(Request("a", (1, 3), SamplingParams(seed=1)), is_seeded=True)
