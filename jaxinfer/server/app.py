"""Builds the gRPC server, and takes it from its first port to its last request."""

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator, Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jaxinfer.edge_config import SecurityConfig, ServerConfig
from jaxinfer.errors import ConfigError, EngineFailed
from jaxinfer.host.request import FinishReason, Output, Request
from jaxinfer.server import admin, auth, event_loop, exposure, openai_door, service, tls
from jaxinfer.server.address import ADMIN_HOST, check_address
from jaxinfer.server.admin import Admin, Explain
from jaxinfer.server.answers import Answers
from jaxinfer.server.facts import Facts
from jaxinfer.server.health import Arrivals, Door, Health
from jaxinfer.server.hub import Hub
from jaxinfer.server.line import Line
from jaxinfer.server.openai_door import OpenAIDoor
from jaxinfer.server.profiling import Profiler
from jaxinfer.server.served import Deliver, EngineLike, ServedModel
from jaxinfer.server.sight import Sight
from jaxinfer.server.tenants import Tenants
from jaxinfer.server.timeline import StepCounts
from jaxinfer.server.turnstile import Turnstile, slow_connections
from jaxinfer.server.watch import LOOK_S, Watch

MakeEngine = Callable[[Deliver], EngineLike]

GATEWAY = openai_door.servicer()
SERVICES = (*service.NAMES, *([GATEWAY.NAME] if GATEWAY else []))
GATEWAY_SCOPES = (
    GATEWAY.scopes(generate="generate", read="read", is_open=auth.OPEN) if GATEWAY else {}
)
HEALTH_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
OPEN_ON_LOOPBACK = SecurityConfig()
NO_FACTS = Facts()
CLOSE_GRACE_S = 1.0  # for last words on the wire, once the engine is done
QUIET_S = 0.1  # without a new call, before the port is closed
STEP_GRACE_S = 10.0  # for the step under way, once all requests should end
MAX_NAMED = 8  # live requests in one line of the log
KEEPALIVE_MS = 20_000  # a client that vanished without a word is noticed after this and the next
KEEPALIVE_TIMEOUT_MS = 10_000
MAX_METADATA_BYTES = 16 * 1024
WINDOW_BYTES = 64 * 1024  # of each call, in each direction
CONNECTION_AGE_MS = 30 * 60_000  # so that clients spread over servers that came later
CONNECTION_GRACE_MS = 5 * 60_000
CONNECTION_IDLE_MS = 15 * 60_000
CLIENT_PING_MS = 10_000  # clients may look that often whether the server is there
PING_STRIKES = 2  # pings too early, before the connection is closed
HANDSHAKE_MS = 10_000  # for TLS and the first words of HTTP/2
MAX_PENDING = 8192  # calls that no task has taken yet; beyond it gRPC drops others' calls, too

log = logging.getLogger("jaxinfer.server")


def run(
    served: ServedModel,
    make_engine: MakeEngine,
    config: ServerConfig,
    *,
    security: SecurityConfig = OPEN_ON_LOOPBACK,
    restored: Sequence[Request] = (),
    facts: Facts = NO_FACTS,
    explain: Explain | None = None,
    steps: Callable[[], StepCounts] | None = None,
    ready: Callable[[int], None] = lambda port: None,
    door: OpenAIDoor | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then lets running requests finish within the grace.

    Calls `ready(port)` once requests are answered; a second signal ends it at once. Raises
    EngineFailed where the engine's thread ended by itself. `restored` are requests that the engine
    has from a snapshot: each waits `config.resume_ttl_s` for its client, and then ends.
    """
    server = Server(
        served,
        make_engine,
        config,
        security=security,
        restored=restored,
        facts=facts,
        explain=explain,
        steps=steps,
    )
    event_loop.run(serve(server, config, ready, door))


class Server:
    """One model on one port: jaxinfer.v1, health and reflection; operators have another port.

    `make_engine(deliver)` makes the engine, e.g. `partial(EngineThread, engine)`; the server starts
    and stops it. `restored` are the requests that this engine has from the start: its first output
    for each of them holds all of its tokens and text so far.
    """

    make_profiler: Callable[[], Profiler] = Profiler

    def __init__(
        self,
        served: ServedModel,
        make_engine: MakeEngine,
        config: ServerConfig,
        *,
        security: SecurityConfig = OPEN_ON_LOOPBACK,
        restored: Sequence[Request] = (),
        facts: Facts = NO_FACTS,
        explain: Explain | None = None,
        steps: Callable[[], StepCounts] | None = None,
    ) -> None:
        self._served = served
        self._make_engine = make_engine
        self._config = config
        self._security = security
        self._restored = restored
        self._facts = facts
        self._explain = explain
        self._steps = steps
        self._failure = ""

    async def start(self) -> int:
        """Takes the ports, starts the engine, and returns the port; readiness is NOT_SERVING.

        Raises ConfigError where an address can't be had.
        """
        loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._sight = Sight(
            self._served.name,
            self._config,
            has_tenants=bool(self._security.tokens),
            steps=self._steps,
            explain=self._explain,
        )
        self._hub = Hub(
            loop,
            self._sight.observers,
            answers=Answers(self._config.resume_ttl_s),
            line=Line(self._config.max_waiting_tokens, self._config.max_wait_s),
        )
        self._engine = self._make_engine(self._hub.deliver)
        self._health = Health((*SERVICES, self._served.name))
        self._door = Door(self._health, self._engine)
        self._watch = Watch(self._config.stall_limit_s)
        self._profiler = self.make_profiler()
        self._arrivals = Arrivals()
        self._turnstile = Turnstile(lambda is_slow: slow_connections(self._port, is_slow=is_slow))
        exposure.check(self._config, self._security)
        check_address(self._config)
        newest_turn = max((one.turn for one in self._restored), default=0)
        self._tenants = Tenants(newest_turn=newest_turn, line=self._served.line)
        self._gates = auth.gates(self._security, self._tenants, GATEWAY_SCOPES)
        self._fronts = [self._front(), *self._back()]
        self._credentials = tls.credentials(self._security)  # kept: gRPC asks it for certificates
        self._port = port = _bind(self._fronts[0], self._config, self._credentials)
        self._sight.open(self._engine.stats)
        for request in self._restored:
            self._hub.expect(request)
        self._engine.start(self._tell_end(loop))
        for server in self._fronts:
            await server.start()
        self._expiry = loop.call_later(self._config.resume_ttl_s, self._expire)
        self._looks = asyncio.create_task(self._look())
        return port

    async def set_serving(self, is_serving: bool) -> None:
        """Whether it is ready, as far as its owner can say."""
        self._door.open(is_serving)

    async def wait(self, stop: asyncio.Event) -> None:
        """Returns when `stop` is set; raises EngineFailed where the engine's thread ended."""
        waits = [asyncio.ensure_future(event.wait()) for event in (stop, self._over)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waits:
                one.cancel()
        self.check()

    def check(self) -> None:
        """Raises EngineFailed where the engine's thread ended by itself, or would not end."""
        if self._failure:
            raise EngineFailed(self._failure)

    async def stop(self, grace_s: float) -> None:
        """Refuses what is new, lets what runs finish within `grace_s`, ends the rest."""
        self._door.stop()
        self._turnstile.close()
        self._expiry.cancel()
        loop = asyncio.get_running_loop()
        end_s = loop.time() + grace_s
        if not await self._until_idle(grace_s):
            late = self._hub.live
            log.warning("%d requests were not done in %g s; they end now", len(late), grace_s)
        if not await asyncio.to_thread(self._engine.stop, STEP_GRACE_S):
            self._failure = f"the engine's thread hangs in a step, also after {STEP_GRACE_S:g} s"
            ends = [Output(name, (), (), "", FinishReason.CANCELLED) for name in self._hub.live]
            self._hub.deliver(ends)
        await self._until_idle(CLOSE_GRACE_S)
        await self._arrivals.quiet(QUIET_S, at_most_s=CLOSE_GRACE_S)
        self._looks.cancel()
        self._health.close()
        await self._profiler.close()
        grace_s = max(CLOSE_GRACE_S, end_s - loop.time())  # what has ended may still be read
        await asyncio.gather(*(server.stop(grace_s) for server in self._fronts))
        await asyncio.to_thread(self._sight.close)

    def _front(self) -> grpc.aio.Server:
        edge = service.Service(
            self._served,
            self._engine,
            self._hub,
            salt=self._config.prefix_salt,
            reader_limit_s=self._config.reader_limit_s,
            max_chat_messages=self._config.max_chat_messages,
            tenants=self._tenants,
        )
        gates = (self._turnstile, self._arrivals, *self._sight.interceptors, *self._gates)
        server = grpc.aio.server(interceptors=gates, options=_options(self._config))
        server.add_generic_rpc_handlers(edge.handlers())
        if GATEWAY is not None:
            gateway = GATEWAY.Gateway(self._served, self._engine, self._hub, edge, self._door)
            server.add_generic_rpc_handlers((gateway.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*SERVICES, HEALTH_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    def _back(self) -> Iterator[grpc.aio.Server]:
        """The operators' server, where there is one."""
        if not self._config.admin_port:
            return
        operators = Admin(
            self._served,
            self._engine,
            self._hub,
            self._door,
            self._watch,
            facts=self._facts,
            profiler=self._profiler,
            explain=self._explain,
        )
        server = grpc.aio.server(interceptors=self._gates, options=_options(self._config))
        server.add_generic_rpc_handlers((operators.handlers(),))
        reflection.enable_server_reflection((admin.NAME, reflection.SERVICE_NAME), server)
        _listen(server, ADMIN_HOST, self._config.admin_port, "server.admin_port", None)
        yield server

    def _tell_end(self, loop: asyncio.AbstractEventLoop) -> Callable[[Exception | None], None]:
        """What the engine's thread calls at its end."""

        def tell(error: Exception | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._ended, error)

        return tell

    def _ended(self, error: Exception | None) -> None:
        """The engine runs no more: an end of the server too, unless that is why it ended."""
        if error is None and self._door.is_stopping:
            return
        reason = "the log says why" if error is None else str(error) or type(error).__name__
        self._failure = f"the engine's thread ended: {reason}"
        self._door.fail()
        self._over.set()

    async def _look(self) -> None:
        """Keeps health in step with the engine's progress."""
        while True:
            await asyncio.sleep(LOOK_S)
            stalled_s = self._watch.stalled_s
            if not self._watch.look(self._engine.pulse):
                continue
            self._door.stall(self._watch.is_stalled)
            if not self._watch.is_stalled:
                log.warning("a step has ended after %.1f s; health says SERVING again", stalled_s)
                continue
            stats, live = self._engine.stats(), self._hub.live
            log.warning(
                "no step has ended for %.1f s (server.stall_limit_s) though there is work: %d "
                "running and %d waiting after the last one; live are %s%s; health says NOT_SERVING",
                self._watch.stalled_s,
                stats.num_running,
                stats.num_waiting,
                ", ".join(live[:MAX_NAMED]) or "none",
                f" and {len(live) - MAX_NAMED} more" if len(live) > MAX_NAMED else "",
            )

    def _expire(self) -> None:
        late = self._hub.expire()
        for request_id in late:
            self._engine.cancel(request_id)
        if late:
            ttl_s = self._config.resume_ttl_s
            log.warning("%d restored requests were not resumed in %g s; they end", len(late), ttl_s)

    async def _until_idle(self, timeout_s: float) -> bool:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        while self._hub.live and loop.time() < end_s:
            await asyncio.sleep(0.01)
        return not self._hub.live


async def serve(
    server: Server, config: ServerConfig, ready: Callable[[int], None], door: OpenAIDoor | None
) -> None:
    """What `run` does, of a server that is made."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    port = await server.start()
    try:
        await server.set_serving(True)
        ready(port)
        if door is not None:
            door.open([openai_door.worker_url(config.host, port)])
        await server.wait(stop)
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
        if door is not None:
            door.drain()
        await server.stop(config.drain_grace_s)
        if door is not None:
            await door.close()
    server.check()


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    limits = exposure.stream_limits(config)
    return [
        ("grpc.so_reuseport", 0),  # or two servers would share a port, and each its half
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),  # else a minute passes
        ("grpc.http2.min_ping_interval_without_data_ms", CLIENT_PING_MS),
        ("grpc.http2.max_ping_strikes", PING_STRIKES),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        ("grpc.server.max_pending_requests", MAX_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_PENDING),
        ("grpc.max_concurrent_streams", limits.max_streams),
        ("grpc.http.overload_protection", int(limits.refuses_resets)),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_connection_age_ms", CONNECTION_AGE_MS),
        ("grpc.max_connection_age_grace_ms", CONNECTION_GRACE_MS),
        ("grpc.max_connection_idle_ms", CONNECTION_IDLE_MS),
        ("grpc.http2.bdp_probe", 0),  # windows stay as small as they begin
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        ("grpc.http2.write_buffer_size", WINDOW_BYTES),
    ]


def _bind(
    server: grpc.aio.Server, config: ServerConfig, credentials: grpc.ServerCredentials | None
) -> int:
    return _listen(server, config.host, config.port, "server.port", credentials)


def _listen(
    server: grpc.aio.Server,
    host: str,
    port: int,
    key: str,
    credentials: grpc.ServerCredentials | None,
) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if credentials is not None:
            return server.add_secure_port(address, credentials)
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"can't listen on {host!r}, {key} = {port}: {error}") from None
