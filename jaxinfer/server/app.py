"""Builds the gRPC server, and takes it from its first port to its last request."""

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable, Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jaxinfer.edge_config import ServerConfig
from jaxinfer.errors import ConfigError, EngineFailed
from jaxinfer.host.request import Request
from jaxinfer.server import service
from jaxinfer.server.hub import Hub
from jaxinfer.server.served import Deliver, EngineLike, ServedModel

MakeEngine = Callable[[Deliver], EngineLike]

SERVICES = ("", *service.NAMES)
CLOSE_GRACE_S = 1.0  # for last words on the wire, once the engine is done
WATCH_S = 0.25  # how soon the end of the engine's thread is seen
KEEPALIVE_MS = 20_000  # a client that vanished without a word is noticed after this and the next
KEEPALIVE_TIMEOUT_MS = 10_000
CLIENT_PING_MS = 10_000  # clients may look that often whether the server is there

log = logging.getLogger("jaxinfer.server")


def run(
    served: ServedModel,
    make_engine: MakeEngine,
    config: ServerConfig,
    *,
    restored: Sequence[Request] = (),
    ready: Callable[[int], None] = lambda port: None,
) -> None:
    """Serves until SIGTERM or SIGINT, then lets running requests finish within the grace.

    Calls `ready(port)` once requests are answered; a second signal ends it at once. Raises
    EngineFailed where the engine's thread ended by itself. `restored` are requests that the engine
    has from a snapshot: each waits `config.resume_ttl_s` for its client, and then ends.
    """
    asyncio.run(_run(Server(served, make_engine, config, restored=restored), config, ready))


def check_address(config: ServerConfig) -> None:
    """Raises ConfigError where nothing can listen there now, before any work was put into it.

    It asks a plain socket, as gRPC does not say what was wrong.
    """
    host, port = config.host, config.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(_bind_message(error, host, port)) from None
    failures = [error for entry in found if (error := _probe(entry)) is not None]
    # A name may stand for addresses that this machine lacks, such as IPv6's; one is enough.
    taken = [error for error in failures if error.errno == errno.EADDRINUSE]
    if taken or len(failures) == len(found):
        raise ConfigError(_bind_message((taken or failures)[0], host, port))


class Server:
    """One model on one port: jaxinfer.v1, health and reflection.

    `make_engine(deliver)` makes the engine, e.g. `partial(EngineThread, engine)`; the server starts
    and stops it. `restored` are the requests that this engine has from the start: its first output
    for each of them holds all of its tokens and text so far.
    """

    def __init__(
        self,
        served: ServedModel,
        make_engine: MakeEngine,
        config: ServerConfig,
        *,
        restored: Sequence[Request] = (),
    ) -> None:
        self._served = served
        self._make_engine = make_engine
        self._config = config
        self._restored = restored

    async def start(self) -> int:
        """Takes the port, starts the engine, and returns the port; health says NOT_SERVING.

        Raises ConfigError where the address can't be had.
        """
        self._hub = Hub(asyncio.get_running_loop())
        self._engine = self._make_engine(self._hub.deliver)
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._grpc = grpc.aio.server(options=_options(self._config))
        edge = service.Service(self._served, self._engine, self._hub, salt=self._config.prefix_salt)
        self._grpc.add_generic_rpc_handlers(edge.handlers())
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (*service.NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)
        await self.set_serving(False)
        port = _bind(self._grpc, self._config)
        for request in self._restored:
            self._hub.expect(request)
        self._engine.start()
        await self._grpc.start()
        loop = asyncio.get_running_loop()
        self._expiry = loop.call_later(self._config.resume_ttl_s, self._expire)
        return port

    async def set_serving(self, is_serving: bool) -> None:
        """What health says of every service."""
        kinds = health_pb2.HealthCheckResponse
        for name in SERVICES:
            await self._health.set(name, kinds.SERVING if is_serving else kinds.NOT_SERVING)

    async def wait(self, stop: asyncio.Event) -> None:
        """Returns when `stop` is set; raises EngineFailed where the engine's thread ended."""
        while not stop.is_set():
            if not self._engine.alive:
                raise EngineFailed("the engine's thread ended; the log says why")
            try:
                await asyncio.wait_for(stop.wait(), WATCH_S)
            except TimeoutError:
                continue

    async def stop(self, grace_s: float) -> None:
        """Refuses what is new, lets what runs finish within `grace_s`, ends the rest."""
        self._expiry.cancel()
        await self.set_serving(False)
        if self._engine.alive and not await asyncio.to_thread(self._engine.drain, grace_s):
            late = self._hub.live
            log.warning("%d requests were not done in %g s; they end now", len(late), grace_s)
            await asyncio.to_thread(self._engine.stop)  # a snapshot keeps what was live
            await self._until_idle(CLOSE_GRACE_S)
        await self._grpc.stop(CLOSE_GRACE_S)
        await asyncio.to_thread(self._engine.stop)

    def _expire(self) -> None:
        late = self._hub.expire()
        for request_id in late:
            self._engine.cancel(request_id)
        if late:
            ttl_s = self._config.resume_ttl_s
            log.warning("%d restored requests were not resumed in %g s; they end", len(late), ttl_s)

    async def _until_idle(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        while self._hub.live and loop.time() < end_s:
            await asyncio.sleep(0.01)


async def _run(server: Server, config: ServerConfig, ready: Callable[[int], None]) -> None:
    port = await server.start()
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        await server.set_serving(True)
        ready(port)
        await server.wait(stop)
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
        await server.stop(config.drain_grace_s)


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # or two servers would share a port, and each its half
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", CLIENT_PING_MS),
    ]


def _bind(server: grpc.aio.Server, config: ServerConfig) -> int:
    host, port = config.host, config.port
    check_address(config)
    try:
        return server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError as error:
        raise ConfigError(f"can't listen on server.host = {host!r}, port {port}: {error}") from None


def _probe(entry: tuple) -> OSError | None:
    family, kind, protocol, _, address = entry
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None


def _bind_message(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} is taken on {host}; stop what listens there, set server.port to another "
            "one, or to 0 for a free one"
        )
    if error.errno == errno.EACCES:
        return f"port {port} needs rights that this process lacks; set server.port above 1023"
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"server.host is {host!r}, which is no address of this machine: {error.strerror}"
    return f"can't listen on server.host = {host!r}, server.port = {port}: {error.strerror}"
