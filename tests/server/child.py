"""A server with a fake engine in a process of its own, which says what it holds when asked."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from jaxinfer.edge_config import ServerConfig
from jaxinfer.server import event_loop, turnstile
from tests.server.serving import running

ROOT = Path(__file__).parents[2]


class Child:
    """The process, its address, and its own account of itself."""

    def __init__(self, process: "subprocess.Popen[str]", target: str) -> None:
        self.process = process
        self.target = target
        self.is_killed = False

    def kill(self) -> None:
        """Ends it as nothing else does: it has no last word."""
        self.is_killed = True
        self.process.kill()

    def report(self) -> "Report":
        """What it holds now."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        return Report(**json.loads(self.process.stdout.readline()))


class Report(NamedTuple):
    """What a server holds."""

    engine: int
    """Live requests of the engine."""
    hub: int
    """Requests with a mailbox."""
    line: int
    """Requests in line."""
    tasks: int
    """Of the event loop."""
    connections: int
    rss: int
    descriptors: int
    answers: int
    """Answers that are kept for who asks again."""
    leases: int
    """Requests that hold a part of a quota."""
    is_slowing: bool
    """Whether new connections are slowed down."""


@contextmanager
def child(*, step_s: float, hold_s: float = turnstile.HOLD_S, **config: Any) -> Iterator[Child]:
    """A server with these settings, until the end of the block; its exit must be clean.

    New connections are slow for `hold_s` after an abuse.
    """
    settings = json.dumps({"port": 0, **config})
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.server.child", str(step_s), str(hold_s), settings],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        made = Child(process, process.stdout.readline().strip())
        assert made.target, "the server did not start"
        yield made
        process.communicate(timeout=20)
        assert made.is_killed or process.returncode == 0
    finally:
        process.kill()
        process.communicate()


async def _serve(step_s: float, settings: dict[str, Any]) -> None:
    async with running(config=ServerConfig(**settings), step_s=step_s) as server:
        print(server.target, flush=True)
        me, hub = psutil.Process(os.getpid()), server.server._hub
        while await asyncio.to_thread(sys.stdin.readline):
            server.engine.forget()
            report = Report(
                engine=len(server.engine._live),
                hub=len(hub.live),
                line=len(hub.line._waiting),
                tasks=len(asyncio.all_tasks()),
                connections=len(me.net_connections()) - 1,
                rss=me.memory_info().rss,
                descriptors=me.num_fds(),
                answers=len(hub.answers),
                leases=server.server._tenants.num_live(""),
                is_slowing=server.server._turnstile.is_slowing,
            )
            print(json.dumps(report._asdict()), flush=True)


if __name__ == "__main__":
    turnstile.HOLD_S = float(sys.argv[2])
    event_loop.run(_serve(float(sys.argv[1]), json.loads(sys.argv[3])))
