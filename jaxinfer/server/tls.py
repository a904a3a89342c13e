"""TLS of the edge: certificates that are read again when their files change."""

import ssl
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from jaxinfer.edge_config import SecurityConfig
from jaxinfer.errors import ConfigError
from jaxinfer.server.watched import Watched, check_private


class Pem(NamedTuple):
    """The texts of the files, which fit together."""

    cert: bytes
    key: bytes
    client_ca: bytes | None


def credentials(security: SecurityConfig, *, every_s: float = 1.0) -> grpc.ServerCredentials | None:
    """What a secure port of the server asks and shows; None where TLS is off.

    Every handshake gets the newest files that fit together, so that a certificate is renewed
    without a restart; calls under way go on with the old one. Raises ConfigError where the files
    can't be used.
    """
    check_settings(security)
    if not security.tls_cert:
        return None
    paths = [Path(name) for name in _files(security).values()]
    watched = Watched(paths, lambda: read(security), every_s=every_s)
    last = [watched.now()]

    def fetch() -> Any:
        newest = watched.now()
        if newest is last[0]:
            return None  # gRPC keeps what it has
        last[0] = newest
        return _configuration(newest)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(last[0]), fetch, require_client_authentication=bool(security.tls_client_ca)
    )


def check_settings(security: SecurityConfig) -> None:
    """Raises ConfigError where one TLS setting lacks another."""
    for key, other in (
        ("tls_cert", "tls_key"),
        ("tls_key", "tls_cert"),
        ("tls_client_ca", "tls_cert"),
    ):
        if getattr(security, key) and not getattr(security, other):
            raise ConfigError(f"security.{key} is set without security.{other}; set both")


def read(security: SecurityConfig) -> Pem:
    """The files, once it is certain that a handshake can work with them."""
    texts = {key: _bytes(Path(name), key) for key, name in _files(security).items()}
    check_private(Path(security.tls_key), "security.tls_key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An encrypted key would ask for a password on the terminal; this one is always wrong.
        context.load_cert_chain(security.tls_cert, security.tls_key, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"security.tls_cert = {security.tls_cert!r} and security.tls_key = "
            f"{security.tls_key!r} don't make a certificate with its key, both PEM and the key "
            f"without a password: {error}"
        ) from None
    if security.tls_client_ca:
        try:
            context.load_verify_locations(cadata=texts["tls_client_ca"].decode("ascii"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"security.tls_client_ca = {security.tls_client_ca!r} holds no PEM certificates: "
                f"{error}"
            ) from None
    return Pem(texts["tls_cert"], texts["tls_key"], texts.get("tls_client_ca"))


def _files(security: SecurityConfig) -> dict[str, str]:
    keys = ("tls_cert", "tls_key", "tls_client_ca")
    return {key: getattr(security, key) for key in keys if getattr(security, key)}


def _bytes(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"security.{key} = {str(path)!r} can't be read: {error.strerror}"
        ) from None


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.client_ca)
