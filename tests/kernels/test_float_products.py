"""Products with bfloat16 weights in native code: against float64, alone, and in an engine."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import models
from jaxinfer.compile import compile_function
from jaxinfer.engine import Engine
from jaxinfer.kernels import native
from jaxinfer.kernels.products import Floats
from jaxinfer.nn import linear
from jaxinfer.spec import abstract, is_spec
from tests import tiny
from tests.closed_world import SMALL
from tests.kernels.spoilt import check_row_alone
from tests.kernels.test_products import ROWS, SHAPES, activations

pytestmark = pytest.mark.skipif(
    bool(native.lacks("avx512_bf16")), reason=f"no such kernel: {native.lacks('avx512_bf16')}"
)


def weights_of(inner: int, outer: int) -> jax.Array:
    rng = np.random.default_rng(inner + outer)
    plain = rng.normal(size=(outer, inner)) * rng.uniform(0.01, 3, (outer, 1))
    plain[0] = 0
    return jnp.asarray(plain, jnp.bfloat16)


@functools.cache
def compiled(rows: int, inner: int, outer: int):
    """A function of activations, by shape."""
    program = compile_function(
        lambda x, weights: linear.project(x, Floats(weights)),
        jnp.ones((rows, inner)),
        weights_of(inner, outer),
    )
    return lambda x: np.asarray(program(jnp.asarray(x), weights_of(inner, outer)))


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(("inner", "outer"), [*SHAPES, (31, 6), (32, 5), (33, 4)])
def test_products_are_those_of_float64(inner, outer, rows):
    """Of what is left of activations in bfloat16; the error is that of a float32 sum."""
    x = activations(rows, inner)
    rounded = np.asarray(jnp.asarray(x).astype(jnp.bfloat16)).astype(np.float64)
    plain = np.asarray(weights_of(inner, outer)).astype(np.float64)
    found, wanted = compiled(rows, inner, outer)(x), rounded @ plain.T
    assert found.dtype == np.float32 and found.shape == (rows, outer)
    size = np.abs(rounded) @ np.abs(plain).T
    assert np.all(np.abs(found - wanted) <= 1e-6 * size + 1e-36)
    assert not found[:, 0].any(), "an output without weights is zero"


@pytest.mark.parametrize(("inner", "outer"), [(576, 100), (48, 17), (7, 5)])
def test_a_rows_bits_are_the_same_in_every_number_of_rows(inner, outer):
    x = activations(512, inner)
    whole = compiled(512, inner, outer)(x)
    for rows in ROWS:
        run = compiled(rows, inner, outer)
        assert run(x[:rows]).tobytes() == whole[:rows].tobytes(), rows
        assert run(x[-rows:]).tobytes() == whole[-rows:].tobytes(), rows
    order = np.random.default_rng(0).permutation(512)
    assert compiled(512, inner, outer)(x[order]).tobytes() == whole[order].tobytes()


@pytest.mark.parametrize("rows", [3, 40])
def test_what_is_not_finite_stays_so_in_its_row_alone(rows):
    x, run = activations(rows, 576), compiled(rows, 576, 100)
    check_row_alone(run, x)


def test_matrices_are_taken_and_nothing_else():
    """Norms and biases stay arrays, whatever their shape; other dtypes stay XLA's."""
    spec, config = models.spec_of(tiny.MODEL), tiny.MODEL
    params = abstract(spec, jnp.bfloat16)
    taken = jax.tree.leaves(models.using(params, config, "native"))
    wanted = [bool(one.contract) for one in jax.tree.leaves(spec, is_leaf=is_spec)]
    assert [isinstance(leaf, Floats) for leaf in taken] == wanted and any(wanted)
    for tree in (
        models.using(params, config, "xla"),
        models.using(abstract(spec, jnp.float32), config, "native"),
    ):
        assert not any(isinstance(leaf, Floats) for leaf in jax.tree.leaves(tree))


def test_an_engine_keeps_its_promises():
    config = tiny.engine_config(compute_dtype="bfloat16", products="native", **SMALL)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.params())
    engine = Engine(params, tiny.MODEL, tiny.TokenText(), config, store=tiny.store())
    assert engine.config.products == "native" and engine.self_test.is_exact
    target = native.library().target("float_product")
    assert all(target in (one.text() or "") for one in engine.programs.values())
    requests = tiny.random_requests(5, seed=3, max_prompt=30, max_tokens=8)
    tiny.run_alone_and_together(engine, requests, alone=2)
    assert engine.stats().num_compiles_after_start == 0
