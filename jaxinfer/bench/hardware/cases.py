"""Cases of paged attention, and what comes out of them in float64: for tests and for devices."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxinfer import cache as paged
from jaxinfer.kernels.paged_attention import rounded
from jaxinfer.kernels.paged_attention.rounded import Rounded

LIMIT = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2, "int8": 2e-2}
"""Relative errors that are allowed, by the dtype of pages."""


class Case(NamedTuple):
    """One call: heads, rows as (first position, length), and what the kernel is told."""

    places: tuple[tuple[int, int], ...]
    num_kv_heads: int = 2
    group: int = 3
    head_dim: int = 64
    window: int = 0
    soft_cap: float = 0.0
    page_size: int = 8
    block: int = 64
    longest: int = 192

    def for_int8(self, backend: str) -> "Case":
        """With pages as large as a backend needs them in int8."""
        size = max(self.page_size, _INT8_PAGES.get(backend, 0))
        block = max(self.block, size)
        return self._replace(page_size=size, block=block, longest=-(-self.longest // block) * block)


_INT8_PAGES = {"pallas_gpu": 32, "pallas_tpu": 128}

# Lengths of 0 and 1, both sides of page and block edges, a full row; a chunk beside decodes.
DECODE = Case(((0, 1), (7, 1), (8, 1), (0, 0), (63, 1), (64, 1), (191, 1)))
MIXED = Case(((0, 5), (60, 17), (12, 0), (100, 1), (0, 17)), window=40)
CASES = {
    "decode": DECODE,
    "mixed": MIXED._replace(soft_cap=3.0),
    "empty": Case(((5, 0), (0, 0))),
    "decode of one head": Case(((0, 1), (100, 1)), 1, 1),
    "decode of many heads": Case(((70, 1), (15, 1)), 8, 2),
    "decode in a group of 16": Case(((70, 1), (15, 1)), 1, 16),
    "prefill": Case(((0, 100),)),
    "chunk in the middle": Case(((37, 70),)),
    "verify": Case(((37, 5), (63, 5), (0, 5), (187, 5))),
    "head size 128": Case(((0, 1), (130, 1), (64, 0)), head_dim=128),
    "prefill of head size 128": Case(((60, 50),), head_dim=128),
    "head size 256": Case(((0, 1), (130, 1)), head_dim=256),
    "prefill of head size 256": Case(((60, 50),), 1, 2, head_dim=256),
    "pages of 16": Case(((0, 1), (15, 1), (16, 1), (120, 3)), page_size=16, block=128, longest=384),
    "pages of 64": Case(((0, 1), (63, 1), (64, 1), (120, 3)), page_size=64),
    "edges of wide pages": Case(
        ((31, 1), (32, 1), (127, 1), (128, 1), (0, 0), (255, 1), (95, 2)), page_size=32, longest=256
    ),
    "long": Case(((1023, 1), (512, 1), (511, 1), (3, 1)), 1, 2, longest=1024),
    "window of one": Case(((50, 4), (0, 2)), 1, 2, window=1),
    "window of a block": Case(((127, 1), (128, 1), (180, 4)), 1, 2, window=64),
    "window past a block": Case(((90, 5), (3, 3), (191, 1)), 1, 2, window=100),
    "soft cap": Case(((0, 6), (70, 6), (31, 2)), soft_cap=2.0),
}
COMPANY = Case(((150, 1), (7, 1), (191, 1), (0, 0), (64, 1), (63, 1), (8, 1), (100, 1)))
"""Rows whose bits must not change when they change places, or when one is alone."""


class Call(NamedTuple):
    """The arrays of a call."""

    q: Any  # [B, T, N, H], float32
    k_pages: Any
    v_pages: Any
    page_table: Any
    starts: Any
    lengths: Any

    def of_rows(self, rows: list[int]) -> "Call":
        """The same with these rows, in this order."""
        q, table, starts, lengths = (
            leaf[np.array(rows)] for leaf in (self.q, self.page_table, self.starts, self.lengths)
        )
        return Call(q, self.k_pages, self.v_pages, table, starts, lengths)


def prepared(
    backend: str, case: Case, dtype: str, *, poison: float = np.nan
) -> tuple[Case, Call, np.ndarray]:
    """A case as a backend can have it over pages of a dtype, its call, and what that returns."""
    if dtype != "int8":
        return case, *make(case, dtype, poison=poison)
    case = case.for_int8(backend)
    return case, *make_int8(backend, case, poison=poison)


def load_of(dtype: str) -> Callable[..., Any]:
    """What reads pages of this dtype: `load` of paged attention."""
    if dtype == "int8":
        return partial(rounded.unpack, dtype=jnp.bfloat16)
    return lambda stored: stored


def make_int8(backend: str, case: Case, *, poison: float = np.nan) -> tuple[Call, np.ndarray]:
    """The same over int8 pages as a backend reads them; right is what their codes stand for.

    What no row owns has scales that are poison.
    """
    call, _ = make(case, "float32", poison=poison)
    pools = [rounded.round_heads(pool) for pool in (call.k_pages, call.v_pages)]
    with np.errstate(invalid="ignore"):  # no code times an infinite scale
        values = [np.asarray(pool.codes, np.float64) * np.asarray(pool.scales) for pool in pools]
    k, v = (_of_rows(pool, call, case) for pool in values)
    q = call.q.astype(jnp.bfloat16).astype(jnp.float32)
    if backend in paged.ON_CPU:
        pages = [rounded.pack(pool) for pool in (call.k_pages, call.v_pages)]
    else:
        pages = [Rounded(pool.codes, jnp.swapaxes(pool.scales, 2, 3)) for pool in pools]
    call = call._replace(q=q, k_pages=pages[0], v_pages=pages[1])
    starts, lengths = np.asarray(call.starts), np.asarray(call.lengths)
    return call, dense(np.asarray(q, np.float64), k, v, case, starts, lengths)


def _of_rows(pool: np.ndarray, call: Call, case: Case) -> np.ndarray:
    """What each row's pages hold, in order: [B, S, K, H]."""
    table = np.asarray(call.page_table)
    found = pool[:, table].reshape(pool.shape[0], len(table), case.longest, pool.shape[-1])
    return np.moveaxis(found, 0, 2)


def make(case: Case, dtype: str, *, poison: float = np.nan) -> tuple[Call, np.ndarray]:
    """A call with random contents, and what it has to return.

    Pages lie in random order. All that no row owns holds `poison`: other pages, and the rest of a
    row's last one. The table's entries past a row's pages name poisoned pages or other rows' own.
    """
    rng = np.random.default_rng(len(repr(case)))
    starts, lengths = (np.array(column, np.int32) for column in zip(*case.places, strict=True))
    rows, num_queries = len(starts), max(1, lengths.max())
    shape = (rows, case.longest, case.num_kv_heads, case.head_dim)
    q = rng.normal(size=(rows, num_queries, case.num_kv_heads * case.group, case.head_dim))
    q, k, v = (
        np.asarray(jnp.asarray(x, dtype), np.float64)
        for x in (2 * q, rng.normal(size=shape), rng.normal(size=shape))
    )
    pages_per_row = case.longest // case.page_size
    table = rng.permutation(2 * rows * pages_per_row)[: rows * pages_per_row]
    table = table.reshape(rows, pages_per_row)
    pool = (case.num_kv_heads, 2 * rows * pages_per_row, case.page_size, case.head_dim)
    k_pages, v_pages = np.full((2, *pool), poison)
    ends = np.where(lengths > 0, starts + lengths, 0)
    for row, end in enumerate(ends):
        for position in range(end):
            page, offset = table[row, position // case.page_size], position % case.page_size
            k_pages[:, page, offset], v_pages[:, page, offset] = k[row, position], v[row, position]
        table[row, -(-end // case.page_size) :: 2] = table[0, 0]
    call = Call(
        jnp.asarray(q, jnp.float32),
        jnp.asarray(k_pages, dtype),
        jnp.asarray(v_pages, dtype),
        jnp.asarray(table, jnp.int32),
        jnp.asarray(starts),
        jnp.asarray(lengths),
    )
    return call, dense(q, k, v, case, starts, lengths)


def dense(q: Any, k: Any, v: Any, case: Case, starts: Any, lengths: Any) -> np.ndarray:
    """Softmax attention written out, query by query: k and v are [B, S, K, H]."""
    out = np.zeros_like(q)
    for row in range(len(starts)):
        for token in range(lengths[row]):
            position = starts[row] + token
            first = max(0, position - case.window + 1) if case.window else 0
            for head in range(q.shape[2]):
                keys = k[row, first : position + 1, head // case.group]
                logits = keys @ q[row, token, head] / np.sqrt(case.head_dim)
                if case.soft_cap:
                    logits = case.soft_cap * np.tanh(logits / case.soft_cap)
                weights = np.exp(logits - logits.max())
                values = v[row, first : position + 1, head // case.group]
                out[row, token, head] = weights @ values / weights.sum()
    return out


def relative_error(out: np.ndarray, expected: np.ndarray) -> float:
    """The largest error of any query of any head, as a part of the largest value it should have.

    Infinite where queries that should be zeros are not.
    """
    error = np.abs(out - expected).max(axis=-1)
    scale = np.abs(expected).max(axis=-1)
    if error[scale == 0].any():
        return float("inf")
    return float((error[scale > 0] / scale[scale > 0]).max(initial=0.0))
