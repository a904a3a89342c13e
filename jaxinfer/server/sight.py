"""What is seen of a server while it runs: numbers for Prometheus, a line and a span a request."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

import grpc

from jaxinfer.edge_config import ServerConfig
from jaxinfer.errors import ConfigError
from jaxinfer.host.request import EngineStats
from jaxinfer.server import metrics, request_log, service
from jaxinfer.server.admin import Explain
from jaxinfer.server.hub import Observer
from jaxinfer.server.timeline import StepCounts
from jaxinfer.v1 import inference_pb2, model_pb2

if TYPE_CHECKING:
    from jaxinfer.server.spans import Spans

OTEL_PACKAGES = (
    *("opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter"),
    "opentelemetry.exporter.otlp",
)
FILES = (inference_pb2.DESCRIPTOR, model_pb2.DESCRIPTOR)
METHODS = tuple(
    f"/{one.full_name}/{method.name}"
    for file in FILES
    for one in file.services_by_name.values()
    for method in one.methods
    if one.full_name in service.NAMES
)


class Sight:
    """As `server.metrics_port` and `server.request_log` ask for; one that asks for none is free."""

    def __init__(
        self,
        model: str,
        config: ServerConfig,
        *,
        has_tenants: bool = False,
        steps: Callable[[], StepCounts] | None = None,
        explain: Explain | None = None,
    ) -> None:
        """Opens the request log; ConfigError where it can't be written."""
        check(config)
        self._spans = self._open_spans(model, explain, has_tenants) if config.otel else None
        self.numbers = metrics.Metrics(METHODS) if config.metrics_port else None
        self._log = request_log.open_log(config.request_log, has_tenants=has_tenants)
        self._model = model
        self._config = config
        self._steps = steps
        self._stop: Callable[[], None] = lambda: None

    @property
    def observers(self) -> list[Observer]:
        """What the hub tells of each step."""
        return [one for one in (self.numbers, self._log, self._spans) if one is not None]

    @property
    def interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        """The first ones of the server, so that refusals are seen too."""
        listener = None if self.numbers is None else metrics.Listener(self.numbers)
        return [one for one in (listener, self._spans) if one is not None]

    def open(self, stats: Callable[[], EngineStats]) -> None:
        """Takes the port; ConfigError where it can't be had."""
        if self.numbers is None:
            return
        log = self._log
        scraped = metrics.Scraped(
            self.numbers,
            stats,
            model=self._model,
            steps=self._steps,
            num_dropped_lines=lambda: 0 if log is None else log.num_dropped,
        )
        self._stop = metrics.serve(scraped, self._config.host, self._config.metrics_port)

    def close(self) -> None:
        """Ends scrapes, and writes the last lines and spans; waits for all of it."""
        self._stop()
        if self._spans is not None:
            self._spans.close()
        if self._log is not None:
            self._log.close()

    def _open_spans(self, model: str, explain: Explain | None, has_tenants: bool) -> "Spans":
        from jaxinfer.server.spans import (
            open_spans,
        )  # a second of imports that others can do without

        return open_spans(model, explain=explain, has_tenants=has_tenants)


def check(config: ServerConfig) -> None:
    """Raises ConfigError where what it asks for is not installed; before any other work."""
    if not config.otel:
        return
    for name in OTEL_PACKAGES:  # each is inside of one before it
        if find_spec(name) is None:
            raise ConfigError(
                f"server.otel needs {name}, which is not installed; run: pip install "
                "'jaxinfer[otel]'"
            )
