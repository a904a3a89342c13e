"""Engines whose free pages are NaN, devices that fail, and answers compared bit by bit."""

import functools
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache import Cache
from jaxinfer.config import ModelConfig, Scheme
from jaxinfer.engine import Engine
from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.host.request import FinishReason, Output, Request
from jaxinfer.inputs import StepOutput
from jaxinfer.kernels import native
from jaxinfer.kernels.native import NATIVE
from jaxinfer.weights.assemble import quantise_leaves
from tests import tiny

# Small on purpose: XLA:CPU of jax 0.10 hands a reduction of 4,096 elements or more to another
# library, which adds in another order. Here no program has one so large: neither 32 rows or a
# chunk of 32 tokens of 64 numbers, nor 32 rows of 96 logits, nor a block of 8 keys of attention.
MODEL = ModelConfig(
    architecture="llama",
    vocab_size=96,
    num_layers=2,
    d_model=64,
    d_ff=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=512,
    eos_token_ids=(0,),
)
PLANTED = "INTERNAL: planted by a test"
SETUPS: tuple[dict[str, Any], ...] = (
    {},
    {"num_slots": 8, "decode_rows": (8,), "prefill_chunks": (16,), "overlap": False},
    {"decode_rows": (32,), "prefill_chunks": (8, 16, 32), "max_prefill_tokens": 8},
    {"cache": CacheConfig(page_size=4, num_pages=100), "num_slots": 20, "decode_rows": (16, 24)},
)
INT8_SETUPS: tuple[dict[str, Any], ...] = (
    {"cache": CacheConfig(page_size=8, num_pages=72, dtype="int8")},
    {"cache": CacheConfig(page_size=4, num_pages=100, dtype="int8")} | {"num_slots": 20},
)
# bfloat16 pages are stored as bits; four bytes of -1 are a scale of int8 pages that is NaN.
_NAN_BITS = {jnp.dtype(jnp.uint16): 0x7FC0, jnp.dtype(jnp.int8): -1}


class Kind(NamedTuple):
    """What an engine computes with."""

    dtype: str
    kernels: str = "auto"
    """native: attention, products and the likeliest tokens in C++, and refused without it."""
    weights: Scheme = "none"
    pages: str = "auto"

    @property
    def chosen(self) -> dict[str, Any]:
        """The kernels, as settings of an engine."""
        return {"attention": NATIVE, "products": NATIVE} if self.kernels == NATIVE else {}

    def __str__(self) -> str:
        return "-".join(part for part in self if part not in ("auto", "none"))


NATIVE_KINDS = tuple(
    Kind("bfloat16", NATIVE, weights, pages)
    for weights in ("none", "w8a8")
    for pages in ("auto", "int8")
)
native_only = pytest.mark.skipif(
    bool(native.lacks("avx512_bf16")), reason=f"no native kernels: {native.lacks('avx512_bf16')}"
)


class Answer(NamedTuple):
    """All that a request got."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    reason: FinishReason | None = None


def make_config(dtype: str, **changes: Any) -> EngineConfig:
    """Pages for a few long requests only, and decode programs for one row, for few and for many."""
    plain: dict[str, Any] = {
        "num_slots": 32,
        "decode_rows": (1, 8, 32),
        "max_seq_len": 256,
        "prefill_chunks": (8, 32),
        "max_prefill_tokens": 64,
        "attention_block": 8,
        "compute_dtype": dtype,
        "cache": CacheConfig(page_size=8, num_pages=72),
    }
    return EngineConfig(**(plain | changes))


@functools.cache
def shared_engine(kind: Kind, setup: int = 0) -> Engine:
    """An engine that several tests use, one after the other."""
    return make_engine(kind, **(SETUPS if kind.pages == "auto" else INT8_SETUPS)[setup])


def make_engine(kind: Kind, **changes: Any) -> Engine:
    """An engine whose programs all agree: its self-test has dropped none."""
    config = make_config(kind.dtype, **kind.chosen, **changes)
    model = replace(MODEL, quant=kind.weights)
    engine = Engine(make_params(kind), model, tiny.TokenText(), config, store=tiny.store())
    assert engine.self_test.dropped == (), "all programs agree, so the self-test dropped none"
    if kind.kernels == NATIVE:
        assert (engine.config.attention, engine.config.products) == (NATIVE, NATIVE)
    return engine


def make_params(kind: Kind) -> Any:
    """The model's weights, rounded where that is asked for."""
    plain = tiny.params(kind.dtype, MODEL)
    if kind.weights == "none":
        return plain
    leaves = quantise_leaves(jax.tree.leaves(plain), replace(MODEL, quant=kind.weights))
    return jax.tree.unflatten(jax.tree.structure(plain), leaves)


def make_requests(count: int, *, seed: int) -> list[Request]:
    """1 to 200 prompt tokens, many with a beginning in common; every way of sampling."""
    rng = random.Random(seed)
    beginnings = [_tokens(rng, size) for size in (24, 40, 96, 160)]
    return [
        tiny.make_request(
            f"r{number}",
            [*rng.choice(((), *beginnings)), *_tokens(rng, rng.choice((1, 2, 7, 8, 16, 33, 40)))],
            temperature=rng.choice((0.0, 0.0, 0.7, 1.0)),
            top_k=rng.choice((0, 5, 80)),
            top_p=rng.choice((1.0, 0.9)),
            min_p=rng.choice((0.0, 0.0, 0.05)),
            seed=rng.randrange(2**64),
            max_tokens=rng.randint(1, 40),
        )
        for number in range(count)
    ]


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(1, MODEL.vocab_size) for _ in range(count)]


@functools.partial(jax.jit, donate_argnums=0)
def _fill_with_nan(cache: Cache, mask: jax.Array) -> Cache:
    def fill(pool: jax.Array) -> jax.Array:
        nan = jnp.asarray(_NAN_BITS.get(pool.dtype, jnp.nan), pool.dtype)
        return jnp.where(mask[None, :, None, None], nan, pool)

    return Cache(tuple(map(fill, cache.k)), tuple(map(fill, cache.v)), cache.last_tokens)


def poison(engine: Engine, pages: Iterable[int]) -> None:
    """Fills these pages with NaN, in all layers, behind whatever is under way."""
    mask = np.zeros(engine.config.num_pages + 1, bool)
    mask[list(pages)] = True
    engine.device.cache = _fill_with_nan(engine.device.cache, mask)


def poison_free_pages(engine: Engine) -> None:
    """NaN in every page that no sequence owns and no prefix needs, and in the trash page."""
    pool, known = engine._scheduler.pool, set(engine._scheduler.prefix.pages)
    free = (page for page in range(pool.num_pages) if not pool.num_owners(page))
    poison(engine, [page for page in free if page not in known] + [pool.num_pages])


class BrokenOutput:
    """A result that a device promised and never gave."""

    def copy_to_host_async(self) -> None:
        """Nothing comes."""

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise jax.errors.JaxRuntimeError(PLANTED)


class Faults:
    """Makes an engine's device fail when asked to; what the cache held is lost each time."""

    def __init__(self, engine: Engine) -> None:
        self.wanted = ""
        self.num_failed = 0
        self._programs, self._sound = engine.programs, dict(engine.programs)

    def __enter__(self) -> "Faults":
        for shape, program in self._sound.items():
            runs = functools.partial(self._run, program.run, shape.phase)
            self._programs[shape] = replace(program, run=runs)
        return self

    def __exit__(self, *_: object) -> None:
        self._programs.update(self._sound)

    def plant(self, phase: str) -> None:
        """The next program that is dispatched fails, or the next decode once it is read."""
        self.wanted = phase

    def _run(self, run: Callable[..., Any], kind: str, *arguments: Any) -> tuple[Cache, Any]:
        cache, output = run(*arguments)
        if not self.wanted or (self.wanted == "read" and kind != "decode"):
            return cache, output
        wanted, self.wanted = self.wanted, ""
        self.num_failed += 1
        if wanted == "dispatch":
            jax.tree.map(lambda leaf: leaf.delete(), cache)
            raise jax.errors.JaxRuntimeError(PLANTED)
        lost = _fill_with_nan(cache, np.ones(cache.k[0].shape[1], bool))
        return lost, StepOutput(BrokenOutput(), BrokenOutput())


def alone(engine: Engine, request: Request) -> Answer:
    """What a request gets from an engine that has nothing else to do, and nothing cached."""
    engine.flush_prefix_cache()
    return drive(engine, [[request]])[request.request_id]


def drive(
    engine: Engine,
    arrivals: Iterable[list[Request]],
    between: Callable[[int], None] = lambda step: None,
) -> dict[str, Answer]:
    """Takes in one list of requests a step until all have ended; poisons before every step."""
    found: dict[str, list[Output]] = {}
    lists, step, more = iter(arrivals), 0, True
    while more or engine.has_work:
        new = next(lists, None)
        more = new is not None
        for request in new or ():
            engine.submit(request)
        between(step)
        poison_free_pages(engine)
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
        step += 1
        assert step < 1_000_000, "the engine makes no progress"
    return {name: _answer(outputs) for name, outputs in found.items()}


def _answer(outputs: list[Output]) -> Answer:
    return Answer(
        tuple(token for output in outputs for token in output.token_ids),
        tuple(value for output in outputs for value in output.logprobs),
        outputs[-1].finish_reason,
    )


def differing_bits(found: Answer, expected: Answer) -> int:
    """Bits of tokens and logprobs that are not the same; a missing or extra token counts as 64.

    Of an answer that was cancelled, only what it got is compared.
    """
    is_cut = found.reason is FinishReason.CANCELLED
    size = len(found.tokens) if is_cut else len(expected.tokens)
    missing = abs(len(found.tokens) - min(size, len(expected.tokens)))
    size = min(size, len(found.tokens), len(expected.tokens))
    ours, theirs = (
        np.concatenate(
            [np.asarray(one.tokens[:size], "i4"), np.asarray(one.logprobs[:size], "f4").view("i4")]
        )
        for one in (found, expected)
    )
    return 64 * missing + int(np.bitwise_count(np.bitwise_xor(ours, theirs).view("u4")).sum())


def counts(engine: Engine) -> Counter[str]:
    """What an engine has seen, for differences."""
    stats = engine.stats()
    return Counter(
        preemptions=stats.num_preemptions,
        recoveries=stats.num_recoveries,
        cached_tokens=stats.num_cached_tokens,
        evicted_pages=stats.num_evicted_pages,
        steps=stats.num_steps,
        compiles=stats.num_compiles_after_start,
    )
