"""Calls that outlive their connection: what is asked again, when, and until when."""

import random
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from jaxinfer.client.results import Completed, Delta
from jaxinfer.client.translate import StreamReader
from jaxinfer.errors import (
    DeadlinePassed,
    Draining,
    DuplicateRequest,
    InvalidRequest,
    JaxinferError,
    QueueFull,
    Unreachable,
)
from jaxinfer.host.request import FinishReason
from jaxinfer.v1 import inference_pb2 as pb

LOST = (Unreachable, Draining)
# Once a call was lost: its old self may still be live in the server, and others come back too.
LOST_AGAIN = (*LOST, DuplicateRequest, QueueFull)
FIRST_PAUSE_S, MAX_PAUSE_S = 0.05, 1.0

M = TypeVar("M", pb.GenerateRequest, pb.GenerateStreamRequest)
Clock = Callable[[], float]


class Attempts(Generic[M]):
    """The attempts at one request; the first is as it was asked, later ones ask for what follows.

    With `resume_s` the id and the seed are drawn here, so that each attempt asks for the same
    answer even if the first was lost before it said anything.
    """

    def __init__(
        self,
        message: M,
        options: Mapping[str, Any],
        timeout_s: float | None,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        self._message = message
        self._clock = clock
        resume_s: Any = options.get("resume_s") or 0.0
        self._timeout_s = timeout_s
        self._end_s: float | None = None
        self._give_up_s: float | None = None
        self._num_lost = 0
        if not (isinstance(resume_s, int | float) and 0 <= resume_s < float("inf")):
            raise InvalidRequest(
                f"resume_s is {resume_s!r}; it must be a number of seconds, at least 0",
                field="resume_s",
            )
        self._resume_s = resume_s
        if self._resume_s and not message.HasField("request_id"):
            message.request_id = secrets.token_hex(16)
        if self._resume_s and not message.sampling.HasField("seed"):
            message.sampling.seed = secrets.randbits(64)

    @property
    def message(self) -> M:
        """What the next attempt asks."""
        return self._message

    @property
    def timeout_s(self) -> float | None:
        """What is left of the call's time, which begins with the first attempt."""
        if self._timeout_s is None:
            return None
        if self._end_s is None:
            self._end_s = self._clock() + self._timeout_s
        return max(self._end_s - self._clock(), 0.0)

    def passes(self, event: Delta | Completed | None) -> bool:
        """Whether the caller gets this event: not the end that a stopping server gave a stream."""
        if isinstance(event, Delta):
            self._give_up_s, self._num_lost = None, 0
        if self._resume_s and isinstance(event, Completed):
            return event.completion.finish_reason is not FinishReason.CANCELLED
        return event is not None

    def pause_s(self, error: JaxinferError, reader: StreamReader | None = None) -> float:
        """Seconds to wait before the next attempt; raises `error` where there is none."""
        is_lost = isinstance(error, LOST_AGAIN if self._message.HasField("resume") else LOST)
        if not (self._resume_s and is_lost):
            raise error
        now_s = self._clock()
        if self._give_up_s is None:
            self._give_up_s = now_s + self._resume_s
        pause_s = min(FIRST_PAUSE_S * 2**self._num_lost, MAX_PAUSE_S) * random.uniform(0.5, 1.0)
        if now_s + pause_s > self._give_up_s:
            raise error
        if self._end_s is not None and now_s + pause_s > self._end_s:
            raise DeadlinePassed(f"the call's timeout_s passed while it was lost: {error}")
        self._num_lost += 1
        self._ask_for_the_rest(reader)
        return pause_s

    def _ask_for_the_rest(self, reader: StreamReader | None) -> None:
        message, started = self._message, None if reader is None else reader.started
        message.resume.CopyFrom(pb.Resume() if reader is None else reader.resume)
        if started is None:
            return
        # A server's defaults may be others after a restart; the answer must stay the same.
        message.model = started.model
        message.sampling.CopyFrom(started.parameters.sampling)
        message.stopping.CopyFrom(started.parameters.stopping)
        message.output.CopyFrom(started.parameters.output)
        message.priority = started.parameters.priority
        message.use_prefix_cache = started.parameters.use_prefix_cache
