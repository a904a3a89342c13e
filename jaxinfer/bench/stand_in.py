"""An engine without a model behind the real server, in a process of its own.

python -m jaxinfer.bench.stand_in 0.002
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

from jaxinfer.config import ModelConfig
from jaxinfer.edge_config import ServerConfig
from jaxinfer.host.request import (
    EngineStats,
    FinishReason,
    Limits,
    Output,
    Request,
    SamplingParams,
    Timings,
)
from jaxinfer.runner import EngineThread
from jaxinfer.server import app
from jaxinfer.server.served import ServedModel

NAME = "stand-in"
LIMITS = Limits(vocab_size=256, max_seq_len=1 << 20)
MODEL = ModelConfig("llama", 256, 2, 64, 128, 4, 2, 16, 2048)
TEXT = " word"
TOKEN, LOGPROB = 42, -0.5
MAX_WAITING = 4096
STOP_S = 2.0


class Marks(NamedTuple):
    """What a server process has done so far."""

    wall_s: float
    cpu_s: float
    """Of all its threads."""
    num_tokens: int
    """That the engine made."""
    num_steps: int


class Row:
    """A live request."""

    def __init__(self, request: Request, now_s: float) -> None:
        self.request = request
        self.num_tokens = 0
        self.arrived_s = now_s
        self.timings = Timings(now_s)


class StandIn:
    """What runner.EngineThread needs of an engine: every live request gets a token a step.

    A step that is late is not made up for, as on a device; its host part costs no more than making
    the outputs.
    """

    limits = LIMITS
    max_waiting = MAX_WAITING
    num_waiting = 0

    def __init__(self, step_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._step_s = step_s
        self._clock = clock
        self._rows: dict[str, Row] = {}
        self._cancelled: list[str] = []
        self._due_s = clock()
        self.num_steps = self.num_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._rows)

    def submit(self, request: Request) -> None:
        """Takes a request."""
        self._rows[request.request_id] = Row(request, self._clock())

    def cancel(self, request_id: str) -> None:
        """The next step ends it."""
        self._cancelled.append(request_id)

    def step(self, *, tell: object = None) -> list[Output]:
        """Waits for the time of the step, and gives each request its token: all in one part."""
        time.sleep(max(0.0, self._due_s - self._clock()))
        now_s = self._clock()
        self._due_s = max(self._due_s + self._step_s, now_s)
        ends, self._cancelled = self._cancelled, []
        ended = [self._ended(self._rows.pop(name), now_s) for name in ends if name in self._rows]
        outputs = [self._advance(row, now_s) for row in self._rows.values()]
        for output in outputs:
            if output.finish_reason is not None:
                del self._rows[output.request_id]
        self.num_steps += 1
        self.num_tokens += len(outputs)
        return ended + outputs

    def stats(self) -> EngineStats:
        """Only what is known without a cache."""
        none = dict.fromkeys((entry.name for entry in fields(EngineStats)), 0)
        return EngineStats(**none | {"num_running": len(self._rows)})

    def _advance(self, row: Row, now_s: float) -> Output:
        row.num_tokens += 1
        is_last = row.num_tokens == row.request.sampling.max_tokens
        if row.num_tokens == 1:
            row.timings = Timings(row.arrived_s, row.arrived_s, now_s)
        reason = FinishReason.LENGTH if is_last else None
        return self._output(row, reason, now_s, (TOKEN,), (LOGPROB,), TEXT)

    def _ended(self, row: Row, now_s: float) -> Output:
        return self._output(row, FinishReason.CANCELLED, now_s, (), (), "")

    def _output(
        self,
        row: Row,
        reason: FinishReason | None,
        now_s: float,
        token_ids: tuple[int, ...],
        logprobs: tuple[float, ...],
        text: str,
    ) -> Output:
        times = row.timings
        if reason is not None:
            times = Timings(times.arrived_s, times.scheduled_s, times.first_token_s, now_s)
        return Output(
            row.request.request_id,
            token_ids,
            logprobs,
            text,
            reason,
            num_prompt_tokens=len(row.request.prompt),
            num_output_tokens=row.num_tokens,
            timings=times,
        )


class Bytes:
    """A tokenizer: a token for each byte."""

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The bytes."""
        return list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of bytes."""
        return bytes(ids).decode(errors="replace")

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """All that was said."""
        return self.encode("\n".join(str(one.get("content", "")) for one in messages))


def served() -> ServedModel:
    """A model that there is not."""
    return ServedModel(NAME, MODEL, Bytes(), LIMITS, SamplingParams(max_tokens=16))


def alone_tokens_per_s(num_streams: int, *, seconds: float = 0.3) -> float:
    """Tokens a second of the engine without pauses, and without a server: it bounds no figure."""
    engine = StandIn(0.0)
    sampling = SamplingParams(max_tokens=LIMITS.max_seq_len)
    for number in range(num_streams):
        engine.submit(Request(f"alone-{number}", (1,), sampling))
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < seconds:
        engine.step()
    return engine.num_tokens / (time.perf_counter() - began_s)


def main(argv: Sequence[str]) -> None:
    """Serves until stdin ends; prints its port, then its marks for every line that it reads."""
    engine = StandIn(float(argv[0]))

    def tell() -> None:
        for _ in sys.stdin:
            marks = Marks(
                time.monotonic(), time.process_time(), engine.num_tokens, engine.num_steps
            )
            print(json.dumps(marks), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    def ready(port: int) -> None:
        print(port, flush=True)
        threading.Thread(target=tell, daemon=True).start()

    make_engine = partial(EngineThread, engine)
    app.run(served(), make_engine, ServerConfig(port=0, drain_grace_s=STOP_S), ready=ready)


if __name__ == "__main__":
    main(sys.argv[1:])
