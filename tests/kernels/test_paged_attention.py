"""Every backend of paged attention against a dense reference in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import ConfigError
from jaxinfer.kernels import paged_attention

PAGE_SIZE, BLOCK, PAGES = 8, 32, 128
# (kv heads, group, head size), (first position, length) of each row, window
CASES = {
    "decode": ((2, 3, 16), [(0, 1), (7, 1), (8, 1), (31, 1), (32, 1), (100, 1)], 0),
    "decode one head": ((1, 1, 8), [(0, 1), (63, 1)], 0),
    "empty rows": ((2, 2, 16), [(5, 1), (0, 0), (9, 0), (33, 1)], 0),
    "all rows empty": ((2, 2, 16), [(0, 0), (0, 0)], 0),
    "prefill": ((2, 3, 16), [(0, 40)], 0),
    "chunk in the middle": ((2, 3, 16), [(37, 20)], 0),
    "ragged": ((3, 1, 16), [(0, 5), (60, 17), (12, 0), (31, 1), (0, 17)], 0),
    "window": ((2, 3, 16), [(0, 6), (70, 6), (31, 2)], 10),
    "window of one": ((1, 2, 16), [(50, 4)], 1),
    "window past a block": ((1, 2, 16), [(90, 5), (3, 3)], 40),
    "longest": ((1, 2, 16), [(127, 1), (96, 32)], 0),
}


def dense(q, k, v, starts, lengths, *, window):
    """Softmax attention written out, token by token: k and v are [B, S, K, H]."""
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for row in range(q.shape[0]):
        for token in range(lengths[row]):
            position = starts[row] + token
            first = max(0, position - window + 1) if window else 0
            for head in range(q.shape[2]):
                keys = k[row, first : position + 1, head // group]
                logits = keys @ q[row, token, head] / np.sqrt(q.shape[3])
                weights = np.exp(logits - logits.max())
                values = v[row, first : position + 1, head // group]
                out[row, token, head] = weights @ values / weights.sum()
    return out


def scattered(k, starts, lengths, rng, dtype, poison):
    """The same keys in pages in random order, everything unowned poisoned."""
    rows, _, num_kv_heads, head_dim = k.shape
    pages = np.full((num_kv_heads, PAGES, PAGE_SIZE, head_dim), poison)
    table = rng.permutation(PAGES)[: rows * (128 // PAGE_SIZE)].reshape(rows, -1)
    for row in range(rows):
        for position in range(starts[row] + lengths[row] if lengths[row] else 0):
            page = table[row, position // PAGE_SIZE]
            pages[:, page, position % PAGE_SIZE] = k[row, position]
    return jnp.asarray(pages, dtype), jnp.asarray(table, jnp.int32)


@pytest.mark.parametrize("backend", paged_attention.BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("poison", [0.0, np.nan], ids=["zeros", "nan"])
def test_matches_dense_attention_in_float64(backend, dtype, case, poison):
    (num_kv_heads, group, head_dim), places, window = CASES[case]
    rng = np.random.default_rng(len(case))
    starts, lengths = (np.array(column, np.int32) for column in zip(*places, strict=True))
    rows, num_queries = len(places), max(1, lengths.max())
    q = rng.normal(size=(rows, num_queries, num_kv_heads * group, head_dim))
    k, v = rng.normal(size=(2, rows, 128, num_kv_heads, head_dim))
    q, k, v = (np.asarray(jnp.asarray(x, dtype), np.float64) for x in (q, k, v))
    order = np.random.default_rng(7)
    k_pages, table = scattered(k, starts, lengths, order, dtype, poison)
    order = np.random.default_rng(7)
    v_pages, _ = scattered(v, starts, lengths, order, dtype, poison)
    out = paged_attention.backend(backend)(
        jnp.asarray(q, jnp.float32),
        k_pages,
        v_pages,
        table,
        jnp.asarray(starts),
        jnp.asarray(lengths),
        block=BLOCK,
        window=window,
    )
    expected = dense(q, k, v, starts, lengths, window=window)
    limit = 2e-2 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.asarray(out), expected, atol=limit, rtol=limit)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match="there are: reference"):
        paged_attention.backend("triton")
