"""Clients of a workload: they send its requests to a real server and note when tokens come."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from jaxinfer.bench.load.calls import prompts_of
from jaxinfer.client import AsyncClient, Completion, Delta
from jaxinfer.edge_config import ServerConfig
from jaxinfer.engine import Engine
from jaxinfer.host.cost_model import StepTimes
from jaxinfer.host.workload import Timeline, Workload
from jaxinfer.llm import LoadedEngine
from jaxinfer.runner import EngineThread
from jaxinfer.server.app import Server
from jaxinfer.server.served import ServedModel

STOP_S = 5.0
_POLL_S = 0.005
T = TypeVar("T")


async def serve(loaded: LoadedEngine, scenario: Callable[[AsyncClient], Awaitable[T]]) -> T:
    """Runs `scenario(client)` against a server on a free loopback port, in this process."""
    engine = loaded.engine
    served = ServedModel(
        name=loaded.name,
        config=loaded.model,
        tokenizer=loaded.tokenizer,
        limits=engine.limits,
        defaults=loaded.defaults,
    )
    server = Server(served, lambda deliver: EngineThread(engine, deliver), ServerConfig(port=0))
    port = await server.start()
    await server.set_serving(True)
    try:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            return await scenario(client)
    finally:
        await server.stop(STOP_S)


async def play(
    client: AsyncClient, workload: Workload, *, vocab_size: int, seed: int = 0
) -> list[Timeline]:
    """Sends every request as the workload says; prompts of another seed share no page."""
    started_s = time.perf_counter()
    prompts = prompts_of(workload, vocab_size=vocab_size, seed=seed)
    arrivals = sorted(enumerate(workload.arrivals), key=lambda one: one[1].at_s)
    unsent = iter([(arrival, prompts[number]) for number, arrival in arrivals])
    timelines: list[Timeline] = []

    async def stream() -> None:
        for arrival, prompt in unsent:  # shared: each takes the next that nobody has taken
            await asyncio.sleep(started_s + arrival.at_s - time.perf_counter())
            line = Timeline(time.perf_counter())
            timelines.append(line)
            events = client.stream(
                token_ids=prompt,
                max_tokens=arrival.num_output_tokens,
                temperature=0.0,
                ignore_eos=True,
                priority=arrival.priority,
            )
            async for event in events:
                if isinstance(event, Delta):
                    line.tokens_s += [time.perf_counter()] * len(event.token_ids)

    await asyncio.gather(*(stream() for _ in range(workload.concurrency or len(arrivals))))
    return timelines


async def lone_edge_s(client: AsyncClient, *, vocab_size: int, count: int = 12) -> float:
    """What a first token takes longer for the client than for an engine with nothing else to do."""
    rng, edges = random.Random("edge"), []
    for _ in range(count):
        prompt = [rng.randrange(vocab_size) for _ in range(8)]
        events = client.stream(token_ids=prompt, max_tokens=1, temperature=0.0, ignore_eos=True)
        async for event in events:
            if not isinstance(event, Delta):
                edges.append(_edge_s(event.completion))
    return sorted(edges)[len(edges) // 2]


async def until_idle(engine: Engine) -> None:
    """Waits for the last step of requests whose clients have gone already."""
    while engine.has_work:
        await asyncio.sleep(_POLL_S)


@contextmanager
def timed(engine: Engine) -> Iterator[StepTimes]:
    """Times the engine's steps; enter and leave it while the engine is idle."""
    engine.step_times = StepTimes(engine.config)
    try:
        yield engine.step_times
    finally:
        engine.step_times = None


def _edge_s(completion: Completion) -> float:
    ttft_s, inside_s = completion.stamps.ttft_s, completion.timings.ttft_s
    assert ttft_s is not None and inside_s is not None, "a stream of one token has both"
    return max(0.0, ttft_s - inside_s)
