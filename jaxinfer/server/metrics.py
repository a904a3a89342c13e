"""What Prometheus scrapes: names `jaxinfer_*`, and the `vllm:` ones that boards and routers know.

Nothing here runs once a token. The event loop notes each output when it is delivered, in plain
numbers; families are made of them, and of the engine's own counts, when somebody scrapes.
"""

import bisect
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from functools import partial
from typing import Any, NamedTuple

import grpc
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

from jaxinfer.errors import ConfigError
from jaxinfer.host.request import UNFINISHED, EngineStats, FinishReason, Output
from jaxinfer.server.status import HEARD
from jaxinfer.server.timeline import StepCounts

TOKEN_TIMES = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
    0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
WAIT_TIMES = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
REQUEST_TIMES = (
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0,
)  # fmt: skip
TOKEN_COUNTS = tuple(float(mantissa * 10**power) for power in range(6) for mantissa in (1, 2, 5))
VLLM_REASONS = {
    FinishReason.EOS: "stop",
    FinishReason.STOP_TOKEN: "stop",
    FinishReason.STOP_STRING: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.DEADLINE: "abort",
    FinishReason.ERROR: "error",
}
OTHER_METHOD = "other"


class Histogram:
    """Counts by bucket, without a lock: one thread writes, and a scrape copies the counts first."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float | int) -> None:
        """One value; a bucket holds those up to its bound."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def buckets(self) -> tuple[list[tuple[str, int]], float]:
        """What HistogramMetricFamily takes: counts up to each bound, and the sum."""
        counts, total = list(self._counts), 0
        found: list[tuple[str, int]] = []
        for bound, count in zip((*self._bounds, float("inf")), counts, strict=True):
            total += count
            found.append((floatToGoString(bound), total))
        return found, self._sum


class Times(NamedTuple):
    """Histograms of requests, all in seconds or tokens."""

    ttft: Histogram
    itl: Histogram
    tpot: Histogram
    queue: Histogram
    prefill: Histogram
    decode: Histogram
    inference: Histogram
    e2e: Histogram
    prompt: Histogram
    output: Histogram


class Metrics:
    """A hub's observer, and the numbers of one server."""

    def __init__(self, methods: Iterable[str], *, clock: Callable[[], float] = time.monotonic):
        """`methods` are the gRPC methods that get a label of their own."""
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.reasons: Counter[FinishReason] = Counter(dict.fromkeys(FinishReason, 0))
        self.calls: Counter[tuple[str, str]] = Counter()
        spans = (WAIT_TIMES, TOKEN_TIMES, TOKEN_TIMES, WAIT_TIMES, WAIT_TIMES)
        bounds = (*spans, *[REQUEST_TIMES] * 3, *[TOKEN_COUNTS] * 2)
        self.times = Times(*map(Histogram, bounds))
        self._methods = frozenset(methods)
        self._clock = clock
        self._told_s: dict[str, float] = {}  # request -> when it got its last token

    def delivered(self, outputs: list[Output], cancelled: Set[str]) -> None:
        """The outputs of one step went out; on the event loop's thread."""
        now_s, told_s, times = self._clock(), self._told_s, self.times
        for output in outputs:
            if output.token_ids:
                before_s = told_s.get(output.request_id)
                if before_s is not None:
                    times.itl.observe(now_s - before_s)
                else:
                    self._first(output)
                told_s[output.request_id] = now_s
                self.num_output_tokens += len(output.token_ids)
            if output.finish_reason is not None:
                told_s.pop(output.request_id, None)
                self._ended(output, output.finish_reason)

    def call_ended(self, method: str, code: str) -> None:
        """A gRPC call is over."""
        self.calls[method if method in self._methods else OTHER_METHOD, code] += 1

    def _first(self, output: Output) -> None:
        timings = output.timings
        self.num_prompt_tokens += output.num_prompt_tokens
        if timings.first_token_s is not None:
            self.times.ttft.observe(timings.first_token_s - timings.arrived_s)
        if timings.scheduled_s is not None:
            self.times.queue.observe(timings.scheduled_s - timings.arrived_s)

    def _ended(self, output: Output, reason: FinishReason) -> None:
        timings, times = output.timings, self.times
        self.reasons[reason] += 1
        first_s, end_s = timings.first_token_s, timings.finished_s
        if first_s is None or end_s is None:
            return
        times.e2e.observe(end_s - timings.arrived_s)
        times.decode.observe(end_s - first_s)
        if timings.scheduled_s is not None:
            times.prefill.observe(first_s - timings.scheduled_s)
            times.inference.observe(end_s - timings.scheduled_s)
        times.prompt.observe(output.num_prompt_tokens)
        times.output.observe(output.num_output_tokens)
        if output.num_output_tokens > 1 and reason not in UNFINISHED:
            times.tpot.observe((end_s - first_s) / (output.num_output_tokens - 1))


class Listener(grpc.aio.ServerInterceptor):
    """Has the status of every call told; the first of a server's interceptors."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """The handler as it is; it tells through a variable of the call's own task."""
        HEARD.set(partial(self._metrics.call_ended, handler_call_details.method))
        return await continuation(handler_call_details)


class Scraped:
    """A collector: makes the families of one scrape."""

    def __init__(
        self,
        metrics: Metrics,
        stats: Callable[[], EngineStats],
        *,
        model: str,
        steps: Callable[[], StepCounts] | None = None,
        num_dropped_lines: Callable[[], int] = lambda: 0,
    ) -> None:
        self._metrics = metrics
        self._stats = stats
        self._model = model
        self._steps = steps
        self._num_dropped_lines = num_dropped_lines

    def collect(self) -> Iterator[Metric]:
        """On the thread of the scrape."""
        stats = self._stats()
        yield from self._ours(stats)
        yield from self._vllm(stats)

    def _ours(self, stats: EngineStats) -> Iterator[Metric]:
        make = partial(_family, prefix="jaxinfer_", labels={"model": self._model})
        metrics, times = self._metrics, self._metrics.times
        gauges = {
            "slots": ("Sequences that can decode at once.", stats.num_slots),
            "slots_used": ("Sequences that hold a slot.", stats.num_running),
            "requests_waiting": ("Requests in line for a slot.", stats.num_waiting),
            "pages": ("Pages of the cache.", stats.num_pages),
            "pages_free": (
                "Pages that can be had, cached prefixes included.",
                stats.num_free_pages,
            ),
            "pages_peak": ("Most pages that were owned at once.", stats.peak_pages_used),
            "programs": ("Programs that serving runs.", stats.num_programs),
        }
        for name, (text, value) in gauges.items():
            yield make(GaugeMetricFamily, name, text, value)
        counters: dict[str, tuple[str, float | int]] = {
            "steps": ("Steps of the engine.", stats.num_steps),
            "prompt_tokens": (
                "Prompt tokens of requests that got a token.",
                metrics.num_prompt_tokens,
            ),
            "output_tokens": ("Tokens that were delivered.", metrics.num_output_tokens),
            "prefill_tokens": ("Tokens that were prefilled.", stats.num_prefill_tokens),
            "prefix_queried_tokens": ("Looked up in the prefix cache.", stats.num_queried_tokens),
            "prefix_hit_tokens": ("Of these, found.", stats.num_cached_tokens),
            "evicted_pages": ("Cached pages that made room.", stats.num_evicted_pages),
            "preemptions": ("Requests that gave their pages away.", stats.num_preemptions),
            "recoveries": ("Steps that failed on the device.", stats.num_recoveries),
            "compiles_after_start": ("Should stay 0.", stats.num_compiles_after_start),
            "host_seconds": ("Processor time of the engine's thread.", stats.host_s),
            "dispatch_seconds": ("The same, in JAX's calls.", stats.dispatch_s),
            "wait_seconds": ("The host waited for the device.", stats.wait_s),
            "log_lines_dropped": ("Of the request log.", self._num_dropped_lines()),
            **_step_counters(self._steps),
        }
        for name, (text, value) in counters.items():
            yield make(CounterMetricFamily, name, text, value)
        histograms = {
            "time_to_first_token_seconds": ("Arrival to first token.", times.ttft),
            "inter_token_latency_seconds": ("Between two deliveries.", times.itl),
            "time_per_output_token_seconds": ("Mean of a request, first one left out.", times.tpot),
            "queue_seconds": ("Arrival to slot.", times.queue),
            "request_seconds": ("Arrival to end.", times.e2e),
            "request_prompt_tokens": ("Of requests that ended.", times.prompt),
            "request_output_tokens": ("Of requests that ended.", times.output),
        }
        for name, (text, histogram) in histograms.items():
            yield make(HistogramMetricFamily, name, text, histogram)
        ends = make(CounterMetricFamily, "requests_finished", "By reason.", None, more=("reason",))
        for reason, count in metrics.reasons.items():
            ends.add_metric([self._model, reason.value], count)
        yield ends
        calls = make(CounterMetricFamily, "calls", "gRPC calls.", None, more=("method", "code"))
        for (method, code), count in sorted(metrics.calls.items()):
            calls.add_metric([self._model, method, code], count)
        yield calls

    def _vllm(self, stats: EngineStats) -> Iterator[Metric]:
        make = partial(_family, prefix="vllm:", labels={"model_name": self._model, "engine": "0"})
        metrics, times = self._metrics, self._metrics.times
        used = (stats.num_pages - stats.num_free_pages) / max(1, stats.num_pages)
        for name, value in {
            "num_requests_running": stats.num_running,
            "num_requests_waiting": stats.num_waiting,
            "kv_cache_usage_perc": used,
            "gpu_cache_usage_perc": used,  # its older name, which some routers still ask for
        }.items():
            yield make(GaugeMetricFamily, name, f"As vllm:{name}.", value)
        for name, value in {
            "prompt_tokens": metrics.num_prompt_tokens,
            "generation_tokens": metrics.num_output_tokens,
            "num_preemptions": stats.num_preemptions,
            "prefix_cache_queries": stats.num_queried_tokens,
            "prefix_cache_hits": stats.num_cached_tokens,
        }.items():
            yield make(CounterMetricFamily, name, f"As vllm:{name}.", value)
        for name, histogram in {
            "time_to_first_token_seconds": times.ttft,
            "inter_token_latency_seconds": times.itl,
            "time_per_output_token_seconds": times.itl,  # the older name of the one above
            "request_time_per_output_token_seconds": times.tpot,
            "e2e_request_latency_seconds": times.e2e,
            "request_queue_time_seconds": times.queue,
            "request_prefill_time_seconds": times.prefill,
            "request_decode_time_seconds": times.decode,
            "request_inference_time_seconds": times.inference,
            "request_prompt_tokens": times.prompt,
            "request_generation_tokens": times.output,
        }.items():
            yield make(HistogramMetricFamily, name, f"As vllm:{name}.", histogram)
        success = make(
            CounterMetricFamily, "request_success", "By reason.", None, more=("finished_reason",)
        )
        for reason in dict.fromkeys(VLLM_REASONS.values()):
            count = sum(metrics.reasons[one] for one, its in VLLM_REASONS.items() if its == reason)
            success.add_metric([self._model, "0", reason], count)
        yield success


def serve(collector: Scraped, host: str, port: int) -> Callable[[], None]:
    """Answers scrapes on threads of its own; returns what ends it. Raises ConfigError."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ConfigError(
            f"can't listen on server.host = {host!r}, server.metrics_port = {port}: "
            f"{error.strerror}; set it to another port, or to 0 for no metrics"
        ) from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


def _step_counters(counts: Callable[[], StepCounts] | None) -> dict[str, tuple[str, float | int]]:
    if counts is None:
        return {}
    steps = counts()
    return {
        "prefill_steps": ("Steps with a chunk in them.", steps.num_prefill_steps),
        "prefill_step_seconds": ("What these took.", steps.prefill_s),
        "decode_step_seconds": ("What all others took.", steps.decode_s),
        "useful_tokens": ("Tokens that steps were for.", steps.num_useful_tokens),
        "computed_tokens": ("The same with all padding.", steps.num_computed_tokens),
        "host_gap_seconds": ("With work there, and no step under way.", steps.gap_s),
    }


def _family(
    kind: Any,
    name: str,
    text: str,
    value: float | int | Histogram | None,
    *,
    prefix: str,
    labels: dict[str, str],
    more: tuple[str, ...] = (),
) -> Any:
    """A family with one value, or with none yet."""
    family = kind(prefix + name, text, labels=[*labels, *more])
    if isinstance(value, Histogram):
        buckets, total = value.buckets()
        family.add_metric(list(labels.values()), buckets, total)
    elif value is not None:
        family.add_metric(list(labels.values()), value)
    return family
