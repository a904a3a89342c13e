"""Very many short requests of every kind: what is left in the server afterwards, and what grows."""

import asyncio
import statistics
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import pytest

from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import inference_pb2_grpc
from tests.server.child import Child, Report, child
from tests.server.serving import OWN, free_port

NUM_CLIENTS = 48
EMPTY = {"engine": 0, "hub": 0, "line": 0, "connections": 1, "leases": 0}
"""Nobody is there: what is left is the port of the metrics."""
FULL, NUM_SAMPLES = 1_000_000, 100
MIB = 2**20
WANTED = {
    "unary": {grpc.StatusCode.OK},
    "stream": {grpc.StatusCode.OK},
    "stop": {grpc.StatusCode.OK},
    "cancel": {grpc.StatusCode.CANCELLED},
    "again": {grpc.StatusCode.OK},
    "deadline": {grpc.StatusCode.DEADLINE_EXCEEDED},
    "refused": {grpc.StatusCode.INVALID_ARGUMENT},
    "vanish": {grpc.StatusCode.CANCELLED},
}
"""How calls of each kind end; every one of them must, and no other way."""
TURNS = ("unary",) * 7 + ("stream",) * 5 + ("stop", "again", "refused")
RARE = {97: "deadline", 61: "cancel", 151: "vanish"}
"""One of so many requests: of each call that is cut, gRPC itself loses up to 240 bytes.

It does not free a message that was under way (grpc/grpc#43360).
"""


def request(kind: type[Any], number: int, **more: Any) -> Any:
    """A short request; its id is chosen for every second one."""
    named = {"request_id": f"soak-{number}"} if number % 2 else {}
    options = {"stopping": {"max_tokens": 1 + number % 3}, "sampling": {"seed": number}}
    return kind(**{"text": f"request {number % 50}", **named, **options, **more})


LONG: dict[str, Any] = {"stopping": {"max_tokens": 400}}


async def unary(stub: Any, target: str, number: int) -> None:
    await stub.Generate(request(pb.GenerateRequest, number))


async def again(stub: Any, target: str, number: int) -> None:
    asked = request(pb.GenerateRequest, number, request_id=f"again-{number}")
    first, second = await stub.Generate(asked), await stub.Generate(asked)
    assert first.output == second.output


async def stream(stub: Any, target: str, number: int) -> None:
    events = [event async for event in stub.GenerateStream(request(STREAM, number))]
    assert events[-1].summary.usage.num_output_tokens == 1 + number % 3


async def stop(stub: Any, target: str, number: int) -> None:
    asked = request(STREAM, number, stopping={"max_tokens": 3, "stop": ["a", "e"]})
    async for _ in stub.GenerateStream(asked):
        continue


async def cancel(stub: Any, target: str, number: int) -> None:
    call = stub.GenerateStream(request(STREAM, number, **LONG))
    await call.read()
    call.cancel()
    await call.read()


async def deadline(stub: Any, target: str, number: int) -> None:
    await stub.Generate(request(pb.GenerateRequest, number, **LONG), timeout=0.02)


async def refused(stub: Any, target: str, number: int) -> None:
    await stub.Generate(request(pb.GenerateRequest, number, text=""))


async def vanish(stub: Any, target: str, number: int) -> None:
    async with connected(target) as own:
        call = own.GenerateStream(request(STREAM, number, **LONG))
        await call.read()
    await call.read()


STREAM = pb.GenerateStreamRequest
KINDS: dict[str, Callable[[Any, str, int], Any]] = {
    one.__name__: one for one in (unary, stream, stop, cancel, again, deadline, refused, vanish)
}


@asynccontextmanager
async def connected(target: str) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(target, options=OWN) as wire:
        yield inference_pb2_grpc.InferenceServiceStub(wire)


async def one(stub: Any, target: str, number: int) -> tuple[str, grpc.StatusCode]:
    """One request; its kind, and how it ended."""
    kind = next((kind for step, kind in RARE.items() if number % step == 0), None)
    kind = kind or TURNS[number % len(TURNS)]
    try:
        await KINDS[kind](stub, target, number)
    except grpc.aio.AioRpcError as error:
        return kind, error.code()
    except asyncio.CancelledError:  # that is how grpc.aio says that we cancelled
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        return kind, grpc.StatusCode.CANCELLED
    return kind, grpc.StatusCode.OK


async def requests(target: str, numbers: range) -> Counter[tuple[str, grpc.StatusCode]]:
    """All of them, many at a time, on one connection; it is closed at the end."""
    ends: Counter[tuple[str, grpc.StatusCode]] = Counter()
    left = iter(numbers)
    async with connected(target) as stub:

        async def client() -> None:
            for number in left:  # shared: each takes the next that nobody has taken
                ends[await one(stub, target, number)] += 1

        await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
    return ends


def check(ends: Counter[tuple[str, grpc.StatusCode]], num_requests: int) -> None:
    assert ends.total() == num_requests and {kind for kind, _ in ends} == set(WANTED)
    wrong = {key: number for key, number in ends.items() if key[1] not in WANTED[key[0]]}
    assert not wrong, wrong


async def settled(server: Child) -> Report:
    """What the server holds once all its clients are gone."""
    async with asyncio.timeout(10):
        while not (report := server.report())._asdict().items() >= EMPTY.items():
            print("the server still holds", report)
            await asyncio.sleep(0.05)
    return report


def settings(folder: Path) -> dict[str, Any]:
    return {"request_log": str(folder / "requests.jsonl"), "metrics_port": free_port()}


def test_thousands_of_requests_of_all_kinds_leave_nothing_behind(tmp_path):
    async def body(server: Child) -> None:
        check(await requests(server.target, range(1, 501)), 500)
        before = await settled(server)
        check(await requests(server.target, range(501, 3001)), 2500)
        after = await settled(server)
        assert after.tasks == before.tasks and after.descriptors <= before.descriptors

    with child(step_s=0.001, **settings(tmp_path)) as server:
        asyncio.run(body(server))
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) >= 2500


@pytest.mark.full
def test_a_million_requests_of_all_kinds_and_the_memory_stays_flat():
    """In the second half; in the first one the stores fill that are bounded by time and size."""
    share = FULL // NUM_SAMPLES
    reports: list[Report] = []

    async def body(server: Child) -> None:
        for number in count(1):
            first = 1 + (number - 1) * share
            check(await requests(server.target, range(first, first + share)), share)
            reports.append(await settled(server))
            print(number * share, reports[-1], flush=True)
            if number == NUM_SAMPLES:
                return

    with child(step_s=0.001, request_log="/dev/null", metrics_port=free_port()) as server:
        asyncio.run(body(server))
    late = reports[NUM_SAMPLES // 2 :]
    slope = statistics.linear_regression(
        [share * place / 100_000 for place in range(len(late))], [one.rss / MIB for one in late]
    ).slope
    print(f"{slope:+.2f} MiB a 100,000 requests; from {reports[0]} to {reports[-1]}")
    assert slope <= 1.0
    assert {(one.tasks, one.descriptors) for one in late} == {(late[0].tasks, late[0].descriptors)}
