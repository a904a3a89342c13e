"""Which keys a program reduces where a row's keys are cut into splits, and how splits become one.

Splits have a fixed size, so that a row's sums are the same whatever else is in the batch.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxinfer.kernels.paged_attention import online


class Shape(NamedTuple):
    """What is the same for every program of a call."""

    rows: int  # of queries in a program
    group: int  # rows that are heads of one query
    keys: int  # reduced at a time
    split: int  # keys of a program
    window: int


class Span(NamedTuple):
    """Which blocks of keys a program reduces, and which keys its queries see."""

    first_block: Array
    end_block: Array
    end: Array  # first position that the row does not own
    start: Array  # of the row's first query
    first_row: Array  # of the tile


def span(start: Array, length: Array, first_row: Array, split: Array, shape: Shape) -> Span:
    """The span of one split, for the rows of queries that begin at `first_row`."""
    end = jnp.where(length > 0, start + length, 0)
    last_seen = start + lax.div(first_row + shape.rows - 1, shape.group)
    seen_end = jnp.minimum(jnp.minimum(end, last_seen + 1), (split + 1) * shape.split)
    first = split * shape.split
    if shape.window:
        first_seen = start + lax.div(first_row, shape.group) - shape.window + 1
        first = jnp.maximum(first, first_seen)
    first_block, end_block = (
        lax.div(first, shape.keys),
        lax.div(seen_end + shape.keys - 1, shape.keys),
    )
    return Span(first_block, jnp.maximum(first_block, end_block), end, start, first_row)


def sees(row: Array, key: Array, of: Span, shape: Shape) -> Array:
    """Whether the query in a row of the tile sees the key at a position."""
    last = of.start + lax.div(row + of.first_row, jnp.int32(shape.group))
    seen = (key <= last) & (key < of.end)
    return seen & (key > last - shape.window) if shape.window else seen


def merged(top: Array, total: Array, sums: Array) -> Array:
    """The softmax of rows [B, K, R, H] from those of their splits, [B, K, splits, R]."""
    return online.merge(*(jnp.swapaxes(leaf, 2, 3) for leaf in (top, total, sums)))
