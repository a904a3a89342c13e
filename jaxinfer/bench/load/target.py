"""What a load can be sent to: something that answers a call in parts, and says what it took."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from jaxinfer.bench.load.calls import Call
from jaxinfer.errors import JaxinferError


@dataclass(frozen=True)
class Ask:
    """What is the same in all calls of a run."""

    temperature: float = 0.0
    ignore_eos: bool = True
    """Answers are as long as the workload says, whatever the model would rather do."""
    is_chat: bool = False
    """Texts go through the model's chat template, as a user's message."""
    use_prefix_cache: bool = True
    timeout_s: float = 600.0


class Part(NamedTuple):
    """Something of an answer came; how many tokens it holds, where the server tells."""

    num_tokens: int = 1


class End(NamedTuple):
    """An answer is complete; None where the server doesn't say."""

    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    queue_s: float | None = None
    prefill_s: float | None = None


class CallFailed(JaxinferError):
    """A call that was not answered to its end; `status` is what failures are counted by."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


@runtime_checkable
class Target(Protocol):
    """A server."""

    def stream(self, call: Call) -> AsyncIterator[Part | End]:
        """Sends a call and yields its answer; CallFailed where there is none."""
        ...
