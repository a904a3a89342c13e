"""`jaxinfer cluster` as a process, and what it says."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).parents[2]
WAIT_S = 300.0
SERVING = health_pb2.HealthCheckResponse.SERVING


class Started:
    """A command that is running, its events, and the processes of its group."""

    def __init__(self, *options: str, cache: Path) -> None:
        environ = os.environ | {"JAX_PLATFORMS": "cpu", "JAXINFER_CACHE_DIR": str(cache)}
        environ.pop("XLA_FLAGS", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxinfer", "cluster", "--json", *options],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pids: dict[int, int] = {}
        """By rank, of the newest start."""
        self.ready: dict[int, int] = {}
        """Of these, those that have said so."""
        self._said: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def wait(self, event: str) -> dict[str, Any]:
        """The next event of this name; those before it are dropped."""
        while True:
            found = self._said.get(timeout=WAIT_S)
            assert found is not None, f"it ended before it said {event}"
            if found["event"] == event:
                return found

    def wait_for_others_than(self, before: dict[int, int], count: int = 0) -> None:
        """Until each rank is another process than before, and ready; a server is so sooner."""
        ends_s = time.monotonic() + WAIT_S
        while set(before.values()) & set(self.ready.values()) or len(self.ready) < (
            count or len(before)
        ):
            assert time.monotonic() < ends_s
            time.sleep(0.01)

    def stop(self) -> int:
        """Ends it as an operator does; returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                event = json.loads(line)
                if event["event"] == "rank" and event["pid"] is not None:
                    self.pids[event["rank"]] = event["pid"]
                    if event["said"] == "ready":
                        self.ready[event["rank"]] = event["pid"]
                self._said.put(event)
        self._said.put(None)


@contextmanager
def started(*options: str, cache: Path) -> Iterator[Started]:
    """A command until the end of the block."""
    made = Started(*options, cache=cache)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()


class Probe:
    """Health as a client asks for it."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target)
        self._stub = health_pb2_grpc.HealthStub(self._channel)

    def says(self, service: str) -> bool:
        """Whether it says SERVING of this name."""
        request = health_pb2.HealthCheckRequest(service=service)
        return self._stub.Check(request, timeout=10).status == SERVING

    def wait(self, service: str) -> float:
        """Seconds until it does."""
        began_s = time.monotonic()
        while not self.says(service):
            assert time.monotonic() < began_s + WAIT_S
            time.sleep(0.05)
        return time.monotonic() - began_s

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()
