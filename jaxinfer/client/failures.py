"""gRPC statuses back to the errors that the server raised."""

from types import TracebackType
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2  # pyright: ignore[reportMissingTypeStubs]

from jaxinfer import errors

DOMAIN = "jaxinfer"
DETAILS_KEY = "grpc-status-details-bin"

REASONS: dict[str, type[errors.JaxinferError]] = {
    "INVALID_REQUEST": errors.InvalidRequest,
    "UNKNOWN_MODEL": errors.UnknownModel,
    "DUPLICATE_REQUEST": errors.DuplicateRequest,
    "QUEUE_FULL": errors.QueueFull,
    "QUOTA_EXCEEDED": errors.QuotaExceeded,
    "UNAUTHENTICATED": errors.Unauthenticated,
    "FORBIDDEN": errors.Forbidden,
    "NEVER_FITS": errors.NeverFits,
    "SLOW_READER": errors.SlowReader,
    "DRAINING": errors.Draining,
    "DEADLINE_PASSED": errors.DeadlinePassed,
    "ENGINE_FAILED": errors.EngineFailed,
    "UNKNOWN_REQUEST": errors.UnknownRequest,
    "ENDED_BY_OPERATOR": errors.EndedByOperator,
    "OUT_OF_TURN": errors.OutOfTurn,
}
"""What a server of ours says in its ErrorInfo; server/status.py has the other half."""


class Raised:
    """`with Raised(target):` turns a call's failure into an error of jaxinfer's."""

    def __init__(self, target: str) -> None:
        self._target = target

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, grpc.RpcError):
            raise to_error(error, self._target) from error


def to_error(failure: Any, target: str) -> errors.JaxinferError:
    """The error that a failed call stands for."""
    code, message = failure.code(), failure.details() or ""
    info, bad_request, retry = _details(failure)
    kind = REASONS.get(info.reason) if info.domain == DOMAIN else None
    if kind is not None and issubclass(kind, errors.InvalidRequest):
        violations = bad_request.field_violations
        # The wire names sampling.temperature what a keyword argument names temperature.
        field = violations[0].field.rpartition(".")[2] if violations else ""
        return kind(message, field=field)
    if kind is not None and issubclass(kind, errors.Refused):
        return kind(message, retry_after_s=retry.retry_delay.ToTimedelta().total_seconds())
    if kind is not None:
        return kind(message)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlinePassed(f"{target} did not finish within the call's timeout_s")
    if code is grpc.StatusCode.UNAVAILABLE:
        return errors.Unreachable(f"no server answers at {target}: {message}", code=code.name)
    if code is grpc.StatusCode.CANCELLED:  # without a word of ours: gRPC closed under the call
        return errors.Unreachable(f"the server at {target} closed the call", code=code.name)
    return errors.ClientError(f"{target} answered {code.name}: {message}", code=code.name)


def _details(
    failure: Any,
) -> tuple[error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo]:
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for key, value in failure.trailing_metadata() or ():
        if key != DETAILS_KEY:
            continue
        for detail in status_pb2.Status.FromString(value).details:
            detail.Unpack(info)
            detail.Unpack(bad_request)
            detail.Unpack(retry)
    return info, bad_request, retry
