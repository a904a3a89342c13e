"""The gRPC server of a group: a process without jax, which stays where ranks are lost."""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxinfer.cluster import messages
from jaxinfer.cluster.remote import Address, Group, RemoteEngine
from jaxinfer.cluster.wire import Message
from jaxinfer.config import Config
from jaxinfer.errors import EngineFailed
from jaxinfer.host.plain import Record, tuples
from jaxinfer.server import app, event_loop
from jaxinfer.server.facts import Facts
from jaxinfer.server.openai_door import OpenAIDoor
from jaxinfer.server.profiling import Profiler
from jaxinfer.server.served import Deliver, ServedModel
from jaxinfer.server.timeline import StepCounts
from jaxinfer.text.tokenizer import Tokenizer
from jaxinfer.v1 import admin_pb2 as pb

log = logging.getLogger("jaxinfer.cluster")


class Front:
    """Waits for the first leader that is ready, then serves, whatever becomes of it."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._about: Record = {}
        self._engine: RemoteEngine | None = None
        self._early: list[Message] = []  # before there was an engine to hear it
        self._counts = StepCounts()
        self._why = ""
        self._group = Group(self._hear)

    @property
    def about(self) -> Record:
        """What the first leader says of itself."""
        return self._about

    def connect(self, address: Address) -> None:
        """Rank 0 of a new start listens there."""
        self._group.connect(address)

    def end(self, why: str) -> None:
        """There will be no group any more."""
        with self._lock:
            self._why = why
            engine = self._engine
            self._lock.notify_all()
        if engine is not None:
            engine.end(EngineFailed(why))

    def wait(self) -> Record | None:
        """What the first leader says of itself; None where there will be none."""
        with self._lock:
            self._lock.wait_for(lambda: self._about or self._why)
            return self._about or None

    def run(
        self,
        config: Config,
        *,
        ready: Callable[[int], None],
        door: OpenAIDoor | None = None,
    ) -> None:
        """Serves until SIGTERM or SIGINT; EngineFailed where the group is given up."""
        about = self._about
        model, limits, defaults, text = messages.model_from_plain(about["model"])
        served = ServedModel(
            name=about["name"],
            config=model,
            tokenizer=Tokenizer(text),
            limits=limits,
            defaults=defaults,
            text=text,
            line=about["num_slots"] + about["max_waiting"],
        )

        def make_engine(deliver: Deliver) -> RemoteEngine:
            engine = RemoteEngine(
                deliver,
                self._group.send,
                limits=limits,
                num_slots=about["num_slots"],
                max_waiting=about["max_waiting"],
                counts=self._counts,
                stats=messages.stats_from_plain(about["stats"]),
            )
            with self._lock:
                early, self._early, self._engine = self._early, [], engine
            for message in early:
                engine.hear(message)
            return engine

        server = FrontServer(
            served,
            make_engine,
            config.server,
            security=config.security,
            facts=Facts(**tuples(about["facts"])),
            explain=self._explain,
            steps=lambda: self._counts,
        )
        event_loop.run(app.serve(server, config.server, ready, door))

    def _explain(self, request_id: str) -> Sequence[pb.Happening] | None:
        assert self._engine is not None
        story = self._engine.explain(request_id)
        return [pb.Happening(**one) for one in story] or None

    def _hear(self, message: Message) -> None:
        """On the group's thread."""
        match message:
            case ["ready", dict(about)] if not self._about:
                with self._lock:
                    self._about = about
                    self._lock.notify_all()
            case ["ready", dict(about)] if about["model"] != self._about["model"]:
                self.end("the model has changed since this server started; start it again")
            case ["over", why] if not self._about:
                log.error("the group did not come to serve: %s", why)
            case _:
                with self._lock:
                    engine = self._engine
                    if engine is None:
                        self._early.append(message)
                if engine is not None:
                    engine.hear(message)


def _no_trace(folder: Path) -> None:
    raise RuntimeError("this process only serves, its devices are in others")


class FrontServer(app.Server):
    """A server whose readiness follows its group's."""

    make_profiler = partial(Profiler, begin=_no_trace)
    _remote: RemoteEngine

    async def start(self) -> int:
        """As of a server; from then on health says what the group does."""
        port = await super().start()
        loop = asyncio.get_running_loop()
        self._remote = self._as_remote(self._engine)

        def tell(is_serving: bool) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._door.open, is_serving)

        self._remote.serving = tell
        return port

    async def set_serving(self, is_serving: bool) -> None:
        """Ready only while the group is."""
        await super().set_serving(is_serving and self._remote.is_up)

    @staticmethod
    def _as_remote(engine: Any) -> RemoteEngine:
        assert isinstance(engine, RemoteEngine), "a front is made with one"
        return engine
