"""Several engines of one model, each with devices of its own, as one: data parallel serving.

Each replica has its own thread, pages and journal, and none waits for another. A request stays
where it was put; which replica that is changes none of its tokens, as all run the same programs.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxinfer import recording
from jaxinfer.config import SnapshotConfig
from jaxinfer.engine import Engine
from jaxinfer.errors import Draining, DuplicateRequest, QueueFull
from jaxinfer.host.request import EngineStats, Output, Request
from jaxinfer.runner import Pulse
from jaxinfer.server.score import chunk_of
from jaxinfer.server.served import Deliver, EngineLike

MakeEngine = Callable[[Deliver], EngineLike]
MAX_HOMES = 4096  # beginnings of prompts whose replica is remembered


class Resumed(NamedTuple):
    """Engines that go on where another process stopped."""

    make_engine: MakeEngine
    requests: tuple[Request, ...]
    """What they hold already."""


def resume(wanted: SnapshotConfig, engines: Sequence[Engine], name: str) -> Resumed:
    """Takes in the snapshots that a config asks for; one engine stays one, several are Replicas.

    Each replica keeps a snapshot of its own. What lies there of replicas that are no more is left.
    """
    paths = (numbered(wanted.path, at, len(engines)) for at in range(len(engines)))
    each = [
        recording.resume(replace(wanted, path=path), engine, name)
        for path, engine in zip(paths, engines, strict=True)
    ]
    if len(engines) == 1:
        return Resumed(*each[0])
    config = engines[0].config

    def make_engine(deliver: Deliver) -> Replicas:
        return Replicas(
            [one.make_thread for one in each],
            deliver,
            page_size=config.cache.page_size,
            slack=max(1, config.num_slots // 4),
            restored=[[request.request_id for request in one.requests] for one in each],
        )

    return Resumed(make_engine, tuple(request for one in each for request in one.requests))


class Replicas:
    """A `server.served.EngineLike` over engine threads; requests go where the fewest are live.

    A prompt whose first page a replica has seen goes there again, unless that one has `slack`
    more live requests than another.
    """

    def __init__(
        self,
        make_threads: Sequence[MakeEngine],
        deliver: Deliver,
        *,
        page_size: int,
        slack: int,
        restored: Iterable[Iterable[str]] = (),
    ) -> None:
        """`restored` has the ids of the requests that each replica holds already."""
        self._deliver = deliver
        self._threads = [make_thread(self._give) for make_thread in make_threads]
        self._page_size = page_size
        self._slack = slack
        self._lock = threading.Lock()
        self._places = {name: at for at, names in enumerate(restored) for name in names}
        self._num_live = [0] * len(self._threads)
        for at in self._places.values():
            self._num_live[at] += 1
        self._homes: OrderedDict[int, int] = OrderedDict()
        self._progress = _Progress(len(self._threads))
        self._is_stopping = False
        self._asks = ThreadPoolExecutor(max_workers=4, thread_name_prefix="asks")

    @property
    def alive(self) -> bool:
        """Whether steps of all of them still run."""
        return all(thread.alive for thread in self._threads)

    @property
    def pulse(self) -> Pulse:
        """How far they are together: no further than one that hangs."""
        return self._progress.of([thread.pulse for thread in self._threads])

    def start(self, ended: Callable[[Exception | None], None] = lambda error: None) -> None:
        """Begins to step; `ended` hears of the first one that is over."""
        first = threading.Lock()

        def tell(error: Exception | None) -> None:
            if first.acquire(blocking=False):  # it is never released
                ended(error)

        for thread in self._threads:
            thread.start(tell)

    def submit(self, request: Request) -> None:
        """Hands a request to a replica; raises what the last one that was asked raised."""
        *others, last = self._order(request)
        for at in others:
            try:
                return self._submit(request, at)
            except QueueFull:
                continue
        return self._submit(request, last)

    def check_room(self) -> None:
        """Raises QueueFull or Draining where all of them would refuse any request."""
        for thread in self._threads[:-1]:
            try:
                return thread.check_room()
            except QueueFull:
                continue
        return self._threads[-1].check_room()

    def cancel(self, request_id: str) -> None:
        """Ends a request soon; an id that is not live is no error."""
        at = self._places.get(request_id)
        if at is not None:
            self._threads[at].cancel(request_id)

    def refuse(self) -> None:
        """Takes nothing new from now on."""
        for thread in self._threads:
            thread.refuse()

    def accept(self) -> None:
        """Takes requests again."""
        for thread in self._threads:
            thread.accept()

    def ask(self, function: Callable[[Any], Any]) -> Future[Any]:
        """Calls `function` on what answers for all engines together.

        Raises Draining where no step is to come.
        """
        if self._is_stopping or not self.alive:
            raise Draining("the engines have stopped; nothing can be asked of them")
        return self._asks.submit(function, _Every(self._threads))

    def stats(self) -> EngineStats:
        """The counts of all of them, added up."""
        return sum_of([thread.stats() for thread in self._threads])

    def stop(self, timeout_s: float | None = None) -> bool:
        """Ends each after the step under way; False where one was not over in time."""
        self._is_stopping = True
        self._asks.shutdown(wait=False, cancel_futures=True)
        with ThreadPoolExecutor(len(self._threads)) as pool:
            return all(pool.map(lambda thread: thread.stop(timeout_s), self._threads))

    def _submit(self, request: Request, at: int) -> None:
        with self._lock:
            if request.request_id in self._places:
                raise DuplicateRequest(
                    f"request_id {request.request_id!r} is in use by a live request",
                    field="request_id",
                )
            self._places[request.request_id] = at
            self._num_live[at] += 1
        taken = False
        try:
            self._threads[at].submit(request)
            taken = True
        finally:
            if not taken:
                self._forget(request.request_id)
        self._remember(request, at)

    def _order(self, request: Request) -> list[int]:
        """The replicas, best first."""
        order = sorted(range(len(self._threads)), key=self._num_live.__getitem__)
        home = self._homes.get(self._beginning(request))
        if home is not None and self._num_live[home] - self._num_live[order[0]] < self._slack:
            order.remove(home)
            order.insert(0, home)
        return order

    def _beginning(self, request: Request) -> int:
        """A hint only: two prompts that share one are put together, and nothing else follows."""
        return hash((request.salt, request.prompt[: self._page_size]))

    def _remember(self, request: Request, at: int) -> None:
        if len(request.prompt) <= self._page_size or not request.use_prefix_cache:
            return
        beginning = self._beginning(request)
        with self._lock:
            self._homes[beginning] = at
            self._homes.move_to_end(beginning)
            if len(self._homes) > MAX_HOMES:
                self._homes.popitem(last=False)

    def _forget(self, request_id: str) -> None:
        with self._lock:
            at = self._places.pop(request_id, None)
            if at is not None:
                self._num_live[at] -= 1

    def _give(self, outputs: list[Output]) -> None:
        """An ended request's id is free before its client knows."""
        for output in outputs:
            if output.finish_reason is not None:
                self._forget(output.request_id)
        self._deliver(outputs)


class _Progress:
    """One pulse for many: it goes on when every replica that has work has ended a step."""

    def __init__(self, count: int) -> None:
        self._seen = [Pulse(0, False)] * count
        self._num_rounds = 0

    def of(self, pulses: Sequence[Pulse]) -> Pulse:
        pairs = list(zip(pulses, self._seen, strict=True))
        if all(not (new.has_work and old.has_work and new == old) for new, old in pairs):
            self._seen = list(pulses)
            self._num_rounds += 1
        return Pulse(self._num_rounds, any(pulse.has_work for pulse in pulses))


class _Every:
    """What operators and scores ask of an engine, asked of all; each answers between two steps."""

    def __init__(self, threads: Sequence[EngineLike]) -> None:
        self._threads = threads

    @property
    def scorer(self) -> "_Scorer | None":
        """Texts are scored by the first one."""
        chunk = self._threads[0].ask(chunk_of).result()
        return _Scorer(self._threads[0], chunk) if chunk else None

    @property
    def journal(self) -> "_Journal":
        """The segments that are being written."""
        return _Journal(_joined(self._all(lambda engine: engine.journal.path)))

    def flush_prefix_cache(self) -> int:
        """How many pages all of them have forgotten."""
        return sum(self._all(lambda engine: engine.flush_prefix_cache()))

    def rotate_journal(self) -> Path | None:
        """The segments that were being written."""
        return _joined(self._all(lambda engine: engine.rotate_journal()))

    def _all(self, function: Callable[[Any], Any]) -> list[Any]:
        return [answer.result() for answer in [one.ask(function) for one in self._threads]]


class _Journal(NamedTuple):
    path: Path | None


class _Scorer(NamedTuple):
    thread: EngineLike
    chunk: int

    def part(self, tokens: list[int], start: int) -> Any:
        """What the first replica finds."""
        return self.thread.ask(lambda engine: engine.scorer.part(tokens, start)).result()


def _joined(paths: Iterable[Path | None]) -> Path | None:
    """One path that names several, or None where there is none: `a, b`."""
    found = [str(path) for path in paths if path is not None]
    return Path(", ".join(found)) if found else None


def sum_of(stats: Sequence[EngineStats]) -> EngineStats:
    """The counts of engines beside each other."""
    names = [field.name for field in fields(EngineStats)]
    return EngineStats(**{name: sum(getattr(one, name) for one in stats) for name in names})


def numbered(path: str, at: int, count: int) -> str:
    """Where replica `at` of `count` keeps what one engine keeps in `path`."""
    return f"{path}-{at}" if path and count > 1 else path
