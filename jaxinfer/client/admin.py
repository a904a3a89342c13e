"""The operators' client: it asks AdminService, from the machine that the server runs on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from google.protobuf.message import Message

from jaxinfer.client import channel
from jaxinfer.client.failures import Raised
from jaxinfer.v1 import admin_pb2 as pb
from jaxinfer.v1 import admin_pb2_grpc

TIMEOUT_S = 30.0

T = TypeVar("T")


@dataclass(frozen=True)
class ServerInfo:
    """What a server is, and what it was started with."""

    version: str
    model: str
    device: str
    config_toml: str
    """Its settings, without secrets."""
    programs: tuple[str, ...]
    uptime_s: float
    num_compiles_after_start: int
    broken_promises: tuple[str, ...]
    """What the self-test at start found; empty where all is as promised."""


@dataclass(frozen=True)
class Load:
    """What a server holds now."""

    is_serving: bool
    is_draining: bool
    num_waiting: int
    num_running: int
    num_slots: int
    num_pages: int
    num_free_pages: int
    num_cached_pages: int
    """Of the free ones, those that the prefix cache still knows."""
    num_steps: int
    num_output_tokens: int
    num_preemptions: int
    stalled_s: float
    """Since the last step ended while there was work."""
    live_request_ids: tuple[str, ...]


@dataclass(frozen=True)
class Happening:
    """A piece of a request's time."""

    at_s: float
    seconds: float
    kind: str
    text: str
    step: int


class AdminClient:
    """Talks to the operators' port of one server; any number of threads may share it.

        with AdminClient("127.0.0.1:50052") as admin:
            print(admin.load().num_running)

    Raises the server's own errors: OutOfTurn, UnknownRequest, InvalidRequest, Draining;
    Unreachable where no server answers.
    """

    def __init__(
        self, target: str, *, timeout_s: float = TIMEOUT_S, token: str | None = None
    ) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._channel = channel.connect(target, None)
        calls: Any = channel.Calls(self._channel, channel.token_metadata(token))
        self._stub: Any = admin_pb2_grpc.AdminServiceStub(calls)

    def __enter__(self) -> "AdminClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all calls and the connection."""
        self._channel.close()

    def info(self) -> ServerInfo:
        """What the server is."""
        return _read(ServerInfo, self._ask("GetServerInfo", pb.GetServerInfoRequest()))

    def load(self) -> Load:
        """What it holds now."""
        return _read(Load, self._ask("GetLoad", pb.GetLoadRequest()))

    def explain(self, request_id: str) -> list[Happening]:
        """Where the time of a request went, in order."""
        reply = self._ask("ExplainRequest", pb.ExplainRequestRequest(request_id=request_id))
        return [_read(Happening, one) for one in reply.happenings]

    def abort(self, request_ids: Sequence[str] = (), *, everything: bool = False) -> list[str]:
        """Ends requests; returns those of them that were live."""
        message = pb.AbortRequest(request_ids=request_ids, all=everything)
        return list(self._ask("Abort", message).request_ids)

    def drain(self, wait_s: float = 0.0) -> int:
        """Has it take nothing new; returns how many requests were live after `wait_s` at most."""
        message = pb.DrainRequest(wait_s=wait_s)
        spare_s = wait_s if math.isfinite(wait_s) else 0.0  # the server refuses what is not
        return self._ask("Drain", message, timeout_s=self._timeout_s + spare_s).num_live

    def resume(self) -> None:
        """Has it take requests again."""
        self._ask("Resume", pb.ResumeRequest())

    def flush(self) -> int:
        """Forgets every cached prefix; returns how many pages that were."""
        return self._ask("FlushPrefixCache", pb.FlushPrefixCacheRequest()).num_pages

    def start_profile(self, max_s: float) -> str:
        """Begins a trace of the device; returns its folder, on the server's machine."""
        return self._ask("StartProfile", pb.StartProfileRequest(max_s=max_s)).folder

    def stop_profile(self) -> str:
        """Ends the trace; returns its folder, which now holds it."""
        return self._ask("StopProfile", pb.StopProfileRequest()).folder

    def rotate_journal(self) -> str:
        """Closes the journal's segment; returns its path, on the server's machine."""
        return self._ask("RotateJournal", pb.RotateJournalRequest()).path

    def _ask(self, method: str, message: Message, *, timeout_s: float | None = None) -> Any:
        with Raised(self._target):
            return self._stub.__dict__[method](message, timeout=timeout_s or self._timeout_s)


def _read(kind: type[T], message: Any) -> T:
    """A message as the dataclass of its fields' names."""
    known: Any = kind
    values = {field.name: message.__getattribute__(field.name) for field in fields(known)}
    return kind(
        **{
            name: value if isinstance(value, str | bool | int | float) else tuple(value)
            for name, value in values.items()
        }
    )
