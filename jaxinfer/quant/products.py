"""Products with a quantised weight: whole numbers times whole numbers, summed without rounding.

An activation is rounded to int8 with one scale a token, so a row's bits depend on the row alone,
and the sums are exact on every device, whatever the tiling and the row count. What is left in
floating point is element by element; barriers keep a compiler from joining its products to a sum
that follows, which rounds once in one program and twice in another.
"""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8, Int32

from jaxinfer.dims import Leaf
from jaxinfer.exact import largest
from jaxinfer.kernels import products as kernels
from jaxinfer.quant.leaf import QTensor
from jaxinfer.quant.rounding import LARGEST, hadamard

SMALLEST = 1e-30  # rows whose values are all smaller count as zero
MIN_DOT_ROWS = 2  # one row alone leaves XLA:CPU's path for many, and is 15 times as slow
MOST_FEW_ROWS = 8  # up to here a product is faster with the table first
MIN_FLOAT_ROWS = 8  # fewer may have other bits


class Tokens(NamedTuple):
    """Activations in whole numbers: scale * (digits[0] + digits[1] / 256)."""

    digits: Int8[Array, "digits rows K"]
    scale: Float[Array, "rows 1"]


def project(x: Float[Array, "rows K"], weight: QTensor, *, contract: int) -> Float[Array, "..."]:
    """x times the weight with its last `contract` axes flat; float32, [rows, N]."""
    rows, inner = x.shape
    outer = weight.shape[: len(weight.shape) - contract]
    if weight.product == kernels.NATIVE and inner <= kernels.MAX_INNER:
        flat = weight.codes.reshape(-1, inner), weight.scale.reshape(-1)
        return kernels.project(x, *flat, digits=weight.digits, block=weight.block)
    tokens = round_tokens(rotate(x, weight.block), num_digits=weight.digits)
    flat = tokens.digits.reshape(weight.digits * rows, inner)
    table = weight.codes.reshape(math.prod(outer), inner)
    own = kernels.sums_on_gpu(flat, table) if weight.product == kernels.PALLAS_GPU else None
    whole = _sums(flat, table) if own is None else own
    whole = _join(whole.reshape(weight.digits, rows, -1))
    return lax.optimization_barrier(whole * tokens.scale * weight.scale.reshape(1, -1))


def _sums(rows: Int8[Array, "rows K"], table: Leaf) -> Int32[Array, "rows N"]:
    """The products of all rows with all of the table's ([N, K]), exact in any order of summing.

    The table comes first where there are few rows: XLA:CPU then reads it as it lies, and what it
    lays out anew is the other side.
    """
    dot = functools.partial(
        lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        preferred_element_type=jnp.int32,
    )
    count = len(rows)
    if count > MOST_FEW_ROWS:
        return dot(rows, table)
    few = jnp.pad(rows, ((0, max(0, MIN_DOT_ROWS - count)), (0, 0)))
    return dot(table, few)[:, :count].T


def embed(weight: QTensor, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The rows of a table for some token ids, in float32."""
    found = weight.codes[tokens].astype(jnp.float32) * weight.scale[tokens][..., None]
    return lax.optimization_barrier(rotate(found, weight.block))


def rotate(x: Float[Array, "... K"], block: int) -> Float[Array, "... K"]:
    """Each block of channels times a Hadamard matrix; twice is as it was, but for rounding."""
    if block == 1:
        return x
    flat = x.reshape(-1, block)
    rows = len(flat)
    flat = jnp.pad(flat, ((0, max(0, MIN_FLOAT_ROWS - rows)), (0, 0)))
    out = lax.dot_general(
        flat,
        jnp.asarray(hadamard(block)),
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return out[:rows].reshape(x.shape)


def round_tokens(x: Float[Array, "rows K"], *, num_digits: int) -> Tokens:
    """Each row by its own largest value. A row with a value that is not finite gets such a scale.

    Two digits hold x as a whole number of 15 bits and a sign, split as 256 * high + low.
    """
    most = largest(x)
    top = LARGEST if num_digits == 1 else LARGEST * 256 + LARGEST
    inverse = jnp.where(most < SMALLEST, 0.0, top / most)
    whole = jnp.round(x * inverse)
    scale = most * jnp.float32(1 / top) * (1 if num_digits == 1 else 256)
    if num_digits == 1:
        return Tokens(whole.astype(jnp.int8)[None], scale)
    both = whole.astype(jnp.int32)
    high = (both + 128) >> 8
    return Tokens(jnp.stack([high, both - 256 * high]).astype(jnp.int8), scale)


def _join(sums: Int32[Array, "digits rows N"]) -> Float[Array, "rows N"]:
    """Sums of each digit as one number; a power of two rounds nothing, fused or not."""
    found = sums.astype(jnp.float32)
    return found[0] if len(found) == 1 else found[0] + found[1] * jnp.float32(1 / 256)
