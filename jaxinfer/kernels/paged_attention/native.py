"""Ragged paged attention for CPUs in C++: reads pages where they lie, and as far as rows reach."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.dims import Leaf
from jaxinfer.kernels import native
from jaxinfer.kernels.paged_attention.needs import Needs

_DTYPES = ("float32", "bfloat16", "int8")
_LANES = 16


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
    """What `reference` computes, in float32 from the pages on; see there for the arguments.

    A query's bits depend on nothing but what it sees: not on `block`, nor on `exact`. Where a row
    is to read past its page table, or a page that is not there, the step fails: JaxRuntimeError.
    """
    del block, load, exact, tiles
    call = jax.ffi.ffi_call(
        native.library().target("attention"), jax.ShapeDtypeStruct(q.shape, jnp.float32)
    )
    return call(
        q.astype(jnp.float32),
        k_pages,
        v_pages,
        page_table.astype(jnp.int32),
        starts.astype(jnp.int32),
        lengths.astype(jnp.int32),
        window=np.int64(window),
        scale=np.float32(q.shape[-1] ** -0.5 / math.log(2)),
        soft_cap=np.float32(soft_cap / math.log(2)),
    )


def refusal(needs: Needs) -> str:
    """Why this kernel can't serve an engine; "" where it can."""
    if needs.platform != "cpu":
        return f"is for CPUs, and this is a {needs.platform}"
    if needs.dtype not in _DTYPES:
        return f"reads pages of {', '.join(_DTYPES)}, not of {needs.dtype}"
    if needs.head_dim % _LANES:
        return f"has heads of a multiple of {_LANES}, not of {needs.head_dim}"
    return native.refusal() and f"can't be had: {native.refusal()}"
