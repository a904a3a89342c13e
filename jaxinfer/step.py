"""The functions that run on the device: prefill, decode, score; pure, trees in and trees out.

Where arrays are split over devices, each device runs them on its part of params and cache; `model`
describes that part, `split` says what is a part, and batch and outputs are the same everywhere.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer import cache as paged
from jaxinfer import models, parallel, sampling
from jaxinfer.cache import Cache
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.exact import enough_rows, with_rows
from jaxinfer.inputs import Batch, Scores, StepOutput
from jaxinfer.kernels import paged_attention
from jaxinfer.kernels.products import NATIVE
from jaxinfer.parallel import WHOLE, Split

Params = object
SCORED_AT_ONCE = 32  # positions whose logits are there at once


def prefill(
    params: Params,
    cache: Cache,
    batch: Batch,
    *,
    model: ModelConfig,
    engine: EngineConfig,
    split: Split = WHOLE,
) -> tuple[Cache, StepOutput]:
    """Stores a chunk of T tokens a row and samples the token that follows it.

    The cache is consumed. A chunk in the middle of a prompt has `sample` 0: its token is dropped.
    """
    params = models.using(params, model, engine.products)
    cache, x = hidden(params, cache, batch, model=model, engine=engine, split=split)
    last = jnp.maximum(batch.lengths - 1, 0)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    out = _sample(params, x, batch, model=model, engine=engine, split=split)
    kept = jnp.where(batch.sample == 1, batch.slots, engine.num_slots)
    last_tokens = cache.last_tokens.at[kept].set(jnp.maximum(out.tokens, 0))
    return cache._replace(last_tokens=last_tokens), out


def decode(
    params: Params,
    cache: Cache,
    batch: Batch,
    *,
    model: ModelConfig,
    engine: EngineConfig,
    split: Split = WHOLE,
) -> tuple[Cache, StepOutput]:
    """Stores one token a row and samples the next: a prefill of one token.

    A row with `take_last` continues with the token that the device sampled last for its slot.
    """
    return prefill(params, cache, batch, model=model, engine=engine, split=split)


def score(
    params: Params,
    cache: Cache,
    batch: Batch,
    *,
    model: ModelConfig,
    engine: EngineConfig,
    split: Split = WHOLE,
) -> tuple[Cache, Float[Array, "B T V"]]:
    """Stores a chunk of T tokens a row and returns the logits after each of them."""
    params = models.using(params, model, engine.products)
    cache, x = hidden(params, cache, batch, model=model, engine=engine, split=split)
    exact = engine.bits == "exact"
    logits = models.module_of(model).head(params, x, config=model, exact=exact)
    return cache, parallel.gather(logits, split.vocab)


def score_targets(
    params: Params,
    cache: Cache,
    batch: Batch,
    targets: Int[Array, "B T"],
    *,
    model: ModelConfig,
    engine: EngineConfig,
    split: Split = WHOLE,
) -> tuple[Cache, Scores]:
    """Stores a chunk of T tokens a row, and says how likely `targets` were to follow each of them.

    Logits are made for a few positions at a time: those of a whole chunk may not fit.
    """
    params = models.using(params, model, engine.products)
    cache, x = hidden(params, cache, batch, model=model, engine=engine, split=split)
    head = models.module_of(model).head

    def some(given: tuple[Array, Array]) -> Scores:
        logits = head(params, given[0], config=model, exact=engine.bits == "exact")
        top = parallel.all_max(jnp.max(logits, axis=-1, keepdims=True), split.vocab)
        chosen = parallel.pick(logits, given[1], split.vocab)
        logprobs = chosen - sampling.log_sum(logits, top, split.vocab)
        return Scores(logprobs, chosen >= top[:, 0])

    count = math.gcd(targets.size, SCORED_AT_ONCE)
    parts = x.reshape(-1, count, x.shape[-1]), targets.reshape(-1, count)
    found = lax.map(some, parts)
    return cache, jax.tree.map(lambda leaf: leaf.reshape(targets.shape), found)


def hidden(
    params: Params,
    cache: Cache,
    batch: Batch,
    *,
    model: ModelConfig,
    engine: EngineConfig,
    split: Split = WHOLE,
) -> tuple[Cache, Float[Array, "B T D"]]:
    """Stores a chunk of T tokens a row; returns the residual stream after the last layer."""
    rows, num_tokens = batch.tokens.shape
    first = jnp.where(batch.take_last == 1, cache.last_tokens[batch.slots], batch.tokens[:, 0])
    tokens = batch.tokens.at[:, 0].set(first)
    offsets = jnp.arange(num_tokens, dtype=jnp.int32)[None, :]
    positions = batch.starts[:, None] + offsets
    where = paged.places(
        batch.page_table,
        positions,
        offsets < batch.lengths[:, None],
        page_size=engine.cache.page_size,
        trash_page=engine.num_pages,
    )
    attention, load = paged_attention.backend(engine.attention), paged.reader(engine)
    exact = engine.bits == "exact"
    k_pages, v_pages = list(cache.k), list(cache.v)

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
        k_pages[layer] = paged.write(k_pages[layer], k, where)
        v_pages[layer] = paged.write(v_pages[layer], v, where)
        return attention(
            q,
            k_pages[layer],
            v_pages[layer],
            batch.page_table,
            batch.starts,
            batch.lengths,
            block=engine.attention_block,
            window=model.window(layer),
            load=load,
            exact=exact,
            tiles=engine.attention_tiles,
        )

    x = models.module_of(model).forward(
        params, tokens, positions, attend, config=model, exact=exact, split=split
    )
    return Cache(tuple(k_pages), tuple(v_pages), cache.last_tokens), x


def _sample(
    params: Params,
    x: Float[Array, "B D"],
    batch: Batch,
    *,
    model: ModelConfig,
    engine: EngineConfig,
    split: Split,
) -> StepOutput:
    """The next token of each row, from the activations of its last one."""
    exact, is_native = engine.bits == "exact", engine.products == NATIVE
    logits = models.module_of(model).head(params, x, config=model, exact=exact)
    rows = len(x)
    count = enough_rows(model.vocab_size, rows) if exact else rows
    logits, many = jax.tree.map(lambda leaf: with_rows(leaf, count), (logits, batch))
    ends = many.starts + many.lengths
    drawn = sampling.sample(logits, many, ends, axis=split.vocab, is_native=is_native)
    return jax.tree.map(lambda leaf: leaf[:rows], drawn)
