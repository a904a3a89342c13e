"""A server of jaxinfer's as a target, through its own client."""

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

import grpc

from jaxinfer.bench.load.calls import Call
from jaxinfer.bench.load.target import Ask, CallFailed, End, Part
from jaxinfer.client import AsyncClient, Completed, Model, Options
from jaxinfer.errors import ClientError, JaxinferError


class GrpcTarget:
    """`async with` it inside the running loop."""

    def __init__(self, address: str, ask: Ask, **client_options: Any) -> None:
        self._client = AsyncClient(address, timeout_s=ask.timeout_s, **client_options)
        self._ask = ask

    async def __aenter__(self) -> "GrpcTarget":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.close()

    async def model(self) -> Model:
        """The model that is served."""
        return await self._client.model()

    async def stream(self, call: Call) -> AsyncIterator[Part | End]:
        """Sends a call and yields its answer."""
        options = self._options(call)
        text = call.prompt if isinstance(call.prompt, str) and not self._ask.is_chat else None
        try:
            async for event in self._client.stream(text, **options):
                if not isinstance(event, Completed):
                    if event.token_ids:
                        yield Part(len(event.token_ids))
                    continue
                usage, timings = event.completion.usage, event.completion.timings
                yield End(
                    num_prompt_tokens=usage.num_prompt_tokens,
                    num_output_tokens=usage.num_output_tokens,
                    num_cached_tokens=usage.num_cached_tokens,
                    num_preemptions=usage.num_preemptions,
                    queue_s=timings.queue_s,
                    prefill_s=timings.prefill_s,
                )
        except JaxinferError as error:
            raise CallFailed(status_of(error), str(error)) from error

    def _options(self, call: Call) -> Options:
        options: Options = {
            "max_tokens": call.num_output_tokens,
            "temperature": self._ask.temperature,
            "ignore_eos": self._ask.ignore_eos,
            "priority": call.priority,
            "use_prefix_cache": self._ask.use_prefix_cache,
            "seed": call.number,
        }
        if not isinstance(call.prompt, str):
            options["token_ids"] = call.prompt
        elif self._ask.is_chat:
            options["messages"] = [{"role": "user", "content": call.prompt}]
        return options


def status_of(error: JaxinferError) -> str:
    """The gRPC code of a failed call, or the kind of error that the client itself raised."""
    cause = error.__cause__
    if isinstance(cause, grpc.aio.AioRpcError):
        return cause.code().name
    return (error.code if isinstance(error, ClientError) else "") or type(error).__name__
