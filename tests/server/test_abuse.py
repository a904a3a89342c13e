"""HTTP/2 abuse beside clients that behave: they get their answers, and nothing stays behind."""

import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable
from typing import NamedTuple

import grpc
import pytest

from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import inference_pb2_grpc
from tests.server import abuse
from tests.server.child import ROOT, Child, Report, child
from tests.server.fake_engine import expected_text
from tests.server.serving import OWN, until

TOKENS = 20
GROWTH_MIB = 256  # of the server, over all abuses together; most of it are malloc's free lists
STRANGERS = {"max_streams": 128, "refuse_resets": "on"}  # as where other machines connect
SHORT_S = 0.2
PHASE_S = 1.0
NUM_PHASES = 2
SPIN = "import sys, time\nend = time.time() + float(sys.argv[1])\nwhile time.time() < end: pass"


class Times(NamedTuple):
    """What one client saw of one stream, in seconds."""

    first: float
    gaps: list[float]
    whole: float


async def well_behaved(target: str, end: asyncio.Event) -> list[Times]:
    """Streams one after another on a connection of its own; each must be exactly right."""
    found = []
    message = pb.GenerateStreamRequest(
        text="by", sampling={"seed": 0}, stopping={"max_tokens": TOKENS}
    )
    async with grpc.aio.insecure_channel(target, options=OWN) as wire:
        stub = inference_pb2_grpc.InferenceServiceStub(wire)
        while not end.is_set():
            marks, text = [time.perf_counter()], ""
            async for event in stub.GenerateStream(message):
                if event.HasField("delta"):
                    marks.append(time.perf_counter())
                    text += event.delta.text
            assert text == expected_text("by", TOKENS, seed=0)
            gaps = [after - before for before, after in zip(marks[1:-1], marks[2:], strict=True)]
            found.append(Times(marks[1] - marks[0], gaps, marks[-1] - marks[0]))
    return found


async def beside(target: str, clients: int, abusing: Awaitable[None]) -> list[Times]:
    """What clients saw while `abusing` ran."""
    end = asyncio.Event()
    streams = [asyncio.ensure_future(well_behaved(target, end)) for _ in range(clients)]
    await abusing
    end.set()
    return [times for found in await asyncio.gather(*streams) for times in found]


class Seen(NamedTuple):
    """The 99th percentiles of one phase, in seconds."""

    first: float
    gap: float
    whole: float


def p99(times: list[Times]) -> Seen:
    def of(values: list[float]) -> float:
        return statistics.quantiles(values, n=100)[98]

    gaps = [gap for one in times for gap in one.gaps]
    return Seen(of([one.first for one in times]), of(gaps), of([one.whole for one in times]))


@pytest.fixture(scope="module")
def server():
    """One server for all abuses, so that what one of them leaves behind meets the next."""
    with child(step_s=0.002, hold_s=0.2, **STRANGERS) as running:
        asyncio.run(beside(running.target, 4, asyncio.sleep(0.1)))
        yield running, running.report()


async def is_free(server: Child) -> Report:
    """Returns once no request, task or connection of anybody is left."""
    reports = []

    def nothing_left() -> bool:
        reports.append(server.report())
        left = reports[-1]
        held = left.engine or left.hub or left.line or left.connections or left.is_slowing
        return not held and left.tasks <= 9

    await until(nothing_left, 20.0)
    return reports[-1]


@pytest.mark.parametrize("name", abuse.ABUSES)
def test_others_get_their_answers_and_nothing_stays_behind(server, name):
    running, before = server

    async def abusing() -> None:
        await asyncio.to_thread(abuse.run, name, running.target, SHORT_S)

    async def body() -> None:
        assert await beside(running.target, 2, abusing())
        after = await is_free(running)
        assert after.rss - before.rss <= GROWTH_MIB * 2**20

    asyncio.run(body())


async def process(*arguments: str) -> None:
    """A process of its own, until it ends."""
    made = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, cwd=ROOT, stdout=asyncio.subprocess.DEVNULL
    )
    assert await made.wait() == 0


@pytest.mark.full
def test_what_others_see_of_each_abuse():
    """Their 99th percentiles beside an abuser, alone, and beside a process that only computes.

    The last one shows what an abuser takes as a neighbour on the same machine, not as a client.
    """

    async def body(server: Child) -> None:
        await beside(server.target, 8, asyncio.sleep(PHASE_S))
        ratios = {}
        for name in ("a process that computes", *abuse.ABUSES):
            before, alone, beside_it = server.report(), [], []
            for _ in range(NUM_PHASES):
                await is_free(server)  # and new connections get in at once
                alone += await beside(server.target, 8, asyncio.sleep(PHASE_S))
                what = ("-m", "tests.server.abuse", name, server.target)
                if name not in abuse.ABUSES:
                    what = ("-c", SPIN)
                beside_it += await beside(server.target, 8, process(*what, str(PHASE_S)))
            after, solo, seen = await is_free(server), p99(alone), p99(beside_it)
            ratios[name] = seen.whole / solo.whole
            print(
                f"{name}: answers {1e3 * solo.whole:.0f} -> {1e3 * seen.whole:.0f} ms "
                f"(x {ratios[name]:.2f}), first token {1e3 * solo.first:.0f} -> "
                f"{1e3 * seen.first:.0f} ms, gaps {1e3 * solo.gap:.0f} -> {1e3 * seen.gap:.0f} ms, "
                f"{(after.rss - before.rss) / 2**20:+.1f} MiB",
                flush=True,
            )
        assert max(ratios.values()) <= 10, ratios

    with child(step_s=0.01, **STRANGERS) as running:
        asyncio.run(body(running))
        print(f"in all {running.report().rss / 2**20:.0f} MiB")
