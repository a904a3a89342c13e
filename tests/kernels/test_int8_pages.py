"""int8 pages whose scales lie apart, as the Pallas kernels read them: bits, bytes and steps."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cache as paged
from jaxinfer import step
from jaxinfer.bench.hardware.cases import MIXED, make_int8
from jaxinfer.cache import Cache
from jaxinfer.config import ModelConfig
from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.inputs import Batch, inert_batch
from jaxinfer.kernels.paged_attention import rounded
from jaxinfer.plan import plan_memory
from tests import tiny
from tests.kernels.attention import interpreter, relative_error
from tests.kernels.attention import run as attend

MODEL = replace(tiny.MODEL, head_dim=64)
PAGE_SIZES = {"reference": 32, "pallas_gpu": 32, "pallas_triton": 32, "pallas_tpu": 128}
KERNELS = ("pallas_gpu", "pallas_triton", "pallas_tpu")


def engine(attention: str, **cache: Any) -> EngineConfig:
    pages = CacheConfig(num_pages=12, dtype="int8", page_size=PAGE_SIZES[attention])
    return tiny.engine_config(
        attention=attention,
        attention_block=128,
        compute_dtype="bfloat16",
        num_slots=2,
        cache=replace(pages, **cache),
    )


def scattered(pages: Any, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and bits of scales, each token's at its place in a row of tokens: [.., tokens, _]."""
    whole = np.asarray(pages).swapaxes(0, 2).swapaxes(0, 1)  # [2L, K, W, C, _]
    rows = whole.reshape(*whole.shape[:2], -1, whole.shape[-1])
    return rows[..., :width], rows[..., -rounded.SCALE_BYTES :]


@pytest.mark.parametrize(
    "attention", ["pallas_gpu", pytest.param("pallas_tpu", marks=pytest.mark.full)]
)
def test_a_token_has_the_same_codes_and_scale_wherever_its_scale_lies(attention):
    rng = np.random.default_rng(3)
    new = 10 * rng.normal(size=(2, 20, MODEL.num_kv_heads, 64)).astype(np.float32)

    @partial(jax.jit, static_argnums=0)
    def bits_of(config: EngineConfig, new: jax.Array) -> jax.Array:
        where = paged.places(
            jnp.asarray([[3, 7], [1, 0]], jnp.int32),
            jnp.asarray([[118], [5]]) + jnp.arange(20),
            jnp.ones((2, 20), bool),
            page_size=128,
            trash_page=config.num_pages,
        )
        held = paged.make(MODEL, config)
        pools = tuple(paged.write(pool, new * (1 + at), where) for at, pool in enumerate(held.k))
        return paged.read_bits(Cache(pools, pools, held.last_tokens), jnp.asarray([3, 7, 1]))

    configs = (engine("reference", page_size=128), engine(attention, page_size=128))
    found = [scattered(bits_of(config, new), 64) for config in configs]
    for plain, apart in zip(*found, strict=True):
        np.testing.assert_array_equal(plain, apart)
        assert np.any(apart, axis=-1).sum() == 2 * MODEL.num_layers * MODEL.num_kv_heads * 40


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_they_take_what_the_plan_says_and_little_more_than_half_of_bfloat16(attention, head_dim):
    model = replace(MODEL, head_dim=head_dim)
    config = engine(attention)
    held = paged.make(model, config)
    taken = sum(leaf.nbytes for leaf in jax.tree.leaves((held.k, held.v)))
    plan = plan_memory(model, config)
    assert taken == plan.cache_bytes
    plain = plan_memory(model, engine(attention, dtype="auto"))
    assert plan.page_bytes / plain.page_bytes <= 0.55


@pytest.mark.full
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("poison", [np.inf, -np.inf])
def test_what_no_row_owns_changes_no_bit(backend, poison):
    case = MIXED.for_int8(backend)
    clean, expected = make_int8(backend, case, poison=0.0)
    dirty, _ = make_int8(backend, case, poison=poison)
    outs = [attend(backend, call, case, "int8") for call in (clean, dirty)]
    np.testing.assert_array_equal(*outs)
    assert relative_error(outs[0], expected) < 2e-2


def batch_of(config: EngineConfig, starts: list[int], lengths: list[int], tokens: Any) -> Batch:
    """Two rows whose pages lie in any order."""
    empty = inert_batch(
        2,
        tokens.shape[1],
        pages_per_seq=config.pages_per_seq,
        trash_slot=config.num_slots,
        trash_page=config.num_pages,
    )
    count = min(4, config.pages_per_seq)
    empty.page_table[:, :count] = np.array([[5, 2, 9, 0], [1, 8, 3, 11]])[:, :count]
    filled = empty._replace(
        tokens=tokens,
        starts=np.array(starts, np.int32),
        lengths=np.array(lengths, np.int32),
        slots=np.arange(2, dtype=np.int32),
    )
    return jax.tree.map(jnp.asarray, filled)


def logits_of(config: EngineConfig, model: ModelConfig) -> list[np.ndarray]:
    """Of a chunk that begins two rows, one that goes on, and a decode."""
    params = jax.tree.map(lambda leaf: leaf / 3, tiny.params("bfloat16", model))
    cache = paged.make(model, config)
    rng = np.random.default_rng(0)
    score = jax.jit(partial(step.score, model=model, engine=config))
    found = []
    for starts, lengths in (([0, 0], [40, 16]), ([40, 16], [24, 40]), ([64, 56], [1, 1])):
        tokens = rng.integers(1, 256, (2, max(lengths))).astype(np.int32)
        batch = batch_of(config, starts, lengths, tokens)
        cache, logits = score(params, cache, batch)
        found += [np.asarray(logits)[row, :count] for row, count in enumerate(lengths)]
    return found


@pytest.mark.full
@pytest.mark.parametrize("attention", KERNELS)
def test_steps_with_a_kernel_find_what_they_find_with_the_reference(attention):
    plain = logits_of(engine("reference"), MODEL)
    with interpreter(attention):
        own = logits_of(engine(attention), MODEL)
    for one, other in zip(plain, own, strict=True):
        assert np.abs(one - other).max() < 0.02 * np.abs(one).max()
        assert np.mean(one.argmax(-1) == other.argmax(-1)) > 0.9
