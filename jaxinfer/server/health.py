"""What health says: the process lives, and whether it takes requests; told at once to watchers."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxinfer.errors import Draining
from jaxinfer.server.served import EngineLike
from jaxinfer.server.status import SAID

Status = health_pb2.HealthCheckResponse
LIVENESS = ""
"""The name without letters: whether the process should be left alone or started again."""


class Health(health_pb2_grpc.HealthServicer):
    """grpc.health.v1 with a status for each name.

    A change waits for no watcher: one that does not read gets the newest status when it does.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._states: dict[str, Any] = dict.fromkeys((LIVENESS, *names), Status.NOT_SERVING)
        self._is_closed = False
        self._news = asyncio.Event()

    def say(self, *, is_live: bool, is_ready: bool) -> None:
        """What holds from now on; on the loop's thread."""
        for name in self._states:
            good = is_live if name == LIVENESS else is_ready
            self._states[name] = Status.SERVING if good else Status.NOT_SERVING
        self._wake()

    def close(self) -> None:
        """Ends every watch, after its last word."""
        self._is_closed = True
        self._wake()

    async def Check(self, request: Any, context: Any) -> Any:
        """The status of one name; NOT_FOUND for one that is not known."""
        SAID.get()()
        if request.service not in self._states:
            known = ", ".join(repr(name) for name in self._states)
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here; there is {known}"
            )
        return Status(status=self._states[request.service])

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """The status of one name now, and again whenever it changes."""
        SAID.get()()
        said: Any = None
        while True:
            news = self._news
            state = self._states.get(request.service, Status.SERVICE_UNKNOWN)
            if state != said:
                said = state
                yield Status(status=state)
            if self._is_closed:
                return
            await news.wait()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


class Arrivals(grpc.aio.ServerInterceptor):
    """Knows when the last call came in."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_s = -math.inf

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Lets all calls through as they are."""
        self._last_s = self._clock()
        return await continuation(handler_call_details)

    async def quiet(self, seconds: float, *, at_most_s: float) -> None:
        """Returns once no call has come in for so long, from now on.

        gRPC drops a call that arrives while it shuts down, and its client is told CANCELLED. Those
        who have just got an answer, and ask again, hear UNAVAILABLE from a handler instead.
        """
        began_s = self._clock()
        while (now_s := self._clock()) < began_s + at_most_s:
            if now_s >= max(began_s, self._last_s) + seconds:
                return
            await asyncio.sleep(seconds / 10)


class Door:
    """Whether requests may come in: what the server, its operator and its engine say together.

    Liveness is lost only with the engine, as nothing but a new process helps then.
    """

    def __init__(self, health: Health, engine: EngineLike) -> None:
        self.is_draining = False
        self._health = health
        self._engine = engine
        self.is_stopping = self._is_open = self._is_stalled = self._has_failed = False
        self._say()

    @property
    def is_serving(self) -> bool:
        """What health says of every service."""
        shut = self.is_draining or self._is_stalled or self._has_failed
        return self._is_open and not shut

    def open(self, is_open: bool) -> None:
        """The server is ready, or not yet."""
        self._is_open = is_open
        self._say()

    def drain(self) -> None:
        """Takes nothing new from now on."""
        self._engine.refuse()
        self.is_draining = True
        self._say()

    def resume(self) -> None:
        """Takes requests again; raises Draining where the server stops."""
        if self.is_stopping or self._has_failed:
            raise Draining("the server stops and can't take requests again; start another")
        self._engine.accept()
        self.is_draining = False
        self._say()

    def stop(self) -> None:
        """A drain that nothing ends."""
        self.is_stopping = True
        self.drain()

    def stall(self, is_stalled: bool) -> None:
        """Steps have stopped to end, or end again."""
        self._is_stalled = is_stalled
        self._say()

    def fail(self) -> None:
        """The engine has ended by itself."""
        self._has_failed = True
        self._say()

    def _say(self) -> None:
        self._health.say(is_live=not self._has_failed, is_ready=self.is_serving)
