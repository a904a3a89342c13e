"""Who may call what: bearer tokens, and a scope for every method; what has none is denied."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from jaxinfer.edge_config import SecurityConfig
from jaxinfer.errors import (
    Forbidden,
    JaxinferError,
    QuotaExceeded,
    Unauthenticated,
)
from jaxinfer.server.status import Reported, let_go
from jaxinfer.server.tenants import ANYONE, CALLER, Caller, Tenants
from jaxinfer.server.tokens import TokenFile, watch
from jaxinfer.v1 import admin_pb2, inference_pb2, model_pb2

OPEN = "open"  # no token: health checks of load balancers can't send one
SERVICE_SCOPES = {
    "jaxinfer.v1.InferenceService": "generate",
    "jaxinfer.v1.ModelService": "read",
    "jaxinfer.v1.AdminService": "admin",
    "grpc.health.v1.Health": "health",
    "grpc.reflection.v1alpha.ServerReflection": "read",
}
METHOD_SCOPES = {"/grpc.health.v1.Health/Check": OPEN}
FILES = tuple(
    module.DESCRIPTOR
    for module in (inference_pb2, model_pb2, admin_pb2, health_pb2, reflection_pb2)
)
MAX_TOKEN_CHARS = 256


class Gate(grpc.aio.ServerInterceptor):
    """Lets a call through to its handler, or answers it with a status before it reads anything.

    It returns the handlers as they are and leaves no wrapper around a stream: who asks is told
    through a context variable of the call's own task.
    """

    def __init__(
        self,
        tokens: Callable[[], TokenFile],
        tenants: Tenants,
        scopes: dict[str, str] | None = None,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._tokens = tokens
        self._tenants = tenants
        self._now = now
        self._scopes = method_scopes() if scopes is None else scopes

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """The method's handler, or one that refuses."""
        method = handler_call_details.method
        scope = self._scopes.get(method)
        caller = ANYONE
        if scope != OPEN:
            try:
                caller = self._authenticated(handler_call_details.invocation_metadata or ())
                if scope is not None and scope not in caller.scopes:
                    raise Forbidden(f"{method} needs a token with the scope {scope!r}")
                self._tenants.count_call(caller)
            except (Unauthenticated, Forbidden, QuotaExceeded) as error:
                return refusal(error)
        handler = await continuation(handler_call_details)
        if handler is not None and scope is None:
            return refusal(Forbidden(f"{method} has no scope in this server, so it is closed"))
        CALLER.set(caller)
        return handler

    def _authenticated(self, metadata: Sequence[tuple[str, str | bytes]]) -> Caller:
        given = [value for key, value in metadata if key == "authorization"]
        if not given:
            raise Unauthenticated(
                "this server asks for a token; send the metadata authorization: Bearer TOKEN"
            )
        scheme, _, token = str(given[0]).partition(" ")
        is_one = len(given) == 1 and scheme.lower() == "bearer" and len(token) <= MAX_TOKEN_CHARS
        caller = self._tokens().find(token, now=self._now()) if is_one else None
        if caller is None:
            raise Unauthenticated("the token is not one of this server's, or no longer")
        return caller


def method_scopes(files: Sequence[FileDescriptor] = FILES) -> dict[str, str]:
    """The scope of every method that the descriptors name; KeyError for a service without one."""
    return {
        path: METHOD_SCOPES.get(path, SERVICE_SCOPES[service.full_name])
        for file in files
        for service in file.services_by_name.values()
        for path in (f"/{service.full_name}/{method.name}" for method in service.methods)
    }


def refusal(error: JaxinferError) -> grpc.RpcMethodHandler:
    """A handler for calls of any kind: it reads nothing and ends with the error's status."""

    async def refuse(_: Any, call: Any) -> None:
        async with Reported(call):
            raise error

    return grpc.stream_stream_rpc_method_handler(let_go(refuse))


def gates(
    security: SecurityConfig, tenants: Tenants, more: Mapping[str, str] | None = None
) -> list[grpc.aio.ServerInterceptor]:
    """The interceptors of a server: none where it asks for no tokens.

    `more` has the scopes of methods that a server has besides ours.
    """
    if not security.tokens:
        return []
    return [Gate(watch(Path(security.tokens)).now, tenants, method_scopes() | dict(more or {}))]
