"""A server is killed under load and started again: every stream goes on where it was cut."""

import random
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from jaxinfer import demo
from jaxinfer.client import Client, Completed
from jaxinfer.host import segments
from jaxinfer.host.rehearsal import Rehearsal, compare
from tests import cli_model
from tests.bits import world

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
