"""Every backend of paged attention against a dense reference in float64."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.bench.hardware.cases import CASES, COMPANY, DECODE, LIMIT, MIXED, prepared
from jaxinfer.errors import ConfigError
from jaxinfer.kernels import paged_attention
from tests.kernels.attention import Case, make, needs, relative_error, run

SMALL = {"head_dim": 16, "block": 32, "longest": 128}
REFERENCE = {
    "decode": DECODE,
    "decode one head": Case(((0, 1), (63, 1)), 1, 1, **SMALL | {"head_dim": 8}),
    "empty rows": Case(((5, 1), (0, 0), (9, 0), (33, 1)), **SMALL),
    "all rows empty": Case(((0, 0), (0, 0)), **SMALL),
    "prefill": Case(((0, 40),), **SMALL),
    "chunk in the middle": Case(((37, 20),), **SMALL),
    "ragged": Case(((0, 5), (60, 17), (12, 0), (31, 1), (0, 17)), 3, 1, **SMALL),
    "window": Case(((0, 6), (70, 6), (31, 2)), window=10, **SMALL),
    "window of one": Case(((50, 4),), 1, 2, window=1, **SMALL),
    "window past a block": Case(((90, 5), (3, 3)), 1, 2, window=40, **SMALL),
    "longest": Case(((127, 1), (96, 32)), 1, 2, **SMALL),
    "mixed": MIXED,
}
SOON = {name: CASES[name] for name in ("decode", "mixed")}


def check(backend: str, case: Case, dtype: str, *, poison: float = np.nan) -> None:
    """Compares with float64; skips what the backend says it can't do."""
    attend = paged_attention.backend(backend)
    if case.soft_cap and "soft_cap" not in inspect.signature(attend).parameters:
        pytest.skip(f"{backend} has no soft cap")
    case, call, expected = prepared(backend, case, dtype, poison=poison)
    try:
        paged_attention.choose(backend, needs(backend, case, dtype))
    except ConfigError as refused:
        pytest.skip(str(refused))
    assert relative_error(run(backend, call, case, dtype), expected) < LIMIT[dtype]


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        pytest.param("bfloat16", marks=pytest.mark.full),
        pytest.param("float16", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("case", REFERENCE)
def test_the_reference_matches_float64_whatever_free_pages_hold(dtype, case):
    check("reference", REFERENCE[case], dtype)


@pytest.mark.parametrize(
    ("backend", "case", "dtype"),
    [
        ("reference", "decode", "bfloat16"),
        ("reference", "decode", "float16"),
        ("native", "decode", "bfloat16"),
        ("native", "mixed", "float32"),
        ("pallas_tpu", "decode", "bfloat16"),
        ("pallas_tpu", "mixed", "float32"),
        ("pallas_gpu", "mixed", "bfloat16"),
        ("pallas_tpu", "mixed", "int8"),
        ("pallas_gpu", "mixed", "int8"),
        ("pallas_triton", "mixed", "bfloat16"),
        ("pallas_triton", "mixed", "int8"),
    ],
)
def test_a_backend_matches_float64_whatever_free_pages_hold(backend, case, dtype):
    check(backend, SOON[case], dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", paged_attention.BACKENDS)
def test_every_backend_matches_float64_in_every_case(backend, case, dtype):
    check(backend, CASES[case], dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_on_a_tpu_may_be_wider_than_heads(dtype):
    call, expected = make(DECODE, dtype)
    k_pages, v_pages = (jnp.pad(pages, ((0, 0), (0, 0), (0, 0), (0, 64))) for pages in call[1:3])
    out = run("pallas_tpu", call._replace(k_pages=k_pages, v_pages=v_pages), DECODE)
    assert relative_error(out, expected) < LIMIT[dtype]


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("backend", paged_attention.BACKENDS)
def test_the_bits_of_a_row_do_not_depend_on_its_company(backend, dtype):
    case, call, _ = prepared(backend, COMPANY, dtype)
    together = run(backend, call, case, dtype)
    order = [6, 2, 3, 0, 5, 1, 7, 4]
    moved = run(backend, call.of_rows(order), case, dtype)
    np.testing.assert_array_equal(moved, together[order])
    if backend != "reference":  # which needs eight rows on a CPU
        alone = run(backend, call.of_rows([2]), case, dtype)
        np.testing.assert_array_equal(alone, together[[2]])
