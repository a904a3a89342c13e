"""`jaxinfer top` and the dashboard: both say what a server's metrics say."""

import json
import re
import socket
import ssl
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import trustme
from rich.console import Console

from jaxinfer import cli
from jaxinfer.cli.top import Buckets, frame, parse
from jaxinfer.client import Client
from jaxinfer.edge_config import ServerConfig
from jaxinfer.server.metrics import Metrics, Scraped
from jaxinfer.server.timeline import StepCounts
from tests.server.serving import running_in_thread
from tests.server.test_metrics import free_port, scrape

DASHBOARD = Path(__file__).parents[1] / "deploy/grafana/jaxinfer.json"


def shown(group) -> str:
    console = Console(width=100)
    with console.capture() as kept:
        console.print(group)
    return kept.get()


@pytest.fixture(scope="module")
def served():
    port = free_port()
    with running_in_thread(config=ServerConfig(port=0, metrics_port=port)) as server:
        with Client(server.target) as client:
            for number in range(5):
                client.generate("x" * (number + 1), max_tokens=8)
        yield port, server


def test_one_frame_in_a_pipe(served, capsys):
    port, _ = served
    assert cli.run(["top", "--address", f"127.0.0.1:{port}", "--once"]) == 0
    out = capsys.readouterr().out
    assert "fake, since it began" in out
    rows = {line.strip().split("  ")[0]: line for line in out.splitlines()}
    assert rows["tokens out"].split()[-1] == "40" and rows["requests ended"].split()[-1] == "5"
    assert rows["first token"].split()[-1] == "5" and rows["between tokens"].split()[-1] == "35"
    assert "none" in rows["trouble"] and "\x1b" not in out


def test_over_tls_it_shows_who_asks_and_over_a_plain_wire_it_does_not(
    served, tmp_path, monkeypatch, capsys
):
    authority, shown_ = trustme.CA(), []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self):
            shown_.append((self.path, self.headers.get("Authorization")))
            body = scrape(served[0]).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("JAXINFER_TOKEN", "jxi_mine")
    trusted = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(trusted)
    with HTTPServer(("127.0.0.1", 0), Proxy) as plain, HTTPServer(("127.0.0.1", 0), Proxy) as tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        tls.socket = context.wrap_socket(tls.socket, server_side=True)
        for server in (plain, tls):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        asked = ["top", "--once", "--address"]
        assert cli.run([*asked, f"127.0.0.1:{plain.server_port}"]) == 0
        address = f"https://127.0.0.1:{tls.server_port}/metrics"
        assert cli.run([*asked, address]) != 0  # its authority is nobody's
        assert "certificate" in capsys.readouterr().err
        monkeypatch.setenv("JAXINFER_TLS_CA", str(trusted))
        assert cli.run([*asked, address]) == 0
        for server in (plain, tls):
            server.shutdown()
    assert shown_ == [("/metrics", None), ("/metrics", "Bearer jxi_mine")]


def test_two_scrapes_make_rates_and_recent_times():
    old = parse(TEXT.format(steps=100, some=4, every=4), at_s=10.0)
    new = parse(TEXT.format(steps=300, some=4, every=14), at_s=12.0)
    text = shown(frame(new, old))
    rows = {line.strip().split("  ")[0]: line for line in text.splitlines()}
    assert "100.0 /s" in rows["steps"] and "m, in 2.0 s" in text
    # All ten new values lie between 0.1 and 0.2 seconds.
    assert rows["first token"].split()[2:] == ["0.150", "0.190", "0.199", "10"]
    assert "2 of 8" in rows["slots"] and "25 of 100" in rows["pages"]
    again = parse(TEXT.format(steps=50, some=4, every=4), at_s=14.0)
    assert "25.0 /s" in shown(frame(again, new))  # the server began anew


TEXT = """\
jaxinfer_slots{{model="m"}} 8
jaxinfer_slots_used{{model="m"}} 2
jaxinfer_requests_waiting{{model="m"}} 0
jaxinfer_pages{{model="m"}} 100
jaxinfer_pages_free{{model="m"}} 75
jaxinfer_steps_total{{model="m"}} {steps}
# TYPE jaxinfer_time_to_first_token_seconds histogram
jaxinfer_time_to_first_token_seconds_bucket{{model="m",le="0.1"}} {some}
jaxinfer_time_to_first_token_seconds_bucket{{model="m",le="0.2"}} {every}
jaxinfer_time_to_first_token_seconds_bucket{{model="m",le="+Inf"}} {every}
"""


def test_percentiles_lie_in_their_bucket():
    buckets = Buckets((1.0, 2.0, float("inf")), (5.0, 10.0, 10.0))
    assert [buckets.percentile(share) for share in (0.25, 0.5, 0.9)] == [0.5, 1.0, 1.8]
    assert Buckets((1.0, float("inf")), (0.0, 4.0)).percentile(0.5) == 1.0
    assert Buckets((1.0, float("inf")), (0.0, 0.0)).percentile(0.5) is None


def test_who_does_not_answer_is_said(capsys):
    port = free_port()
    assert cli.run(["top", "--address", f"127.0.0.1:{port}", "--once"]) == 1
    assert "--server.metrics-port" in capsys.readouterr().err
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
    assert cli.run(["top", "--address", "not a port", "--once"]) == 1


def test_every_name_on_the_dashboard_is_in_a_scrape(served):
    port, server = served
    text = scrape(port)
    stats = server.engine.stats()
    told = Scraped(Metrics(()), lambda: stats, model="m", steps=StepCounts)
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line[0] != "#"}
    names |= {sample.name for family in told.collect() for sample in family.samples}
    board = DASHBOARD.read_text()
    used = set(re.findall(r"(?:jaxinfer_|vllm:)\w+", board))
    assert len(used) >= 20 and used <= names, sorted(used - names)
    panels = json.loads(board)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_example_for_prometheus_names_the_port_that_its_comment_does():
    text = DASHBOARD.parents[1].joinpath("prometheus.yml").read_text()
    assert len(set(re.findall(r"\b9\d{3}\b", text))) == 1
