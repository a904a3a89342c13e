"""Logits to tokens: every knob is a per-row array, and randomness is a function of the request.

The token of a row is argmax(logits / temperature + noise) over the tokens that its cuts keep, with
noise(seed, position, token id) drawn from a Gumbel distribution: the Gumbel-max trick. The noise of
a token does not depend on which others are looked at, so the likeliest few can be tried first, and
a speculative run draws what a plain one draws.

Where the vocabulary is split over devices, each of them finds its own likeliest tokens, and those
few are gathered; all logits are gathered only for the rows that need them all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from jaxinfer import parallel
from jaxinfer.inputs import Batch, StepOutput
from jaxinfer.kernels.likeliest import likeliest
from jaxinfer.parallel import Axis

NUM_CANDIDATES = 64  # looked at first; the whole vocabulary only where these can't decide
_BASE_KEY = 0


class _Candidates(NamedTuple):
    """The likeliest tokens of each row, likeliest first."""

    logits: Float[Array, "B W"]  # divided by the temperature
    ids: Int[Array, "B W"]


def sample(
    logits: Float[Array, "B V"],
    batch: Batch,
    positions: Int[Array, " B"],
    *,
    axis: Axis = None,
    is_native: bool = False,
) -> StepOutput:
    """Draws the token at `positions` of each row; `axis` is that of V, where it is split.

    Where it `is_native`, native code finds the likeliest tokens: the same ones.

    Cuts come in Hugging Face's order: temperature, top_k, top_p of what is left, min_p. Ties go to
    the lowest id. A row whose logits are not finite gets token -1 and changes no other.
    """
    logits = _ban(logits, batch.banned, axis)
    scale = jnp.where(batch.temperature > 0, 1.0 / jnp.maximum(batch.temperature, 1e-6), 1.0)
    candidates = _likeliest(logits, axis, is_native)
    totals = log_sum(logits, candidates.logits[:, :1], axis)
    scaled = candidates._replace(logits=candidates.logits * scale[:, None])
    scaled_totals = lax.cond(
        jnp.any((batch.temperature > 0) & (batch.temperature != 1.0)),
        lambda: log_sum(logits * scale[:, None], scaled.logits[:, :1], axis),
        lambda: totals,
    )
    keys = _keys(batch.seed, positions)
    tokens, is_decided = _from_candidates(scaled, scaled_totals, keys, batch)
    tokens = lax.cond(
        jnp.all(is_decided | (batch.lengths == 0)),
        lambda: tokens,
        lambda: _from_vocabulary(
            parallel.gather(logits, axis), scale, keys, batch, tokens, is_decided
        ),
    )
    logprobs = parallel.pick(logits, tokens, axis) - totals
    return StepOutput(jnp.where(jnp.isfinite(logprobs), tokens, -1), logprobs)


def _ban(logits: Float[Array, "B V"], banned: Int[Array, "B X"], axis: Axis) -> Float[Array, "B V"]:
    def without() -> Array:
        rows = jnp.arange(logits.shape[0])[:, None]
        count = logits.shape[-1]
        if axis is None:
            ids = jnp.where(banned < 0, count, banned)
        else:
            is_own, places = parallel.own(banned, count, axis)
            ids = jnp.where(is_own, places, count)
        return logits.at[rows, ids].set(-jnp.inf, mode="drop")

    return lax.cond(jnp.any(banned >= 0), without, lambda: logits)


def _likeliest(logits: Float[Array, "B V"], axis: Axis, is_native: bool) -> _Candidates:
    # The barrier keeps XLA from merging later slices into this one: it would then no longer know
    # the pattern as a top-k, and sort the whole vocabulary (8 ms a row instead of 0.06).
    find = likeliest if is_native else lax.top_k
    found = find(logits, min(NUM_CANDIDATES, logits.shape[-1]))
    if axis is not None:
        found = _likeliest_of_all(*found, logits.shape[-1], axis)
    return _Candidates(*lax.optimization_barrier(tuple(found)))


def _likeliest_of_all(logits: Array, places: Array, count: int, axis: str) -> tuple[Array, Array]:
    """The likeliest of every device's candidates; each device has `count` tokens.

    Devices come in the order of their tokens, so ties go to the lowest id here too.
    """
    ids = places + parallel.first(count, axis)
    bits = lax.bitcast_convert_type(logits, ids.dtype)
    all_bits, all_ids = parallel.gather(jnp.stack([bits, ids]), axis)  # one small message
    every = lax.bitcast_convert_type(all_bits, logits.dtype)
    found, where = lax.top_k(every, min(NUM_CANDIDATES, every.shape[-1]))
    return found, jnp.take_along_axis(all_ids, where, axis=1)


def log_sum(
    logits: Float[Array, "B V"], top: Float[Array, "B 1"], axis: Axis = None
) -> Float[Array, " B"]:
    """log(sum(exp(logits))) of each row, given its largest."""
    return jnp.log(parallel.all_sum(jnp.sum(jnp.exp(logits - top), axis=-1), axis)) + top[:, 0]


def _keys(seed: UInt32[Array, "B 2"], positions: Int[Array, " B"]) -> Array:
    """One key a row, folded from its seed and position."""
    base = jax.random.key(_BASE_KEY, impl="threefry2x32")
    words = jnp.concatenate([seed, positions[:, None].astype(jnp.uint32)], axis=1)

    def one(own: Array) -> Array:
        # A loop: the cipher's code is in the program once, and XLA is slow to compile it.
        return lax.fori_loop(0, len(own), lambda at, key: jax.random.fold_in(key, own[at]), base)

    return jax.vmap(one)(words)


def _noise(key: Array, ids: Int[Array, " W"]) -> Float[Array, " W"]:
    """The Gumbel noise of some token ids under one key."""
    data = jax.vmap(lambda token: jax.random.key_data(jax.random.fold_in(key, token)))(ids)
    bits = data[..., 0] ^ data[..., 1]
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))


def _from_candidates(
    candidates: _Candidates, totals: Float[Array, " B"], keys: Array, batch: Batch
) -> tuple[Int[Array, " B"], Array]:
    """The draw among the candidates, and whether the rest of the vocabulary could change it."""
    width = candidates.ids.shape[1]
    ranks = jnp.arange(width)
    has_top_k = (batch.top_k > 0)[:, None]
    kept = ~has_top_k | (ranks < batch.top_k[:, None])
    weights = jnp.exp(candidates.logits - candidates.logits[:, :1])
    all_mass = jnp.exp(totals - candidates.logits[:, 0])[:, None]
    mass = jnp.where(has_top_k, jnp.sum(jnp.where(kept, weights, 0), -1, keepdims=True), all_mass)
    reached = jnp.cumsum(weights, axis=-1)
    kept &= reached - weights < batch.top_p[:, None] * mass
    kept &= weights >= batch.min_p[:, None]
    noise = jax.vmap(_noise)(keys, candidates.ids)
    drawn = jnp.argmax(jnp.where(kept, candidates.logits + noise, -jnp.inf), axis=-1)
    is_greedy = batch.temperature == 0
    drawn = jnp.where(is_greedy, 0, drawn)
    # Past the last candidate nothing is kept if a cut comes before it; top_p needs the right mass.
    has_mass = batch.top_k <= width
    is_cut_by_top_p = has_mass & (batch.top_p < 1) & (reached[:, -1] >= batch.top_p * mass[:, 0])
    is_cut_by_min_p = (has_mass | (batch.top_p == 1)) & (weights[:, -1] < batch.min_p)
    is_cut_by_top_k = (batch.top_k > 0) & (batch.top_k <= width)
    is_decided = is_greedy | is_cut_by_top_k | is_cut_by_top_p | is_cut_by_min_p
    return jnp.take_along_axis(candidates.ids, drawn[:, None], axis=1)[:, 0], is_decided


def _from_vocabulary(
    logits: Float[Array, "B V"],
    scale: Float[Array, " B"],
    keys: Array,
    batch: Batch,
    tokens: Int[Array, " B"],
    is_decided: Array,
) -> Int[Array, " B"]:
    """The draw over the whole vocabulary, row by row, for the rows that need it."""
    ids = jnp.arange(logits.shape[-1])

    def one(row: tuple[Array, ...]) -> Array:
        row_logits, row_scale, key, top_k, top_p, min_p, token, done = row

        def unsorted(noise: Array) -> Array:
            scaled = row_logits * row_scale
            kept = scaled >= jnp.max(scaled) + jnp.log(min_p)
            return jnp.argmax(jnp.where(kept, scaled + noise, -jnp.inf)).astype(token.dtype)

        def by_rank(noise: Array) -> Array:
            scaled, order = lax.sort((-row_logits * row_scale, ids), num_keys=1, is_stable=True)
            scaled = -scaled
            weights = jnp.exp(scaled - scaled[0])
            kept = (top_k == 0) | (ids < top_k)
            weights_kept = jnp.where(kept, weights, 0)
            reached = jnp.cumsum(weights_kept)
            kept &= reached - weights_kept < top_p * reached[-1]
            kept &= weights >= min_p
            drawn = jnp.argmax(jnp.where(kept, scaled + noise[order], -jnp.inf))
            return order[drawn]

        def draw() -> Array:
            needs_order = (top_k > 0) | (top_p < 1)
            return lax.cond(needs_order, by_rank, unsorted, _noise(key, ids))

        return lax.cond(done, lambda: token, draw)

    is_done = is_decided | (batch.lengths == 0)
    return lax.map(
        one,
        (logits, scale, keys, batch.top_k, batch.top_p, batch.min_p, tokens, is_done),
    )
