"""The client for plain code and threads."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxinfer.client import channel, translate
from jaxinfer.client.failures import Raised
from jaxinfer.client.results import Completed, Completion, Delta, Model, Score, Stamps
from jaxinfer.client.resume import LOST_AGAIN, Attempts
from jaxinfer.client.translate import ChatMessages, Options
from jaxinfer.errors import JaxinferError, Unreachable
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import inference_pb2_grpc, model_pb2, model_pb2_grpc

POLL_S = 0.05
PROBE_S = 2.0
READY_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name


class Client:
    """Talks to one server; any number of threads may share it.

        with Client("127.0.0.1:50051") as client:
            print(client.generate("The capital of France is", max_tokens=8).text)

    Raises the server's own errors: InvalidRequest, UnknownModel, QueueFull, Draining,
    DeadlinePassed, EngineFailed; Unreachable where no server answers, ClientError for the rest.
    `timeout_s` is the deadline of a call that gives none itself.

    `token` goes with every call. `tls_ca` is a PEM file of whom to trust, `tls` alone trusts what
    the system does; `tls_cert` and `tls_key` are this client's own certificate.
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
        self._channel = channel.connect(target, secure)
        calls = channel.Calls(self._channel, channel.token_metadata(token))
        self._inference: Any = inference_pb2_grpc.InferenceServiceStub(calls)
        self._models: Any = model_pb2_grpc.ModelServiceStub(calls)
        self._health: Any = health_pb2_grpc.HealthStub(calls)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all calls and the connection."""
        self._channel.close()

    def generate(self, prompt: str | None = None, **options: Unpack[Options]) -> Completion:
        """Continues one prompt: a text, `token_ids=` or `messages=`. See `Options`."""
        message = translate.to_request(pb.GenerateRequest, prompt, options)
        attempts = Attempts(message, options, self._timeout(options.get("timeout_s")))
        sent_s = time.perf_counter()
        reply: pb.GenerateResponse | None = None
        while reply is None:
            try:
                with Raised(self._target):
                    reply = self._inference.Generate(attempts.message, timeout=attempts.timeout_s)
            except LOST_AGAIN as error:
                time.sleep(attempts.pause_s(error))
        stamps = Stamps(e2e_s=time.perf_counter() - sent_s)
        return translate.to_completion(reply, stamps=stamps)

    def stream(
        self, prompt: str | None = None, **options: Unpack[Options]
    ) -> Iterator[Delta | Completed]:
        """Yields Deltas as they come, then one Completed with all of it.

        Closing the iterator, or breaking out of its loop, ends the request in the server.
        """
        message = translate.to_request(pb.GenerateStreamRequest, prompt, options)
        timeout_s = self._timeout(options.get("timeout_s"))
        return self._events(Attempts(message, options, timeout_s))

    def score(
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
            reply: pb.ScoreResponse = self._inference.Score(
                request, timeout=self._timeout(timeout_s)
            )
        return translate.to_score(reply)

    def tokenize(
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
            reply: pb.TokenizeResponse = self._inference.Tokenize(
                request, timeout=self._timeout(timeout_s)
            )
        return list(reply.token_ids)

    def detokenize(
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
            reply: pb.DetokenizeResponse = self._inference.Detokenize(
                request, timeout=self._timeout(timeout_s)
            )
        return reply.text

    def models(self) -> list[Model]:
        """The models that the server has."""
        with Raised(self._target):
            reply: model_pb2.ListModelsResponse = self._models.ListModels(
                model_pb2.ListModelsRequest(), timeout=self._timeout_s
            )
        return [translate.to_model(message) for message in reply.models]

    def model(self, name: str | None = None) -> Model:
        """One model; without a name the one that is served."""
        request = model_pb2.GetModelRequest(model=name)
        with Raised(self._target):
            reply: model_pb2.GetModelResponse = self._models.GetModel(
                request, timeout=self._timeout_s
            )
        return translate.to_model(reply.model)

    def health(self, service: str = "", *, timeout_s: float | None = None) -> str:
        """SERVING or NOT_SERVING: of the process, or with a name whether requests are taken.

        The names are those of the services, such as jaxinfer.v1.InferenceService, and the model's.
        """
        request = health_pb2.HealthCheckRequest(service=service)
        with Raised(self._target):
            reply: health_pb2.HealthCheckResponse = self._health.Check(
                request, timeout=self._timeout(timeout_s)
            )
        return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns once the server says SERVING; Unreachable where it doesn't in time."""
        end_s = time.monotonic() + timeout_s
        said = "nothing"
        while (left_s := end_s - time.monotonic()) > 0:
            try:
                said = self.health(READY_NAME, timeout_s=min(left_s, PROBE_S))
            except JaxinferError as error:
                said = str(error)
            if said == "SERVING":
                return
            time.sleep(POLL_S)
        raise Unreachable(f"{self._target} was not ready within {timeout_s:g} s; it said: {said}")

    def _events(self, attempts: Attempts[pb.GenerateStreamRequest]) -> Iterator[Delta | Completed]:
        reader = translate.StreamReader()
        pause_s: float | None = 0.0
        while pause_s is not None:
            time.sleep(pause_s)
            call: Any = self._inference.GenerateStream(attempts.message, timeout=attempts.timeout_s)
            try:
                with Raised(self._target):
                    for reply in call:
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
