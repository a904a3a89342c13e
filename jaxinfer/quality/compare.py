"""Two models, or two ways to keep one, through the same forward, token by token."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxinfer import cache as paged
from jaxinfer import models, step
from jaxinfer.compile import Progress, compile_function
from jaxinfer.config import ModelConfig
from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.fingerprint import settle
from jaxinfer.inputs import inert_batch, pack, unpack
from jaxinfer.quality.texts import Window
from jaxinfer.quant import using

AT_ONCE = 32  # positions whose logits are there at once, twice


class Model(NamedTuple):
    """Weights, and what they are."""

    params: Any
    config: ModelConfig


class _Side(NamedTuple):
    params: Any
    model: ModelConfig
    engine: EngineConfig


class Compared(NamedTuple):
    """What two models say of each token of a window but the first, given those before it."""

    kl: np.ndarray
    """f32: nats by which the candidate's distribution diverges from the reference's."""
    reference_logprob: np.ndarray
    candidate_logprob: np.ndarray
    """f32: of the token that the text goes on with."""
    reference_top: np.ndarray
    candidate_top: np.ndarray
    """i32: the token that each finds likeliest."""
    targets: np.ndarray
    """i32: the token that the text goes on with."""


def compare(
    reference: Model,
    candidate: Model,
    pieces: Sequence[Window],
    *,
    engine: EngineConfig,
    size: int,
    progress: Progress = lambda stage, done, total: None,
) -> list[Compared]:
    """Runs each window through both models, as a prefill of its tokens would be served.

    `size` is the length of the longest window. Both have the dtype and attention that `engine`
    says; what differs between them is the weights, and that the reference keeps its keys and
    values in that dtype whatever engine.cache.dtype says.
    """
    config = one_chunk(engine, size)
    plain = replace(config, cache=replace(config.cache, dtype="auto"))
    sides = (_side(reference, plain), _side(candidate, config))
    packed = [jnp.asarray(pack_window(piece.tokens, config, size)) for piece in pieces]
    held = [(side.params, paged.make(side.model, side.engine)) for side in sides]
    kinds = [(side.model, side.engine) for side in sides]
    both = compile_function(_both(kinds, size), held, packed[0])
    found = []
    for number, (piece, batch) in enumerate(zip(pieces, packed, strict=True), start=1):
        leaves = both(held, batch)
        kept = [np.asarray(leaf)[: len(piece.tokens) - 1] for leaf in leaves]
        found.append(Compared(*kept, targets=piece.tokens[1:]))
        progress("compare", number, len(pieces))
    return found


def _side(model: Model, engine: EngineConfig) -> _Side:
    """Both as an engine would run them."""
    settled = settle(model.config, engine, jax.devices()[:1]).engine
    return _Side(using(model.params, settled.products), model.config, settled)


def one_chunk(engine: EngineConfig, size: int) -> EngineConfig:
    """One sequence, prefilled at once."""
    cache = CacheConfig(**{**vars(engine.cache), "num_pages": 0, "prefix": False})
    changes = {"num_slots": 1, "max_seq_len": size, "decode_rows": (1,), "prefill_chunks": (size,)}
    return EngineConfig(**{**vars(engine), **changes, "cache": cache, "score_chunk": 0})


def _both(kinds: Sequence[tuple[ModelConfig, EngineConfig]], size: int) -> Any:
    """A function of weights and an empty cache for each side, and a packed window."""

    def head(model: ModelConfig, engine: EngineConfig, params: Any, x: Array) -> Array:
        exact = engine.bits == "exact"
        logits = models.module_of(model).head(params, x, config=model, exact=exact)
        return jax.nn.log_softmax(logits)

    def compare_logits(held: Sequence[tuple[Any, Any]], packed: Any) -> tuple[Array, ...]:
        batch = unpack(packed[:, :-size], tokens=size)
        hidden = [
            step.hidden(params, cache, batch, model=model, engine=engine)[1]
            for (model, engine), (params, cache) in zip(kinds, held, strict=True)
        ]

        def some(given: tuple[Array, Array, Array]) -> tuple[Array, ...]:
            first, second = (
                head(*kind, params, x)
                for kind, (params, _), x in zip(kinds, held, given[:2], strict=True)
            )
            kl = jnp.sum(jnp.exp(first) * (first - second), axis=-1)
            wanted = given[2][:, None]
            logprobs = [jnp.take_along_axis(x, wanted, axis=1)[:, 0] for x in (first, second)]
            tops = [jnp.argmax(x, axis=-1).astype(jnp.int32) for x in (first, second)]
            return (kl, *logprobs, *tops)

        count = math.gcd(size, AT_ONCE)
        parts = [x.reshape(-1, count, x.shape[-1]) for x in hidden]
        found = lax.map(some, (*parts, packed[:, -size:].reshape(-1, count)))
        return tuple(leaf.reshape(-1) for leaf in found)

    return compare_logits


def pack_window(tokens: np.ndarray, engine: EngineConfig, size: int) -> np.ndarray:
    """The batch of a window, and beside it what each of its tokens is followed by."""
    batch = inert_batch(
        1,
        size,
        pages_per_seq=engine.pages_per_seq,
        trash_slot=engine.num_slots,
        trash_page=engine.num_pages,
    )
    batch.tokens[0, : len(tokens)] = tokens
    batch.lengths[0] = len(tokens)
    batch.page_table[0, : engine.num_pages] = np.arange(engine.num_pages)
    following = np.zeros((1, size), np.int32)
    following[0, : len(tokens) - 1] = tokens[1:]
    return np.concatenate([pack(batch), following], axis=1)
