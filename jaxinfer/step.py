"""The functions that run on the device: prefill, decode, score; pure, trees in and trees out."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer import cache as paged
from jaxinfer import models, sampling
from jaxinfer.cache import Cache
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.exact import enough_rows, with_rows
from jaxinfer.inputs import Batch, StepOutput
from jaxinfer.kernels import paged_attention

Params = object


def prefill(
    params: Params, cache: Cache, batch: Batch, *, model: ModelConfig, engine: EngineConfig
) -> tuple[Cache, StepOutput]:
    """Stores a chunk of T tokens a row and samples the token that follows it.

    The cache is consumed. A chunk in the middle of a prompt has `sample` 0: its token is dropped.
    """
    cache, x = _run(params, cache, batch, model=model, engine=engine)
    last = jnp.maximum(batch.lengths - 1, 0)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    out = _sample(params, x, batch, model=model, exact=engine.bits == "exact")
    kept = jnp.where(batch.sample == 1, batch.slots, engine.num_slots)
    last_tokens = cache.last_tokens.at[kept].set(jnp.maximum(out.tokens, 0))
    return cache._replace(last_tokens=last_tokens), out


def decode(
    params: Params, cache: Cache, batch: Batch, *, model: ModelConfig, engine: EngineConfig
) -> tuple[Cache, StepOutput]:
    """Stores one token a row and samples the next: a prefill of one token.

    A row with `take_last` continues with the token that the device sampled last for its slot.
    """
    return prefill(params, cache, batch, model=model, engine=engine)


def score(
    params: Params, cache: Cache, batch: Batch, *, model: ModelConfig, engine: EngineConfig
) -> tuple[Cache, Float[Array, "B T V"]]:
    """Stores a chunk of T tokens a row and returns the logits after each of them."""
    cache, x = _run(params, cache, batch, model=model, engine=engine)
    exact = engine.bits == "exact"
    return cache, models.module_of(model).head(params, x, config=model, exact=exact)


def _sample(
    params: Params, x: Float[Array, "B D"], batch: Batch, *, model: ModelConfig, exact: bool
) -> StepOutput:
    """The next token of each row, from the activations of its last one."""
    logits = models.module_of(model).head(params, x, config=model, exact=exact)
    rows = len(x)
    count = enough_rows(model.vocab_size, rows) if exact else rows
    logits, many = jax.tree.map(lambda leaf: with_rows(leaf, count), (logits, batch))
    drawn = sampling.sample(logits, many, many.starts + many.lengths)
    return jax.tree.map(lambda leaf: leaf[:rows], drawn)


def _run(
    params: Params, cache: Cache, batch: Batch, *, model: ModelConfig, engine: EngineConfig
) -> tuple[Cache, Float[Array, "B T D"]]:
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
    attention = paged_attention.backend(engine.attention)
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
            load=paged.from_pages,
            exact=exact,
        )

    x = models.module_of(model).forward(
        params, tokens, positions, attend, config=model, exact=exact
    )
    return Cache(tuple(k_pages), tuple(v_pages), cache.last_tokens), x
