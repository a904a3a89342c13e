"""A server with a fake engine of some slots, alone in its process, so that it alone is measured."""

import asyncio
import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

from jaxinfer.edge_config import ServerConfig
from tests.server.fake_engine import FakeEngine
from tests.server.serving import running

ROOT = Path(__file__).parents[2]
SLOTS = 8


class Slots(FakeEngine):
    """A fake engine with so many slots; the others wait, and the line is bounded."""

    def _advance(self, sequence):
        first = list(self._live.values())[:SLOTS]
        if sequence in first or sequence.is_cancelled:
            return super()._advance(sequence)
        return None


class Apart(NamedTuple):
    """The process of a server, and its address."""

    process: psutil.Process
    target: str

    @property
    def rss_mb(self) -> float:
        """What it holds of the machine's memory."""
        return self.process.memory_info().rss / 2**20


@contextmanager
def apart(*, step_s: float, max_live: int = 0, **config) -> Iterator[Apart]:
    """A server until the end of the block, where its exit must be clean; 0: nobody waits."""
    settings = json.dumps({"port": 0, **config})
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.server.apart", str(step_s), str(max_live), settings],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield Apart(psutil.Process(process.pid), process.stdout.readline().strip())
        process.communicate(timeout=30)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


async def _serve(step_s: float, max_live: int, config: ServerConfig) -> None:
    dials = {"kind": Slots, "max_live": max_live} if max_live else {}
    async with running(config=config, step_s=step_s, **dials) as server:
        gc.collect()
        gc.freeze()  # as `jaxinfer serve` does once its model is loaded
        print(server.target, flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            continue


if __name__ == "__main__":
    settings = ServerConfig(**json.loads(sys.argv[3]))
    asyncio.run(_serve(float(sys.argv[1]), int(sys.argv[2]), settings))
