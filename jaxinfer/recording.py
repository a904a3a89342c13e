"""What a config keeps of an engine's life: a journal of its steps, snapshots to go on from."""

import hashlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from jaxinfer import config as settings
from jaxinfer import manifest
from jaxinfer.config import Config, ModelConfig, SnapshotConfig
from jaxinfer.engine import Engine
from jaxinfer.errors import InvalidRequest, SnapshotRefused
from jaxinfer.host import snapshot as snapshots
from jaxinfer.host.journal import Recorder, Veil
from jaxinfer.host.request import Output, Request
from jaxinfer.host.segments import Writer
from jaxinfer.host.snapshot import Snapshot
from jaxinfer.runner import EngineThread

_KEY_BYTES = 32
log = logging.getLogger(__name__)


def open_journal(config: Config, engine: Engine, name: str) -> Recorder | None:
    """Begins the journal that a config asks for; it stands in a new segment."""
    wanted = config.journal
    if not wanted.folder:
        return None
    key = secrets.token_bytes(_KEY_BYTES)
    header = {
        "settings": settings.to_toml(config),
        "digest": settings.digest(config),
        "model": name,
        "identity": identity(engine.model, name),
        "programs": programs_digest(engine),
        "engine": asdict(engine.config),
        "eos_token_ids": list(engine.model.eos_token_ids),
        "prompts": wanted.prompts,
        "key": key.hex() if wanted.prompts == "hash" else "",
    }
    writer = Writer(
        Path(wanted.folder).expanduser(),
        header,
        segment_bytes=wanted.segment_mb * 2**20,
        num_segments=wanted.num_segments,
    )
    return Recorder(writer, veil=None if wanted.prompts == "keep" else Veil(key))


def identity(model: ModelConfig, name: str) -> str:
    """A short name for the model that a journal or a snapshot belongs to."""
    content = json.dumps([name, asdict(model)], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def programs_digest(engine: Engine) -> str:
    """A short name for the programs of an engine: other ones may give other bits."""
    return manifest.describe(engine.programs.values(), engine.model, engine.config).digest[:16]


def restore(path: Path, engine: Engine, name: str) -> tuple[Request, ...]:
    """Goes on with the requests of a snapshot, if there is one that fits.

    One that doesn't is put aside with a warning: it costs those requests, not the start.
    """
    try:
        found = snapshots.read(path)
        if found is None:
            return ()
        if found.model != identity(engine.model, name):
            raise SnapshotRefused(f"the snapshot {path} is of another model than {name}")
        return engine.restore(found)
    except (SnapshotRefused, InvalidRequest) as error:
        aside = path.with_name(f"{path.name}.refused")
        path.replace(aside)
        log.warning("%s; it lies in %s now, and nothing was restored", error, aside)
        return ()


class Resumed(NamedTuple):
    """An engine that goes on where another process stopped."""

    make_thread: Callable[[Callable[[list[Output]], None]], EngineThread]
    requests: tuple[Request, ...]
    """What it holds already."""


def resume(wanted: SnapshotConfig, engine: Engine, name: str) -> Resumed:
    """Takes in the snapshot that a config asks for, if there is one, and will keep new ones."""
    if not wanted.path:
        return Resumed(lambda deliver: EngineThread(engine, deliver), ())
    path = Path(wanted.path).expanduser()
    requests = restore(path, engine, name)
    ids = [request.request_id for request in requests]
    model, interval_s = identity(engine.model, name), wanted.interval_s

    def make_thread(deliver: Callable[[list[Output]], None]) -> EngineThread:
        keeper = Keeper(engine.snapshot, path, model=model, interval_s=interval_s)
        return EngineThread(engine, deliver, restored=ids, keeper=keeper)

    return Resumed(make_thread, requests)


class Keeper:
    """Writes snapshots of an engine as it goes, on a thread of its own; the newest one counts."""

    def __init__(
        self,
        take: Callable[[], Snapshot],
        path: Path,
        *,
        model: str,
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._take = take
        self._path = path
        self._model = model
        self._interval_s = interval_s
        self._clock = clock
        self._due_s = clock()
        self._wake = threading.Condition()
        self._next: Snapshot | None = None
        self._is_closed = False
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._thread.start()

    def offer(self, *, is_idle: bool = False) -> None:
        """Takes a snapshot if it is time for one, or if there is no other chance for a while."""
        now_s = self._clock()
        if now_s < self._due_s and not is_idle:
            return
        self._due_s = now_s + self._interval_s
        with self._wake:
            self._next = self._take()
            self._wake.notify()

    def close(self) -> None:
        """Returns once the last snapshot is on disk."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while self._next is None and not self._is_closed:
                    self._wake.wait()
                newest, self._next = self._next, None
            if newest is None:
                return
            try:
                snapshots.write(newest._replace(model=self._model), self._path)
            except OSError as error:
                log.error("no snapshot was written to %s: %s", self._path, error)
