"""The one table from errors to gRPC status codes, and the details that travel with a status."""

import logging
import secrets
from types import TracebackType
from typing import Any, NoReturn, Protocol, runtime_checkable

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from jaxinfer import errors
from jaxinfer.server.translate import wire_path

DOMAIN = "jaxinfer"
DETAILS_KEY = "grpc-status-details-bin"
RETRY_AFTER_S = 1
MAX_MESSAGE_CHARS = 400  # a status travels in headers, and peers bound those at 8 kB
MISSING = (grpc.StatusCode.INTERNAL, "INTERNAL")

TABLE: dict[type[BaseException], tuple[grpc.StatusCode, str]] = {
    errors.InvalidRequest: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    errors.UnknownModel: (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL"),
    errors.DuplicateRequest: (grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_REQUEST"),
    errors.QueueFull: (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    errors.Draining: (grpc.StatusCode.UNAVAILABLE, "DRAINING"),
    errors.DeadlinePassed: (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED"),
    errors.EngineFailed: (grpc.StatusCode.INTERNAL, "ENGINE_FAILED"),
}
"""Code and reason by error class; a class stands for its subclasses. All else is INTERNAL."""

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
        if isinstance(error, Exception):
            code, status = status_of(error)
            details = ((DETAILS_KEY, status.SerializeToString()),)
            await self._call.abort(code, status.message, details)


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
    message = message[:MAX_MESSAGE_CHARS]
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
    if isinstance(error, errors.QueueFull):
        delay = duration_pb2.Duration(seconds=RETRY_AFTER_S)
        return [error_details_pb2.RetryInfo(retry_delay=delay)]
    if isinstance(error, errors.InvalidRequest) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=wire_path(error.field)[:MAX_MESSAGE_CHARS], description=message
        )
        return [error_details_pb2.BadRequest(field_violations=[violation])]
    return []


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
