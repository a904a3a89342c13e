"""One span a request, under its client's, with the phases of its time; nothing at all when off."""

import asyncio
import itertools
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jaxinfer import config
from jaxinfer.edge_config import SecurityConfig, ServerConfig
from jaxinfer.errors import ConfigError
from jaxinfer.host.request import FinishReason, Output, Request, SamplingParams, Timings
from jaxinfer.server import sight, spans
from jaxinfer.server.timeline import explainer
from jaxinfer.v1 import admin_pb2
from jaxinfer.v1 import inference_pb2 as pb
from tests import tiny
from tests.server.serving import refused, until, with_stub
from tests.server.test_auth import make_tokens
from tests.server.test_timeline import watched

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
WITH_SPANS = ServerConfig(port=0, otel=True)


@pytest.fixture
def memory(monkeypatch):
    """What a server exports; BatchSpanProcessor and all else are the real ones."""
    found = InMemorySpanExporter()
    monkeypatch.setattr(spans, "otlp_exporter", lambda protocol: found)
    return found


def serve(body, **options):
    """The spans are there when the server has stopped."""
    with_stub(body, config=WITH_SPANS, **options)


def roots(memory):
    return [one for one in memory.get_finished_spans() if one.name.endswith(" fake")]


def children(memory, root):
    spans_ = memory.get_finished_spans()
    inside = [one for one in spans_ if one.parent and one.parent.span_id == root.context.span_id]
    return sorted(inside, key=lambda one: one.start_time)


def test_a_request_is_a_span_under_its_clients_with_what_it_took(memory):
    async def body(stub, server):
        message = pb.GenerateRequest(
            text="abc", request_id="r1", sampling={"temperature": 0.5}, stopping={"max_tokens": 5}
        )
        await stub.Generate(message, metadata=TRACEPARENT)

    serve(body)
    (root,) = roots(memory)
    assert root.name == "text_completion fake" and root.kind.name == "SERVER"
    assert f"{root.context.trace_id:032x}" == TRACE and f"{root.parent.span_id:016x}" == PARENT
    assert root.status.is_unset and root.end_time > root.start_time
    wanted = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "fake",
        "gen_ai.response.id": "r1",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": 4,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ("length",),
        "rpc.method": "jaxinfer.v1.InferenceService/Generate",
        "rpc.response.status_code": "OK",
    }
    assert {name: root.attributes[name] for name in wanted} == wanted
    assert root.attributes["gen_ai.server.time_to_first_token"] >= 0
    assert root.resource.attributes["service.name"] == "jaxinfer"
    inside = children(memory, root)
    assert [one.name for one in inside] == ["queued", "prefill", "decode"]
    assert all(one.end_time == after.start_time for one, after in itertools.pairwise(inside))
    assert root.start_time <= inside[0].start_time and inside[-1].end_time <= root.end_time


def test_no_prompt_and_no_answer_is_in_a_span(memory):
    async def body(stub, server):
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="my secret")])
        answer = await stub.Generate(pb.GenerateRequest(chat=chat))
        said.append(answer.output.text)

    said = []
    serve(body)
    (root,) = roots(memory)
    assert root.name == "chat fake" and root.parent is None
    shown = "".join(one.to_json() for one in memory.get_finished_spans())
    assert said[0] and said[0] not in shown and "my secret" not in shown


def test_calls_that_are_refused_or_left_have_their_status(memory):
    async def body(stub, server):
        bad = pb.GenerateRequest(text="a", stopping={"max_tokens": 0})
        await refused(stub.Generate(bad), grpc.StatusCode.INVALID_ARGUMENT)
        stream = stub.GenerateStream(
            pb.GenerateStreamRequest(text="a", stopping={"max_tokens": 400})
        )
        await stream.read()
        await stream.read()
        stream.cancel()
        await until(lambda: server.engine.steps_after_cancel)

    serve(body, step_s=0.005)
    refusal, left = roots(memory)
    assert refusal.attributes["error.type"] == "INVALID_ARGUMENT"
    assert refusal.status.is_unset  # by the conventions: the caller's fault
    assert "gen_ai.usage.input_tokens" not in refusal.attributes
    assert left.attributes["rpc.response.status_code"] == "CANCELLED"
    assert left.attributes["gen_ai.response.finish_reasons"] == ("cancelled",)
    assert left.attributes["gen_ai.usage.output_tokens"] >= 1


def test_a_request_that_came_too_late_has_its_status(memory):
    async def late(stub, server):
        call = stub.Generate(
            pb.GenerateRequest(text="a", stopping={"max_tokens": 400}), timeout=0.2
        )
        await refused(call, grpc.StatusCode.DEADLINE_EXCEEDED)
        await until(lambda: not server.server._hub.live)

    serve(late, step_s=0.005)
    (root,) = roots(memory)
    assert root.attributes["rpc.response.status_code"] in ("DEADLINE_EXCEEDED", "CANCELLED")


def test_a_call_without_a_token_is_seen(memory, tmp_path):
    async def stranger(stub, server):
        await refused(stub.Generate(pb.GenerateRequest(text="a")), grpc.StatusCode.UNAUTHENTICATED)

    path = tmp_path / "tokens.toml"
    make_tokens(path)
    serve(stranger, security=SecurityConfig(tokens=str(path)))
    (root,) = roots(memory)
    assert root.attributes["error.type"] == "UNAUTHENTICATED"


def test_phases_are_those_of_the_timeline_and_lie_end_to_end():
    engine, timeline = watched()
    requests = tiny.random_requests(12, seed=5, max_prompt=60, max_tokens=60)
    lasts = {name: answer.last for name, answer in tiny.run(engine, requests).items()}
    assert sum(one.num_preemptions for one in lasts.values())
    memory = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    made = spans.Spans("fake", provider, explain=explainer(timeline))

    async def end_all() -> None:
        for last in lasts.values():
            traced = spans._Traced(spans.METHODS[0], {}, 0)
            made._begun(traced, Request(last.request_id, (2,), SamplingParams()), False)
            made._heard(traced, lambda code: None, "OK")
        made.delivered(list(lasts.values()), set())
        await asyncio.sleep(0)

    asyncio.run(end_all())
    made.close()
    found = {one.attributes["gen_ai.response.id"]: one for one in roots(memory)}
    assert found.keys() == lasts.keys()
    for name, root in found.items():
        last, inside = lasts[name], children(memory, root)
        assert [one.name for one in inside[:2]] == ["queued", "prefill"]
        num_again = sum(one.name == "queued" for one in inside) - 1
        assert num_again == last.num_preemptions == root.attributes["jaxinfer.num_preemptions"]
        told = [event.name for event in root.events]
        assert told.count("preempted") == num_again and told.count("admitted") == num_again + 1
        for one, after in itertools.pairwise(inside):
            assert abs(after.start_time - one.end_time) <= 2  # rounded to nanoseconds
        total_ns = (last.timings.finished_s - last.timings.arrived_s) * 1e9
        assert abs(inside[-1].end_time - inside[0].start_time - total_ns) <= 2


def test_pauses_and_tails_belong_to_the_phase_around_them():
    kinds = ["queued", "admitted", "prefill", "paused", "prefill", "decode", "beside", "decode"]
    told, at_s = [], 0.0
    for kind in (*kinds, "finished"):
        seconds = 0.0 if kind == "admitted" else 1.0
        told.append(admin_pb2.Happening(at_s=at_s, seconds=seconds, kind=kind, text=kind, step=1))
        at_s += seconds
    found = [(one.name, one.at_s, one.seconds) for one in spans.phases_of(told)]
    assert found == [("queued", 0.0, 1.0), ("prefill", 1.0, 3.0), ("decode", 4.0, 4.0)]


def test_a_request_that_never_ran_has_waited_only():
    last = Output("r", (), (), "", FinishReason.CANCELLED, timings=Timings(2.0, finished_s=5.0))
    assert spans.phases_without(last) == [spans.Phase("queued", 0.0, 3.0, "", 0)]


def test_a_full_queue_costs_spans_and_makes_nobody_wait(monkeypatch):
    monkeypatch.setattr(spans, "MAX_QUEUED", 1)
    hold = threading.Event()

    def stuck(request_id):
        hold.wait(10)

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(InMemorySpanExporter()))
    made = spans.Spans("fake", provider, explain=stuck)

    async def many() -> None:
        for number in range(5):
            traced = spans._Traced(spans.METHODS[0], {}, 0)
            made._begun(traced, Request(f"r{number}", (2,), SamplingParams()), False)
            made._heard(traced, lambda code: None, "OK")
            made.delivered([Output(f"r{number}", (), (), "", FinishReason.EOS)], set())

    asyncio.run(many())
    assert made.num_dropped >= 3  # one is held, one waits
    hold.set()
    made.close()


def test_spans_arrive_at_a_collector_that_the_environment_names(monkeypatch):
    got = []

    def export(request, context):
        got.extend(
            span
            for one in request.resource_spans
            for part in one.scope_spans
            for span in part.spans
        )
        return otlp.ExportTraceServiceResponse()

    handler = grpc.unary_unary_rpc_method_handler(
        export,
        otlp.ExportTraceServiceRequest.FromString,
        otlp.ExportTraceServiceResponse.SerializeToString,
    )
    collector = grpc.server(ThreadPoolExecutor(1))
    name = "opentelemetry.proto.collector.trace.v1.TraceService"
    methods = grpc.method_handlers_generic_handler(name, {"Export": handler})
    collector.add_generic_rpc_handlers((methods,))
    port = collector.add_insecure_port("127.0.0.1:0")
    collector.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")

    async def body(stub, server):
        await stub.Generate(pb.GenerateRequest(text="abc"), metadata=TRACEPARENT)

    try:
        serve(body)
    finally:
        collector.stop(0).wait()
    assert [one.name for one in got].count("text_completion fake") == 1 and len(got) == 4
    assert {one.trace_id.hex() for one in got} == {TRACE}


def test_a_server_without_spans_does_not_import_opentelemetry():
    code = "import sys, jaxinfer.server.app; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_is_missing_is_said_before_the_start(monkeypatch):
    monkeypatch.setattr(sight, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"server\.otel.*jaxinfer\[otel\]"):
        sight.check(WITH_SPANS)
    sight.check(ServerConfig())


def test_the_protocol_is_that_of_the_environment():
    variables = {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    assert config.otlp_protocol({}) == "grpc"
    assert config.otlp_protocol(variables) == "http/protobuf"
    variables["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = "carrier pigeon"
    with pytest.raises(ConfigError, match="carrier pigeon"):
        spans.otlp_exporter(config.otlp_protocol(variables))
