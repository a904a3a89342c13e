"""Whether a server can listen where its settings say, and what is wrong where it can't."""

import errno
import socket

from jaxinfer.edge_config import ServerConfig
from jaxinfer.errors import ConfigError

ADMIN_HOST = "127.0.0.1"  # whoever is on the machine may do what operators do, and nobody else


def check_address(config: ServerConfig) -> None:
    """Raises ConfigError where nothing can listen there now, before any work was put into it.

    It asks a plain socket, as gRPC does not say what was wrong.
    """
    _check_port(config.host, config.port, "server.port")
    if config.metrics_port:
        if config.metrics_port == config.port:
            raise ConfigError(
                f"server.metrics_port is {config.metrics_port}, which is server.port too; set it "
                "to another port, or to 0 for no metrics"
            )
        _check_port(config.host, config.metrics_port, "server.metrics_port")
    if config.openai_port:
        if config.openai_port in (config.port, config.metrics_port, config.admin_port):
            raise ConfigError(
                f"server.openai_port is {config.openai_port}, which another one of this server's "
                "ports is too; set it to a port of its own"
            )
        _check_port(ADMIN_HOST, config.openai_port, "server.openai_port")
    if not config.admin_port:
        return
    if config.admin_port in (config.port, config.metrics_port):
        raise ConfigError(
            f"server.admin_port is {config.admin_port}, which another one of this server's ports "
            "is too; set it to a port of its own"
        )
    _check_port(ADMIN_HOST, config.admin_port, "server.admin_port")


def of_operators(config: ServerConfig) -> str:
    """Where AdminService listens; empty where it is left out."""
    return f"{ADMIN_HOST}:{config.admin_port}" if config.admin_port else ""


def _check_port(host: str, port: int, key: str) -> None:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(_bind_message(error, host, port, key)) from None
    failures = [error for entry in found if (error := _probe(entry)) is not None]
    # A name may stand for addresses that this machine lacks, such as IPv6's; one is enough.
    taken = [error for error in failures if error.errno == errno.EADDRINUSE]
    if taken or len(failures) == len(found):
        raise ConfigError(_bind_message((taken or failures)[0], host, port, key))


def _probe(entry: tuple) -> OSError | None:
    family, kind, protocol, _, address = entry
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None


def _bind_message(error: OSError, host: str, port: int, key: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} is taken on {host}; stop what listens there, or set {key} to another one"
            + (", or to 0 for a free one" if key == "server.port" else ", or to 0 for none")
        )
    if error.errno == errno.EACCES:
        return f"port {port} needs rights that this process lacks; set {key} above 1023"
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"server.host is {host!r}, which is no address of this machine: {error.strerror}"
    return f"can't listen on {host!r}, {key} = {port}: {error.strerror}"
