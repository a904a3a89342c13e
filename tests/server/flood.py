"""An open-loop load of requests: what a server makes of it, told as one JSON line a rate.

python -m tests.server.flood 127.0.0.1:50051 10 100,200 6 8    # text of 10, rates, seconds, tokens
"""

import asyncio
import gc
import json
import sys
import time
from collections import Counter
from typing import NamedTuple

import grpc
from google.rpc import error_details_pb2

from jaxinfer.v1 import inference_pb2 as pb
from jaxinfer.v1 import inference_pb2_grpc
from tests.server.serving import detail


class Load(NamedTuple):
    """What an open-loop load got."""

    good_per_s: float
    codes: dict[str, int]
    refusal_p50_s: float
    refusal_p99_s: float
    answer_p99_s: float
    lag_p99_s: float
    """By which the load itself was late."""
    num_without_delay: int
    """Refusals that did not say when to ask again."""


async def offered(
    stub, per_s: float, seconds: float, *, tokens: int = 8, num_chars: int = 1
) -> Load:
    """Requests at a fixed rate, whatever becomes of them; the same seconds count for each."""
    codes: Counter[str] = Counter()
    refusals, answers, lags, silent = [], [], [], []
    message = pb.GenerateRequest(
        text="a" * num_chars, stopping={"max_tokens": tokens, "ignore_eos": True}
    )

    async def one() -> None:
        began_s = time.perf_counter()
        try:
            await stub.Generate(message)
            codes["OK"] += 1
            answers.append(time.perf_counter() - began_s)
        except grpc.aio.AioRpcError as error:
            refusals.append(time.perf_counter() - began_s)
            codes[error.code().name] += 1
            if not detail(error, error_details_pb2.RetryInfo).HasField("retry_delay"):
                silent.append(error)

    tasks, start_s = [], time.perf_counter()
    for number in range(int(per_s * seconds)):
        due_s = start_s + number / per_s
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        lags.append(time.perf_counter() - due_s)
        tasks.append(asyncio.ensure_future(one()))
    await asyncio.gather(*tasks)
    took_s = time.perf_counter() - start_s
    return Load(
        codes["OK"] / took_s,
        dict(codes),
        _quantile(refusals, 0.5),
        _quantile(refusals, 0.99),
        _quantile(answers, 0.99),
        _quantile(lags, 0.99),
        len(silent),
    )


def _quantile(values: list[float], part: float) -> float:
    return sorted(values)[int(len(values) * part)] if values else 0.0


async def _main(target: str, num_chars: int, rates: list[float], seconds: float, tokens: int):
    async with grpc.aio.insecure_channel(target) as wire:
        stub = inference_pb2_grpc.InferenceServiceStub(wire)
        await offered(stub, rates[0] / 2, 1.0, tokens=tokens, num_chars=num_chars)
        gc.collect()
        gc.freeze()
        for rate in rates:
            load = await offered(stub, rate, seconds, tokens=tokens, num_chars=num_chars)
            print(json.dumps(load._asdict()), flush=True)


if __name__ == "__main__":
    target, num_chars, rates, seconds, tokens = sys.argv[1:]
    per_s = [float(rate) for rate in rates.split(",")]
    asyncio.run(_main(target, int(num_chars), per_s, float(seconds), int(tokens)))
