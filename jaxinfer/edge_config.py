"""The settings of the edge and of what a server writes down; read through jaxinfer.config."""

import math
from dataclasses import dataclass
from typing import Literal

from jaxinfer.errors import ConfigError


@dataclass(frozen=True)
class ServerConfig:
    """The gRPC edge."""

    host: str = "127.0.0.1"
    port: int = 50051
    """0 takes a free port."""
    max_message_bytes: int = 4 * 1024 * 1024
    drain_grace_s: float = 10.0
    """How long a stopping server lets running requests finish."""
    prefix_salt: str = ""
    """Servers with another salt give other names to the same cached prefix."""
    resume_ttl_s: float = 60.0
    """How long a request that came back from a snapshot waits for its client."""
    admin_port: int = 0
    """AdminService listens there on loopback, and nowhere else; 0 leaves it out."""
    metrics_port: int = 0
    """Prometheus finds /metrics there, on `host`; 0 leaves it out."""
    openai_port: int = 0
    """OpenAI's protocol is spoken there on loopback, by the extra `gateway`; 0 leaves it out."""
    request_log: str = ""
    """One JSON line for each request that ended goes to this file, `-` is stderr; empty: none."""
    otel: bool = False
    """A span of each request goes where the OTEL_* variables say; needs the extra `otel`."""
    stall_limit_s: float = 30.0
    """Health says NOT_SERVING when a step takes longer; 0: never."""
    reader_limit_s: float = 60.0
    """A stream whose client takes nothing for so long ends with ABORTED; 0: never."""
    max_waiting_tokens: int = 0
    """Prompt tokens that may wait in all; one request more is refused. 0: no bound of its own."""
    max_wait_s: float = 8.0
    """A request that would wait longer is refused, by the pace at which others began; 0: none is.
    A load of hours that nobody waits for sets 0 and bounds the line by engine.max_waiting alone."""
    max_chat_messages: int = 4096
    """Messages of one conversation; one more is refused before the chat template runs."""
    max_streams: int = 0
    """Calls at once on one connection; 0: 1024, and 128 where other machines reach the server.
    Lower: a client that floods delays others less; but one that asks for more at once may be
    refused, also where it waits for its turn."""
    refuse_resets: Literal["auto", "on", "off"] = "auto"
    """gRPC's own guard against calls that are taken back at once; auto: on where other machines
    reach the server. It also refuses calls of honest clients that ask for many at once, and can't
    say when to retry."""
    max_connections: int = 1000
    """Connections at once on one port; one more is closed as it comes."""

    def __post_init__(self) -> None:
        for key in ("port", "admin_port", "metrics_port", "openai_port"):
            if not 0 <= getattr(self, key) <= 65535:
                raise ConfigError(
                    f"server.{key} is {getattr(self, key)}; it must be from 0 to 65535"
                )
        for key in ("max_connections", "max_message_bytes", "max_chat_messages"):
            if getattr(self, key) < 1:
                raise ConfigError(f"server.{key} is {getattr(self, key)}; it must be at least 1")
        for key in (
            "drain_grace_s",
            "resume_ttl_s",
            "stall_limit_s",
            "reader_limit_s",
            "max_waiting_tokens",
            "max_wait_s",
            "max_streams",
        ):
            if not 0 <= getattr(self, key) < math.inf:
                raise ConfigError(
                    f"server.{key} is {getattr(self, key)}; it must be at least 0 and finite"
                )


@dataclass(frozen=True)
class SecurityConfig:
    """Who may ask, and over what kind of wire."""

    tls_cert: str = ""
    """PEM file of the server's certificate chain; with `tls_key` it turns TLS on."""
    tls_key: str = ""
    tls_client_ca: str = ""
    """PEM file; with it a client needs a certificate that one of these signed."""
    tokens: str = ""
    """TOML file of salted token hashes with tenants, scopes and quotas; empty asks for none."""
    openai_key: str = ""
    """File with the key that clients of `server.openai_port` show; empty draws one at the start."""
    allow_insecure: bool = False
    """Listens beyond loopback without TLS and tokens; for networks that are safe by themselves."""


@dataclass(frozen=True)
class JournalConfig:
    """What is written down of every step, so that it can be run again: `jaxinfer replay`."""

    folder: str = ""
    """Where the segments go; empty keeps no journal."""
    segment_mb: int = 64
    """A new segment begins after this many megabytes; each can be replayed alone."""
    num_segments: int = 8
    """The newest ones are kept."""
    prompts: Literal["keep", "hash", "redact"] = "keep"
    """hash and redact write stand-ins for token ids, so that only the schedule can be replayed;
    with hash, whoever has a prompt can still find it in the journal."""

    def __post_init__(self) -> None:
        for key in ("segment_mb", "num_segments"):
            if getattr(self, key) < 1:
                raise ConfigError(f"journal.{key} is {getattr(self, key)}; it must be at least 1")


@dataclass(frozen=True)
class SnapshotConfig:
    """The live requests, saved as they go, so that a new process can go on with them."""

    path: str = ""
    """The file; read at the start, where it is there. Empty saves nothing."""
    interval_s: float = 1.0
    """Seconds between two of them."""

    def __post_init__(self) -> None:
        if not 0 < self.interval_s < math.inf:
            raise ConfigError(
                f"snapshot.interval_s is {self.interval_s}; it must be above 0 and finite"
            )


@dataclass(frozen=True)
class ClusterConfig:
    """One model over several processes: `jaxinfer cluster`."""

    port: int = 0
    """Rank 0 listens there for the others; 0: a free one on one machine, and 50052 beyond."""
    key_file: str = ""
    """File with the secret that the processes of a group prove to each other; needed beyond one
    machine. On one machine it may be empty: a new key is drawn at each start."""
    heartbeat_s: float = 10.0
    """A process that says nothing for so long is taken to be lost."""
    start_limit_s: float = 600.0
    """How long a group may take until it serves; then it is started again."""
    max_failed_starts: int = 5
    """So many starts in a row that did not come to serve end the command; 0: none does."""
    coordinator_port: int = 0
    """jax.distributed meets there, on rank 0's host; 0 takes a free one."""

    def __post_init__(self) -> None:
        for key in ("port", "coordinator_port"):
            if not 0 <= getattr(self, key) <= 65535:
                raise ConfigError(
                    f"cluster.{key} is {getattr(self, key)}; it must be from 0 to 65535"
                )
        for key in ("heartbeat_s", "start_limit_s"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(
                    f"cluster.{key} is {getattr(self, key)}; it must be above 0 and finite"
                )
        if self.max_failed_starts < 0:
            raise ConfigError(
                f"cluster.max_failed_starts is {self.max_failed_starts}; it must be at least 0"
            )
