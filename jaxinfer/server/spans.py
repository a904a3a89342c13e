"""OpenTelemetry spans of the extra `otel`: one a request, and the phases of its time under it.

The event loop notes what began and what ended. A thread of ours makes spans of that, and one of
OpenTelemetry's sends them, so that a slow or absent collector holds up nobody.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import grpc
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

import jaxinfer
from jaxinfer import config
from jaxinfer.errors import ConfigError
from jaxinfer.host.request import FinishReason, Output, Request
from jaxinfer.server.status import BEGUN, HEARD
from jaxinfer.v1 import admin_pb2

MAX_QUEUED = 4096
MAX_PHASES = 256
CLOSE_S = 3.0  # for the last spans; a collector that is not there can't hold up the end
METHODS = (
    "/jaxinfer.v1.InferenceService/Generate",
    "/jaxinfer.v1.InferenceService/GenerateStream",
    "/vllm.grpc.engine.VllmEngine/Generate",
)
PHASES = {"queued": "queued", "prefill": "prefill", "decode": "decode", "beside": "decode"} | {
    "failed": "failed",
    "forgotten": "forgotten",
}
"""Pieces of a timeline that begin a phase; all others go on with the phase that they are in."""
POINTS = ("admitted", "preempted")
FAULTS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
"""The statuses that are the server's own fault, by the conventions for gRPC."""
WORDS = dict.fromkeys(("eos", "stop_token", "stop_string"), "stop") | {"context": "length"}

Explain = Callable[[str], Iterable[admin_pb2.Happening] | None]


class Phase(NamedTuple):
    """A part of a request's time."""

    name: str
    at_s: float
    """Since the request arrived."""
    seconds: float
    why: str
    """What the longest piece of it says."""
    step: int


@dataclass(slots=True, eq=False)
class _Traced:
    """One call on its way."""

    method: str
    carrier: dict[str, str]
    began_ns: int
    operation: str = "text_completion"
    request: Request | None = None
    output: Output | None = None
    code: str = ""
    ended_ns: int = 0
    is_over: bool = False
    engine_ns: int = 0
    """What the engine's clock lies behind that of the day."""


class Spans(grpc.aio.ServerInterceptor):
    """A server's interceptor, and a hub's observer: a span needs what both of them see."""

    def __init__(
        self,
        model: str,
        provider: TracerProvider,
        *,
        explain: Explain | None = None,
        has_tenants: bool = False,
    ) -> None:
        """Spans of requests to `model`; `provider` is ended by `close`."""
        self.num_dropped = 0
        self._model = model
        self._provider = provider
        self._tracer = provider.get_tracer("jaxinfer", jaxinfer.__version__)
        self._explain = (lambda _: None) if explain is None else explain
        self._has_tenants = has_tenants
        self._live: dict[str, _Traced] = {}
        self._queue: queue.Queue[_Traced | None] = queue.Queue(MAX_QUEUED)
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """The handler as it is; what happens is heard through variables of the call's own task."""
        method = handler_call_details.method
        if method in METHODS:
            metadata = handler_call_details.invocation_metadata or ()
            carrier = {key: value for key, value in metadata if isinstance(value, str)}
            traced = _Traced(method, carrier, time.time_ns())
            BEGUN.set(partial(self._begun, traced))
            HEARD.set(partial(self._heard, traced, HEARD.get()))
        return await continuation(handler_call_details)

    def delivered(self, outputs: list[Output], cancelled: Set[str]) -> None:
        """The outputs of one step went out."""
        for output in outputs:
            if output.finish_reason is not None:
                traced = self._live.pop(output.request_id, None)
                if traced is not None:
                    traced.output = output
                    self._end(traced)

    def close(self) -> None:
        """Sends what there is, as far as that takes no longer than a moment."""
        end_s = time.monotonic() + CLOSE_S
        try:
            self._queue.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        self._thread.join(end_s - time.monotonic())
        last = threading.Thread(target=self._provider.shutdown, name="spans-end", daemon=True)
        last.start()
        last.join(max(0.0, end_s - time.monotonic()))

    def _begun(self, traced: _Traced, request: Request, is_chat: bool) -> None:
        traced.operation = "chat" if is_chat else traced.operation
        traced.request = request
        self._live[request.request_id] = traced

    def _heard(self, traced: _Traced, told: Callable[[str], None], code: str) -> None:
        """The last status counts: a stream that is cut short has been left before."""
        told(code)
        traced.code, traced.ended_ns = code, time.time_ns()
        asyncio.get_running_loop().call_soon(self._end, traced)

    def _end(self, traced: _Traced) -> None:
        """A span ends with its call, and not before the engine is done with the request."""
        is_done = traced.request is None or traced.output is not None
        if not traced.code or not is_done or traced.is_over:
            return
        traced.is_over = True
        traced.engine_ns = time.time_ns() - time.monotonic_ns()
        try:
            self._queue.put_nowait(traced)
        except queue.Full:
            self.num_dropped += 1

    def _run(self) -> None:
        while (traced := self._queue.get()) is not None:
            self._write(traced)

    def _write(self, traced: _Traced) -> None:
        span = self._tracer.start_span(
            f"{traced.operation} {self._model}",
            propagate.extract(traced.carrier),
            trace.SpanKind.SERVER,
            attributes=self._attributes(traced),
            start_time=traced.began_ns,
        )
        if traced.code in FAULTS:
            span.set_status(trace.StatusCode.ERROR, traced.code)
        if traced.output is not None and span.is_recording():
            self._write_phases(span, traced, traced.output)
        span.end(traced.ended_ns)

    def _write_phases(self, span: trace.Span, traced: _Traced, output: Output) -> None:
        """Children for where the time went, and events for what happened at one moment."""
        told = list(self._explain(output.request_id) or ())
        zero_ns = traced.engine_ns + _ns(output.timings.arrived_s)
        phases = phases_of(told) if told else phases_without(output)
        inside = trace.set_span_in_context(span, Context())
        for phase in phases[:MAX_PHASES]:
            start_ns = zero_ns + _ns(phase.at_s)
            attributes = {"jaxinfer.why": phase.why, "jaxinfer.step": phase.step}
            child = self._tracer.start_span(
                phase.name, inside, attributes=attributes, start_time=start_ns
            )
            child.end(start_ns + _ns(phase.seconds))
        if len(phases) > MAX_PHASES:
            span.set_attribute("jaxinfer.num_phases_left_out", len(phases) - MAX_PHASES)
        for one in told:
            if one.kind in POINTS:
                details = {"jaxinfer.why": one.text, "jaxinfer.step": one.step}
                span.add_event(one.kind, details, zero_ns + _ns(one.at_s))

    def _attributes(self, traced: _Traced) -> dict[str, Any]:
        """By the conventions for generative AI and for RPC; neither prompts nor answers."""
        found: dict[str, Any] = {
            "gen_ai.operation.name": traced.operation,
            "gen_ai.provider.name": "jaxinfer",
            "gen_ai.request.model": self._model,
            "rpc.system.name": "grpc",
            "rpc.method": traced.method.removeprefix("/"),
            "rpc.response.status_code": traced.code,
            "error.type": None if traced.code == "OK" else traced.code,
        }
        if traced.request is not None:
            found |= self._asked(traced.request)
        if traced.output is not None:
            found |= _answered(traced.output)
        return {name: value for name, value in found.items() if value is not None}

    def _asked(self, request: Request) -> dict[str, Any]:
        tenant, slash, name = request.request_id.partition("/")
        is_tenants = self._has_tenants and bool(slash)
        sampling = request.sampling
        return {
            "gen_ai.response.id": name if is_tenants else request.request_id,
            "jaxinfer.tenant": tenant if is_tenants else None,
            "jaxinfer.priority": request.priority,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.top_p": sampling.top_p,
        }


def open_spans(model: str, *, explain: Explain | None = None, has_tenants: bool = False) -> Spans:
    """Spans that go where the OTEL_* variables of the environment say."""
    exporter = otlp_exporter(config.otlp_protocol())
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "jaxinfer"}))
    resource = resource.merge(Resource({SERVICE_VERSION: jaxinfer.__version__}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Spans(model, provider, explain=explain, has_tenants=has_tenants)


def otlp_exporter(protocol: str) -> SpanExporter:
    """What sends spans by one of OTLP's protocols."""
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (
            OTLPSpanExporter as GrpcExporter,
        )

        return GrpcExporter()
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
            OTLPSpanExporter as HttpExporter,
        )

        return HttpExporter()
    raise ConfigError(
        f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}; it must be grpc or http/protobuf"
    )


def phases_of(told: Iterable[admin_pb2.Happening]) -> list[Phase]:
    """The pieces of a timeline, as few as tell where the time went."""
    phases: list[Phase] = []
    longest_s = 0.0
    for one in told:
        if not one.seconds:
            continue
        last = phases[-1] if phases else None
        name = PHASES.get(one.kind, one.kind if last is None else last.name)
        if last is None or last.name != name:
            phases.append(Phase(name, one.at_s, one.seconds, one.text, one.step))
            longest_s = one.seconds
            continue
        why = one.text if one.seconds > longest_s else last.why
        longest_s = max(longest_s, one.seconds)
        phases[-1] = last._replace(seconds=one.at_s + one.seconds - last.at_s, why=why)
    return phases


def phases_without(output: Output) -> list[Phase]:
    """The same from a request's own times, where no steps are known."""
    times = output.timings
    moments = (times.arrived_s, times.scheduled_s, times.first_token_s, times.finished_s)
    reached = [one for one in moments[:-1] if one is not None]
    ends = [*reached[1:], times.finished_s]
    return [
        Phase(name, start_s - times.arrived_s, end_s - start_s, "", 0)
        for name, start_s, end_s in zip(PHASES, reached, ends, strict=False)
        if end_s is not None
    ]


def _answered(output: Output) -> Mapping[str, Any]:
    assert output.finish_reason is not None
    times, reason = output.timings, FinishReason(output.finish_reason).value
    first_s, end_s, num_later = times.first_token_s, times.finished_s, output.num_output_tokens - 1
    later_s = None
    if first_s is not None and end_s is not None and num_later > 0:
        later_s = (end_s - first_s) / num_later
    return {
        "gen_ai.response.finish_reasons": (WORDS.get(reason, reason),),
        "gen_ai.usage.input_tokens": output.num_prompt_tokens,
        "gen_ai.usage.output_tokens": output.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": output.num_cached_tokens,
        "gen_ai.server.time_to_first_token": None if first_s is None else first_s - times.arrived_s,
        "gen_ai.server.time_per_output_token": later_s,
        "jaxinfer.num_preemptions": output.num_preemptions,
    }


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
