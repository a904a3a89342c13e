"""`jaxinfer top`: what a server does now, on the terminal; reads its /metrics."""

import math
import ssl
import time
import urllib.error
import urllib.request
from collections import defaultdict
from http.client import HTTPException
from typing import Annotated, Any, NamedTuple

from cyclopts import Parameter
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jaxinfer.cli.console import console
from jaxinfer.config import access
from jaxinfer.errors import ClientError, Unreachable

TIMEOUT_S = 5.0
BAR_CELLS = 30
PREFIX = "jaxinfer_"
TIMES = {
    "time_to_first_token_seconds": "first token",
    "inter_token_latency_seconds": "between tokens",
    "queue_seconds": "in line",
    "request_seconds": "whole request",
}


class Buckets(NamedTuple):
    """A histogram: counts up to each bound."""

    bounds: tuple[float, ...]
    counts: tuple[float, ...]

    def percentile(self, share: float) -> float | None:
        """Where that share lies, taken as evenly spread in its bucket; None without values."""
        if not self.counts or not self.counts[-1]:
            return None
        wanted, below, low = share * self.counts[-1], 0.0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if count >= wanted and count > below:
                part = (wanted - below) / (count - below)
                return low if math.isinf(bound) else low + part * (bound - low)
            below, low = count, bound
        return low

    def since(self, before: "Buckets") -> "Buckets":
        """What came after another scrape."""
        if before.bounds != self.bounds:
            return self
        pairs = zip(self.counts, before.counts, strict=True)
        return Buckets(self.bounds, tuple(now - then for now, then in pairs))


class Scrape(NamedTuple):
    """One answer of /metrics; names are those without jaxinfer_."""

    at_s: float
    model: str
    values: dict[str, float]
    """Summed over labels, where there are more of them than the model."""
    buckets: dict[str, Buckets]


def top(
    *,
    address: str,
    every_s: Annotated[float, Parameter(name="--every")] = 1.0,
    once: bool = False,
) -> None:
    """Shows slots, pages, rates and times of a running server until Ctrl-C.

    Rates and times are those since the frame before; with --once, those since the server began.

    Parameters
    ----------
    address
        HOST:PORT of its metrics: server.host and server.metrics_port. With https:// before it, as
        of a proxy, JAXINFER_TOKEN, JAXINFER_TLS_CA, _CERT and _KEY say who asks.
    every_s
        Seconds between two frames.
    once
        Prints one frame and ends.
    """
    newest, out = scrape(address), console()
    if once:
        out.print(frame(newest, None))
        return
    with Live(frame(newest, None), console=out, auto_refresh=False) as live:
        while True:
            time.sleep(max(0.1, every_s))
            before, newest = newest, scrape(address)
            live.update(frame(newest, before), refresh=True)


def scrape(address: str) -> Scrape:
    """Asks a server; raises Unreachable where none answers, ClientError where it is another."""
    url = url_of(address)
    try:
        with _open(url) as answer:
            text = answer.read().decode()
    except (OSError, ValueError, HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise Unreachable(
            f"no metrics at {url}: {reason}; start the server with --server.metrics-port, and "
            "give --address HOST:METRICS_PORT"
        ) from None
    found = parse(text, at_s=time.monotonic())
    if "slots" not in found.values:
        raise ClientError(f"{url} answers, but not with the metrics of a jaxinfer server")
    return found


def url_of(address: str) -> str:
    """Where the metrics are; https where the address says so."""
    scheme = "https" if address.startswith("https://") else "http"
    place = address.removeprefix(f"{scheme}://").rstrip("/").removesuffix("/metrics")
    return f"{scheme}://{place}/metrics"


def _open(url: str) -> Any:
    """A proxy with TLS is shown who asks; over a plain wire the token stays here."""
    if not url.startswith("https://"):
        return urllib.request.urlopen(url, timeout=TIMEOUT_S)
    who = access()
    trusted = ssl.create_default_context(cafile=who.get("tls_ca"))
    if "tls_cert" in who:
        trusted.load_cert_chain(who["tls_cert"], who.get("tls_key"))
    headers = {"Authorization": f"Bearer {who['token']}"} if "token" in who else {}
    asked = urllib.request.Request(url, headers=headers)
    return urllib.request.urlopen(asked, timeout=TIMEOUT_S, context=trusted)


def parse(text: str, *, at_s: float) -> Scrape:
    """What a scrape's text says."""
    from prometheus_client.parser import text_string_to_metric_families

    values: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, dict[float, float]] = defaultdict(dict)
    model = ""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.startswith(PREFIX):
                continue
            name = sample.name.removeprefix(PREFIX)
            model = sample.labels.get("model", model)
            if "le" in sample.labels:
                counts[name.removesuffix("_bucket")][float(sample.labels["le"])] = sample.value
            else:
                values[name] += sample.value
    buckets = {name: Buckets(tuple(one), tuple(one.values())) for name, one in counts.items()}
    return Scrape(at_s, model, dict(values), buckets)


def frame(now: Scrape, before: Scrape | None) -> Group:
    """One picture of a server."""
    rows = Table.grid(padding=(0, 2))
    value = now.values
    used = value["pages"] - value["pages_free"]
    rows.add_row("slots", _bar(value["slots_used"], value["slots"]))
    rows.add_row("pages", _bar(used, value["pages"]))
    rows.add_row("waiting", f"{value['requests_waiting']:.0f}")
    for name, text in _rates(now, before).items():
        rows.add_row(name, text)
    times = Table("seconds", "p50", "p90", "p99", "count", box=None, padding=(0, 2))
    for column in times.columns[1:]:
        column.justify = "right"
    for name, called in TIMES.items():
        every = now.buckets.get(name, Buckets((), ()))
        recent = every if before is None else every.since(before.buckets.get(name, every))
        shares = [_seconds(recent.percentile(share)) for share in (0.5, 0.9, 0.99)]
        count = recent.counts[-1] if recent.counts else 0
        times.add_row(called, *shares, f"{count:.0f}")
    since = "since it began" if before is None else f"in {now.at_s - before.at_s:.1f} s"
    return Group(Text(f"{now.model}, {since}", style="bold"), rows, times)


def _rates(now: Scrape, before: Scrape | None) -> dict[str, str]:
    def grown(name: str) -> float:
        """A server that was started again counts from 0."""
        newest = now.values.get(f"{name}_total", 0.0)
        old = 0.0 if before is None else before.values.get(f"{name}_total", 0.0)
        return newest - old if newest >= old else newest

    def rate(name: str) -> str:
        if before is None:
            return f"{grown(name):.0f}"
        return f"{grown(name) / max(1e-9, now.at_s - before.at_s):.1f} /s"

    shown = {
        "steps": rate("steps"),
        "tokens out": rate("output_tokens"),
        "tokens in": rate("prefill_tokens"),
        "requests ended": rate("requests_finished"),
        "prefix hits": _share(grown("prefix_hit_tokens"), grown("prefix_queried_tokens")),
    }
    if "computed_tokens_total" in now.values:
        shown["padding"] = _share(
            grown("computed_tokens") - grown("useful_tokens"), grown("computed_tokens")
        )
        busy_s = grown("prefill_step_seconds") + grown("decode_step_seconds")
        shown["device idle for host"] = _share(
            grown("host_gap_seconds"), grown("host_gap_seconds") + busy_s
        )
    bad = {name: grown(name) for name in ("preemptions", "recoveries", "compiles_after_start")}
    shown["trouble"] = ", ".join(f"{n:.0f} {name}" for name, n in bad.items() if n) or "none"
    return shown


def _bar(used: float, there: float) -> str:
    filled = round(BAR_CELLS * used / there) if there else 0
    return f"{'█' * filled}{'·' * (BAR_CELLS - filled)} {used:.0f} of {there:.0f}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
