"""The handlers of `jaxinfer.v1`: they translate, and nothing else."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from jaxinfer.errors import DeadlinePassed, Draining, EngineFailed, InvalidRequest
from jaxinfer.host.request import FinishReason, Output, Request
from jaxinfer.server import translate
from jaxinfer.server.hub import Hub, Mailbox
from jaxinfer.server.resume import Rest, Seen, seen_from
from jaxinfer.server.served import EngineLike, ServedModel
from jaxinfer.server.status import Call, Reported
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import model_pb2

NAMES = tuple(
    file.services_by_name[name].full_name
    for file, name in (
        (pb.DESCRIPTOR, "InferenceService"),
        (model_pb2.DESCRIPTOR, "ModelService"),
    )
)


@dataclass(frozen=True)
class Live:
    """A request that the engine has taken."""

    mailbox: Mailbox
    rest: Rest
    wanted: translate.Wanted
    started: pb.Started


class Service:
    """Both services; requests arrive as bytes, so that damaged ones get a status of ours."""

    def __init__(
        self,
        served: ServedModel,
        engine: EngineLike,
        hub: Hub,
        *,
        salt: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._served = served
        self._engine = engine
        self._hub = hub
        self._salt = salt
        self._clock = clock

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """What a grpc.aio server dispatches to."""
        inference = {
            "Generate": _unary(self.generate),
            "GenerateStream": grpc.unary_stream_rpc_method_handler(
                self.generate_stream, response_serializer=_to_bytes
            ),
            "Tokenize": _unary(self.tokenize),
            "Detokenize": _unary(self.detokenize),
        }
        models = {"ListModels": _unary(self.list_models), "GetModel": _unary(self.get_model)}
        return [
            grpc.method_handlers_generic_handler(name, methods)
            for name, methods in zip(NAMES, (inference, models), strict=True)
        ]

    async def generate(self, data: bytes, call: Call) -> pb.GenerateResponse:
        async with Reported(call):
            live = await self._begin(translate.parse(pb.GenerateRequest, data), call)
            output = live.rest.of(await live.mailbox.take_all())
            _raise_failure(output)
            return pb.GenerateResponse(
                started=live.started,
                output=translate.to_delta(output, live.wanted) or pb.Delta(),
                finished=translate.to_finished(output),
                summary=translate.to_summary(output),
            )

    async def generate_stream(
        self, data: bytes, call: Call
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        async with Reported(call):
            live = await self._begin(translate.parse(pb.GenerateStreamRequest, data), call)
            yield pb.GenerateStreamResponse(started=live.started)
            while True:
                output = live.rest.of(await live.mailbox.take())
                delta = translate.to_delta(output, live.wanted)
                if delta is not None:
                    yield pb.GenerateStreamResponse(delta=delta)
                if output.finish_reason is not None:
                    break
            yield pb.GenerateStreamResponse(finished=translate.to_finished(output))
            yield pb.GenerateStreamResponse(summary=translate.to_summary(output))
            _raise_failure(output)

    async def tokenize(self, data: bytes, call: Call) -> pb.TokenizeResponse:
        async with Reported(call):
            message = translate.parse(pb.TokenizeRequest, data)
            translate.check_model(message.model, self._served)
            if message.HasField("add_special") and message.HasField("chat"):
                raise InvalidRequest(
                    "add_special goes with text; a chat template writes its own special tokens",
                    field="add_special",
                )
            add_special = message.add_special if message.HasField("add_special") else True
            encode = translate.encoder(message, self._served.tokenizer, add_special=add_special)
            return pb.TokenizeResponse(token_ids=await asyncio.to_thread(encode))

    async def detokenize(self, data: bytes, call: Call) -> pb.DetokenizeResponse:
        async with Reported(call):
            message = translate.parse(pb.DetokenizeRequest, data)
            translate.check_model(message.model, self._served)
            vocab_size = self._served.limits.vocab_size
            for place, token in enumerate(message.token_ids):
                if not 0 <= token < vocab_size:
                    raise InvalidRequest(
                        f"token_ids[{place}] is {token}; token ids of this model go from 0 to "
                        f"{vocab_size - 1}",
                        field="token_ids",
                    )
            skip_special = message.skip_special if message.HasField("skip_special") else True
            decode = self._served.tokenizer.decode
            text = await asyncio.to_thread(decode, message.token_ids, skip_special=skip_special)
            return pb.DetokenizeResponse(text=text)

    async def list_models(self, data: bytes, call: Call) -> model_pb2.ListModelsResponse:
        async with Reported(call):
            translate.parse(model_pb2.ListModelsRequest, data)
            return model_pb2.ListModelsResponse(models=[translate.to_model(self._served)])

    async def get_model(self, data: bytes, call: Call) -> model_pb2.GetModelResponse:
        async with Reported(call):
            message = translate.parse(model_pb2.GetModelRequest, data)
            translate.check_model(message.model, self._served)
            return model_pb2.GetModelResponse(model=translate.to_model(self._served))

    async def _begin(
        self, message: pb.GenerateRequest | pb.GenerateStreamRequest, call: Call
    ) -> Live:
        """Submits or resumes; from then on the end of the call is the end of the request."""
        deadline_s = self._deadline_s(call)
        translate.check_model(message.model, self._served)
        seen = seen_from(message)
        request_id = translate.request_id_from(message)
        sampling = translate.sampling_from(message, self._served.defaults)
        wanted = translate.wanted_from(message.output)
        prompt = await asyncio.to_thread(translate.encoder(message, self._served.tokenizer))
        request = Request(
            request_id=request_id,
            prompt=tuple(prompt),
            sampling=sampling,
            priority=message.priority,
            salt=self._salt,
            use_prefix_cache=translate.uses_prefix_cache(message),
            deadline_s=deadline_s,
        )
        mailbox = (None if seen is None else self._hub.claim(request)) or self._submit(request)
        call.add_done_callback(lambda _: self._leave(request_id, mailbox))
        started = translate.to_started(
            request_id=request_id,
            model=self._served.name,
            num_prompt_tokens=len(prompt),
            parameters=translate.to_parameters(
                sampling, wanted, request.priority, request.use_prefix_cache
            ),
        )
        return Live(mailbox, Rest(seen or Seen()), wanted, started)

    def _deadline_s(self, call: Call) -> float | None:
        remaining_s = call.time_remaining()
        if remaining_s is None:
            return None
        if remaining_s <= 0:
            raise DeadlinePassed("the deadline had passed when the request arrived")
        return self._clock() + remaining_s

    def _submit(self, request: Request) -> Mailbox:
        mailbox = self._hub.open(request.request_id)
        taken = False
        try:
            self._engine.submit(request)
            taken = True
        finally:
            if not taken:
                self._hub.forget(request.request_id)
        return mailbox

    def _leave(self, request_id: str, mailbox: Mailbox) -> None:
        if self._hub.abandon(request_id, mailbox):
            self._engine.cancel(request_id)


def _raise_failure(output: Output) -> None:
    """Raises where a request ended without an answer."""
    match output.finish_reason:
        case FinishReason.DEADLINE:
            raise DeadlinePassed(
                f"the deadline passed after {output.num_output_tokens} tokens; give more time, or "
                "ask for fewer with max_tokens"
            )
        case FinishReason.CANCELLED:
            raise Draining("the server stopped before this request was finished; ask another")
        case FinishReason.ERROR:
            raise EngineFailed(output.error)


def _unary(behaviour: Any) -> grpc.RpcMethodHandler:
    return grpc.unary_unary_rpc_method_handler(behaviour, response_serializer=_to_bytes)


def _to_bytes(message: Any) -> bytes:
    return message.SerializeToString()
