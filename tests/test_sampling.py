"""Sampling against its definition: cuts in order, Gumbel-max, one noise for each token."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import sampling
from jaxinfer.inputs import inert_batch

sample = jax.jit(sampling.sample)


def batch_of(rows, **fields):
    batch = inert_batch(rows, 1, pages_per_seq=1, trash_slot=0, trash_page=0)
    batch.lengths[:] = 1
    for name, value in fields.items():
        getattr(batch, name)[:] = value
    return jax.tree.map(jnp.asarray, batch)


@functools.cache
def noise(seed, position, vocab_size):
    halves = jnp.array([[seed & 0xFFFFFFFF, seed >> 32]], jnp.uint32)
    key = sampling._keys(halves, jnp.array([position], jnp.int32))[0]
    return np.asarray(sampling._noise(key, jnp.arange(vocab_size)), np.float64)


def by_definition(logits, *, temperature, top_k, top_p, min_p, seed, position):
    """The token that the docstring of `sample` describes, in float64."""
    if temperature == 0:
        return int(np.argmax(logits))
    scaled = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    if top_k:
        order = order[:top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    before = np.cumsum(weights) - weights
    order = order[before < top_p * weights.sum()]
    order = order[np.exp(scaled[order] - scaled[order[0]]) >= min_p]
    drawn = scaled[order] + noise(seed, position, len(logits))[order]
    return int(order[np.argmax(drawn)])


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 64, 200])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2])
@pytest.mark.parametrize("min_p", [0.0, 0.1])
def test_draws_what_the_definition_draws(temperature, top_k, top_p, min_p):
    rng = np.random.default_rng(top_k)
    logits = rng.normal(scale=2.0, size=(16, 1000)).astype(np.float32)
    knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    batch = batch_of(16, **knobs, seed=np.array([5, 9], np.uint32))
    positions = np.arange(16, dtype=np.int32) % 4
    tokens = sample(jnp.asarray(logits), batch, jnp.asarray(positions)).tokens
    seed = 5 + (9 << 32)
    expected = [
        by_definition(row, **knobs, seed=seed, position=int(position))
        for row, position in zip(logits, positions, strict=True)
    ]
    assert np.asarray(tokens).tolist() == expected


def test_a_row_draws_the_same_whatever_its_neighbours_ask():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(8, 500)).astype(np.float32)
    mixed = batch_of(
        8,
        temperature=np.array([0, 1, 1, 1, 0.5, 1, 2, 0], np.float32),
        top_k=np.array([0, 0, 3, 100, 0, 0, 0, 0], np.int32),
        top_p=np.array([1, 1, 1, 1, 0.5, 0.99, 1, 1], np.float32),
        seed=np.arange(16, dtype=np.uint32).reshape(8, 2),
    )
    together = sample(jnp.asarray(logits), mixed, jnp.arange(8))
    for row in range(8):
        same = jax.tree.map(lambda field, row=row: jnp.repeat(field[row : row + 1], 8, 0), mixed)
        rows = jnp.repeat(jnp.asarray(logits[row : row + 1]), 8, 0)
        alone = sample(rows, same, jnp.full(8, row))
        assert int(alone.tokens[3]) == int(together.tokens[row])
        assert float(alone.logprobs[3]) == float(together.logprobs[row])


def test_frequencies_follow_the_probabilities():
    logits = np.random.default_rng(0).normal(size=32).astype(np.float32)
    rows, rounds = 2048, 10
    batch = batch_of(rows, temperature=1.0, seed=np.array([1, 2], np.uint32))
    counts = np.zeros(32)
    for number in range(rounds):
        positions = jnp.arange(rows) + number * rows
        tokens = sample(jnp.tile(logits, (rows, 1)), batch, positions).tokens
        counts += np.bincount(np.asarray(tokens), minlength=32)
    expected = np.exp(logits) / np.exp(logits).sum() * rows * rounds
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 31 + 4 * math.sqrt(2 * 31)  # about p > 1e-4


def test_noise_is_gumbel_and_differs_by_seed_position_and_token():
    draws = [
        noise(seed, position, 20_000) for seed, position in ((0, 0), (1, 0), (0, 1), (2**40, 0))
    ]
    for one in draws:
        assert abs(one.mean() - 0.5772) < 0.03
        assert abs(one.var() - math.pi**2 / 6) < 0.07
    for place, one in enumerate(draws):
        for other in draws[:place]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.03


def test_logprobs_are_those_of_the_model():
    logits = np.random.default_rng(1).normal(size=(8, 300)).astype(np.float32)
    out = sample(jnp.asarray(logits), batch_of(8, temperature=0.7, top_k=5), jnp.arange(8))
    full = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    expected = full[np.arange(8), np.asarray(out.tokens)]
    np.testing.assert_allclose(np.asarray(out.logprobs), expected, atol=1e-5)


def test_banned_tokens_are_never_drawn_and_ties_go_to_the_lowest_id():
    logits = jnp.zeros((8, 100)).at[:, 40].set(1.0)
    banned = np.full((8, 16), -1, np.int32)
    banned[:, 2] = 40
    assert np.asarray(sample(logits, batch_of(8), jnp.arange(8)).tokens).tolist() == [40] * 8
    out = sample(logits, batch_of(8, banned=banned), jnp.arange(8))
    assert np.asarray(out.tokens).tolist() == [0] * 8


def test_a_row_that_is_not_finite_is_marked_and_changes_no_other():
    logits = np.random.default_rng(1).normal(size=(8, 300)).astype(np.float32)
    clean = sample(jnp.asarray(logits), batch_of(8, temperature=1.0), jnp.arange(8))
    logits[3] = np.nan
    logits[5, 17] = np.inf
    out = sample(jnp.asarray(logits), batch_of(8, temperature=1.0), jnp.arange(8))
    assert np.asarray(out.tokens)[[3, 5]].tolist() == [-1, -1]
    others = [0, 1, 2, 4, 6, 7]
    assert np.array_equal(np.asarray(out.tokens)[others], np.asarray(clean.tokens)[others])
