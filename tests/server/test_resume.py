"""A cut answer goes on where it was: nothing missing, nothing twice, whoever kept the request."""

import asyncio
from dataclasses import replace
from typing import NamedTuple

import grpc
import pytest
from google.rpc import error_details_pb2

from jaxinfer.edge_config import ServerConfig
from jaxinfer.host.live import Live
from jaxinfer.host.request import (
    JAXINFER_DEFAULTS,
    FinishReason,
    Request,
    SamplingParams,
    Timings,
)
from jaxinfer.host.sequence import Sequence
from jaxinfer.text.stops import Found
from jaxinfer.v1 import inference_pb2 as pb
from tests.server.fake_engine import FakeEngine, expected_tokens, multibyte_tokens
from tests.server.serving import detail, refused, until, with_stub

SEED = 7
STOP = bytes(multibyte_tokens([1, *b"hello"], 24, seed=SEED)).decode(errors="ignore")[4:6]


class Case(NamedTuple):
    """A request, as the engine has it and as the wire has it."""

    stopping: dict
    tokens: object = multibyte_tokens

    def request(self, request_id: str) -> Request:
        stopping = {name: tuple(v) if name == "stop" else v for name, v in self.stopping.items()}
        sampling = SamplingParams(seed=SEED, temperature=0.7, **stopping)
        return Request(request_id, (1, *b"hello"), sampling.or_else(JAXINFER_DEFAULTS))

    def ask(self, kind, request_id: str, resume: dict | None):
        return kind(
            text="hello",
            request_id=request_id,
            sampling={"seed": SEED, "temperature": 0.7},
            stopping=self.stopping,
            output={"token_ids": True, "logprobs": True},
            resume=resume,
        )


class Answer(NamedTuple):
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()

    def __add__(self, other: "Answer") -> "Answer":
        return Answer(*(mine + others for mine, others in zip(self, other, strict=True)))

    @property
    def counts(self) -> dict[str, int]:
        return {"num_tokens": len(self.token_ids), "num_text_bytes": len(self.text.encode())}


CASES = {
    "letters": Case({"max_tokens": 12}, expected_tokens),
    "long characters": Case({"max_tokens": 24}),
    "half a character at the end": Case({"max_tokens": 5}),
    "a stop string": Case({"max_tokens": 24, "stop": [STOP]}),
    "a stop string that does not come": Case({"max_tokens": 13, "stop": [STOP[0] + "?"]}),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def prefixes(case: Case) -> list[Answer]:
    """What a client may have of an answer: nothing, what came with each token, all of it."""
    engine = FakeEngine(print, tokens=case.tokens, restored=[(case.request("x"), 100)])
    found = [Answer()]
    for token, logprob, text in engine._live["x"].unsent:
        found.append(found[-1] + Answer(text, (token,), (logprob,)))
    return found


async def collected(stub, message) -> tuple[Answer, pb.Finished, pb.Summary]:
    answer, events = Answer(), [event async for event in stub.GenerateStream(message)]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started" and kinds[-2:] == ["finished", "summary"]
    for event in events[1:-2]:
        delta = event.delta
        answer += Answer(delta.text, tuple(delta.token_ids), tuple(delta.logprobs))
    return answer, events[-2].finished, events[-1].summary


def test_the_cases_are_what_they_say():
    assert len(STOP) == 2 and len(STOP.encode()) > 2
    assert prefixes(CASES["half a character at the end"])[-1].text.endswith("\ufffd")
    assert len(prefixes(CASES["long characters"])[-1].text[0].encode()) > 1
    assert STOP not in prefixes(CASES["a stop string"])[-1].text
    assert len(prefixes(CASES["a stop string"])) < 24
    for case in CASES.values():
        texts = [answer.text for answer in prefixes(case)]
        assert case.tokens is expected_tokens or len(set(texts)) < len(texts)  # text trails


@each_case
def test_a_stream_cut_anywhere_goes_on_from_a_restored_request(case):
    found = prefixes(case)
    saves = {
        f"{cut} {saved}": (cut, saved)
        for cut in range(len(found))
        for saved in {0, cut // 2, min(cut, len(found) - 2), len(found) - 2}
    }

    async def one(stub, name, have, whole):
        rest, finished, summary = await collected(
            stub, case.ask(pb.GenerateStreamRequest, name, have.counts)
        )
        assert have + rest == found[-1]
        assert (finished, summary.usage) == (whole[1], whole[2].usage)

    async def body(stub, server):
        whole = await collected(stub, case.ask(pb.GenerateStreamRequest, "whole", None))
        assert whole[0] == found[-1]
        await asyncio.gather(
            *(one(stub, name, found[cut], whole) for name, (cut, _) in saves.items())
        )
        assert [request.request_id for request in server.engine.submitted] == ["whole"]
        assert server.engine.cancelled == [] and server.server._hub.live == []

    restored = [(case.request(name), saved) for name, (_, saved) in saves.items()]
    with_stub(body, restored=restored, tokens=case.tokens, step_s=0.001)


@each_case
@pytest.mark.parametrize("kind", [pb.GenerateStreamRequest, pb.GenerateRequest])
def test_an_answer_cut_anywhere_goes_on_from_a_new_computation(case, kind):
    found = prefixes(case)

    async def one(stub, name, have):
        message = case.ask(kind, name, have.counts)
        if kind is pb.GenerateStreamRequest:
            rest, _, summary = await collected(stub, message)
        else:
            reply = await stub.Generate(message)
            output, summary = reply.output, reply.summary
            rest = Answer(output.text, tuple(output.token_ids), tuple(output.logprobs))
        assert have + rest == found[-1]
        assert summary.usage.num_output_tokens == len(found) - 1  # of the whole answer

    async def body(stub, server):
        await asyncio.gather(*(one(stub, str(cut), have) for cut, have in enumerate(found)))
        assert len(server.engine.submitted) == len(found)

    with_stub(body, tokens=case.tokens, step_s=0.001)


def test_tokens_and_text_are_counted_apart():
    case = CASES["long characters"]
    whole = prefixes(case)[-1]

    async def body(stub, server):
        text_only = {"num_text_bytes": len(whole.text.encode())}
        rest, *_ = await collected(stub, case.ask(pb.GenerateStreamRequest, "a", text_only))
        assert rest == whole._replace(text="")
        tokens_only = {"num_tokens": len(whole.token_ids)}
        rest, *_ = await collected(stub, case.ask(pb.GenerateStreamRequest, "b", tokens_only))
        assert rest == Answer(whole.text)

    with_stub(body, tokens=case.tokens, restored=[(case.request("a"), 3)])


BAD = {
    "too many tokens": ({"num_tokens": 25}, "num_tokens is 25, and the whole answer has 24"),
    "too much text": ({"num_text_bytes": 1000}, "num_text_bytes is 1000, and the whole answer has"),
    "half a character": ({"num_text_bytes": 1}, "inside a character"),
    "less than none": ({"num_tokens": -1}, "must be at least 0"),
}


@pytest.mark.parametrize(("resume", "said"), BAD.values(), ids=BAD)
def test_counts_that_no_stream_of_the_request_had_are_refused(resume, said):
    case = CASES["long characters"]

    async def body(stub, server):
        for name in ("restored", "new"):
            stream = stub.GenerateStream(case.ask(pb.GenerateStreamRequest, name, resume))
            kinds = []
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for event in stream:
                    kinds.append(event.WhichOneof("event"))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert said in caught.value.details() and "finished" not in kinds
            (violation,) = detail(caught.value, error_details_pb2.BadRequest).field_violations
            assert violation.field == f"resume.{next(iter(resume))}"
            message = case.ask(pb.GenerateRequest, f"{name} unary", resume)
            error = await refused(stub.Generate(message), grpc.StatusCode.INVALID_ARGUMENT)
            assert said in error.details()
        await until(lambda: server.server._hub.live in ([], ["restored"]))

    with_stub(body, tokens=case.tokens, restored=[(case.request("restored"), 3)])


OTHERS = {
    "prompt": {"text": "hullo"},
    "sampling.temperature": {"sampling": {"seed": SEED, "temperature": 0.71}},
    "sampling.seed": {"sampling": {"seed": SEED + 1, "temperature": 0.7}},
    "stopping.max_tokens": {"stopping": {"max_tokens": 13}},
    "stopping.stop": {"stopping": {"max_tokens": 12, "stop": ["x"]}},
    "priority": {"priority": 1},
    "use_prefix_cache": {"use_prefix_cache": False},
}


def test_a_different_request_can_not_take_over():
    case = CASES["letters"]

    async def body(stub, server):
        for field, change in OTHERS.items():
            message = case.ask(pb.GenerateStreamRequest, "mine", {})
            for name, value in change.items():
                message.ClearField(name)
                message.MergeFrom(pb.GenerateStreamRequest(**{name: value}))
            call = stub.GenerateStream(message)
            error = await refused(call.read(), grpc.StatusCode.INVALID_ARGUMENT)
            (violation,) = detail(error, error_details_pb2.BadRequest).field_violations
            assert violation.field == field and field.rpartition(".")[2] in error.details()
            assert "hello" not in error.details() and "0.7" not in error.details()
        await until(lambda: server.server._hub.live == [])
        again = await stub.Generate(case.ask(pb.GenerateRequest, "mine", None))
        assert again.output.text == prefixes(case)[-1].text
        rest, *_ = await collected(stub, case.ask(pb.GenerateStreamRequest, "mine", {}))
        assert rest == prefixes(case)[-1] and server.engine.submitted == []

    with_stub(body, restored=[(case.request("mine"), 3)])


@pytest.mark.parametrize("missing", ["request_id", "sampling.seed"])
def test_a_resume_says_the_id_and_the_seed(missing):
    async def body(stub, server):
        message = CASES["letters"].ask(pb.GenerateRequest, "a", {})
        outer, _, inner = missing.rpartition(".")
        (getattr(message, outer) if outer else message).ClearField(inner)
        error = await refused(stub.Generate(message), grpc.StatusCode.INVALID_ARGUMENT)
        assert f"resume without {missing}" in error.details()

    with_stub(body)


def test_of_two_that_resume_one_request_one_wins():
    case = Case({"max_tokens": 60}, expected_tokens)

    async def body(stub, server):
        message = case.ask(pb.GenerateStreamRequest, "one", {})
        found = await asyncio.gather(
            *(collected(stub, message) for _ in range(2)), return_exceptions=True
        )
        (error,) = (one for one in found if isinstance(one, grpc.aio.AioRpcError))
        (answer,) = (one[0] for one in found if not isinstance(one, grpc.aio.AioRpcError))
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
        assert answer == prefixes(case)[-1]

    with_stub(body, restored=[(case.request("one"), 3)], step_s=0.005)


def test_a_finished_request_waits_for_its_client():
    case = CASES["letters"]

    async def body(stub, server):
        await until(lambda: not server.server._hub.live)
        rest, *_ = await collected(stub, case.ask(pb.GenerateStreamRequest, "done", {}))
        assert rest == prefixes(case)[-1]
        assert server.engine.submitted == []

    with_stub(body, restored=[(case.request("done"), 11)])


def test_what_nobody_claims_in_time_is_cancelled():
    long, short = Case({"max_tokens": 400}, expected_tokens), CASES["letters"]

    async def body(stub, server):
        await until(lambda: server.engine.cancelled == ["long"])
        await until(lambda: not server.server._hub.live)
        known = server.server._hub.answers
        await until(lambda: known.find(short.request("short"), is_seeded=True) is None)
        rest, *_ = await collected(stub, short.ask(pb.GenerateStreamRequest, "short", {}))
        assert rest == prefixes(short)[-1]
        assert len(server.engine.submitted) == 1  # forgotten, so it was computed again

    with_stub(
        body,
        restored=[(long.request("long"), 3), (short.request("short"), 11)],
        step_s=0.005,
        config=ServerConfig(port=0, resume_ttl_s=0.1),
    )


@pytest.mark.parametrize("end", ["leaves", "deadline"])
def test_the_end_of_a_resuming_call_ends_the_request(end):
    case = Case({"max_tokens": 400}, expected_tokens)

    async def body(stub, server):
        message = case.ask(pb.GenerateStreamRequest, "mine", {})
        stream = stub.GenerateStream(message, timeout=0.2 if end == "deadline" else None)
        await stream.read()
        if end == "leaves":
            stream.cancel()
        await until(lambda: server.engine.cancelled == ["mine"])
        await until(lambda: not server.server._hub.live)

    with_stub(body, restored=[(case.request("mine"), 3)], step_s=0.01)


def test_a_live_request_with_a_reader_stays_its_own():
    case = Case({"max_tokens": 400}, expected_tokens)

    async def body(stub, server):
        stream = stub.GenerateStream(case.ask(pb.GenerateStreamRequest, "mine", None))
        await stream.read()
        again = stub.GenerateStream(case.ask(pb.GenerateStreamRequest, "mine", {}))
        await refused(again.read(), grpc.StatusCode.ALREADY_EXISTS)
        assert (await stream.read()).HasField("delta")
        stream.cancel()

    with_stub(body, step_s=0.005)


def test_the_prefix_cache_is_asked_for_and_reported():
    case = CASES["letters"]

    async def body(stub, server):
        message = case.ask(pb.GenerateRequest, "a", None)
        reply = await stub.Generate(message)
        assert reply.summary.usage.num_cached_tokens == 3
        assert reply.started.parameters.use_prefix_cache
        message.use_prefix_cache, message.request_id = False, "b"
        assert not (await stub.Generate(message)).started.parameters.use_prefix_cache
        first, second = server.engine.submitted
        assert (first.use_prefix_cache, second.use_prefix_cache) == (True, False)
        assert first.salt == second.salt == "ours"
        assert replace(first, salt="") == case.request("a")

    with_stub(body, config=ServerConfig(port=0, prefix_salt="ours"))


@pytest.mark.parametrize("reason", FinishReason)
def test_text_that_is_not_certain_is_told_only_at_the_answers_own_end(reason):
    class HoldsBack:
        def push(self, token):
            return Found("", None)

        def finish(self):
            return "held"

    sequence = Sequence(0, CASES["letters"].request("a"))
    live = Live(sequence, HoldsBack(), Timings(0.0))
    sequence.tokens.append(5)
    live.take(5, -1.0)
    sequence.finish_reason = reason
    live.end(1.0)
    own_end = (FinishReason.EOS, FinishReason.STOP_TOKEN, FinishReason.LENGTH, FinishReason.CONTEXT)
    assert live.output().text == ("held" if reason in own_end else "")
