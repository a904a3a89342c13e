"""What the server needs of the rest: a model's facts, its tokenizer, and an engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jaxinfer.config import ModelConfig
from jaxinfer.host.request import Limits, Output, Request, SamplingParams

Deliver = Callable[[list[Output]], None]


@runtime_checkable
class Codec(Protocol):
    """Text to tokens and back; `text.tokenizer.Tokenizer` is one."""

    def encode(self, text: str, *, add_special: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]: ...


@runtime_checkable
class EngineLike(Protocol):
    """An engine on its own thread; `runner.EngineThread` is one.

    It calls the `deliver` that it was made with on its thread, at most once a step, with every
    output of the step. Each submitted request gets exactly one output with a finish reason, also
    when it is cancelled.
    """

    @property
    def alive(self) -> bool: ...

    def start(self) -> None: ...

    def submit(self, request: Request) -> None:
        """Takes a request, or raises InvalidRequest, QueueFull or Draining at once."""
        ...

    def cancel(self, request_id: str) -> None:
        """Ends a request soon; an id that is not live is no error."""
        ...

    def drain(self, timeout_s: float) -> bool:
        """Takes nothing new, waits for what runs; False where some of it was not done in time."""
        ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class ServedModel:
    """The one model of a server."""

    name: str
    config: ModelConfig
    tokenizer: Codec
    limits: Limits
    defaults: SamplingParams = field(default_factory=SamplingParams)
    """What the model's own settings say about sampling."""
