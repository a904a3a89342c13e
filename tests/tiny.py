"""A tiny random model, and the shortest ways to run it: shared by the tests of steps and engine."""

import functools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer import models, spec
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.engine import Engine
from jaxinfer.host.request import JAXINFER_DEFAULTS, Output, Request, SamplingParams
from jaxinfer.store import Store, find_store

MODEL = ModelConfig(
    architecture="llama",
    vocab_size=256,
    num_layers=2,
    d_model=64,
    d_ff=128,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    max_positions=512,
    eos_token_ids=(0,),
)


class _Said(NamedTuple):
    text: str
    stop: str | None


class TokenText:
    """Stands in for a tokenizer: token 7 reads "<7>"."""

    def stream(self, prompt_tail: Any = (), stop: tuple[str, ...] = ()) -> "TokenText":
        copy = TokenText()
        copy.stops = stop
        return copy

    def push(self, token: int) -> _Said:
        text = f"<{token}>"
        found = next((stop for stop in self.stops if stop in text), None)
        return _Said("" if found else text, found)

    def finish(self) -> str:
        return ""


def engine_config(**changes: Any) -> EngineConfig:
    """Small chunks and pages, so that short prompts cross many edges."""
    plain: dict[str, Any] = {
        "max_seq_len": 256,
        "prefill_chunks": (8, 16, 64),
        "prefill_rows": (1,),  # a program less to compile; test_engine.py and bits/ have several
        "compute_dtype": "float32",
        "attention_block": 32,
    }
    return EngineConfig(**(plain | changes))


@functools.cache
def params(dtype: str = "float32", model: ModelConfig = MODEL) -> Any:
    """Weights large enough for logits that differ from token to token."""
    tree = spec.initialise(models.module_of(model).spec(model), jax.random.key(0), jnp.float32)
    return jax.tree.map(lambda leaf: (3 * leaf).astype(dtype), tree)


def cache_dir() -> Path:
    """What tests of one run share; its `programs` are those of `store`."""
    return Path(os.environ["TESTS_CACHE"])


def store() -> Store | None:
    """Compiled programs that tests of one run share."""
    return find_store(cache_dir() / "programs")


def make_engine(**changes: Any) -> Engine:
    config = engine_config(**changes)
    return Engine(params(config.compute_dtype), MODEL, TokenText(), config, store=store())


def make_request(name: str, prompt: Any, **sampling: Any) -> Request:
    plain = {"temperature": 0.0, "max_tokens": 16, "seed": 0, "ignore_eos": True} | sampling
    return Request(name, tuple(prompt), SamplingParams(**plain).or_else(JAXINFER_DEFAULTS))


def random_requests(
    count: int, *, seed: int, max_prompt: int = 150, max_tokens: int = 60
) -> list[Request]:
    """Mixed lengths and every sampling path: greedy, candidates, whole vocabulary."""
    rng = random.Random(seed)
    return [
        make_request(
            f"r{number}",
            [rng.randrange(MODEL.vocab_size) for _ in range(rng.randint(1, max_prompt))],
            temperature=rng.choice([0.0, 0.0, 0.7, 1.0]),
            top_k=rng.choice([0, 5, 100]),
            top_p=rng.choice([1.0, 0.9]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            seed=rng.randrange(2**64),
            max_tokens=rng.randint(1, max_tokens),
        )
        for number in range(count)
    ]


class Answer(NamedTuple):
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    last: Output


def run_alone_and_together(
    engine: Engine, requests: list[Request], *, alone: int
) -> dict[str, Answer]:
    """The answers of all at once, which the first ones must also get alone, bit for bit."""
    together = run(engine, requests)
    engine.flush_prefix_cache()
    for request in requests[:alone]:
        (own,) = run(engine, [request]).values()
        assert own.tokens == together[request.request_id].tokens
        assert own.logprobs == together[request.request_id].logprobs
    return together


def run(
    engine: Engine,
    requests: list[Request],
    *,
    each_step: Callable[[int, list[Output]], None] = lambda number, outputs: None,
    arrivals_per_step: int = 1000,
) -> dict[str, Answer]:
    """Feeds requests to an engine and steps it until it is empty."""
    parts: dict[str, list[Output]] = {}
    left, number = list(requests), 0
    while left or engine.has_work:
        for request in left[:arrivals_per_step]:
            engine.submit(request)
        del left[:arrivals_per_step]
        outputs = engine.step()
        for output in outputs:
            parts.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
        each_step(number, outputs)
        number += 1
        assert number < 100_000, "the engine makes no progress"
    return {name: _answer(outputs) for name, outputs in parts.items()}


def _answer(outputs: list[Output]) -> Answer:
    assert [output.finish_reason is None for output in outputs] == [True] * (len(outputs) - 1) + [
        False
    ], "a request must end exactly once, with its last output"
    return Answer(
        tuple(token for output in outputs for token in output.token_ids),
        tuple(value for output in outputs for value in output.logprobs),
        "".join(output.text for output in outputs),
        outputs[-1],
    )
