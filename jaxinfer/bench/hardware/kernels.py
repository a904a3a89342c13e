"""Every kernel of attention on this device against float64, and the bits of rows in company."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxinfer import compile as programs_of
from jaxinfer.bench.hardware.cases import (
    CASES,
    COMPANY,
    LIMIT,
    Call,
    Case,
    load_of,
    prepared,
    relative_error,
)
from jaxinfer.bench.hardware.part import Part
from jaxinfer.kernels import paged_attention

_ORDER = [6, 2, 3, 0, 5, 1, 7, 4]
_FEW = ("decode", "mixed", "prefill")  # of each dtype but bfloat16


def measure(part: Part) -> None:
    """A row a kernel, dtype and case; `ok` says whether it is right."""
    for backend in reversed(paged_attention.BACKENDS):  # the reference comes last
        for dtype in part.sizes.dtypes:
            _cases(part, backend, dtype)
        _company(part, backend)


def _cases(part: Part, backend: str, dtype: str) -> None:
    for name, case in CASES.items():
        if part.sizes.cases and name not in part.sizes.cases:
            continue
        if not part.sizes.cases and dtype != "bfloat16" and name not in _FEW:
            continue
        what = f"{backend} {dtype}, {name}"
        found = _run(part, backend, dtype, case, what)
        if found is not None:
            out, expected, _ = found
            error = relative_error(out, expected)
            part.add(kernel=backend, dtype=dtype, case=name, error=error, ok=error < LIMIT[dtype])


def _company(part: Part, backend: str) -> None:
    """A row's bits in another place, and alone; the reference promises that on CPUs only."""
    what = f"{backend}, bits of rows in company"
    found = _run(part, backend, "bfloat16", COMPANY, what)
    if found is None:
        return
    together, _, run = found

    def differ(rows: list[int]) -> bool:
        return not np.array_equal(run(rows), together[rows])

    moved = part.attempt(what, lambda: differ(_ORDER))
    alone = part.attempt(what, lambda: differ([2]))
    if moved is not None and alone is not None:
        promised = backend != "reference"
        part.add(
            kernel=backend,
            dtype="bfloat16",
            case="bits in company",
            moved_differs=moved,
            alone_differs=alone,
            ok=not (promised and (moved or alone)),
        )


def _run(
    part: Part, backend: str, dtype: str, case: Case, what: str
) -> tuple[np.ndarray, np.ndarray, Callable[[list[int]], np.ndarray]] | None:
    """What comes out, what should, and the way to run some of the rows."""
    case, call, expected = prepared(backend, case, dtype)
    needs = paged_attention.needs_here(
        dtype=dtype,
        head_dim=case.head_dim,
        page_size=case.page_size,
        block=case.block,
        compute_dtype="bfloat16" if dtype == "int8" else dtype,
    )
    place = part.kernel(backend, needs)
    if place is None:
        return None
    options = {"soft_cap": case.soft_cap} if case.soft_cap else {}
    options |= {"load": load_of(dtype)} if dtype == "int8" else {}
    attend = partial(
        paged_attention.backend(backend), block=case.block, window=case.window, **options
    )

    built: dict[int, Callable[..., Any]] = {}  # by rows

    def run(call: Call) -> np.ndarray:
        # Without it products of float32 are rounded to TF32 on a GPU.
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            rows = len(call.starts)
            if rows not in built:
                built[rows] = programs_of.compile_function(attend, *call)
            return np.asarray(built[rows](*call))

    def of_rows(rows: list[int]) -> np.ndarray:
        with place():
            return run(call.of_rows(rows))

    with place():
        out = part.attempt(what, lambda: run(call))
    return None if out is None else (out, expected, of_rows)
