"""Cases of paged attention, and what comes out of them in float64: shared by tests of kernels."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.kernels import paged_attention
from jaxinfer.kernels.paged_attention import Needs
from tests.kernels import mosaic_gpu

PLACES = {"pallas_tpu": ("tpu", ""), "pallas_gpu": ("gpu", "9.0")}  # else on the CPU itself


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


def run(backend: str, call: Call, case: Case) -> np.ndarray:
    """What a backend returns, on the CPU; kernels run in their interpreters."""
    options = {"soft_cap": case.soft_cap} if case.soft_cap else {}
    with interpreter(backend):
        out = paged_attention.backend(backend)(
            *call, block=case.block, window=case.window, **options
        )
        return np.asarray(out)


def interpreter(backend: str) -> AbstractContextManager[None]:
    """Where a kernel runs without the hardware; memory that was never written holds NaN."""
    if backend == "pallas_tpu":
        return pltpu.force_tpu_interpret_mode()
    if backend == "pallas_gpu":
        return mosaic_gpu.interpreter()
    return nullcontext()


def needs(backend: str, case: Case, dtype: str) -> Needs:
    """The needs of a case, on the hardware that the backend is for."""
    platform, capability = PLACES.get(backend, ("cpu", ""))
    return Needs(platform, capability, dtype, case.head_dim, case.page_size, case.block)


def relative_error(out: np.ndarray, expected: np.ndarray) -> float:
    """The largest error of any query of any head, as a part of the largest value it should have.

    Queries that should be zeros must be zeros.
    """
    error = np.abs(out - expected).max(axis=-1)
    scale = np.abs(expected).max(axis=-1)
    assert not error[scale == 0].any()
    return float((error[scale > 0] / scale[scale > 0]).max(initial=0.0))
