"""The client for asyncio."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Unpack

from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxinfer.client import channel, translate
from jaxinfer.client.failures import Raised
from jaxinfer.client.results import Completed, Completion, Delta, Model, Score, Stamps
from jaxinfer.client.resume import LOST_AGAIN, Attempts
from jaxinfer.client.sync import POLL_S, PROBE_S, READY_NAME
from jaxinfer.client.translate import ChatMessages, Options
from jaxinfer.errors import JaxinferError, Unreachable
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import inference_pb2_grpc, model_pb2, model_pb2_grpc


class AsyncClient:
    """`Client` for asyncio; make it inside the running loop.

    async with AsyncClient("127.0.0.1:50051") as client:
        async for event in client.stream("Once upon a time", max_tokens=64):
            ...
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float | None = None,
        token: str | None = None,
        tls: bool = False,
        tls_ca: str | Path | None = None,
        tls_cert: str | Path | None = None,
        tls_key: str | Path | None = None,
    ) -> None:
        self._target = target
        self._timeout_s = timeout_s
        secure = channel.credentials(tls=tls, ca=tls_ca, cert=tls_cert, key=tls_key)
        self._channel = channel.connect_aio(target, secure)
        calls = channel.Calls(self._channel, channel.token_metadata(token))
        self._inference: Any = inference_pb2_grpc.InferenceServiceStub(calls)
        self._models: Any = model_pb2_grpc.ModelServiceStub(calls)
        self._health: Any = health_pb2_grpc.HealthStub(calls)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends all calls and the connection."""
        await self._channel.close()

    async def generate(self, prompt: str | None = None, **options: Unpack[Options]) -> Completion:
        """Continues one prompt: a text, `token_ids=` or `messages=`. See `Options`."""
        message = translate.to_request(pb.GenerateRequest, prompt, options)
        attempts = Attempts(message, options, self._timeout(options.get("timeout_s")))
        sent_s = time.perf_counter()
        reply: pb.GenerateResponse | None = None
        while reply is None:
            try:
                with Raised(self._target):
                    reply = await self._inference.Generate(
                        attempts.message, timeout=attempts.timeout_s
                    )
            except LOST_AGAIN as error:
                await asyncio.sleep(attempts.pause_s(error))
        stamps = Stamps(e2e_s=time.perf_counter() - sent_s)
        return translate.to_completion(reply, stamps=stamps)

    def stream(
        self, prompt: str | None = None, **options: Unpack[Options]
    ) -> AsyncIterator[Delta | Completed]:
        """Yields Deltas as they come, then one Completed with all of it.

        Closing the iterator ends the request in the server; after a `break` Python closes it a
        little later, so where that matters use `contextlib.aclosing`.
        """
        message = translate.to_request(pb.GenerateStreamRequest, prompt, options)
        timeout_s = self._timeout(options.get("timeout_s"))
        return self._events(Attempts(message, options, timeout_s))

    async def score(
        self,
        text: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: ChatMessages | None = None,
        timeout_s: float | None = None,
    ) -> Score:
        """How likely the model finds a text; the server has engine.score_chunk set."""
        given = translate.to_prompt(text, {"token_ids": token_ids, "messages": messages})
        request = translate.build(pb.ScoreRequest, **given)
        with Raised(self._target):
            reply: pb.ScoreResponse = await self._inference.Score(
                request, timeout=self._timeout(timeout_s)
            )
        return translate.to_score(reply)

    async def tokenize(
        self,
        text: str | None = None,
        *,
        messages: ChatMessages | None = None,
        add_special: bool | None = None,
        timeout_s: float | None = None,
    ) -> list[int]:
        """The tokens of a text or a conversation."""
        request = translate.build(
            pb.TokenizeRequest,
            **translate.to_prompt(text, {"messages": messages}),
            **({} if add_special is None else {"add_special": add_special}),
        )
        with Raised(self._target):
            reply: pb.TokenizeResponse = await self._inference.Tokenize(
                request, timeout=self._timeout(timeout_s)
            )
        return list(reply.token_ids)

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special: bool = True,
        timeout_s: float | None = None,
    ) -> str:
        """The text of some tokens."""
        request = translate.build(
            pb.DetokenizeRequest, token_ids=token_ids, skip_special=skip_special
        )
        with Raised(self._target):
            reply: pb.DetokenizeResponse = await self._inference.Detokenize(
                request, timeout=self._timeout(timeout_s)
            )
        return reply.text

    async def models(self) -> list[Model]:
        """The models that the server has."""
        with Raised(self._target):
            reply: model_pb2.ListModelsResponse = await self._models.ListModels(
                model_pb2.ListModelsRequest(), timeout=self._timeout_s
            )
        return [translate.to_model(message) for message in reply.models]

    async def model(self, name: str | None = None) -> Model:
        """One model; without a name the one that is served."""
        request = model_pb2.GetModelRequest(model=name)
        with Raised(self._target):
            reply: model_pb2.GetModelResponse = await self._models.GetModel(
                request, timeout=self._timeout_s
            )
        return translate.to_model(reply.model)

    async def health(self, service: str = "", *, timeout_s: float | None = None) -> str:
        """SERVING or NOT_SERVING: of the process, or with a name whether requests are taken.

        The names are those of the services, such as jaxinfer.v1.InferenceService, and the model's.
        """
        request = health_pb2.HealthCheckRequest(service=service)
        with Raised(self._target):
            reply: health_pb2.HealthCheckResponse = await self._health.Check(
                request, timeout=self._timeout(timeout_s)
            )
        return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns once the server says SERVING; Unreachable where it doesn't in time."""
        end_s = time.monotonic() + timeout_s
        said = "nothing"
        while (left_s := end_s - time.monotonic()) > 0:
            try:
                said = await self.health(READY_NAME, timeout_s=min(left_s, PROBE_S))
            except JaxinferError as error:
                said = str(error)
            if said == "SERVING":
                return
            await asyncio.sleep(POLL_S)
        raise Unreachable(f"{self._target} was not ready within {timeout_s:g} s; it said: {said}")

    async def _events(
        self, attempts: Attempts[pb.GenerateStreamRequest]
    ) -> AsyncIterator[Delta | Completed]:
        reader = translate.StreamReader()
        pause_s: float | None = 0.0
        while pause_s is not None:
            await asyncio.sleep(pause_s)
            call: Any = self._inference.GenerateStream(attempts.message, timeout=attempts.timeout_s)
            try:
                with Raised(self._target):
                    async for reply in call:
                        event = reader.feed(reply)
                        if event is not None and attempts.passes(event):
                            yield event
                pause_s = None
            except LOST_AGAIN as error:
                pause_s = attempts.pause_s(error, reader)
            finally:
                call.cancel()

    def _timeout(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s
