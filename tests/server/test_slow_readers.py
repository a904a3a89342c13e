"""Clients that do not read: their streams end, their requests too, and others do not wait."""

import asyncio
import statistics
import time

import grpc
import pytest
from google.rpc import error_details_pb2

from jaxinfer.edge_config import ServerConfig
from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import inference_pb2_grpc
from tests.server.apart import Apart, apart
from tests.server.fake_engine import expected_text
from tests.server.serving import detail, until, with_stub

# The smallest windows that a client can ask for, so that little text fills them.
NARROW = (("grpc.http2.lookahead_bytes", 5), ("grpc.http2.bdp_probe", 0))
MESSAGE = pb.GenerateStreamRequest(text="a", sampling={"seed": 0}, stopping={"max_tokens": 480})


async def stalled(target: str) -> grpc.aio.AioRpcError | None:
    """A stream that reads nothing until the server gives it up; how it ended."""
    async with grpc.aio.insecure_channel(target, options=NARROW) as wire:
        call = inference_pb2_grpc.InferenceServiceStub(wire).GenerateStream(MESSAGE)
        await call.wait_for_connection()
        await asyncio.sleep(LIMIT_S * 4)
        try:
            while await call.read() is not grpc.aio.EOF:
                continue
        except grpc.aio.AioRpcError as error:
            return error
    return None


async def normal(target: str) -> list[float]:
    """A stream that is read; the seconds between its events."""
    async with grpc.aio.insecure_channel(target) as wire:
        stub = inference_pb2_grpc.InferenceServiceStub(wire)
        gaps, text, last_s = [], "", time.perf_counter()
        async for event in stub.GenerateStream(MESSAGE):
            text += event.delta.text
            gaps.append(time.perf_counter() - last_s)
            last_s = time.perf_counter()
        assert text == expected_text("a", 480, seed=0)
        return gaps[2:-2]


LIMIT_S = 0.3
CONFIG = ServerConfig(port=0, reader_limit_s=LIMIT_S)


def test_a_stream_that_nobody_reads_ends_aborted_and_frees_its_request():
    async def body(stub, server):
        ends = [asyncio.ensure_future(stalled(server.target)) for _ in range(8)]
        reads = [asyncio.ensure_future(normal(server.target)) for _ in range(4)]
        await until(lambda: len(server.engine.submitted) == 12)
        await asyncio.gather(*reads)
        errors = await asyncio.gather(*ends)
        for error in errors:
            assert error is not None and error.code() is grpc.StatusCode.ABORTED, error
            assert detail(error, error_details_pb2.ErrorInfo).reason == "SLOW_READER"
        assert len(server.engine.cancelled) == 8 and server.server._hub.live == []

    with_stub(body, config=CONFIG, step_s=0.004)


def test_zero_waits_for_ever():
    async def body(stub, server):
        assert await stalled(server.target) is None

    with_stub(body, config=ServerConfig(port=0, reader_limit_s=0.0), step_s=0.002)


@pytest.mark.full
def test_a_hundred_that_never_read_beside_twenty_that_do():
    def p99_s(gaps: list[list[float]]) -> float:
        return statistics.quantiles([gap for one in gaps for gap in one], n=100)[98]

    async def body(server: Apart) -> None:
        await asyncio.gather(*(normal(server.target) for _ in range(20)))
        alone = await asyncio.gather(*(normal(server.target) for _ in range(20)))
        before_mb = server.rss_mb
        ends = [asyncio.ensure_future(stalled(server.target)) for _ in range(100)]
        beside = await asyncio.gather(*(normal(server.target) for _ in range(20)))
        grown_mb = server.rss_mb - before_mb
        codes = {error and error.code() for error in await asyncio.gather(*ends)}
        ratio = p99_s(beside) / p99_s(alone)
        print(
            f"100 stalled: {grown_mb:+.1f} MiB, p99 {p99_s(beside):.4f} s, x {ratio:.2f}, {codes}"
        )
        assert codes == {grpc.StatusCode.ABORTED} and grown_mb <= 64 and ratio < 10

    with apart(step_s=0.01, reader_limit_s=LIMIT_S) as server:
        asyncio.run(body(server))
