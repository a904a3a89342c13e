"""The line before the engine as the edge sees it: how long it is, and how long it will take."""

import time
from collections import Counter, deque
from collections.abc import Callable

from jaxinfer.errors import DeadlinePassed, NeverFits, QueueFull
from jaxinfer.host.request import Request

WINDOW = 64  # of begins that tell the pace
ENOUGH = 8  # of them
LEAST_WAIT_S, MOST_WAIT_S = 0.05, 60.0
SURE = 0.5  # of the predicted wait: who could not make it at twice the pace is told at once


class Line:
    """Requests that got nothing yet; on the event loop's thread only."""

    def __init__(
        self,
        max_tokens: int = 0,
        max_wait_s: float = 0.0,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Bounds of 0 are none."""
        self._max_tokens = max_tokens
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._waiting: dict[str, tuple[str, int]] = {}  # request_id -> tenant, prompt tokens
        self._tenants: Counter[str] = Counter()  # of those that wait
        self._num_tokens = 0
        self._begun_s: float | None = None  # the last begin, where others waited on
        self._gaps_s: deque[float] = deque(maxlen=WINDOW)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens that wait."""
        return self._num_tokens

    def wait_s(self, tenant: str = "") -> float:
        """How long a request that comes now would wait, by the pace of those before it.

        That is the time from one begin to the next where somebody waited all the while: what comes
        seldom says nothing about how fast the engine is.
        """
        if len(self._gaps_s) < ENOUGH:
            return 0.0
        return self._num_ahead(tenant) * sum(self._gaps_s) / len(self._gaps_s)

    def retry_after_s(self, tenant: str = "") -> float:
        """When it makes sense to ask again: when half of the line has gone."""
        return min(max(self.wait_s(tenant) / 2, LEAST_WAIT_S), MOST_WAIT_S)

    def check_room(self, deadline_s: float | None, tenant: str = "") -> None:
        """Raises what any request is told now, whatever its prompt; for before it is tokenised."""
        if self._max_tokens and self._num_tokens >= self._max_tokens:
            raise QueueFull(
                f"{self._num_tokens} prompt tokens wait, the bound (server.max_waiting_tokens); "
                "try again later",
                retry_after_s=self.retry_after_s(tenant),
            )
        wait_s, num_ahead = self.wait_s(tenant), self._num_ahead(tenant)
        if self._max_wait_s and wait_s > self._max_wait_s:
            raise QueueFull(
                f"{num_ahead} requests wait, which takes about {wait_s:.1f} s, above the bound of "
                f"{self._max_wait_s:g} s (server.max_wait_s); try again later",
                retry_after_s=self.retry_after_s(tenant),
            )
        if deadline_s is None:
            return
        left_s = deadline_s - self._clock()
        if SURE * wait_s > left_s:
            raise DeadlinePassed(
                f"{num_ahead} requests wait, which takes about {wait_s:.1f} s, and "
                f"the deadline is in {max(0.0, left_s):.1f} s; give more time, or ask another "
                "server"
            )

    def check(self, request: Request, tenant: str = "") -> None:
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
                retry_after_s=self.retry_after_s(tenant),
            )
        self.check_room(request.deadline_s, tenant)

    def enter(self, request: Request, tenant: str = "") -> None:
        """A request waits now."""
        self._waiting[request.request_id] = (tenant, len(request.prompt))
        self._tenants[tenant] += 1
        self._num_tokens += len(request.prompt)

    def begin(self, request_id: str) -> None:
        """A request got its first output, whatever that is."""
        if not self._leave(request_id):
            return
        now_s = self._clock()
        if self._begun_s is not None:
            self._gaps_s.append(now_s - self._begun_s)
        self._begun_s = now_s if self._waiting else None

    def leave(self, request_id: str) -> None:
        """A request is gone; no news where it was not waiting."""
        self._leave(request_id)
        if not self._waiting:
            self._begun_s = None

    def _leave(self, request_id: str) -> bool:
        if request_id not in self._waiting:
            return False
        tenant, size = self._waiting.pop(request_id)
        self._num_tokens -= size
        self._tenants[tenant] -= 1
        self._tenants += Counter()  # without those at 0
        return True

    def _num_ahead(self, tenant: str) -> int:
        """Of other tenants no more than of its own: they take turns."""
        num_own = self._tenants[tenant]
        others = (num for name, num in self._tenants.items() if name != tenant)
        return num_own + sum(min(num, num_own + 1) for num in others)
