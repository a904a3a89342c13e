"""`vllm.grpc.engine.VllmEngine` on the same port, so that the gateway `smg` can stand before it.

Whoever speaks OpenAI's or Anthropic's protocol speaks with the gateway; it tokenizes, writes chats
and reads tools, and asks here for tokens. A field of its messages is applied, or refused by name.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import grpc
from smg_grpc_proto.generated import (  # pyright: ignore[reportMissingImports]
    common_pb2,
    vllm_engine_pb2,
)

import jaxinfer
from jaxinfer.errors import InvalidRequest
from jaxinfer.host.request import FinishReason, Output, SamplingParams
from jaxinfer.server import bounds, gateway_text, translate
from jaxinfer.server.health import Door
from jaxinfer.server.hub import Hub, Mailbox
from jaxinfer.server.served import EngineLike, ServedModel
from jaxinfer.server.service import Asked, Service, raise_failure, read
from jaxinfer.server.status import Call, Reported, let_go
from jaxinfer.server.tenants import CALLER

pb: Any = vllm_engine_pb2
common: Any = common_pb2

NAME = pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name
CHUNK_BYTES = 1 << 20  # of the tokenizer's archive
WORDS = {
    FinishReason.EOS: "stop",
    FinishReason.STOP_TOKEN: "stop",
    FinishReason.STOP_STRING: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT: "length",
}
"""The wire's words for ends that are an answer; the others are a status."""

APPLIED = ("request_id", "tokenized", "text", "sampling_params", "stream")
APPLIED_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "seed"),
    *("stop", "stop_token_ids", "ignore_eos", "logprobs"),
)
BY_GATEWAY = (
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)
"""How tokens become text; the gateway does that itself, out of all tokens."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "repetition_penalty": (1.0,),
    "data_parallel_rank": (0,),
}
"""Values of fields that are not served, but ask for nothing."""


class Gateway:
    """The servicer; what it shares with `jaxinfer.v1` is the way a request goes in."""

    def __init__(
        self,
        served: ServedModel,
        engine: EngineLike,
        hub: Hub,
        edge: Service,
        door: Door,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._served = served
        self._engine = engine
        self._hub = hub
        self._edge = edge
        self._door = door
        self._clock = clock
        self._began_s = clock()

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a grpc.aio server dispatches to."""
        unary = {
            "HealthCheck": self.health_check,
            "Abort": self.abort,
            "GetModelInfo": self.get_model_info,
            "GetServerInfo": self.get_server_info,
            "GetLoads": self.get_loads,
        }
        streams: dict[str, Any] = {"Generate": let_go(self._write_answer)}
        if self._served.text is not None:
            streams["GetTokenizer"] = self.get_tokenizer
        return grpc.method_handlers_generic_handler(
            NAME,
            {
                name: grpc.unary_unary_rpc_method_handler(
                    let_go(method), response_serializer=_to_bytes
                )
                for name, method in unary.items()
            }
            | {
                name: grpc.unary_stream_rpc_method_handler(method, response_serializer=_to_bytes)
                for name, method in streams.items()
            },
        )

    async def generate(self, data: bytes, call: Call) -> AsyncGenerator[Any, None]:
        async with Reported(call):
            message = await read(pb.GenerateRequest, data)
            sampling = message.sampling_params
            num_top = sampling.logprobs if sampling.HasField("logprobs") else None
            asked = asked_from(message, self._served)
            request, mailbox = await self._edge.begin(asked, call)
            try:
                async for answer in _answers(mailbox, num_top, is_stream=message.stream):
                    yield answer
            finally:
                self._edge.leave(request.request_id, mailbox)

    async def _write_answer(self, data: bytes, call: Any) -> None:
        await self._edge.writers.write(self.generate(data, call), call)

    async def abort(self, data: bytes, call: Call) -> Any:
        async with Reported(call):
            message = translate.parse(pb.AbortRequest, data)
            caller = CALLER.get()
            for name in self._hub.abort(map(caller.request_id, message.request_ids)):
                self._engine.cancel(name)
            return pb.AbortResponse()

    async def health_check(self, data: bytes, call: Call) -> Any:
        async with Reported(call):
            translate.parse(pb.HealthCheckRequest, data)
            is_serving = self._door.is_serving
            message = "serving" if is_serving else "takes no requests now; its log says why"
            return pb.HealthCheckResponse(healthy=is_serving, message=message)

    async def get_model_info(self, data: bytes, call: Call) -> Any:
        async with Reported(call):
            translate.parse(pb.GetModelInfoRequest, data)
            served, defaults = self._served, self._served.defaults
            values = {name: getattr(defaults, name) for name in ("temperature", "top_k", "top_p")}
            values |= {"min_p": defaults.min_p, "max_tokens": defaults.max_tokens}
            return pb.GetModelInfoResponse(
                model_path=served.name,
                served_model_name=served.name,
                is_generation=True,
                max_context_length=served.limits.max_seq_len,
                max_req_input_len=served.limits.max_seq_len - 1,
                vocab_size=served.limits.vocab_size,
                model_type=served.config.architecture,
                architectures=[served.config.architecture],
                eos_token_ids=served.limits.eos_token_ids,
                default_sampling_params_json=json.dumps(
                    {name: value for name, value in values.items() if value is not None}
                ),
            )

    async def get_server_info(self, data: bytes, call: Call) -> Any:
        async with Reported(call):
            translate.parse(pb.GetServerInfoRequest, data)
            stats = self._engine.stats()
            return pb.GetServerInfoResponse(
                active_requests=stats.num_running + stats.num_waiting,
                uptime_seconds=self._clock() - self._began_s,
                server_type="jaxinfer",
                data_parallel_size=1,
                max_num_seqs=stats.num_slots,
            )

    async def get_loads(self, data: bytes, call: Call) -> Any:
        async with Reported(call):
            translate.parse(pb.GetLoadsRequest, data)
            stats = self._engine.stats()
            load = pb.SchedulerLoad(
                num_running_reqs=stats.num_running,
                num_waiting_reqs=stats.num_waiting,
                num_total_reqs=stats.num_running + stats.num_waiting,
                max_running_requests=stats.num_slots,
                token_usage=1 - stats.num_free_pages / max(1, stats.num_pages),
                utilization=stats.num_running / max(1, stats.num_slots),
                cache_hit_rate=stats.num_cached_tokens / max(1, stats.num_queried_tokens),
            )
            return pb.GetLoadsResponse(
                timestamp=datetime.now(UTC).isoformat(),
                version=jaxinfer.__version__,
                dp_rank_count=1,
                loads=[load],
            )

    async def get_tokenizer(self, data: bytes, call: Call) -> AsyncIterator[Any]:
        async with Reported(call):
            translate.parse(common.GetTokenizerRequest, data)
            archive, digest = await asyncio.to_thread(gateway_text.archive, self._served)
            places = range(0, len(archive), CHUNK_BYTES)
            for place in places:
                is_last = place == places[-1]
                yield common.GetTokenizerChunk(
                    data=archive[place : place + CHUNK_BYTES], sha256=digest if is_last else ""
                )


def scopes(*, generate: str, read: str, is_open: str) -> dict[str, str]:
    """The scope of every method, for a server that asks for tokens."""
    paths = {method.name: f"/{NAME}/{method.name}" for method in _methods()}
    found = dict.fromkeys(paths.values(), read)
    return found | {
        paths["Generate"]: generate,
        paths["Abort"]: generate,
        paths["HealthCheck"]: is_open,
    }


def asked_from(message: Any, served: ServedModel) -> Asked:
    """What a GenerateRequest says; InvalidRequest where it says what is not served."""
    _refuse_others(message, (*APPLIED, *NEUTRAL), path="")
    sampling = message.sampling_params
    _refuse_others(sampling, (*APPLIED_SAMPLING, *BY_GATEWAY), path="sampling_params.")
    in_force = translate.in_force(_sampling(sampling), served.defaults)
    _check_logprobs(sampling, in_force)
    request_id = message.request_id or secrets.token_hex(16)
    if len(request_id) > translate.MAX_ID_CHARS:
        raise InvalidRequest(
            f"request_id has {len(request_id)} characters; it must have 1 to "
            f"{translate.MAX_ID_CHARS}, or be left out",
            field="request_id",
        )
    return Asked(
        request_id=request_id,
        encode=_encoder(message, served),
        sampling=in_force,
        is_seeded=sampling.HasField("seed"),
    )


def _check_logprobs(sampling: Any, in_force: SamplingParams) -> None:
    """One alternative is known where the token chosen is the likeliest; more are not."""
    is_likeliest = in_force.temperature == 0 and not in_force.min_tokens
    if sampling.logprobs not in ((0, 1) if is_likeliest else (0,)):
        raise InvalidRequest(
            f"sampling_params.logprobs is {sampling.logprobs}; this server gives the chosen "
            "token's own logprob: ask for 0 alternatives (with logprobs = true, top_logprobs = 0), "
            "or for 1 with temperature = 0, which takes the likeliest",
            field="sampling_params.logprobs",
        )


def _sampling(sampling: Any) -> SamplingParams:
    """The parameters that a message sets: `optional` ones by presence, the others by not being 0.

    The protocol's other scalars can't say 0, so 0 is the model's own value.
    """
    values: dict[str, Any] = {
        field.name: value if isinstance(value, int | float) else tuple(value)
        for field, value in sampling.ListFields()
        if field.name in APPLIED_SAMPLING and field.name != "logprobs"
    }
    return SamplingParams(**values)


def _encoder(message: Any, served: ServedModel) -> Callable[[], list[int]]:
    limit = served.limits.max_seq_len
    match message.WhichOneof("input"):
        case "tokenized":
            ids = list(message.tokenized.input_ids[: limit + 1])  # one too many is refused as many
            return lambda: ids
        case "text" if message.text:
            text = message.text
            bounds.check_text(text, max_tokens=limit, field="text")
            return lambda: served.tokenizer.encode(text)
        case _:
            raise InvalidRequest(
                "the request has no prompt; give tokenized.input_ids or text", field="input"
            )


def _refuse_others(message: Any, known: tuple[str, ...], *, path: str) -> None:
    """Raises where a field is set that is not `known`, and not to a value that asks for nothing."""
    for field, value in message.ListFields():
        if field.name in NEUTRAL and value in NEUTRAL[field.name]:
            continue
        if field.name not in known or field.name in NEUTRAL:
            shown = f" = {value}" if isinstance(value, int | float) else ""
            raise InvalidRequest(
                f"{path}{field.name}{shown} is not served here; leave it out",
                field=f"{path}{field.name}",
            )


async def _answers(mailbox: Mailbox, num_top: int | None, *, is_stream: bool) -> AsyncIterator[Any]:
    """Chunks as they come, where they are wanted, and a last word."""
    while True:
        output = await (mailbox.take() if is_stream else mailbox.take_all())
        raise_failure(output, mailbox)
        if is_stream and output.token_ids:
            yield pb.GenerateResponse(chunk=_chunk(output, num_top))
        if output.finish_reason is not None:
            break
    yield pb.GenerateResponse(complete=_complete(output, num_top))


def _chunk(output: Output, num_top: int | None) -> Any:
    return pb.GenerateStreamChunk(
        token_ids=output.token_ids,
        prompt_tokens=output.num_prompt_tokens,
        completion_tokens=output.num_output_tokens,
        cached_tokens=output.num_cached_tokens,
        output_logprobs=_logprobs(output, num_top),
    )


def _complete(output: Output, num_top: int | None) -> Any:
    """The last word: of a stream its last tokens, or everything where there was none."""
    assert output.finish_reason is not None
    complete = pb.GenerateComplete(
        output_ids=output.token_ids,
        finish_reason=WORDS[output.finish_reason],
        prompt_tokens=output.num_prompt_tokens,
        completion_tokens=output.num_output_tokens,
        cached_tokens=output.num_cached_tokens,
        output_logprobs=_logprobs(output, num_top),
    )
    if isinstance(output.stop, str):
        complete.matched_stop_str = output.stop
    elif output.stop is not None:
        complete.matched_token_id = output.stop
    return complete


def _logprobs(output: Output, num_top: int | None) -> Any:
    if num_top is None:
        return None
    pairs = zip(output.logprobs, output.token_ids, strict=True)
    return pb.OutputLogProbs(
        token_logprobs=output.logprobs,
        token_ids=output.token_ids,
        top_logprobs=[
            pb.TopLogProbs(values=[value], token_ids=[token]) for value, token in pairs if num_top
        ],
    )


def _methods() -> list[Any]:
    return list(pb.DESCRIPTOR.services_by_name["VllmEngine"].methods)


def _to_bytes(message: Any) -> bytes:
    return message.SerializeToString()
