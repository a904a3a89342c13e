"""Serialised executables in a private folder; only a whole file made for exactly this is loaded."""

import hashlib
import json
import logging
import os
import pickle
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable

from jaxinfer.errors import ConfigError, ProgramRefused

MAGIC = b"jaxinfer program 1\n"
SUFFIX = ".program"
NOTE_SUFFIX = ".verdict"
MAX_FILES = 512  # the least recently used ones beyond this go
_STRAY_S = 3600.0  # a temporary file of this age has lost its writer
_CHECKSUM_LEN = 32
_MAX_HEADER_LEN = 2**20
# What reading bytes that are whole, but that this jax did not write, can raise.
_UNREADABLE = (
    jax.errors.JaxRuntimeError,
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
)
log = logging.getLogger(__name__)

Key = Mapping[str, str]
"""Everything that a program depends on, by name; two programs with equal keys are the same."""
Devices = list[Any]
"""Of jax, in the order in which a program numbers them."""
Agree = Callable[[str, Any], tuple[Any, ...]]
"""What all processes that share a model say under a label; each of them must ask."""


class Shape(NamedTuple):
    """What sets one program of a phase apart from another."""

    phase: str  # "prefill", "decode" or "allocate"
    rows: int
    tokens: int

    @property
    def name(self) -> str:
        """How the program is called in tables: decode-8x1."""
        return f"{self.phase}-{self.rows}x{self.tokens}" if self.rows else self.phase


@dataclass(frozen=True)
class ProgramCost:
    """What one program takes: measured when it was compiled, and kept with it."""

    phase: str
    rows: int
    tokens: int
    key: str
    """The hash of everything that the program depends on."""
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    """Of the outputs, what lies in the donated arguments."""
    temp_bytes: int
    code_bytes: int
    """0 where the device does not say."""
    trace_s: float
    compile_s: float

    @property
    def shape(self) -> Shape:
        """Which program it is."""
        return Shape(self.phase, self.rows, self.tokens)


class Trees(NamedTuple):
    """The structure of a program's arguments and of its result; never read from a file."""

    arguments: Any
    result: Any


class Loaded(NamedTuple):
    """A program that came out of the store."""

    run: jax.stages.Compiled
    cost: ProgramCost
    seconds: float


def alone(label: str, value: Any) -> tuple[Any, ...]:
    """The agreement of one process."""
    return (value,)


@dataclass(frozen=True)
class Store:
    """A folder of executables.

    They are machine code, and jax reads the frame around it with pickle: whoever can write to the
    folder can run code in this process. So it must belong to this user (or to root) and be writable
    by nobody else, and so must each file. Nothing is unpickled before that, the checksum and the
    key have been found right; the checksum finds damage and is no defence against a writer.

    Processes that share a model must all load a program, or all compile it: what one of them has
    not got counts for none.
    """

    folder: Path
    agree: Agree = alone

    def load(self, name: str, key: Key, trees: Trees, devices: Devices) -> Loaded | None:
        """A program that is ready to run; None where there is none, or none that can be trusted."""
        found = self._load(name, key, trees, devices)
        is_everywhere = all(self.agree(f"program {digest(key)}", found is not None))
        return found if is_everywhere else None

    def _load(self, name: str, key: Key, trees: Trees, devices: Devices) -> Loaded | None:
        path, started = self._path(name, key), time.monotonic()
        try:
            cost, executable = _read(path, key)
            run = _revive(path, executable, trees, devices)
            return Loaded(run, cost, time.monotonic() - started)
        except FileNotFoundError:
            return None
        except (OSError, ProgramRefused) as error:
            log.warning("%s; it is compiled again", error)
            return None

    def cost(self, name: str, key: Key) -> ProgramCost | None:
        """What a stored program takes, without loading it."""
        try:
            return _read(self._path(name, key), key)[0]
        except FileNotFoundError:
            return None
        except (OSError, ProgramRefused) as error:
            log.warning("%s", error)
            return None

    def save(self, key: Key, compiled: jax.stages.Compiled, cost: ProgramCost) -> None:
        """Keeps a program; a folder that can't be written to costs a warning and nothing else."""
        path = self._path(cost.shape.name, key)
        try:
            executable, _, _ = serialize_executable.serialize(compiled)
            _write(path, _pack(key, cost, executable))
        except (OSError, *_UNREADABLE) as error:
            log.warning("%s can't be kept: %s", path, error)

    def recall(self, key: Key) -> dict[str, Any] | None:
        """What `remember` was told under this key; None where nothing is there to be trusted."""
        found = self._recall(key)
        told = self.agree(f"verdict {digest(key)}", found)
        return found if all(one == told[0] for one in told) else None

    def _recall(self, key: Key) -> dict[str, Any] | None:
        try:
            kept = json.loads(_read_body(self._note(key)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, ProgramRefused) as error:
            log.warning("%s", error)
            return None
        return kept["about"] if kept["key"] == dict(key) else None

    def remember(self, key: Key, about: Mapping[str, Any]) -> None:
        """Keeps what was found out about programs, with the same care as programs."""
        body = json.dumps({"key": dict(key), "about": dict(about)}, sort_keys=True).encode()
        try:
            _write(self._note(key), _sealed(body))
        except OSError as error:
            log.warning("%s can't be kept: %s", self._note(key), error)

    def prune(self) -> None:
        """Forgets the least recently used programs beyond MAX_FILES, and what writers left."""
        try:
            for suffix in (SUFFIX, NOTE_SUFFIX):
                kept = sorted(self.folder.glob(f"*{suffix}"), key=_last_used, reverse=True)
                strays = [
                    path
                    for path in self.folder.glob(f"*{suffix}.*")
                    if time.time() - _last_used(path) > _STRAY_S
                ]
                for path in (*kept[MAX_FILES:], *strays):
                    path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s can't be tidied: %s", self.folder, error)

    def _path(self, name: str, key: Key) -> Path:
        return self.folder / f"{name}-{digest(key)[:32]}{SUFFIX}"

    def _note(self, key: Key) -> Path:
        return self.folder / f"{digest(key)[:32]}{NOTE_SUFFIX}"


@dataclass(frozen=True)
class StoreAhead(Store):
    """A store of which some programs are being loaded already, on other threads."""

    under_way: Mapping[str, Future[Loaded | None]] = field(default_factory=dict)
    """By the digest of their key."""

    def load(self, name: str, key: Key, trees: Trees, devices: Devices) -> Loaded | None:
        """What the other thread finds, where there is one."""
        future = self.under_way.get(digest(key))
        return super().load(name, key, trees, devices) if future is None else future.result()


def open_store(folder: Path) -> Store:
    """Makes the folder where it is missing; raises ConfigError where others could write to it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise ConfigError(f"the folder of compiled programs can't be used: {error}") from error
    if why := _why_not_private(found):
        raise ConfigError(
            f"the folder of compiled programs {folder} {why}, so others could have this process "
            "run their code; make it your own with mode 0700, or choose another"
        )
    return Store(folder)


def find_store(folder: Path) -> Store | None:
    """The store, or a warning where its folder can't be used."""
    try:
        return open_store(folder)
    except ConfigError as error:
        log.warning("%s; programs are compiled at each start", error)
        return None


def read_cost(entry: Mapping[str, Any]) -> ProgramCost:
    """A cost from JSON; raises KeyError, TypeError or ValueError where it isn't one."""
    kinds = {"phase": str, "key": str, "trace_s": float, "compile_s": float}
    names = [one.name for one in fields(ProgramCost)]
    return ProgramCost(**{name: kinds.get(name, int)(entry[name]) for name in names})


def digest(key: Key) -> str:
    """The hash of a key."""
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()


def _read(path: Path, key: Key) -> tuple[ProgramCost, bytes]:
    """A file's parts; raises ProgramRefused unless it is private, whole and made for `key`."""
    body = _read_body(path)
    header_len = int.from_bytes(body[:4], "big")
    if not 0 < header_len <= min(_MAX_HEADER_LEN, len(body) - 4):
        raise ProgramRefused(f"{path} is damaged: its header does not fit")
    try:
        header = json.loads(body[4 : 4 + header_len])
        cost = read_cost(header["cost"])
        made_for = dict(header["key"])
    except (ValueError, KeyError, TypeError) as error:
        raise ProgramRefused(f"{path} is damaged: its header can't be read ({error})") from error
    different = sorted(name for name in {*made_for, *key} if made_for.get(name) != key.get(name))
    if different:
        raise ProgramRefused(f"{path} was made for another {', '.join(different)}")
    return cost, body[4 + header_len :]


def _read_body(path: Path) -> bytes:
    """What the checksum of a file covers."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ProgramRefused(f"{path} is not a file")
        if why := _why_not_private(found):
            raise ProgramRefused(f"{path} {why}")
        if file.read(len(MAGIC)) != MAGIC:
            raise ProgramRefused(f"{path} is not a program of this version of jaxinfer")
        checksum, body = file.read(_CHECKSUM_LEN), file.read()
    if hashlib.sha256(body).digest() != checksum:
        raise ProgramRefused(f"{path} is damaged: its checksum differs")
    return body


def _revive(path: Path, executable: bytes, trees: Trees, devices: Devices) -> jax.stages.Compiled:
    """The program in bytes that have been checked."""
    try:
        loaded = serialize_executable.deserialize_and_load(
            executable,
            trees.arguments,
            trees.result,
            backend=devices[0].client,
            execution_devices=devices,
        )
    except _UNREADABLE as error:
        raise ProgramRefused(f"{path} can't be loaded: {error}") from error
    try:
        os.utime(path)  # for prune
    except OSError:
        log.debug("%s can't be touched", path)
    return loaded


def _pack(key: Key, cost: ProgramCost, executable: bytes) -> bytes:
    header = json.dumps({"key": dict(key), "cost": asdict(cost)}, sort_keys=True).encode()
    return _sealed(len(header).to_bytes(4, "big") + header + executable)


def _sealed(body: bytes) -> bytes:
    return MAGIC + hashlib.sha256(body).digest() + body


def _write(path: Path, content: bytes) -> None:
    """All of a file or none of it, whoever else writes it at the same time."""
    descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _why_not_private(found: os.stat_result) -> str:
    if found.st_uid not in (os.getuid(), 0):
        return f"belongs to user {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"has mode {stat.S_IMODE(found.st_mode):04o}"
    return ""


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
