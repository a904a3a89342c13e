"""The connection of a client: plain or TLS, with a token on every call or without."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from jaxinfer.errors import ConfigError

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 20_000),  # a server that vanished without a word is noticed
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # else a minute passes where its kernel still answers
    ("grpc.http2.max_pings_without_data", 0),  # no bound: a long answer is one request
    ("grpc.initial_reconnect_backoff_ms", 100),  # gRPC's own waits grow to two minutes
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
REPLICAS: dict[str, Any] = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": "jaxinfer.v1.InferenceService"},
}
"""Calls go round the servers that are ready; where there is one alone, it says itself why not."""


Metadata = tuple[tuple[str, str], ...]


class Calls:
    """A channel whose calls carry metadata; stubs are made of it as of a channel.

    No interceptor does it: around a stream it would stand between a reader and its call.
    """

    def __init__(self, channel: Any, metadata: Metadata) -> None:
        self._channel = channel
        self._metadata = metadata

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        """As of a channel."""
        return self._with_metadata(self._channel.unary_unary(*arguments, **options))

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        """As of a channel."""
        return self._with_metadata(self._channel.unary_stream(*arguments, **options))

    def stream_unary(self, *arguments: Any, **options: Any) -> Any:
        """As of a channel."""
        return self._with_metadata(self._channel.stream_unary(*arguments, **options))

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        """As of a channel."""
        return self._with_metadata(self._channel.stream_stream(*arguments, **options))

    def _with_metadata(self, call: Any) -> Any:
        return partial(call, metadata=self._metadata) if self._metadata else call


def token_metadata(token: str | None) -> Metadata:
    """What a call says of who asks."""
    if not token:
        return ()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError("the token has characters that no token has; was it cut or quoted?")
    return (("authorization", f"Bearer {token}"),)


def credentials(
    *, tls: bool, ca: str | Path | None, cert: str | Path | None, key: str | Path | None
) -> grpc.ChannelCredentials | None:
    """What a secure connection trusts and shows; None for a plain one.

    Without `ca` those are trusted that gRPC trusts by itself.
    """
    if (cert is None) != (key is None):
        raise ConfigError("tls_cert and tls_key go together; give both, or neither")
    if not (tls or ca or cert):
        return None
    return grpc.ssl_channel_credentials(_read(ca), _read(key), _read(cert))


def connect(target: str, secure: grpc.ChannelCredentials | None) -> grpc.Channel:
    """A channel for threads."""
    options = options_for(target)
    if secure is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, secure, options=options)


def connect_aio(target: str, secure: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """A channel for asyncio."""
    options = options_for(target)
    if secure is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, secure, options=options)


def options_for(target: str) -> Sequence[tuple[str, int | str]]:
    """Several servers, with commas after ipv4: or behind one name of dns:///, take turns."""
    if "," not in target and not target.startswith("dns:"):
        return CHANNEL_OPTIONS
    return (*CHANNEL_OPTIONS, ("grpc.service_config", json.dumps(REPLICAS)))


def _read(path: str | Path | None) -> bytes | None:
    try:
        return None if path is None else Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{str(path)!r} can't be read: {error.strerror}") from None
