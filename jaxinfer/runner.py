"""The engine on a thread of its own: requests in from any thread, outputs out as steps return."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxinfer.errors import Draining, DuplicateRequest, EngineFailed, QueueFull
from jaxinfer.host.request import (
    EngineStats,
    FinishReason,
    Limits,
    Output,
    Request,
    check_request,
)

log = logging.getLogger(__name__)


@runtime_checkable
class Steps(Protocol):
    """What a thread needs of an engine."""

    limits: Limits

    @property
    def has_work(self) -> bool: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def max_waiting(self) -> int: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def step(self, *, tell: Callable[[list[Output]], None]) -> list[Output]: ...
    def stats(self) -> EngineStats: ...


@runtime_checkable
class Keeps(Protocol):
    """What is told when the engine can be saved: recording.Keeper."""

    def offer(self, *, is_idle: bool = ...) -> None: ...
    def close(self) -> None: ...


class Pulse(NamedTuple):
    """Whether steps end."""

    num_steps: int
    """Steps that have ended."""
    has_work: bool


class _Asked(NamedTuple):
    """A call between two steps."""

    function: Callable[[Any], Any]
    answer: Future[Any]


class EngineThread:
    """Runs an engine's steps for as long as there is work.

    `deliver` is called on the engine's thread, once for each part of a step that returns by itself,
    with the outputs of all requests in it.
    What is live when it stops stays in the keeper's last snapshot, for another process.
    """

    def __init__(
        self,
        engine: Steps,
        deliver: Callable[[list[Output]], None],
        *,
        restored: Iterable[str] = (),
        keeper: Keeps | None = None,
    ) -> None:
        """`restored` are the ids of the requests that the engine holds already."""
        self.limits = engine.limits
        self._engine = engine
        self._deliver = deliver
        self._keeper = keeper
        self._wake = threading.Condition()
        self._inbox: deque[Request | str | _Asked] = deque()  # submit, cancel an id, call
        self._num_inbox_requests = 0
        self._live: set[str] = set(restored)
        self._is_draining = False
        self._is_stopping = False
        self._num_steps = 0
        self._ended: Callable[[Exception | None], None] = lambda error: None
        self._stats = engine.stats()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether steps still run."""
        return self._thread.is_alive()

    @property
    def pulse(self) -> Pulse:
        """How far it is, from any thread."""
        return Pulse(self._num_steps, bool(self._live or self._inbox))

    def start(self, ended: Callable[[Exception | None], None] = lambda error: None) -> None:
        """Begins to step; `ended` hears on the engine's thread that it is over, and why.

        It hears that before the clients of live requests do.
        """
        self._ended = ended
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Hands a request over; raises InvalidRequest, QueueFull or Draining at once."""
        check_request(request, self.limits)
        with self._wake:
            self.check_room()
            if request.request_id in self._live:
                raise DuplicateRequest(
                    f"request_id {request.request_id!r} is in use by a live request",
                    field="request_id",
                )
            self._inbox.append(request)
            self._num_inbox_requests += 1
            self._live.add(request.request_id)
            self._wake.notify()

    def check_room(self) -> None:
        """Raises QueueFull or Draining where a request of any kind would be refused now."""
        if self._is_draining or self._is_stopping:
            raise Draining("the server is draining and takes no new requests; ask another")
        if not self._thread.is_alive():
            raise Draining("the engine has stopped and takes no new requests")
        waiting = self._engine.num_waiting + self._num_inbox_requests
        if waiting >= self._engine.max_waiting:
            raise QueueFull(
                f"{waiting} requests are waiting, the bound (engine.max_waiting); try again later"
            )

    def cancel(self, request_id: str) -> None:
        """Asks for a request to end; it ends within one step, with CANCELLED."""
        with self._wake:
            self._inbox.append(request_id)
            self._wake.notify()

    def ask(self, function: Callable[[Any], Any]) -> Future[Any]:
        """Calls `function(engine)` between two steps, on the engine's thread; a step follows.

        Raises Draining where no step is to come.
        """
        asked = _Asked(function, Future())
        with self._wake:
            if self._is_stopping or not self._thread.is_alive():
                raise Draining("the engine has stopped; nothing can be asked of it")
            self._inbox.append(asked)
            self._wake.notify()
        return asked.answer

    def refuse(self) -> None:
        """Takes no new requests from now on; what runs goes on."""
        with self._wake:
            self._is_draining = True

    def accept(self) -> None:
        """Takes requests again."""
        with self._wake:
            self._is_draining = False

    def drain(self, timeout_s: float) -> bool:
        """Takes nothing new and waits for what runs; False where some was left at the end."""
        self.refuse()
        with self._wake:
            return self._wake.wait_for(lambda: not self._live, timeout=timeout_s)

    def stop(self, timeout_s: float | None = None) -> bool:
        """Ends the thread after the step under way; live requests end with CANCELLED.

        False where that step was not over in time.
        """
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def stats(self) -> EngineStats:
        """The engine's counts after its last step."""
        return self._stats

    def _run(self) -> None:
        failure: Exception | None = None
        try:
            while self._wait_for_work():
                self._take_inbox()
                self._give(self._engine.step(tell=self._give))
                self._num_steps += 1
                self._keep()
        except Exception as error:  # barrier: whatever killed the engine, no client may hang
            log.exception("the engine stopped")
            failure = error
        else:
            self._keep(is_idle=True)
        self._give_up(failure)
        if self._keeper is not None:
            self._keeper.close()

    def _keep(self, *, is_idle: bool = False) -> None:
        if self._keeper is not None:
            self._keeper.offer(is_idle=is_idle)

    def _wait_for_work(self) -> bool:
        if not self._engine.has_work:
            self._keep(is_idle=True)
        with self._wake:
            while not (self._inbox or self._engine.has_work or self._is_stopping):
                self._wake.wait()
            return not self._is_stopping

    def _take_inbox(self) -> None:
        with self._wake:
            inbox, self._inbox = self._inbox, deque()
            self._num_inbox_requests = 0
        for entry in inbox:
            match entry:
                case Request():
                    self._engine.submit(entry)
                case _Asked():
                    self._answer(entry)
                case _:
                    self._engine.cancel(entry)

    def _answer(self, asked: _Asked) -> None:
        if not asked.answer.set_running_or_notify_cancel():
            return
        try:
            found = asked.function(self._engine)
        except Exception as error:  # barrier: an operator's mistake must not end the engine
            asked.answer.set_exception(error)
        else:
            asked.answer.set_result(found)

    def _give(self, outputs: list[Output]) -> None:
        """Delivers a step's outputs; an ended request's id is free before its client knows."""
        self._stats = self._engine.stats()
        if not outputs:
            return
        with self._wake:
            for output in outputs:
                if output.finish_reason is not None:
                    self._live.discard(output.request_id)
        self._deliver(outputs)
        with self._wake:
            self._wake.notify_all()

    def _give_up(self, error: Exception | None) -> None:
        """Ends every live request, so that nobody waits for an engine that is gone."""
        with self._wake:
            self._is_stopping = True
            left = sorted(self._live)
            unheard = [entry for entry in self._inbox if isinstance(entry, _Asked)]
        self._ended(error)
        for asked in unheard:
            if asked.answer.set_running_or_notify_cancel():
                asked.answer.set_exception(Draining("the engine has stopped"))
        reason = FinishReason.CANCELLED if error is None else FinishReason.ERROR
        text = str(error) if isinstance(error, EngineFailed) else "the engine stopped"
        self._give(
            [Output(name, (), (), "", reason, error="" if error is None else text) for name in left]
        )
