"""Keys and values in int8 pages: how near they are, what they take, who can read them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cache as paged
from jaxinfer.config import load
from jaxinfer.engine_config import CacheConfig, EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.fingerprint import program_key
from jaxinfer.kernels.paged_attention import needs, reference, rounded
from jaxinfer.plan import plan_memory
from jaxinfer.quality.compare import Model, compare
from jaxinfer.quality.report import figures
from jaxinfer.quality.texts import Window
from jaxinfer.weights.demo import DEMOS
from tests import tiny
from tests.kernels.attention import Case, make, relative_error

INT8 = CacheConfig(dtype="int8")


def values(seed: int = 0) -> np.ndarray:
    """Heads of very different size, with outliers and zeros: [tokens, heads, 64]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, 3, 64)) * 10.0 ** rng.integers(-6, 6, (40, 3, 1))
    x[3, 1, 7] *= 1000
    x[5] = 0
    return x.astype(np.float32)


def read(packed: jax.Array, dtype: str = "float32") -> np.ndarray:
    found = rounded.unpack(packed[..., :-4], packed[..., -4:], dtype)
    return np.asarray(found.astype(jnp.float32), np.float64)


@pytest.mark.parametrize(("dtype", "more"), [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_a_value_is_within_half_a_step_of_its_head(dtype, more):
    x = values()
    found = read(rounded.pack(jnp.asarray(x)), dtype)
    largest = np.max(np.abs(x.astype(np.float64)), axis=-1, keepdims=True)
    assert np.all(np.abs(found - x) <= largest / 254 + more * largest)
    assert not found[5].any()
    worst = np.max(np.abs(found - x)[[0, 1, 2]] / largest[[0, 1, 2]])
    assert worst > 0.5 / 254, "a bound that nothing comes near would prove nothing"


def test_a_heads_bits_depend_on_the_head_alone():
    x = jnp.asarray(values())
    whole = np.asarray(rounded.pack(x))
    assert whole.shape == (40, 3, 68) and whole.dtype == np.int8
    for rows in (1, 2, 7):
        assert np.array_equal(np.asarray(rounded.pack(x[:rows])), whole[:rows])


def test_what_is_not_finite_stays_so_in_its_head_alone():
    x = values()
    clean = read(rounded.pack(jnp.asarray(x)))
    for bad in (np.nan, np.inf):
        x[2, 0, 9] = bad
        found = read(rounded.pack(jnp.asarray(x)))
        assert not np.isfinite(found[2, 0]).any()
        found[2, 0] = clean[2, 0]
        assert np.array_equal(found, clean)


@pytest.mark.parametrize("window", [0, 20])
def test_attention_over_int8_pages_is_near_that_over_floats(window):
    case = Case(((0, 5), (60, 17), (12, 0), (100, 1), (191, 1)), window=window)
    call, expected = make(case, "float32")
    pages = [rounded.pack(pool) for pool in (call.k_pages, call.v_pages)]
    assert np.isnan(read(pages[0])).any(), "what no row owns is poisoned"
    engine = EngineConfig(compute_dtype="float32", cache=INT8)
    out = np.asarray(
        reference.paged_attention(
            call.q,
            *pages,
            *call[3:],
            block=case.block,
            window=case.window,
            load=paged.reader(engine),
        )
    )
    assert 1e-4 < relative_error(out, expected) < 0.03


def test_a_token_takes_little_more_than_half_of_what_it_takes_in_bfloat16():
    model = DEMOS["smollm2-135m"].config
    plain, eight = (
        plan_memory(model, EngineConfig(max_seq_len=256, num_slots=2, cache=cache))
        for cache in (CacheConfig(), INT8)
    )
    assert eight.page_bytes / plain.page_bytes == (64 + 4) / 128 <= 0.55
    engine = tiny.engine_config(compute_dtype="bfloat16", cache=INT8, num_slots=1)
    held = paged.make(tiny.MODEL, engine)
    assert {leaf.dtype for leaf in (*held.k, *held.v)} == {jnp.dtype(jnp.int8)}
    taken = sum(leaf.nbytes for leaf in (*held.k, *held.v))
    assert taken == plan_memory(tiny.MODEL, engine).cache_bytes


def test_programs_follow_the_setting():
    engine = load("engine.cache.dtype=int8").engine
    assert engine.cache.dtype == "int8" and engine.scoring.cache.dtype == "int8"
    keys = [
        program_key("x", tiny.MODEL, one, arguments=(), devices=jax.devices()[:1])
        for one in (engine, replace(engine, cache=CacheConfig()))
    ]
    assert keys[0]["engine"] != keys[1]["engine"]
    with pytest.raises(ConfigError, match="one of auto, int8"):
        load("engine.cache.dtype=int4")


def test_kernels_are_asked_for_the_pages_dtype(monkeypatch):
    """So that one that can't read int8 refuses it: see kernels/test_attention_choice.py."""
    asked = []
    monkeypatch.setattr(
        "jaxinfer.kernels.paged_attention.needs_here",
        lambda **known: asked.append(known["dtype"]) or needs.Needs("tpu", "", **known),
    )
    for cache in (CacheConfig(num_pages=32), CacheConfig(num_pages=32, dtype="int8")):
        config = tiny.engine_config(attention="pallas_gpu", cache=cache, num_slots=1)
        with pytest.raises(ConfigError, match="needs a GPU"):
            tiny.Engine(tiny.params(), tiny.MODEL, tiny.TokenText(), config)
    assert asked == ["float32", "int8"]


def test_a_comparison_sees_what_the_pages_do():
    rng = np.random.default_rng(0)
    pieces = [Window(rng.integers(0, 256, size).astype(np.int32), "") for size in (40, 64)]
    sides = [Model(jax.tree.map(lambda leaf: leaf / 3, tiny.params()), tiny.MODEL)] * 2
    engine = EngineConfig(compute_dtype="float32", attention_block=32, cache=INT8)
    found = figures("x", compare(*sides, pieces, engine=engine, size=64))
    assert 1e-8 < found.kl.value < 0.01
    assert found.top1.value > 0.9
