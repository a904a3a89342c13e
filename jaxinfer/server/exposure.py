"""Who can reach the server: an address that other machines reach needs TLS and tokens."""

import ipaddress
import logging
import socket
from pathlib import Path
from typing import NamedTuple

from jaxinfer.edge_config import SecurityConfig, ServerConfig
from jaxinfer.errors import ConfigError
from jaxinfer.server import tls, tokens

REQUIRED = ("tls_cert", "tls_key", "tokens")

log = logging.getLogger("jaxinfer.server")


def check_exposure(server: ServerConfig, security: SecurityConfig) -> None:
    """Raises ConfigError where a stranger could ask, or could read what others ask.

    `security.allow_insecure` turns the error into a line in the log.
    """
    found = _exposure(server, security)
    if not found:
        return
    if not security.allow_insecure:
        raise ConfigError(found)
    log.warning("security.allow_insecure is set: %s", found)


def check(server: ServerConfig, security: SecurityConfig) -> None:
    """`check_exposure`, and that the files of `security` can be used; before any other work."""
    check_exposure(server, security)
    tls.check_settings(security)
    if security.tls_cert:
        tls.read(security)
    if security.tokens:
        tokens.read(Path(security.tokens))


def is_loopback(host: str) -> bool:
    """Whether every address that the name stands for is this machine talking to itself."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        return False
    texts = (str(entry[4][0]).partition("%")[0] for entry in found)
    return bool(host) and all(ipaddress.ip_address(text).is_loopback for text in texts)


class StreamLimits(NamedTuple):
    """What one connection may do."""

    max_streams: int
    refuses_resets: bool


def stream_limits(server: ServerConfig) -> StreamLimits:
    """The bounds of a connection: closer ones where strangers can open it."""
    is_open = not is_loopback(server.host)
    refuses = is_open if server.refuse_resets == "auto" else server.refuse_resets == "on"
    return StreamLimits(server.max_streams or (128 if is_open else 1024), refuses)


def _exposure(server: ServerConfig, security: SecurityConfig) -> str:
    """What is wrong, and what to set; empty where nothing is."""
    if is_loopback(server.host):
        return ""
    missing = [f"security.{key}" for key in REQUIRED if not getattr(security, key)]
    if missing:
        needed = " and ".join(filter(None, (", ".join(missing[:-1]), missing[-1])))
        return (
            f"server.host = {server.host!r} can be reached from other machines, and {needed} "
            f"{'is' if len(missing) == 1 else 'are'} not set; set {needed}, or leave server.host "
            "at 127.0.0.1, or say security.allow_insecure = true where the network is safe by "
            "itself"
        )
    if server.metrics_port:
        return (
            f"server.metrics_port = {server.metrics_port} answers anyone on server.host = "
            f"{server.host!r}, without TLS and tokens; set server.metrics_port = 0, or say "
            "security.allow_insecure = true where only monitoring can reach that port"
        )
    return ""
