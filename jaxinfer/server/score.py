"""Scores texts between the engine's steps: one chunk after another, one text at a time."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxinfer.errors import OutOfTurn, QueueFull
from jaxinfer.host.request import Request, check_request
from jaxinfer.server.served import EngineLike, ServedModel

MAX_WAITING = 64  # texts; one more is refused


@runtime_checkable
class Part(Protocol):
    """What is known of some tokens; `scoring.Scored` is one."""

    logprobs: np.ndarray
    is_likeliest: np.ndarray


class Scoring:
    """The line of texts that wait for their scores."""

    def __init__(self, served: ServedModel, engine: EngineLike) -> None:
        self._served = served
        self._engine = engine
        self._turn = asyncio.Lock()
        self._num_waiting = 0

    async def of(self, tokens: list[int]) -> list[Part]:
        """Scores a text in parts; requests that run get a step between any two of them."""
        check_request(Request("score", tuple(tokens), self._served.defaults), self._served.limits)
        if self._num_waiting >= MAX_WAITING:
            raise QueueFull(f"{MAX_WAITING} texts wait for their scores; try again later")
        self._num_waiting += 1
        try:
            async with self._turn:
                return await self._parts(tokens)
        finally:
            self._num_waiting -= 1

    async def _parts(self, tokens: list[int]) -> list[Part]:
        chunk, parts = await self._ask(chunk_of), []
        if not chunk:
            raise OutOfTurn(
                "this server scores no texts; start it with engine.score_chunk, such as 128"
            )
        for start in range(0, len(tokens) - 1, chunk):
            parts.append(await self._ask(lambda engine, at=start: engine.scorer.part(tokens, at)))
        return parts

    async def _ask(self, function: Callable[[Any], Any]) -> Any:
        return await asyncio.wrap_future(self._engine.ask(function))


def chunk_of(engine: Any) -> int:
    """Tokens that an engine scores at a time; 0 where it scores none."""
    return 0 if engine.scorer is None else engine.scorer.chunk
