"""What the gRPC edge costs: streams through the real server, from an engine without a model.

The server is a process of its own, and so is this one, which reads as fast as gRPC for Python can.
"""

import asyncio
import json
import statistics
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import grpc
from rich.table import Table

from jaxinfer.bench import stand_in
from jaxinfer.bench.stand_in import Marks
from jaxinfer.errors import ClientError
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import inference_pb2_grpc

Show = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Load:
    """What is asked of the server."""

    streams: int = 64
    step_s: float = 0.001
    """Of the engine; each stream gets a token a step."""
    tokens: int = 512
    """Of one answer; a stream that is done is asked again."""
    seconds: float = 5.0
    warm_s: float = 1.0


@dataclass(frozen=True)
class Round:
    """One server process, measured once it is warm."""

    tokens_per_s: float
    """That the client got."""
    messages_per_s: float
    """Deltas that the client got."""
    made_per_s: float
    """Tokens that the engine made meanwhile."""
    server_us_per_token: float
    """Processor time of the server process, its engine's thread included."""
    server_us_per_message: float
    server_cores: float
    client_cores: float
    gap_p50_ms: float
    """Between two deltas of a stream, as the client sees them."""
    gap_p99_ms: float


@dataclass(frozen=True)
class Report:
    """Everything of one run."""

    load: Load
    engine_tokens_per_s: float
    """Of the engine alone: no figure here may come near it."""
    rounds: tuple[Round, ...]

    @property
    def tokens_per_s(self) -> float:
        """The median."""
        return statistics.median(one.tokens_per_s for one in self.rounds)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "tokens_per_s": self.tokens_per_s}


class Counts:
    """What all streams got."""

    def __init__(self) -> None:
        self.num_tokens = self.num_messages = 0
        self.gaps_s: list[float] = []

    def clear(self) -> None:
        """Begins anew."""
        self.num_tokens = self.num_messages = 0
        self.gaps_s = []


def measure(
    load: Load, *, rounds: int = 3, progress: Show = lambda stage, done, total: None
) -> Report:
    """A server process for each round."""
    alone = stand_in.alone_tokens_per_s(load.streams)
    found = []
    for number in range(rounds):
        found.append(asyncio.run(_round(load)))
        progress("measure", number + 1, rounds)
    return Report(load, alone, tuple(found))


def table(report: Report) -> Table:
    """One row a round."""
    load = report.load
    title = (
        f"{load.streams} streams, a token each every {1e3 * load.step_s:g} ms; the engine alone "
        f"makes {report.engine_tokens_per_s:,.0f} tokens/s"
    )
    names = (
        "round",
        "tokens/s",
        "messages/s",
        "made/s",
        "us/token",
        "us/message",
        "cores",
        "client cores",
        "gap p50 ms",
        "p99",
    )
    found = Table(*names, title=title, title_justify="left")
    for column in found.columns:
        column.justify = "right"
    for number, one in enumerate(report.rounds, start=1):
        found.add_row(
            str(number),
            *(f"{value:,.0f}" for value in (one.tokens_per_s, one.messages_per_s, one.made_per_s)),
            *(f"{value:.1f}" for value in (one.server_us_per_token, one.server_us_per_message)),
            *(f"{value:.2f}" for value in (one.server_cores, one.client_cores)),
            *(f"{value:.1f}" for value in (one.gap_p50_ms, one.gap_p99_ms)),
        )
    return found


async def _round(load: Load) -> Round:
    command = (sys.executable, "-m", stand_in.__name__, str(load.step_s))
    child = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    assert child.stdin is not None and child.stdout is not None
    try:
        said = (await child.stdout.readline()).decode().strip()
        if not said.isdigit():
            raise ClientError("the server of this measurement did not start; it says why above")
        port = int(said)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as wire:
            return await _measured(load, child, inference_pb2_grpc.InferenceServiceStub(wire))
    finally:
        child.stdin.close()
        await child.wait()


async def _measured(load: Load, child: Process, stub: Any) -> Round:
    counts = Counts()
    streams = [
        asyncio.create_task(_stream(stub, counts, number, load.tokens))
        for number in range(load.streams)
    ]
    await _sleep(streams, load.warm_s)
    counts.clear()
    before, cpu_s = await _marks(child), time.process_time()
    await _sleep(streams, load.seconds)
    after, cpu_s = await _marks(child), time.process_time() - cpu_s
    num_tokens, num_messages = counts.num_tokens, counts.num_messages
    for one in streams:
        one.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    seconds, server_s = after.wall_s - before.wall_s, after.cpu_s - before.cpu_s
    if len(counts.gaps_s) < 2:
        raise ClientError(f"nothing came within {load.seconds:g} s; count longer")
    gaps = statistics.quantiles(counts.gaps_s, n=100)
    return Round(
        tokens_per_s=num_tokens / seconds,
        messages_per_s=num_messages / seconds,
        made_per_s=(after.num_tokens - before.num_tokens) / seconds,
        server_us_per_token=1e6 * server_s / num_tokens,
        server_us_per_message=1e6 * server_s / num_messages,
        server_cores=server_s / seconds,
        client_cores=cpu_s / seconds,
        gap_p50_ms=1e3 * gaps[49],
        gap_p99_ms=1e3 * gaps[98],
    )


async def _sleep(streams: list[asyncio.Task[None]], seconds: float) -> None:
    """Raises what ended a stream, where one ended."""
    done, _ = await asyncio.wait(streams, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for one in done:
        one.result()


async def _stream(stub: Any, counts: Counts, number: int, num_tokens: int) -> None:
    message = pb.GenerateStreamRequest(
        text=f"stream {number}",
        sampling={"seed": number},
        stopping={"max_tokens": num_tokens},
        output={"text": True, "token_ids": True},
    )
    while True:
        num_got, last_s = 0, 0.0
        async for event in stub.GenerateStream(message):
            num_new = len(event.delta.token_ids)
            if num_new:
                now_s = time.perf_counter()
                if num_got:
                    counts.gaps_s.append(now_s - last_s)
                last_s = now_s
                num_got += num_new
                counts.num_tokens += num_new
                counts.num_messages += 1
        if num_got != num_tokens:
            raise ClientError(f"a stream brought {num_got} tokens and should have {num_tokens}")


async def _marks(child: Process) -> Marks:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(b"\n")
    await child.stdin.drain()
    return Marks(*json.loads(await child.stdout.readline()))
