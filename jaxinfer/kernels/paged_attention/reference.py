"""Ragged paged attention in plain JAX: the definition, and the path on CPU."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.dims import Leaf
from jaxinfer.exact import enough_rows, with_rows
from jaxinfer.kernels.paged_attention.online import capped

_NOTHING = -(2**30)
MIN_QUERY_ROWS = 4  # fewer rows leave XLA:CPU's fast batched dot, and change a row's bits


class _Softmax(NamedTuple):
    """A softmax that is not finished: the blocks so far, in powers of two."""

    top: Int[Array, "K B R 1"]  # least whole number not below any logit yet; _NOTHING at first
    total: Float[Array, "K B R 1"]  # sum of 2^(logit - top)
    out: Float[Array, "K B R H"]  # sum of 2^(logit - top) * v


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Leaf,
    v_pages: Leaf,
    page_table: Int[Array, "B M"],
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    *,
    block: int,
    window: int = 0,
    soft_cap: float = 0.0,
    load: Callable[..., Array] = lambda stored: stored,
    exact: bool = True,
    tiles: tuple[int, ...] = (),
) -> Float[Array, "B T N H"]:
    """Row b's query t, at position starts[b] + t, attends to the tokens at positions up to its own.

    Pages are [K, P, C, H]; row b's token s lies in page page_table[b, s // C] at offset s % C, and
    the new tokens are already there. With a window only the last `window` positions are seen.
    A `soft_cap` bounds logits: cap * tanh(logit / cap), 0 for none (Gemma 2, arXiv:2408.00118).
    `load` turns what is stored into values; int8 pages give it codes [..., H] and the bits of
    their scales, which lie behind the codes (see `rounded`). Queries t >= lengths[b] return zeros.
    The page table reaches to starts[b] + lengths[b] at least, and names pages of the pool up to it.
    What pages hold outside a row's positions, NaN included, changes nothing.

    Keys are reduced in blocks of `block` tokens, in order, so that a row's bits depend neither on
    its neighbours nor on the program that it runs in (Milakov and Gimelshein 2018 for the merge of
    blocks). The number of blocks follows the longest row, not the page table. Without `exact` few
    rows are not made many, and their bits may differ from those of the same rows among others.
    `tiles` are the sizes of a kernel, () for its own; there are none here.
    """
    del tiles
    rows, num_queries, num_heads, head_dim = q.shape
    num_kv_heads, _, page_size, _ = k_pages.shape
    group = num_heads // num_kv_heads
    pages_per_block = block // page_size
    q_KBRH, padding = _group_queries(q, num_kv_heads, scale=head_dim**-0.5 / math.log(2))
    last = starts[:, None] + jnp.repeat(jnp.arange(num_queries), group)[None, :]
    last = jnp.pad(last, ((0, 0), (0, padding)))  # [B, R]

    owned_end = starts + lengths

    def one_block(index: Array, softmax: _Softmax) -> _Softmax:
        pages = lax.dynamic_slice_in_dim(
            page_table, index * pages_per_block, pages_per_block, axis=1
        )
        seen = index * block + jnp.arange(block)  # [S]
        visible = seen <= last[..., None]  # [B, R, S]
        if window:
            visible &= seen > last[..., None] - window
        owned = seen < owned_end[:, None]  # [B, S]
        k_KBSH = load(*_gather(k_pages, pages, head_dim))
        v_KBSH = load(*_gather(v_pages, pages, head_dim))
        v_KBSH = jnp.where(owned[None, ..., None], v_KBSH, jnp.zeros((), v_KBSH.dtype))
        visible &= owned[:, None]
        return _merge(softmax, q_KBRH, k_KBSH, v_KBSH, visible, soft_cap=soft_cap, exact=exact)

    ends = jnp.where(lengths > 0, owned_end, 0)
    first = jnp.where(lengths > 0, starts + 1 - window, jnp.iinfo(jnp.int32).max) // block
    bounds = (jnp.clip(jnp.min(first), 0, None) if window else 0, -(-jnp.max(ends) // block))
    shape = q_KBRH.shape[:3]
    empty = _Softmax(
        top=jnp.full((*shape, 1), _NOTHING, jnp.int32),
        total=jnp.zeros((*shape, 1), jnp.float32),
        out=jnp.zeros((*shape, head_dim), jnp.float32),
    )
    done = lax.fori_loop(*bounds, one_block, empty)
    out_KBRH = jnp.where(done.total == 0, 0.0, done.out / done.total)
    out = out_KBRH[:, :, : num_queries * group].reshape(
        num_kv_heads, rows, num_queries, group, head_dim
    )
    out = jnp.transpose(out, (1, 2, 0, 3, 4)).reshape(q.shape)
    is_real = jnp.arange(num_queries)[None, :] < lengths[:, None]
    return jnp.where(is_real[..., None, None], out, 0.0)


def _group_queries(
    q: Float[Array, "B T N H"], num_kv_heads: int, *, scale: float
) -> tuple[Float[Array, "K B R H"], int]:
    """The queries that share a kv head as rows of one matrix, padded to MIN_QUERY_ROWS."""
    rows, num_queries, num_heads, head_dim = q.shape
    group = num_heads // num_kv_heads
    q = (q * scale).reshape(rows, num_queries, num_kv_heads, group, head_dim)
    q_KBRH = jnp.transpose(q, (2, 0, 1, 3, 4)).reshape(num_kv_heads, rows, -1, head_dim)
    padding = max(0, MIN_QUERY_ROWS - num_queries * group)
    return jnp.pad(q_KBRH, ((0, 0), (0, 0), (0, padding), (0, 0))), padding


def _gather(pages: Leaf, wanted: Int[Array, "B W"], head_dim: int) -> tuple[Array, ...]:
    """The wanted pages of each row, end to end: [K, B, W * C, H]; of int8 pages the scales beside.

    Heads and pages are one axis for the gather, so that nothing is transposed after it. Codes and
    scales are gathered apart: to cut them apart afterwards takes XLA:CPU longer than the gather.
    """
    num_kv_heads, num_pages, page_size, width = pages.shape
    rows, count = wanted.shape
    flat = pages.reshape(num_kv_heads * num_pages, page_size, width)
    places = (jnp.arange(num_kv_heads)[:, None, None] * num_pages + wanted[None]).reshape(-1)

    def part(first: int, size: int) -> Array:
        starts = jnp.stack([places, jnp.full_like(places, first)], axis=1)
        found = lax.gather(
            flat,
            starts,
            lax.GatherDimensionNumbers((1, 2), (0,), (0, 2)),
            (1, page_size, size),
            mode="promise_in_bounds",
        )
        return found.reshape(num_kv_heads, rows, count * page_size, size)

    if pages.dtype == jnp.int8:
        return part(0, head_dim), part(head_dim, width - head_dim)
    return (part(0, width),)


def _merge(
    softmax: _Softmax,
    q_KBRH: Array,
    k_KBSH: Array,
    v_KBSH: Array,
    visible: Bool[Array, "B R S"],
    *,
    soft_cap: float,
    exact: bool,
) -> _Softmax:
    """Takes one more block of keys into an unfinished softmax.

    Old sums fade by whole powers of two, which is exact: whether a compiler rounds `old * fade +
    new` once or twice, as it does for one size and not for another, the bits are the same.
    """
    over_h = (((3,), (3,)), ((0, 1), (0, 1)))
    over_s = (((3,), (2,)), ((0, 1), (0, 1)))
    logits = lax.dot_general(
        q_KBRH.astype(k_KBSH.dtype), k_KBSH, over_h, preferred_element_type=jnp.float32
    )
    logits = jnp.where(visible[None], capped(logits, soft_cap), -jnp.inf)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    block_top = jnp.where(largest == -jnp.inf, _NOTHING, jnp.ceil(largest).astype(jnp.int32))
    top = jnp.maximum(softmax.top, block_top)
    base = jnp.where(top == _NOTHING, 0, top).astype(jnp.float32)
    weights, total = _weigh((logits - base) * math.log(2), exact=exact)
    new = lax.dot_general(
        weights.astype(v_KBSH.dtype), v_KBSH, over_s, preferred_element_type=jnp.float32
    )
    fade = _power_of_two(softmax.top - top)
    return _Softmax(top=top, total=softmax.total * fade + total, out=softmax.out * fade + new)


def _weigh(
    exponents: Float[Array, "K B R S"], *, exact: bool
) -> tuple[Float[Array, "K B R S"], Float[Array, "K B R 1"]]:
    """exp of each, and its sum over the keys."""
    num_heads, rows, queries, keys = exponents.shape
    count = enough_rows(num_heads * queries * keys, rows) if exact else rows
    weights = jnp.exp(with_rows(exponents, count, axis=1))
    return weights[:, :rows], jnp.sum(weights, axis=-1, keepdims=True)[:, :rows]


def _power_of_two(exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """2^exponent for exponent <= 0, exactly; 0 below the range of float32."""
    bits = (jnp.maximum(exponent, -127) + 127) << 23
    return lax.bitcast_convert_type(bits, jnp.float32)
