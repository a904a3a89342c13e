"""What is left of decoding while a long prompt is prefilled beside it."""

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

from rich.table import Table

from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.errors import ConfigError
from jaxinfer.host.request import JAXINFER_DEFAULTS, Request, SamplingParams

BAR = 0.5
STREAM_PROMPT = 64
_ROOM = 512  # tokens beyond the long prompt: for the streams, which outlast it
Show = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Round:
    """One long prompt."""

    alone_tokens_per_s: float
    """Of all streams, just before and just after the prompt."""
    beside_tokens_per_s: float
    """Of all streams, from the prompt's arrival to its first token."""
    ttft_beside_s: float
    ttft_alone_s: float
    """Of the same prompt with nothing else in the engine."""
    longest_gap_ms: float
    """Between two tokens of one stream, beside the prompt."""

    @property
    def kept(self) -> float:
        """The part of decoding that goes on."""
        return self.beside_tokens_per_s / self.alone_tokens_per_s


@dataclass(frozen=True)
class Report:
    """Everything of one run."""

    model: str
    num_streams: int
    num_prompt_tokens: int
    max_prefill_tokens: int
    prefill_per_decode: int
    rounds: tuple[Round, ...]

    @property
    def kept(self) -> float:
        """Mean of all rounds."""
        return mean(one.kept for one in self.rounds)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rounds = [{**asdict(one), "kept": one.kept} for one in self.rounds]
        return {**asdict(self), "rounds": rounds, "kept": self.kept, "bar": BAR}


def roomy(config: EngineConfig, *, num_streams: int, num_prompt_tokens: int) -> EngineConfig:
    """The settings, with a slot more than there are streams and room for the prompt."""
    fits = config.num_slots > num_streams
    return replace(
        config,
        num_slots=config.num_slots if fits else num_streams + 1,
        decode_rows=config.decode_rows if fits else (),
        max_seq_len=max(config.max_seq_len, num_prompt_tokens + _ROOM),
    )


def measure(
    engine: Engine,
    *,
    name: str,
    num_streams: int = 8,
    num_prompt_tokens: int = 4096,
    num_alone_steps: int = 48,
    rounds: int = 3,
    progress: Show = lambda stage, done, total: None,
) -> Report:
    """Each round: the prompt alone; then the streams alone, beside the prompt, and alone again."""
    check(engine.config, num_streams=num_streams, num_prompt_tokens=num_prompt_tokens)
    found = []
    for number in range(rounds):
        bench = _Bench(engine, num_streams, num_prompt_tokens, seed=number)
        found.append(bench.round(num_alone_steps))
        progress("measure", number + 1, rounds)
    return Report(
        model=name,
        num_streams=num_streams,
        num_prompt_tokens=num_prompt_tokens,
        max_prefill_tokens=engine.config.max_prefill_tokens,
        prefill_per_decode=engine.config.prefill_per_decode,
        rounds=tuple(found),
    )


class _Bench:
    """Streams that decode until they are stopped, and a long prompt now and then."""

    def __init__(
        self, engine: Engine, num_streams: int, num_prompt_tokens: int, *, seed: int
    ) -> None:
        self._engine = engine
        self._num_prompt_tokens = num_prompt_tokens
        self._rng = random.Random(seed)
        self._seed = seed
        self._streams = [f"stream-{number}" for number in range(num_streams)]
        self._names = (f"long-{number}" for number in itertools.count())
        self._last_s: dict[str, float] = {}
        self._longest_gap_s = 0.0
        self._num_tokens = 0

    def round(self, num_steps: int) -> Round:
        ttft_alone_s = self._prompt()
        for name in self._streams:
            self._engine.submit(self._request(name, STREAM_PROMPT, max_tokens=None))
        while len(self._last_s) < len(self._streams):
            self._step()
        before = self._alone(num_steps)
        self._longest_gap_s, self._num_tokens, started_s = 0.0, 0, time.perf_counter()
        ttft_beside_s = self._prompt()
        beside = self._num_tokens / (time.perf_counter() - started_s)
        gap_s = self._longest_gap_s
        after = self._alone(num_steps)
        for name in self._streams:
            self._engine.cancel(name)
        while self._engine.has_work:
            self._engine.step()
        return Round(
            alone_tokens_per_s=(before + after) / 2,
            beside_tokens_per_s=beside,
            ttft_beside_s=ttft_beside_s,
            ttft_alone_s=ttft_alone_s,
            longest_gap_ms=1e3 * gap_s,
        )

    def _alone(self, num_steps: int) -> float:
        """Tokens a second of all streams."""
        self._num_tokens, started_s = 0, time.perf_counter()
        for _ in range(num_steps):
            self._step()
        return self._num_tokens / (time.perf_counter() - started_s)

    def _prompt(self) -> float:
        """Sends the long prompt and returns the seconds to its first token."""
        name = next(self._names)
        request = self._request(name, self._num_prompt_tokens, max_tokens=1)
        self._engine.submit(request)
        ttft_s = None
        while ttft_s is None:
            ttft_s = self._step(name)
        return ttft_s

    def _step(self, awaited: str = "") -> float | None:
        """One step; returns the time to the first token of a request that ends in it."""
        ttft_s = None
        outputs, now_s = self._engine.step(), time.perf_counter()
        for output in outputs:
            if output.request_id == awaited and output.timings.first_token_s is not None:
                ttft_s = output.timings.first_token_s - output.timings.arrived_s
            elif output.token_ids:
                gap_s = now_s - self._last_s.get(output.request_id, now_s)
                self._longest_gap_s = max(self._longest_gap_s, gap_s)
                self._last_s[output.request_id] = now_s
                self._num_tokens += len(output.token_ids)
        return ttft_s

    def _request(self, name: str, num_tokens: int, *, max_tokens: int | None) -> Request:
        vocab_size = self._engine.model.vocab_size
        prompt = tuple(self._rng.randrange(vocab_size) for _ in range(num_tokens))
        sampling = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=0
        ).or_else(JAXINFER_DEFAULTS)
        return Request(name, prompt, sampling, use_prefix_cache=False)


def check(config: EngineConfig, *, num_streams: int, num_prompt_tokens: int) -> None:
    """Raises ConfigError where the engine is too small for this."""
    if num_streams < 1 or num_prompt_tokens < 1:
        raise ConfigError("there must be at least one stream, and one token in the long prompt")
    if config.num_slots <= num_streams or config.max_seq_len < num_prompt_tokens + 1:
        raise ConfigError(
            f"{num_streams} streams beside a prompt of {num_prompt_tokens} tokens need "
            f"engine.num_slots of {num_streams + 1} and engine.max_seq_len of "
            f"{num_prompt_tokens + 1}; they are {config.num_slots} and {config.max_seq_len}"
        )


def table(report: Report) -> Table:
    """One row a round, and their mean."""
    title = (
        f"{report.model}: {report.num_streams} streams and a prompt of "
        f"{report.num_prompt_tokens} tokens; prefill_per_decode {report.prefill_per_decode}"
    )
    found = Table(
        "round",
        "alone tok/s",
        "beside tok/s",
        "kept",
        "longest gap ms",
        "TTFT beside s",
        "TTFT alone s",
        title=title,
        title_justify="left",
    )
    for column in found.columns:
        column.justify = "right"
    for number, one in enumerate(report.rounds, start=1):
        found.add_row(
            str(number),
            f"{one.alone_tokens_per_s:.1f}",
            f"{one.beside_tokens_per_s:.1f}",
            f"{one.kept:.0%}",
            f"{one.longest_gap_ms:.0f}",
            f"{one.ttft_beside_s:.2f}",
            f"{one.ttft_alone_s:.2f}",
        )
    found.add_section()
    is_met = "yes" if report.kept >= BAR else "no"
    found.add_row("mean", "", "", f"{report.kept:.0%}", f"at least {BAR:.0%}: {is_met}", "", "")
    return found
