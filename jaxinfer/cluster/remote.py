"""The engine as the server sees it: in other processes, which may go away and come back."""

import itertools
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxinfer.cluster import group, messages
from jaxinfer.cluster.wire import Greeting, Link, Message
from jaxinfer.errors import (
    Draining,
    DuplicateRequest,
    EngineFailed,
    GroupError,
    PeerLost,
    QueueFull,
)
from jaxinfer.host.plain import request_to_plain
from jaxinfer.host.request import (
    EngineStats,
    FinishReason,
    Limits,
    Output,
    Request,
    check_request,
)
from jaxinfer.runner import Pulse
from jaxinfer.server.served import Deliver
from jaxinfer.server.timeline import StepCounts

JOIN_S = 60.0  # for rank 0 to answer, which listens already
ASK_S = 600.0
ASKS = 4
RETRY_AFTER_S = 5.0  # what clients are told while the group starts again
log = logging.getLogger("jaxinfer.cluster")


class Address(NamedTuple):
    """Where rank 0 listens, and the key that it wants."""

    host: str
    port: int
    key: bytes


class Group:
    """The connection to rank 0: made again for each start of the group.

    `told` hears every message of a leader that is ready, first its `ready`, and `over` at the end
    of each; all on one thread.
    """

    def __init__(self, told: Callable[[Message], None]) -> None:
        self._told = told
        self._link: Link | None = None
        self._addresses: queue.SimpleQueue[Address] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="group", daemon=True).start()

    def connect(self, address: Address) -> None:
        """Rank 0 of a new start listens there."""
        self._addresses.put(address)

    def send(self, message: Message) -> None:
        """To the leader; PeerLost where there is none."""
        if self._link is None:
            raise PeerLost("rank 0 is not there")
        self._link.send(message)

    def _run(self) -> None:
        while True:
            address = self._addresses.get()
            try:
                link, _ = group.join(
                    address[:2],
                    address.key,
                    Greeting("front", 0, {}),
                    name="rank 0",
                    timeout_s=JOIN_S,
                )
                self._link = link
                link.send(["hello"])
                why = self._receive(link)
            except GroupError as error:
                why = str(error)
            if self._link is not None:
                self._link.close()
            self._link = None
            self._told(["over", why])

    def _receive(self, link: Link) -> str:
        """Returns why it ended."""
        while True:
            message = link.receive()
            if message[0] == "over":
                return str(message[1])
            if message[0] == "ready":
                link.settle()
            self._told(message)


class RemoteEngine:
    """An EngineLike whose steps are another process's; see server.served.

    It never ends by itself: where its group is lost, live requests end as those of a server that
    stops, `serving` hears False, and new ones are refused until the group is back.
    """

    def __init__(
        self,
        deliver: Deliver,
        send: Callable[[Message], None],
        *,
        limits: Limits,
        num_slots: int,
        max_waiting: int,
        counts: StepCounts,
        stats: EngineStats,
    ) -> None:
        self.serving: Callable[[bool], None] = lambda is_serving: None
        self._ended: Callable[[Exception | None], None] = lambda error: None
        self._deliver, self._send = deliver, send
        self._limits, self._num_slots, self._max_waiting = limits, num_slots, max_waiting
        self._counts, self._stats = counts, stats
        self._lock = threading.Lock()
        self._live: set[str] = set()
        self._answers: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        self._num_steps = 0
        self._is_up = True
        self._is_draining = self._is_stopping = False
        self._asks = ThreadPoolExecutor(max_workers=ASKS, thread_name_prefix="asks")

    @property
    def alive(self) -> bool:
        """It outlives its processes."""
        return True

    @property
    def is_up(self) -> bool:
        """Whether the group serves now."""
        return self._is_up

    @property
    def pulse(self) -> Pulse:
        """How far the leader was, a moment ago."""
        return Pulse(self._num_steps, bool(self._live))

    def start(self, ended: Callable[[Exception | None], None] = lambda error: None) -> None:
        """The group steps already; `ended` hears that there will be none any more."""
        self._ended = ended

    def end(self, error: Exception) -> None:
        """There will be no group any more."""
        self._is_stopping = True
        self._ended(error)
        self._end_all(str(error))

    def submit(self, request: Request) -> None:
        """Hands a request over; raises InvalidRequest, QueueFull or Draining at once."""
        check_request(request, self._limits)
        self.check_room()
        with self._lock:
            if request.request_id in self._live:
                raise DuplicateRequest(
                    f"request_id {request.request_id!r} is in use by a live request",
                    field="request_id",
                )
            self._live.add(request.request_id)
        try:
            self._send(["submit", request_to_plain(request)])
        except PeerLost as error:
            with self._lock:
                self._live.discard(request.request_id)
            raise _away() from error

    def check_room(self) -> None:
        """Raises QueueFull or Draining where a request of any kind would be refused now."""
        if self._is_draining or self._is_stopping:
            raise Draining("the server is draining and takes no new requests; ask another")
        if not self._is_up:
            raise _away()
        waiting = max(len(self._live) - self._num_slots, self._stats.num_waiting)
        if waiting >= self._max_waiting:
            raise QueueFull(
                f"{waiting} requests are waiting, the bound (engine.max_waiting); try again later"
            )

    def cancel(self, request_id: str) -> None:
        """Asks for a request to end."""
        self._say(["cancel", request_id])

    def refuse(self) -> None:
        """Takes no new requests from now on; what runs goes on."""
        self._is_draining = True

    def accept(self) -> None:
        """Takes requests again."""
        self._is_draining = False

    def ask(self, function: Callable[[Any], Any]) -> Future[Any]:
        """Calls `function` on what an engine answers to; each call of it is one of the leader's.

        Raises Draining where no group is there.
        """
        if self._is_stopping or not self._is_up:
            raise _away()
        return self._asks.submit(function, _Asked(self._ask))

    def explain(self, request_id: str) -> list[dict[str, Any]]:
        """What happened to a request of this start of the group; nothing where it is unknown."""
        return self._ask("explain", request_id) if self._is_up else []

    def stats(self) -> EngineStats:
        """The leader's counts, a moment ago."""
        return self._stats

    def stop(self, timeout_s: float | None = None) -> bool:
        """Ends what is live here; whoever started the group ends it."""
        self._is_stopping = True
        self._end_all("")
        return True

    def hear(self, message: Message) -> None:
        """What the leader says, in its order."""
        match message:
            case ["ready", dict(about)]:
                self._stats = messages.stats_from_plain(about["stats"])
                self._is_up = True
                self.serving(True)
            case ["outputs", list(plain)]:
                self._give([messages.output_from_plain(one) for one in plain])
            case ["pulse", int(num_steps), list(stats), dict(counts)]:
                self._num_steps = num_steps
                self._stats = messages.stats_from_plain(stats)
                for name, value in counts.items():
                    setattr(self._counts, name, value)
            case ["refused", str(request_id), str(why)]:
                self._give([_end(request_id, why)])
            case ["answer", int(number), found, str(why)]:
                self._settle(number, found, why)
            case ["over", str(why)]:
                self._is_up = False
                self.serving(False)
                if not self._is_stopping:  # a server that stops ends its group
                    log.error("the group is lost: %s", why)
                self._end_all("the processes that run the model start again; ask again later")
            case _:
                log.error("rank 0 sent %r, which is unknown here", message[0])

    def _give(self, outputs: list[Output]) -> None:
        with self._lock:
            known = [output for output in outputs if output.request_id in self._live]
            for output in known:
                if output.finish_reason is not None:
                    self._live.discard(output.request_id)
        self._deliver(known)

    def _end_all(self, why: str) -> None:
        with self._lock:
            left, unheard = sorted(self._live), [*self._answers.values()]
            self._live.clear()
            self._answers.clear()
        for future in unheard:
            future.set_exception(_away())
        self._deliver([_end(name, why) for name in left])

    def _say(self, message: Message) -> None:
        try:
            self._send(message)
        except PeerLost:
            log.debug("%s was not heard: no group is there", message[0])

    def _ask(self, what: str, *arguments: Any) -> Any:
        future: Future[Any] = Future()
        with self._lock:
            number = next(self._numbers)
            self._answers[number] = future
        try:
            self._send(["ask", number, what, list(arguments)])
        except PeerLost as error:
            with self._lock:
                self._answers.pop(number, None)
            raise _away() from error
        return future.result(ASK_S)

    def _settle(self, number: int, found: Any, why: str) -> None:
        with self._lock:
            future = self._answers.pop(number, None)
        if future is None:
            return
        if why:
            future.set_exception(EngineFailed(why))
        else:
            future.set_result(found)


class _Asked:
    """What operators and scores ask of an engine; see leader.ASKED."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self._ask = ask

    @property
    def scorer(self) -> "_Scorer | None":
        chunk = self._ask("score_chunk")
        return _Scorer(self._ask, chunk) if chunk else None

    @property
    def journal(self) -> "_Journal":
        path = self._ask("journal_path")
        return _Journal(None if path is None else Path(path))

    def flush_prefix_cache(self) -> int:
        return self._ask("flush")

    def rotate_journal(self) -> Path | None:
        path = self._ask("rotate")
        return None if path is None else Path(path)


class _Journal(NamedTuple):
    path: Path | None


class _Scorer(NamedTuple):
    ask: Callable[..., Any]
    chunk: int

    def part(self, tokens: list[int], start: int) -> "_Part":
        logprobs, is_likeliest = self.ask("score", tokens, start)
        return _Part(np.asarray(logprobs, np.float32), np.asarray(is_likeliest, bool))


class _Part(NamedTuple):
    logprobs: np.ndarray
    is_likeliest: np.ndarray


def _end(request_id: str, why: str) -> Output:
    return Output(request_id, (), (), "", FinishReason.CANCELLED, error=why)


def _away() -> Draining:
    return Draining(
        "the processes that run the model start again; ask again in a moment",
        retry_after_s=RETRY_AFTER_S,
    )
