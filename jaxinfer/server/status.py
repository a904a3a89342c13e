"""The one table from errors to gRPC status codes, and the details that travel with a status."""

import logging
import math
import secrets
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Any, NoReturn, Protocol, runtime_checkable

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from jaxinfer import errors
from jaxinfer.host.request import Request
from jaxinfer.server.translate import wire_path

DOMAIN = "jaxinfer"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
MAX_MESSAGE_BYTES = 400  # a status travels in headers three times, and peers bound those at 8 kB
MISSING = (grpc.StatusCode.INTERNAL, "INTERNAL")

TABLE: dict[type[BaseException], tuple[grpc.StatusCode, str]] = {
    errors.InvalidRequest: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    errors.UnknownModel: (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL"),
    errors.DuplicateRequest: (grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_REQUEST"),
    errors.QueueFull: (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    errors.QuotaExceeded: (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"),
    errors.Unauthenticated: (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    errors.Forbidden: (grpc.StatusCode.PERMISSION_DENIED, "FORBIDDEN"),
    errors.NeverFits: (grpc.StatusCode.FAILED_PRECONDITION, "NEVER_FITS"),
    errors.SlowReader: (grpc.StatusCode.ABORTED, "SLOW_READER"),
    errors.Draining: (grpc.StatusCode.UNAVAILABLE, "DRAINING"),
    errors.DeadlinePassed: (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED"),
    errors.EngineFailed: (grpc.StatusCode.INTERNAL, "ENGINE_FAILED"),
    errors.UnknownRequest: (grpc.StatusCode.NOT_FOUND, "UNKNOWN_REQUEST"),
    errors.EndedByOperator: (grpc.StatusCode.CANCELLED, "ENDED_BY_OPERATOR"),
    errors.OutOfTurn: (grpc.StatusCode.FAILED_PRECONDITION, "OUT_OF_TURN"),
}
"""Code and reason by error class; a class stands for its subclasses. All else is INTERNAL."""

HEARD: ContextVar[Callable[[str], None]] = ContextVar("heard", default=lambda code: None)
"""Hears the status of the call of this task; an interceptor sets it before the handler runs."""

BEGUN: ContextVar[Callable[[Request, bool], None]] = ContextVar(
    "begun", default=lambda request, is_chat: None
)
"""Hears what the engine was asked by the call of this task, and whether it is a chat."""

SAID: ContextVar[Callable[[], None]] = ContextVar("said", default=lambda: None)
"""Hears that the message of the call of this task has come."""

log = logging.getLogger("jaxinfer.server")


@runtime_checkable
class Call(Protocol):
    """What handlers use of a `grpc.aio.ServicerContext`."""

    def time_remaining(self) -> float | None: ...

    def add_done_callback(self, callback: Any) -> None: ...

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()
    ) -> NoReturn: ...


class Reported:
    """`async with Reported(call):` ends the call with the right status where the body raises."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # What is no Exception is the call's own end: a client that left, a generator closed.
        if not isinstance(error, Exception):
            HEARD.get()("OK" if error is None else "CANCELLED")
        else:
            code, status = status_of(error)
            HEARD.get()(code.name)
            details = ((DETAILS_KEY, status.SerializeToString()), *_pushback(error))
            error.__traceback__ = None  # its frames hold the call, and the call holds the abort
            await self._call.abort(code, status.message, details)


def let_go(behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A handler whose aborted calls are freed at once, not when the collector finds them.

    An aborted call keeps its abort, and that its frames, which keep the call. gRPC counts calls
    that are not freed as open: over `server.max_streams` of them it refuses new ones by itself,
    UNAVAILABLE and without a delay. It raises the abort again when the handler is through.
    """

    async def handle(message: Any, call: Any) -> Any:
        SAID.get()()
        try:
            return await behaviour(message, call)
        except grpc.aio.AbortError as error:
            error.__traceback__ = error.__context__ = None
            return None

    return handle


def status_of(error: Exception) -> tuple[grpc.StatusCode, status_pb2.Status]:
    """The status that a caller sees.

    An internal error shows an id only; the log has the rest under it.
    """
    code, reason = row(type(error))
    message = str(error)
    if code is grpc.StatusCode.INTERNAL:
        error_id = secrets.token_hex(4)
        log.error("internal error %s: %s", error_id, error, exc_info=error)
        message = f"the server failed while it served this request; its log has error {error_id}"
    message = _cut(message)
    details = [error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN), *_more(error, message)]
    return code, status_pb2.Status(
        code=code.value[0], message=message, details=[_packed(detail) for detail in details]
    )


def row(kind: type[BaseException]) -> tuple[grpc.StatusCode, str]:
    """The table's entry for a class or the nearest class above it."""
    for parent in kind.__mro__:
        if parent in TABLE:
            return TABLE[parent]
    return MISSING


def _more(error: Exception, message: str) -> list[Message]:
    if isinstance(error, errors.Refused):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        retry = error_details_pb2.RetryInfo(retry_delay=delay)
        return [retry, *_quota_failure(error, message)]
    if isinstance(error, errors.NeverFits):
        broken = error_details_pb2.PreconditionFailure.Violation(
            type="CAPACITY", subject="server.max_waiting_tokens", description=message
        )
        return [error_details_pb2.PreconditionFailure(violations=[broken])]
    if isinstance(error, errors.InvalidRequest) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_cut(wire_path(error.field)), description=message
        )
        return [error_details_pb2.BadRequest(field_violations=[violation])]
    return []


def _quota_failure(error: errors.Refused, message: str) -> list[Message]:
    match error:
        case errors.QuotaExceeded():
            subject = f"tenant:{error.tenant}"
        case errors.QueueFull():
            subject = "server"
        case _:
            return []
    violation = error_details_pb2.QuotaFailure.Violation(subject=subject, description=message)
    return [error_details_pb2.QuotaFailure(violations=[violation])]


def _pushback(error: Exception) -> tuple[tuple[str, str], ...]:
    """When gRPC's own retries may come back."""
    if not isinstance(error, errors.Refused):
        return ()
    return ((PUSHBACK_KEY, str(math.ceil(error.retry_after_s * 1000))),)


def _cut(text: str) -> str:
    """What fits into headers: its begin, as text that has UTF-8, without controls."""
    data = text.encode(errors="replace")[:MAX_MESSAGE_BYTES]
    return "".join(one if one.isprintable() else "?" for one in data.decode(errors="ignore"))


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
