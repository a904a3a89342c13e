"""Rank 0: the engine whose log the others follow, and that serves the front."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from jaxinfer import config as settings
from jaxinfer.cluster import build, group, messages
from jaxinfer.cluster.build import Meeting
from jaxinfer.cluster.log import Led
from jaxinfer.cluster.process import Process
from jaxinfer.cluster.wire import Message
from jaxinfer.engine import Engine
from jaxinfer.errors import EngineFailed, JaxinferError
from jaxinfer.host.plain import request_from_plain
from jaxinfer.host.request import Output
from jaxinfer.llm import LoadedEngine
from jaxinfer.runner import EngineThread
from jaxinfer.scoring import Scored, Scorer
from jaxinfer.server import facts
from jaxinfer.server.score import chunk_of
from jaxinfer.server.timeline import Timeline

PULSE_S = 0.1
ASKS = 4  # of operators and scores, at once
log = logging.getLogger("jaxinfer.cluster")


def run(process: Process) -> None:
    """Gathers the group, loads, and serves until it ends."""
    desk = Desk()
    spec, config = process.spec, process.config
    listener = group.listen(spec.host, spec.port)

    def lost(why: str) -> None:
        leader.tell_front(["over", why])
        process.lost(why)

    leader = group.Leader(
        listener,
        bytes.fromhex(spec.key),
        size=spec.size,
        silence_s=config.cluster.heartbeat_s,
        about=build.about(),
        lost=lost,
        heard=desk.hear,
    )
    stop = threading.Thread(
        target=process.until_told, args=(lambda: leader.send(["bye"]),), daemon=True
    )
    stop.start()
    process.say("listening", port=listener.getsockname()[1])
    leader.wait_for_peers(config.cluster.start_limit_s)
    began_s = time.monotonic()
    meeting = Meeting(_place_to_meet(process), 0, spec.size, spec.place, spec.num_here)
    begin = {
        "settings": settings.to_toml(config),
        "meet": meeting.address,
        "is_fresh": spec.is_fresh,
    }
    leader.send(["begin", begin])
    build.meet(config, meeting)
    loaded = build.load(config, leader.agree, is_fresh=spec.is_fresh)
    engine = lead(loaded.engine, leader)
    leader.settle()
    load_s = round(time.monotonic() - began_s, 3)
    desk.open(Served(loaded, config, load_s), engine, leader.tell_front, lost)
    process.say("ready", load_s=load_s)
    desk.serve()


def lead(engine: Engine, leader: group.Leader) -> Engine:
    """From now on what the engine does is in the log."""
    engine.journal = Led(leader.digest, leader.send, journal=engine.journal)
    if engine.scorer is not None:
        engine.scorer.before = lambda tokens, start: leader.send(["score", tokens, start])
    return engine


def _place_to_meet(process: Process) -> str:
    """Where jax's processes meet: a port of rank 0's host that nobody has."""
    port = process.config.cluster.coordinator_port
    if not port:
        with group.listen(process.spec.host, 0) as found:
            port = found.getsockname()[1]
    host = process.spec.host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Served:
    """What the front is told of a loaded engine."""

    def __init__(self, loaded: LoadedEngine, config: settings.Config, load_s: float) -> None:
        engine = loaded.engine
        self.timeline = engine.observer = Timeline(engine.config)
        self.about = {
            "name": loaded.name,
            "model": messages.model_to_plain(
                loaded.model, engine.limits, loaded.defaults, loaded.tokenizer.assets
            ),
            "facts": asdict(facts.gather(config, engine)),
            "stats": messages.stats_to_plain(engine.stats()),
            "num_slots": engine.config.num_slots,
            "max_waiting": engine.config.max_waiting,
            "exact_bits": engine.self_test.is_exact,
            "load_s": load_s,
            "engine": build.described(loaded),
        }


class Desk:
    """Takes what the front says to the engine, and what the engine says to the front."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_front_here = False
        self._served: Served | None = None

    def open(
        self,
        served: Served,
        engine: Engine,
        tell: Callable[[Message], None],
        lost: Callable[[str], None],
    ) -> None:
        """The engine is ready."""
        self._tell, self._lost, self._engine = tell, lost, engine
        self._thread = EngineThread(engine, self._deliver)
        self._asks = ThreadPoolExecutor(max_workers=ASKS)
        self._thread.start(self._ended)
        with self._lock:
            self._served = served
            if self._is_front_here:
                tell(["ready", served.about])

    def serve(self) -> None:
        """Tells how far the engine is, for as long as this process lives."""
        num_steps = -1
        while True:
            time.sleep(PULSE_S)
            pulse = self._thread.pulse
            if pulse.num_steps != num_steps:
                num_steps = pulse.num_steps
                self._tell(["pulse", num_steps, *self._counts()])

    def hear(self, message: Message) -> None:
        """What the front says, in its order."""
        match message:
            case ["hello"]:
                with self._lock:
                    self._is_front_here = True
                    if self._served is not None:
                        self._tell(["ready", self._served.about])
            case ["submit", dict(plain)]:
                try:
                    self._thread.submit(request_from_plain(plain))
                except JaxinferError as error:
                    self._tell(["refused", plain["request_id"], str(error)])
            case ["cancel", str(request_id)]:
                self._thread.cancel(request_id)
            case ["ask", int(number), str(what), list(arguments)]:
                self._asks.submit(self._answer, number, what, arguments)
            case _:
                log.error("the server sent %r, which is unknown here", message[0])

    def _counts(self) -> Message:
        assert self._served is not None
        stats = messages.stats_to_plain(self._thread.stats())
        return [stats, asdict(self._served.timeline.counts)]

    def _deliver(self, outputs: list[Output]) -> None:
        self._tell(["outputs", [messages.output_to_plain(output) for output in outputs]])

    def _ended(self, error: Exception | None) -> None:
        self._lost(f"the engine's thread ended: {error or 'the log says why'}")

    def _answer(self, number: int, what: str, arguments: list[Any]) -> None:
        try:
            if what == "explain":
                assert self._served is not None
                story = self._served.timeline.explain(*arguments)
                found: Any = [one._asdict() for one in story]
            else:
                asked = self._thread.ask(lambda engine: ASKED[what](engine, *arguments))
                found = asked.result()
        except JaxinferError as error:
            self._tell(["answer", number, None, str(error)])
            if isinstance(error, EngineFailed):  # the other ranks can't know how far it got
                self._lost(str(error))
        else:
            self._tell(["answer", number, found, ""])


def _flush(engine: Engine) -> int:
    return engine.flush_prefix_cache()


def _rotate(engine: Engine) -> str | None:
    before = engine.rotate_journal()
    return None if before is None else str(before)


def _journal_path(engine: Engine) -> str | None:
    path = None if engine.journal is None else engine.journal.path
    return None if path is None else str(path)


def _score(engine: Engine, tokens: list[int], start: int) -> list[list[Any]]:
    scorer: Scorer | None = engine.scorer
    assert scorer is not None, "the front asks for the chunk first"
    found: Scored = scorer.part(tokens, start)
    return [found.logprobs.tolist(), found.is_likeliest.tolist()]


ASKED: dict[str, Callable[..., Any]] = {
    "flush": _flush,
    "rotate": _rotate,
    "journal_path": _journal_path,
    "score_chunk": chunk_of,
    "score": _score,
}
"""What may be asked of an engine between two steps, by name; there is no other way in."""
