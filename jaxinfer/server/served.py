"""What the server needs of the rest: a model's facts, its tokenizer, and an engine."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jaxinfer.config import ModelConfig
from jaxinfer.host.request import EngineStats, Limits, Output, Request, SamplingParams
from jaxinfer.runner import Pulse
from jaxinfer.text.assets import TextAssets

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

    @property
    def pulse(self) -> Pulse:
        """Whether steps end; from any thread."""
        ...

    def start(self, ended: Callable[[Exception | None], None] = ...) -> None:
        """Begins to step; `ended` hears on its thread that it is over, before any client does."""
        ...

    def submit(self, request: Request) -> None:
        """Takes a request, or raises InvalidRequest, QueueFull or Draining at once."""
        ...

    def check_room(self) -> None:
        """Raises QueueFull or Draining where any request would be refused now; costs nothing."""
        ...

    def cancel(self, request_id: str) -> None:
        """Ends a request soon; an id that is not live is no error."""
        ...

    def refuse(self) -> None:
        """Takes nothing new from now on."""
        ...

    def accept(self) -> None:
        """Takes requests again."""
        ...

    def ask(self, function: Callable[[Any], Any]) -> Future[Any]:
        """Calls `function(engine)` on its thread between two steps; a step follows."""
        ...

    def stats(self) -> EngineStats: ...

    def stop(self, timeout_s: float | None = None) -> bool:
        """Ends it after the step under way; False where that step was not over in time."""
        ...


@dataclass(frozen=True)
class ServedModel:
    """The one model of a server."""

    name: str
    config: ModelConfig
    tokenizer: Codec
    limits: Limits
    defaults: SamplingParams = field(default_factory=SamplingParams)
    """What the model's own settings say about sampling."""
    text: TextAssets | None = None
    """What the tokenizer was built from, for a gateway that tokenizes itself."""
    line: int = 0
    """Requests that the engine holds, waiting ones included; 0 where that is not known."""
