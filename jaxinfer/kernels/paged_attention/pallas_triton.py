"""Ragged paged attention for GPUs of NVIDIA from Ampere on, by way of Triton.

One program is some rows of a row's queries for one kv head, against one split of its keys; what
splits come to is merged in order afterwards. Each key is read by the address that the page table
gives it, so pages may have any size, and only keys that the row owns are read.

Codes of int8 pages are multiplied in the dtype of the queries, which holds them exactly; their
scales are factors of logits and of weights.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxinfer.dims import Leaf
from jaxinfer.errors import ConfigError
from jaxinfer.kernels.paged_attention import online, queries, splits
from jaxinfer.kernels.paged_attention.needs import Needs
from jaxinfer.kernels.paged_attention.rounded import Rounded, values_dtype
from jaxinfer.kernels.paged_attention.tiles import TRITON_LEAST, triton_tiles

_TRITON = "jax.experimental.pallas.triton"
plt: Any = import_module(_TRITON) if find_spec(_TRITON) else None  # jax 0.11 says it will go
_DTYPES = ("bfloat16", "float16", "float32", "int8")
_LEAST_CAPABILITY = 8  # below it XLA refuses Triton
_MOST_HEAD_DIM = 256
_MOST_CODES = 2**31  # jax counts elements in 32 bits up to 4 GiB
_is_interpreted: ContextVar[bool] = ContextVar("is_interpreted", default=False)


class _Kind(NamedTuple):
    """What is the same for every row of a call."""

    shape: splits.Shape
    page_size: int
    real_rows: int  # of queries; those that fill up the last tile are not stored
    soft_cap: float


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
    """See reference.paged_attention; `load` says what codes are multiplied in.

    `exact` changes nothing here: rows never share a sum.
    """
    del exact
    batch, num_queries, num_heads, head_dim = q.shape
    stored = k_pages.codes if isinstance(k_pages, Rounded) else k_pages
    if stored.dtype == jnp.int8 and stored.size >= _MOST_CODES:
        raise ConfigError(
            f"a layer's int8 pages are {stored.size} codes, and pallas_triton reaches "
            f"{_MOST_CODES - 1}; lower engine.cache.num_pages"
        )
    num_kv_heads, _, page_size, _ = stored.shape
    group = num_heads // num_kv_heads
    longest = page_table.shape[1] * page_size
    sizes = triton_tiles(longest, head_dim, block=block, dtype=stored.dtype, chosen=tiles)
    q_BKRH = queries.grouped(q, num_kv_heads, tile=sizes.rows).astype(values_dtype(k_pages, load))
    num_splits, num_rows = -(-longest // sizes.split), q_BKRH.shape[2]
    shape = splits.Shape(sizes.rows, group, sizes.keys, sizes.split, window)
    kind = _Kind(shape, page_size, num_queries * group, soft_cap)
    of_split = (batch, num_kv_heads, num_splits, num_rows)

    def of_tile(*width: int, **place: Any) -> pl.BlockSpec:
        last = (0,) * len(width)
        return pl.BlockSpec(
            (None, None, None, sizes.rows, *width),
            lambda work, head, row: (
                row,
                head,
                lax.rem(work, num_splits),
                lax.div(work, num_splits),
                *last,
            ),
        )

    def of_queries(work: Array, head: Array, row: Array) -> tuple[Array | int, ...]:
        return row, head, lax.div(work, num_splits), 0

    top, total, sums = pl.pallas_call(
        functools.partial(_kernel, num_splits=num_splits, kind=kind),
        out_shape=(
            jax.ShapeDtypeStruct(of_split, jnp.int32),
            jax.ShapeDtypeStruct(of_split, jnp.float32),
            jax.ShapeDtypeStruct((*of_split, head_dim), jnp.float32),
        ),
        grid=(num_splits * num_rows // sizes.rows, num_kv_heads, batch),
        in_specs=[
            *(pl.BlockSpec() for _ in range(3)),
            pl.BlockSpec((None, None, sizes.rows, head_dim), of_queries),
            *jax.tree.map(lambda _: pl.BlockSpec(), (k_pages, v_pages)),
        ],
        out_specs=(of_tile(), of_tile(), of_tile(head_dim)),
        compiler_params=plt.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages),
        interpret=_is_interpreted.get(),
        name="paged_attention",
    )(page_table, starts, lengths, q_BKRH, k_pages, v_pages)
    real = (leaf[:, :, :, : kind.real_rows] for leaf in (top, total, sums))
    return queries.ungrouped(splits.merged(*real), lengths, num_queries=num_queries, group=group)


def refusal(needs: Needs) -> str:
    """Why this kernel can't serve an engine; "" where it can."""
    if needs.platform != "gpu":
        return f"needs a GPU, and this is a {needs.platform}"
    if plt is None:
        return f"needs {_TRITON}, which jax {jax.__version__} has no more"
    major = needs.capability.split(".")[0]
    if not major.isdigit() or int(major) < _LEAST_CAPABILITY:
        return (
            f"needs a GPU of NVIDIA with compute capability {_LEAST_CAPABILITY}.0 or later, and "
            f"this one's is {needs.capability}"
        )
    if needs.dtype not in _DTYPES:
        return f"reads pages of {' or '.join(_DTYPES)}, not of {needs.dtype}"
    if not _is_power_of_two(needs.head_dim) or not 16 <= needs.head_dim <= _MOST_HEAD_DIM:
        return f"has heads of a power of two from 16 to {_MOST_HEAD_DIM}, not of {needs.head_dim}"
    if needs.block % TRITON_LEAST:
        return (
            f"reduces a multiple of {TRITON_LEAST} keys at a time; engine.attention_block is "
            f"{needs.block}"
        )
    if needs.dtype == "int8" and needs.compute_dtype not in ("bfloat16", "float16"):
        return (
            "multiplies int8 pages in bfloat16 or float16; engine.compute_dtype is "
            f"{needs.compute_dtype}"
        )
    return ""


@contextmanager
def interpreter() -> Iterator[None]:
    """Kernels that are called inside run on any device, as what XLA makes of their arithmetic.

    Memory that nobody wrote holds NaN.
    """
    before = _is_interpreted.set(True)
    try:
        yield
    finally:
        _is_interpreted.reset(before)


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _kernel(
    table: Any,  # i32 [B, M]
    starts: Any,
    lengths: Any,
    q: Any,  # [R, H]
    k_pages: Any,  # [K, P, C, H]; int8 ones with scales of [K, P, 1, C]
    v_pages: Any,
    top: Any,  # i32 [R], of one split
    total: Any,  # f32 [R]
    sums: Any,  # f32 [R, H]
    *,
    num_splits: int,
    kind: _Kind,
) -> None:
    work, head, row = (pl.program_id(axis) for axis in range(3))
    shape = kind.shape
    first_row = lax.div(work, num_splits) * shape.rows
    span = splits.span(starts[row], lengths[row], first_row, lax.rem(work, num_splits), shape)
    keys = jnp.arange(shape.keys, dtype=jnp.int32)
    rows = jnp.arange(shape.rows, dtype=jnp.int32)
    last_page = lax.div(jnp.maximum(span.end - 1, 0), kind.page_size)
    queries_RH = q[...]

    def one_block(index: Array, softmax: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        key = index * shape.keys + keys
        number = jnp.minimum(lax.div(key, kind.page_size), last_page)
        place = (head, table[row, number], lax.rem(key, kind.page_size))
        k_SH, k_scales = _read(k_pages, place, key < span.end, q.dtype)
        logits = _product(queries_RH, k_SH, contracted=1)
        logits = logits if k_scales is None else logits * k_scales[None, :]
        seen = splits.sees(rows[:, None], key[None, :], span, shape)
        logits = jnp.where(seen, online.capped(logits, kind.soft_cap), -jnp.inf)
        v_SH, v_scales = _read(v_pages, place, key < span.end, q.dtype)
        return _reduce(logits, v_SH, v_scales, softmax)

    nothing = (
        jnp.full((shape.rows,), online.NOTHING, jnp.int32),
        jnp.zeros((shape.rows,), jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    done = lax.fori_loop(span.first_block, span.end_block, one_block, nothing)
    is_real = first_row + rows < kind.real_rows
    plt.store(top.at[...], done[0], mask=is_real)
    plt.store(total.at[...], done[1], mask=is_real)

    @pl.when(span.first_block < span.end_block)
    def _() -> None:
        by_column = lax.broadcast_in_dim(is_real, done[2].shape, (0,))
        plt.store(sums.at[...], done[2], mask=by_column)


def _read(
    pages: Any, place: tuple[Array, Array, Array], is_owned: Array, dtype: Any
) -> tuple[Array, Array | None]:
    """The keys or values of a block [S, H], and their scales [S]; zeros for what isn't owned."""
    stored = pages.codes if isinstance(pages, Rounded) else pages
    head, page, offset = place
    shape = (is_owned.shape[0], stored.shape[-1])
    across = functools.partial(lax.broadcast_in_dim, shape=shape, broadcast_dimensions=(0,))
    column = lax.broadcasted_iota(jnp.int32, shape, 1)
    values = plt.load(
        stored.at[head, across(page), across(offset), column],
        mask=across(is_owned),
        other=jnp.zeros((), stored.dtype),
    )
    if not isinstance(pages, Rounded):
        return values, None
    scales = plt.load(pages.scales.at[head, page, 0, offset], mask=is_owned, other=0.0)
    return values.astype(jnp.float32).astype(dtype), scales


def _product(left: Array, right: Array, *, contracted: int) -> Array:
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return lax.dot_general(
        left,
        right,
        (((1,), (contracted,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _reduce(
    logits: Array, v_SH: Array, v_scales: Array | None, softmax: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """Takes one more block of keys into an unfinished softmax."""
    old, total, sums = softmax
    new = online.new_top(old, jnp.max(logits, axis=1))
    weights = jnp.exp2(logits - online.base(new)[:, None])
    faded = online.fade(old, new)
    total = total * faded + jnp.sum(weights, axis=1)
    weights = weights if v_scales is None else weights * v_scales[None, :]
    product = _product(weights.astype(v_SH.dtype), v_SH, contracted=0)
    return new, total, sums * faded[:, None] + product
