"""The handlers of `jaxinfer.v1`: they translate, and nothing else."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import grpc

from jaxinfer.errors import (
    DeadlinePassed,
    Draining,
    EndedByOperator,
    EngineFailed,
    InvalidRequest,
    QueueFull,
)
from jaxinfer.host.request import FinishReason, Output, Request, SamplingParams
from jaxinfer.server import bounds, translate
from jaxinfer.server.hub import Hub, Mailbox
from jaxinfer.server.resume import Rest, Seen, seen_from
from jaxinfer.server.score import Scoring
from jaxinfer.server.served import EngineLike, ServedModel
from jaxinfer.server.status import BEGUN, Call, Reported, let_go
from jaxinfer.server.tenants import CALLER, Tenants
from jaxinfer.server.writing import Writers
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import model_pb2

NAMES = tuple(
    file.services_by_name[name].full_name
    for file, name in (
        (pb.DESCRIPTOR, "InferenceService"),
        (model_pb2.DESCRIPTOR, "ModelService"),
    )
)


class Asked(NamedTuple):
    """What a request says, whichever protocol it came in."""

    request_id: str
    encode: Callable[[], list[int]]
    """Makes the prompt's tokens; it may take long."""
    sampling: SamplingParams
    priority: int = 0
    use_prefix_cache: bool = True
    seen: Seen | None = None
    """None where the request is not resumed."""
    is_seeded: bool = True
    """False where the seed was drawn here."""
    is_chat: bool = False


@dataclass(frozen=True)
class Live:
    """A request that the engine has taken."""

    request_id: str
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
        reader_limit_s: float = 0.0,
        max_chat_messages: int = bounds.MAX_CHAT_MESSAGES,
        tenants: Tenants | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._served = served
        self._engine = engine
        self._hub = hub
        self._salt = salt
        self.writers = Writers(reader_limit_s)
        self._tenants = Tenants() if tenants is None else tenants
        self._clock = clock
        self._scoring = Scoring(served, engine)
        self._encoder = partial(
            translate.encoder, tokenizer=served.tokenizer, max_messages=max_chat_messages
        )

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """What a grpc.aio server dispatches to."""
        inference = {
            "Generate": _unary(self.generate),
            "GenerateStream": grpc.unary_stream_rpc_method_handler(let_go(self._write_stream)),
            "Score": _unary(self.score),
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
            live = await self._begin(await read(pb.GenerateRequest, data), call)
            output = live.rest.of(await live.mailbox.take_all())
            raise_failure(output, live.mailbox)
            response = pb.GenerateResponse(
                started=live.started,
                output=pb.Delta(),
                finished=translate.to_finished(output),
                summary=translate.to_summary(output),
            )
            translate.fill_delta(response.output, output, live.wanted)
            return response

    async def generate_stream(self, data: bytes, call: Call) -> AsyncGenerator[bytes, None]:
        """The events as they go onto the wire."""
        async with Reported(call):
            live = await self._begin(await read(pb.GenerateStreamRequest, data), call)
            mailbox, rest, wanted = live.mailbox, live.rest, live.wanted
            try:
                yield _to_bytes(pb.GenerateStreamResponse(started=live.started))
                while True:
                    output = rest.of(await mailbox.take())
                    event = pb.GenerateStreamResponse()
                    if translate.fill_delta(event.delta, output, wanted):
                        yield event.SerializeToString()
                    if output.finish_reason is not None:
                        break
                finished, summary = translate.to_finished(output), translate.to_summary(output)
                yield _to_bytes(pb.GenerateStreamResponse(finished=finished))
                yield _to_bytes(pb.GenerateStreamResponse(summary=summary))
                raise_failure(output, mailbox)
            finally:
                self.leave(live.request_id, mailbox)

    async def _write_stream(self, data: bytes, call: Any) -> None:
        await self.writers.write(self.generate_stream(data, call), call)

    async def score(self, data: bytes, call: Call) -> pb.ScoreResponse:
        async with Reported(call):
            message = await read(pb.ScoreRequest, data)
            translate.check_model(message.model, self._served)
            encode = self._encoder(message)
            tokens = list(await asyncio.to_thread(encode))
            lease = self._tenants.begin(CALLER.get(), len(tokens), None)
            try:
                parts = await self._scoring.of(tokens)
            finally:
                lease.end()
            return pb.ScoreResponse(
                token_ids=tokens,
                logprobs=[value for part in parts for value in part.logprobs.tolist()],
                is_likeliest=[value for part in parts for value in part.is_likeliest.tolist()],
            )

    async def tokenize(self, data: bytes, call: Call) -> pb.TokenizeResponse:
        async with Reported(call):
            message = await read(pb.TokenizeRequest, data)
            translate.check_model(message.model, self._served)
            if message.HasField("add_special") and message.HasField("chat"):
                raise InvalidRequest(
                    "add_special goes with text; a chat template writes its own special tokens",
                    field="add_special",
                )
            add_special = message.add_special if message.HasField("add_special") else True
            encode = self._encoder(message, add_special=add_special)
            return pb.TokenizeResponse(token_ids=await asyncio.to_thread(encode))

    async def detokenize(self, data: bytes, call: Call) -> pb.DetokenizeResponse:
        async with Reported(call):
            message = await read(pb.DetokenizeRequest, data)
            translate.check_model(message.model, self._served)
            skip_special = message.skip_special if message.HasField("skip_special") else True
            text = await asyncio.to_thread(self._decoded, message.token_ids, skip_special)
            return pb.DetokenizeResponse(text=text)

    async def list_models(self, data: bytes, call: Call) -> model_pb2.ListModelsResponse:
        async with Reported(call):
            await read(model_pb2.ListModelsRequest, data)
            return model_pb2.ListModelsResponse(models=[translate.to_model(self._served)])

    async def get_model(self, data: bytes, call: Call) -> model_pb2.GetModelResponse:
        async with Reported(call):
            message = await read(model_pb2.GetModelRequest, data)
            translate.check_model(message.model, self._served)
            return model_pb2.GetModelResponse(model=translate.to_model(self._served))

    async def begin(self, asked: Asked, call: Call) -> tuple[Request, Mailbox]:
        """Submits or resumes; from then on the end of the call is the end of the request."""
        deadline_s = self._deadline_s(call)
        caller = CALLER.get()
        caller.check_priority(asked.priority)
        self.check_room(asked.request_id, deadline_s)
        prompt = await asyncio.to_thread(asked.encode)
        lease = self._tenants.begin(caller, len(prompt), asked.sampling.max_tokens)
        request = Request(
            request_id=caller.request_id(asked.request_id),
            prompt=tuple(prompt),
            sampling=asked.sampling,
            priority=asked.priority,
            turn=lease.turn,
            salt=caller.salt(self._salt),
            use_prefix_cache=asked.use_prefix_cache,
            deadline_s=deadline_s,
        )
        with lease:
            claimed = None if asked.seen is None else self._hub.claim(request)
            again = None if claimed else self._hub.answered(request, is_seeded=asked.is_seeded)
            if again is not None:
                call.add_done_callback(lambda _: lease.end())
                return again
            mailbox = claimed or self._submit(request)
        BEGUN.get()(request, asked.is_chat)
        lease.num_output_tokens = lambda: mailbox.num_output_tokens
        call.add_done_callback(lambda _: lease.end())
        call.add_done_callback(lambda _: self.leave(request.request_id, mailbox))
        return request, mailbox

    def check_room(self, request_id: str, deadline_s: float | None) -> None:
        """Raises what a request is told for which there is no place, before work goes into it.

        One that is live or answered already needs none.
        """
        caller = CALLER.get()
        if self._hub.knows(caller.request_id(request_id)):
            return
        self._tenants.check_room(caller)
        self._hub.line.check_room(deadline_s, caller.tenant)
        try:
            self._engine.check_room()
        except QueueFull as error:
            error.retry_after_s = self._hub.line.retry_after_s(caller.tenant)
            raise

    def _decoded(self, token_ids: Sequence[int], skip_special: bool) -> str:
        vocab_size = self._served.limits.vocab_size
        for place, token in enumerate(token_ids):
            if not 0 <= token < vocab_size:
                raise InvalidRequest(
                    f"token_ids[{place}] is {token}; token ids of this model go from 0 to "
                    f"{vocab_size - 1}",
                    field="token_ids",
                )
        return self._served.tokenizer.decode(token_ids, skip_special=skip_special)

    async def _begin(
        self, message: pb.GenerateRequest | pb.GenerateStreamRequest, call: Call
    ) -> Live:
        translate.check_model(message.model, self._served)
        request_id = translate.request_id_from(message)
        self.check_room(request_id, self._deadline_s(call))
        asked = Asked(
            request_id=request_id,
            encode=self._encoder(message, max_tokens=self._served.limits.max_seq_len),
            sampling=translate.sampling_from(message, self._served.defaults),
            priority=message.priority,
            use_prefix_cache=translate.uses_prefix_cache(message),
            seen=seen_from(message),
            is_seeded=message.sampling.HasField("seed"),
            is_chat=message.HasField("chat"),
        )
        wanted = translate.wanted_from(message.output)
        request, mailbox = await self.begin(asked, call)
        started = translate.to_started(
            request_id=asked.request_id,
            model=self._served.name,
            num_prompt_tokens=len(request.prompt),
            parameters=translate.to_parameters(
                request.sampling, wanted, asked.priority, asked.use_prefix_cache
            ),
        )
        return Live(request.request_id, mailbox, Rest(asked.seen or Seen()), wanted, started)

    def _deadline_s(self, call: Call) -> float | None:
        remaining_s = call.time_remaining()
        if remaining_s is None:
            return None
        if remaining_s <= 0:
            raise DeadlinePassed("the deadline had passed when the request arrived")
        return self._clock() + remaining_s

    def _submit(self, request: Request) -> Mailbox:
        tenant = CALLER.get().tenant
        mailbox = self._hub.admit(request, tenant)
        taken = False
        try:
            self._engine.submit(request)
            taken = True
        except QueueFull as error:
            error.retry_after_s = self._hub.line.retry_after_s(tenant)
            raise
        finally:
            if not taken:
                self._hub.forget(request.request_id)
        return mailbox

    def leave(self, request_id: str, mailbox: Mailbox) -> None:
        """No one reads a request any more."""
        if self._hub.abandon(request_id, mailbox):
            self._engine.cancel(request_id)


def raise_failure(output: Output, mailbox: Mailbox) -> None:
    """Raises where a request ended without an answer."""
    match output.finish_reason:
        case FinishReason.DEADLINE:
            raise DeadlinePassed(
                f"the deadline passed after {output.num_output_tokens} tokens; give more time, or "
                "ask for fewer with max_tokens"
            )
        case FinishReason.CANCELLED if mailbox.is_aborted:
            raise EndedByOperator("an operator ended this request; asking again may not help")
        case FinishReason.CANCELLED:
            raise Draining(
                output.error or "the server stopped before this request was finished; ask another"
            )
        case FinishReason.ERROR:
            raise EngineFailed(output.error)


async def read(kind: type[translate.M], data: bytes) -> translate.M:
    """A message of these bytes; a large one is read while the event loop goes on."""
    if len(data) <= bounds.LARGE_BYTES:
        return translate.parse(kind, data)
    return await asyncio.to_thread(translate.parse, kind, data)


def _unary(behaviour: Any) -> grpc.RpcMethodHandler:
    return grpc.unary_unary_rpc_method_handler(let_go(behaviour), response_serializer=_to_bytes)


def _to_bytes(message: Any) -> bytes:
    return message.SerializeToString()
