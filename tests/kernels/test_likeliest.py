"""The largest few of each row in native code: those of XLA, in its order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.kernels import native
from jaxinfer.kernels.likeliest import likeliest

pytestmark = pytest.mark.skipif(
    bool(native.refusal()), reason=f"no native kernels: {native.refusal()}"
)
KINDS = {
    "normal": lambda x: x,
    "many the same": np.round,
    "all the same": np.zeros_like,
    "most banned": lambda x: np.where(np.abs(x) < 2, -np.inf, x),
    "zeros of both signs": lambda x: np.where(x < 0, -0.0, 0.0),
    "some infinite": lambda x: np.where(x > 2, np.inf, x),
    "falling": lambda x: -np.sort(-x, axis=1),
}


@functools.cache
def both(width: int, count: int):
    """Compiled functions: native, and XLA's."""
    shape = jax.ShapeDtypeStruct((3, width), jnp.float32)
    return tuple(
        jax.jit(lambda x, find=find: find(x, count)).lower(shape).compile()
        for find in (likeliest, jax.lax.top_k)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_xla_bit_for_bit(kind):
    for width in (1, 63, 65, 96, 4095, 5000, 49152):
        x = np.random.default_rng(width).normal(size=(3, width))
        given = jnp.asarray(KINDS[kind](x), jnp.float32)
        mine, xlas = (run(given) for run in both(width, min(64, width)))
        for one, other in zip(mine, xlas, strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), width


def test_a_row_with_nan_changes_no_other_and_has_places_that_there_are():
    x = np.random.default_rng(0).normal(size=(3, 5000)).astype(np.float32)
    clean = both(5000, 64)[0](jnp.asarray(x))
    for where in (0, 63, 4999, slice(None)):
        spoilt = x.copy()
        spoilt[1, where] = np.nan
        values, places = map(np.asarray, both(5000, 64)[0](jnp.asarray(spoilt)))
        assert ((places >= 0) & (places < 5000)).all()
        for found, wanted in zip((values, places), clean, strict=True):
            assert found[[0, 2]].tobytes() == np.asarray(wanted)[[0, 2]].tobytes()
