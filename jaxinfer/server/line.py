"""The line before the engine as the edge sees it: how long it is, and how long it will take."""

import time
from collections import deque
from collections.abc import Callable

from jaxinfer.errors import DeadlinePassed, NeverFits, QueueFull
from jaxinfer.host.request import Request

WINDOW = 64  # of begins that tell the pace
LEAST_WAIT_S, MOST_WAIT_S = 0.05, 60.0
SURE = 0.5  # of the predicted wait: who could not make it at twice the pace is told at once


class Line:
    """Requests that got nothing yet; on the event loop's thread only."""

    def __init__(self, max_tokens: int = 0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_tokens = max_tokens
        self._clock = clock
        self._waiting: dict[str, int] = {}
        self._num_tokens = 0
        self._begins: deque[float] = deque(maxlen=WINDOW)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens that wait."""
        return self._num_tokens

    @property
    def wait_s(self) -> float:
        """How long a request that comes now would wait, by the pace of those before it."""
        if len(self._begins) < 8:
            return 0.0
        per_request_s = (self._begins[-1] - self._begins[0]) / (len(self._begins) - 1)
        return len(self._waiting) * per_request_s

    @property
    def retry_after_s(self) -> float:
        """When it makes sense to ask again: when half of the line has gone."""
        return min(max(self.wait_s / 2, LEAST_WAIT_S), MOST_WAIT_S)

    def check_room(self, deadline_s: float | None) -> None:
        """Raises what any request is told now, whatever its prompt; for before it is tokenised."""
        if self._max_tokens and self._num_tokens >= self._max_tokens:
            raise QueueFull(
                f"{self._num_tokens} prompt tokens wait, the bound (server.max_waiting_tokens); "
                "try again later",
                retry_after_s=self.retry_after_s,
            )
        if deadline_s is None:
            return
        left_s = deadline_s - self._clock()
        if SURE * self.wait_s > left_s:
            raise DeadlinePassed(
                f"{len(self._waiting)} requests wait, which takes about {self.wait_s:.1f} s, and "
                f"the deadline is in {max(0.0, left_s):.1f} s; give more time, or ask another "
                "server"
            )

    def check(self, request: Request) -> None:
        """Raises what a request that can't or should not wait is told."""
        size = len(request.prompt)
        if self._max_tokens and size > self._max_tokens:
            raise NeverFits(
                f"the prompt has {size} tokens, and the line holds {self._max_tokens} "
                "(server.max_waiting_tokens); it would never be let in"
            )
        if self._max_tokens and self._num_tokens + size > self._max_tokens:
            raise QueueFull(
                f"{self._num_tokens} prompt tokens wait, and {size} more would be above the bound "
                "(server.max_waiting_tokens); try again later",
                retry_after_s=self.retry_after_s,
            )
        self.check_room(request.deadline_s)

    def enter(self, request: Request) -> None:
        """A request waits now."""
        self._waiting[request.request_id] = len(request.prompt)
        self._num_tokens += len(request.prompt)

    def begin(self, request_id: str) -> None:
        """A request got its first output, whatever that is."""
        if self._leave(request_id):
            self._begins.append(self._clock())

    def leave(self, request_id: str) -> None:
        """A request is gone; no news where it was not waiting."""
        self._leave(request_id)

    def _leave(self, request_id: str) -> bool:
        size = self._waiting.pop(request_id, None)
        self._num_tokens -= size or 0
        return size is not None
