"""A server is killed under load and started again: every stream goes on where it was cut."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest

from jaxinfer import demo
from jaxinfer.client import Client, Completed, channel
from jaxinfer.errors import Unreachable
from jaxinfer.host import segments
from jaxinfer.host.rehearsal import Rehearsal, compare
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import inference_pb2_grpc
from tests import cli_model
from tests.bits import world
from tests.server.child import child
from tests.server.serving import OWN, free_port

MODEL = replace(world.MODEL, vocab_size=256)
SETTINGS = """
[engine]
num_slots = 8
max_seq_len = 480
prefill_chunks = [8, 16, 32]
attention_block = 8
compute_dtype = "float32"
cache.page_size = 8
cache.num_pages = 200
[snapshot]
path = "{folder}/live.json"
interval_s = 0.02
[journal]
folder = "{folder}/journal"
"""
NUM_STREAMS = 10
RESUME_S = 120.0


class Streams(threading.Thread):
    """Clients that ask at once, and know what they should get."""

    def __init__(self, target: str, requests: list[dict]) -> None:
        super().__init__(daemon=True)
        self.counts = [0] * len(requests)
        self.completions = [None] * len(requests)
        self.texts = [""] * len(requests)
        self.enough = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(at, target, request), daemon=True)
            for at, request in enumerate(requests)
        ]

    def run(self) -> None:
        for reader in self._readers:
            reader.start()
        for reader in self._readers:
            reader.join()

    def wait_for(self, count: int) -> None:
        """Returns as soon as so many tokens have come, over all streams."""
        with self.enough:
            assert self.enough.wait_for(lambda: sum(self.counts) >= count, timeout=120)

    def _read(self, at: int, target: str, request: dict) -> None:
        with Client(target) as client:
            for event in client.stream(resume_s=RESUME_S, **request):
                if isinstance(event, Completed):
                    self.completions[at] = event.completion
                    continue
                with self.enough:
                    self.counts[at] += len(event.token_ids)
                    self.texts[at] += event.text
                    self.enough.notify_all()


def requests_of(rng: random.Random) -> list[dict]:
    return [
        {
            "token_ids": [rng.randrange(1, 256) for _ in range(rng.randint(1, 120))],
            "temperature": rng.choice([0.0, 0.8]),
            "seed": rng.randrange(2**64),
            "max_tokens": rng.randint(150, 300),
            "ignore_eos": True,
            "logprobs": True,
        }
        for _ in range(NUM_STREAMS)
    ]


def start(arguments, port: int) -> tuple[subprocess.Popen, dict]:
    options = (*arguments, "--server.port", str(port), "--json")
    command = [sys.executable, "-m", "jaxinfer", "serve", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, demo._event(process, "ready")


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()


def run(folder, *, num_kills: int, seed: int) -> int:
    """Kills and starts again as often as asked; returns how many streams were cut."""
    cli_model.save(folder, MODEL, SETTINGS.format(folder=folder))
    arguments = ("-m", str(folder / "tiny"), "-c", str(folder / "tiny.toml"))
    rng = random.Random(seed)
    process, ready = start(arguments, 0)
    num_cut = num_restored = 0
    try:
        for _ in range(num_kills):
            requests = requests_of(rng)
            with Client(ready["target"]) as client:
                whole = [client.generate(**request) for request in requests]
            streams = Streams(ready["target"], requests)
            streams.start()
            streams.wait_for(rng.randrange(1, 150 * NUM_STREAMS))
            kill(process)
            num_cut += sum(completion is None for completion in streams.completions)
            process, ready = start(arguments, ready["port"])
            num_restored += ready["num_restored"]
            streams.join(RESUME_S)
            for wanted, got, text in zip(whole, streams.completions, streams.texts, strict=True):
                assert got is not None, "a stream did not come back"
                assert got.token_ids == wanted.token_ids
                assert got.logprobs == wanted.logprobs
                assert text == got.text == wanted.text
                assert got.finish_reason == wanted.finish_reason
    finally:
        kill(process)
    assert num_restored >= num_kills, "the snapshots brought nothing back"
    return num_cut


def test_every_stream_goes_on_exactly(tmp_path):
    assert run(tmp_path, num_kills=2, seed=1) >= 2
    paths = segments.segments(tmp_path / "journal")
    assert len(paths) == 3
    for path in paths:  # what a killed process has written runs again, too
        segment = segments.read(path)
        rehearsal = Rehearsal(segment)
        assert segment.records
        for record in segment.records:
            assert compare(record, rehearsal.step(record)) is None


@pytest.mark.full
def test_fifty_kills(tmp_path):
    assert run(tmp_path, num_kills=50, seed=2) >= 100


class Call(threading.Thread):
    """One call that is live when the server dies: how it ends, and when."""

    def __init__(self, target: str, *, streams: bool) -> None:
        super().__init__(daemon=True)
        self.began = threading.Event()
        self.code: grpc.StatusCode | None = None
        self.ended_s = 0.0
        self._target = target
        self._streams = streams
        self.start()

    def run(self) -> None:
        with grpc.insecure_channel(self._target, options=OWN) as wire:
            stub = inference_pb2_grpc.InferenceServiceStub(wire)
            fields: dict[str, Any] = {"text": "a", "stopping": {"max_tokens": 480}}
            try:
                if self._streams:
                    for _ in stub.GenerateStream(pb.GenerateStreamRequest(**fields)):
                        self.began.set()
                else:
                    call = stub.Generate.future(pb.GenerateRequest(**fields))
                    self.began.set()
                    call.result()
            except grpc.RpcError as error:
                self.ended_s, self.code = time.monotonic(), error.code()


def kill_and_see(count: int) -> float:
    """Kills so many servers on one port, each under load; the slowest error in seconds."""
    port, slowest_s = free_port(), 0.0
    for number in range(count):
        with child(step_s=0.02, port=port) as server:
            calls = [Call(server.target, streams=at % 3 > 0) for at in range(12)]
            for call in calls:
                assert call.began.wait(30)
            while server.report().engine < len(calls):
                time.sleep(0.01)
            time.sleep(0.01 * (number % 5))
            killed_s = time.monotonic()
            server.kill()
            for call in calls:
                call.join(30)
                assert call.code is grpc.StatusCode.UNAVAILABLE, call.code
            slowest_s = max(slowest_s, *(call.ended_s - killed_s for call in calls))
    return slowest_s


def test_every_live_call_of_a_killed_server_is_unavailable_and_the_next_one_starts_there():
    assert kill_and_see(2) <= 10  # the machine may be busy with other tests


@pytest.mark.full
def test_what_the_clients_of_fifty_killed_servers_see():
    slowest_s = kill_and_see(50)
    print(f"50 kills, 600 live calls: all UNAVAILABLE, the slowest after {1e3 * slowest_s:.0f} ms")
    assert slowest_s <= 1.0


@contextmanager
def silent(pid: int):
    """A process that does nothing while its kernel keeps its connections."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield time.monotonic()
    finally:
        os.kill(pid, signal.SIGCONT)


def seconds_until_unreachable() -> float:
    """From the moment in which a server falls silent in the middle of a stream."""
    with child(step_s=0.05) as server, Client(server.target) as client:
        events = client.stream("a", max_tokens=400)
        next(events)
        with silent(server.process.pid) as since_s:
            with pytest.raises(Unreachable) as caught:
                list(events)
            found_s = time.monotonic() - since_s
        assert caught.value.code == "UNAVAILABLE"
    return found_s


def test_a_server_that_falls_silent_is_unreachable_after_its_clients_next_ping(monkeypatch):
    sooner = {"grpc.keepalive_time_ms": 500, "grpc.keepalive_timeout_ms": 500}
    sooner |= {"grpc.http2.ping_timeout_ms": 500}
    options = tuple((name, sooner.get(name, value)) for name, value in channel.CHANNEL_OPTIONS)
    assert sooner.keys() <= dict(channel.CHANNEL_OPTIONS).keys()
    monkeypatch.setattr(channel, "CHANNEL_OPTIONS", options)
    assert seconds_until_unreachable() <= 15  # 1 s; gRPC's own limit is a minute


@pytest.mark.full
def test_how_long_a_silent_server_is_believed():
    found_s = seconds_until_unreachable()
    print(f"a server that falls silent: UNAVAILABLE after {found_s:.1f} s")
    assert 19 <= found_s <= 35
