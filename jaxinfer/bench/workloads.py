"""Workloads that every peer can be given: the same tokens in, as many tokens out.

W1  one request, 128 tokens in, 128 out
W2  one request, 1,024 in, 32 out
W3  32 requests at once, 32 to 256 in, 16 to 192 out
W4  16 requests at once, 768 shared tokens and 32 own ones in, 16 out
W5  64 requests at once, 32 to 256 in, 1 to 512 out: 96 in the mean, most short and few long

Answers of W5 are as long as a geometric distribution says, the discrete exponential one, which
continuous batching is usually measured on (Daniel et al. 2023, "How continuous batching enables
23x throughput in LLM inference").

Lengths depend on the workload alone, tokens on the repeat too, so that no prefix cache makes a
later repeat cheaper. The recipe is plain arithmetic: other programs can make the same tokens.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from jaxinfer.bench.load import files
from jaxinfer.config import EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.text.tokenizer import Tokenizer

NAMES = ("W1", "W2", "W3", "W4", "W5")
MOST_AT_ONCE = 32
_TOKENS = (1000, 48_999)  # plain ones of every vocabulary that is large enough
_MASK = 2**64 - 1


class Call(NamedTuple):
    """One request; it ends after exactly so many tokens."""

    prompt: tuple[int, ...]
    num_output_tokens: int


@dataclass(frozen=True)
class Workload:
    """Requests that are all there at the start."""

    name: str
    said: str
    calls: Callable[[int], tuple[Call, ...]]
    """The requests of one repeat, by its number."""


def named(name: str, *, vocab_size: int) -> Workload:
    """W1 to W5. Tokens beyond a small vocabulary are folded into it."""
    if name not in NAMES:
        raise ConfigError(f"no workload {name!r}; there are: {', '.join(NAMES)}, or a JSONL file")
    said = next(line for line in str(__doc__).splitlines() if line.startswith(name))

    def calls(repeat: int) -> tuple[Call, ...]:
        return tuple(
            Call(tuple(token % vocab_size for token in prompt), count)
            for prompt, count in _recipe(name, repeat)
        )

    return Workload(name, said.removeprefix(name).strip(), calls)


def streams(count: int, *, prompt: int, output: int, vocab_size: int) -> Workload:
    """So many equal requests."""

    def calls(repeat: int) -> tuple[Call, ...]:
        draws = _Draws(f"streams {count}", repeat)
        return tuple(
            Call(tuple(token % vocab_size for token in draws.tokens(prompt)), output)
            for _ in range(count)
        )

    return Workload(f"{count} streams", f"{prompt} tokens in, {output} out each", calls)


def from_file(path: Path, tokenizer: Tokenizer, *, num_output_tokens: int, chat: bool) -> Workload:
    """The prompts of a JSONL file (`prompt`, `turns` or `token_ids`), the same in every repeat.

    A line may say its own `num_output_tokens`. With `chat` texts go through the chat template.
    """
    rows, _ = files.read(path)

    def encode(prompt: str | tuple[int, ...] | None) -> tuple[int, ...]:
        if isinstance(prompt, str) and chat:
            return tuple(tokenizer.encode_chat([{"role": "user", "content": prompt}]))
        if isinstance(prompt, str):
            return tuple(tokenizer.encode(prompt))
        if prompt is None:
            raise ConfigError(f"{path}: every line needs a prompt, turns or token_ids")
        return prompt

    found = tuple(
        Call(encode(row.prompt), row.arrival.num_output_tokens or num_output_tokens) for row in rows
    )
    return Workload(path.stem, f"{len(found)} prompts of {path.name}", lambda repeat: found)


def first(workload: Workload, count: int | None) -> Workload:
    """Only the first requests of a workload."""
    if count is None:
        return workload
    if count < 1:
        raise ConfigError(f"--requests is {count}; it must be at least 1")
    return replace(
        workload,
        said=f"{workload.said}; the first {count}",
        calls=lambda repeat: workload.calls(repeat)[:count],
    )


def fitted(config: EngineConfig, workload: Workload, *, keep: frozenset[str]) -> EngineConfig:
    """Slots for all requests at once (32 at most) and room for the longest, and no more.

    What `keep` names was asked for and stays.
    """
    calls = workload.calls(0)
    longest = max(len(call.prompt) + call.num_output_tokens for call in calls)
    changes: dict[str, int | tuple[int, ...]] = {}
    if "max_seq_len" not in keep:
        size = config.attention_block
        changes["max_seq_len"] = -(-longest // size) * size
    if "num_slots" not in keep:
        changes["num_slots"] = min(len(calls), MOST_AT_ONCE)
        if "decode_rows" not in keep:
            changes["decode_rows"] = ()
    fitting = replace(config, **changes)
    if fitting.max_seq_len < longest:
        raise ConfigError(
            f"{workload.name} has a request of {longest} tokens; engine.max_seq_len is "
            f"{fitting.max_seq_len}: set it to at least that, or leave it out"
        )
    return fitting


class _Draws:
    """splitmix64 (Steele et al. 2014): the same numbers in every language."""

    def __init__(self, name: str, repeat: int, *, seed: int | None = None) -> None:
        named = 1_000_003 * (repeat + 1) + sum(map(ord, name))
        self._state = (named if seed is None else seed) & _MASK

    def integer(self, low: int, high: int) -> int:
        """A whole number from low to high."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        mixed = self._state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        return low + (mixed ^ (mixed >> 31)) % (high - low + 1)

    def length(self, mean: int, most: int) -> int:
        """How often until one of `mean` is drawn: a geometric distribution, cut at `most`."""
        count = 1
        while count < most and self.integer(1, mean) > 1:
            count += 1
        return count

    def tokens(self, count: int) -> list[int]:
        """So many tokens."""
        return [self.integer(*_TOKENS) for _ in range(count)]


def _recipe(name: str, repeat: int) -> Iterator[tuple[list[int], int]]:
    draws = _Draws(name, repeat)
    if name == "W1":
        yield draws.tokens(128), 128
    elif name == "W2":
        yield draws.tokens(1024), 32
    elif name == "W4":
        shared = draws.tokens(768)
        for _ in itertools.repeat(None, 16):
            yield shared + draws.tokens(32), 16
    else:
        lengths = _Draws(name, repeat, seed=0)
        for _ in itertools.repeat(None, 32 if name == "W3" else 64):
            num_prompt = lengths.integer(32, 256)
            num_output = lengths.integer(16, 192) if name == "W3" else lengths.length(96, 512)
            yield draws.tokens(num_prompt), num_output
