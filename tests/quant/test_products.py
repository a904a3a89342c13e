"""Products with quantised weights, against whole numbers and float64 in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.compile import compile_function
from jaxinfer.errors import ConfigError
from jaxinfer.nn import linear
from jaxinfer.quant import describe, find_scheme, leaf, products, quantise, restore
from jaxinfer.quant.rounding import round_to_nearest
from jaxinfer.spec import ArraySpec, abstract

SHAPES = [(1, 576, 40), (3, 48, 17), (8, 128, 96), (13, 7, 5), (2, 1, 3), (40, 256, 11)]


def hadamard(size: int) -> np.ndarray:
    """By its definition: the sign is the parity of the bits that row and column share."""
    signs = [[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]
    return np.array(signs, np.float64) / np.sqrt(size)


def rotated(matrix: np.ndarray, block: int) -> np.ndarray:
    parts = matrix.astype(np.float64).reshape(len(matrix), -1, block)
    return (parts @ hadamard(block)).reshape(matrix.shape)


def values(rows: int, inner: int, outer: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations and weights with rows of zeros, outliers, and rows of very different size."""
    rng = np.random.default_rng(rows * inner + outer)
    x = rng.normal(size=(rows, inner)) * 10.0 ** rng.integers(-3, 4, (rows, 1))
    x[:, rng.integers(inner)] *= 300
    weight = rng.normal(size=(outer, inner)) * rng.uniform(0.01, 3, (outer, 1))
    weight[0] = 0
    weight[-1, rng.integers(inner)] = 50
    if rows > 2:
        x[1] = 0
    return x.astype(np.float32), weight.astype(np.float32)


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize(("rows", "inner", "outer"), SHAPES)
def test_a_product_is_that_of_the_whole_numbers(rows, inner, outer, digits):
    x, plain = values(rows, inner, outer)
    weight = quantise("w", plain, contract=1, digits=digits)
    assert weight.block == np.gcd(inner, 128)
    tokens = products.round_tokens(products.rotate(jnp.asarray(x), weight.block), num_digits=digits)
    whole = np.tensordot([256, 1][-digits:], np.asarray(tokens.digits, np.int64), 1)
    turned, scale = rotated(x, weight.block), np.asarray(tokens.scale, np.float64)
    scale = scale / 256 ** (digits - 1)
    top = np.max(np.abs(turned), axis=1, keepdims=True)
    np.testing.assert_allclose(scale, top / (127 if digits == 1 else 127 * 257), rtol=1e-5)
    assert np.max(np.abs(whole - turned / np.where(top > 0, scale, 1))) < 0.5 + 0.02 * digits
    wanted = whole @ np.asarray(weight.codes, np.int64).T * scale * np.float64(weight.scale)
    found = np.asarray(linear.project(jnp.asarray(x), weight))
    assert found.dtype == np.float32 and found.shape == (rows, outer)
    # Two digits are joined in float32, where large sums may all but cancel.
    slack = 1e-6 * np.abs(wanted) + (digits - 1) * 1e-6 * np.linalg.norm(wanted, axis=1)[:, None]
    assert np.all(np.abs(found - wanted) <= slack)
    assert not found[:, 0].any(), "a row of zeros gives zero"
    if rows > 2:
        assert not found[1].any(), "a token of zeros gives zero"


@pytest.mark.parametrize(("digits", "most"), [(1, 0.02), (2, 0.011)])
def test_a_product_is_near_that_of_the_floats(digits, most):
    x, plain = values(40, 576, 96)
    found = np.asarray(
        linear.project(jnp.asarray(x), quantise("w", plain, contract=1, digits=digits))
    )
    wanted = x.astype(np.float64) @ plain.T.astype(np.float64)
    error = np.linalg.norm(found - wanted, axis=1) / np.maximum(np.linalg.norm(wanted, axis=1), 1)
    assert np.max(error) < most


@pytest.mark.parametrize("digits", [1, 2])
def test_a_rows_bits_depend_on_the_row_alone(digits):
    x, plain = values(64, 192, 40)
    weight = quantise("w", plain, contract=1, digits=digits)
    whole = np.asarray(linear.project(jnp.asarray(x), weight))
    for rows in (1, 2, 5, 8, 33):
        some = np.asarray(linear.project(jnp.asarray(x[:rows]), weight))
        assert some.tobytes() == whole[:rows].tobytes(), rows
    order = np.random.default_rng(0).permutation(64)
    moved = np.asarray(linear.project(jnp.asarray(x[order]), weight))
    assert moved.tobytes() == whole[order].tobytes()


@pytest.mark.parametrize("rows", [4, 70])  # XLA:CPU sums 4,096 elements and more by other code
def test_what_is_not_finite_stays_so_in_its_row_alone(rows):
    x, plain = values(rows, 64, 16)
    weight = quantise("w", plain[1:], contract=1, digits=1)
    clean = np.asarray(linear.project(jnp.asarray(x), weight))
    for bad in (np.nan, np.inf):
        x[2, 5] = bad
        found = np.asarray(linear.project(jnp.asarray(x), weight))
        assert not np.isfinite(found[2]).any()
        assert np.delete(found, 2, 0).tobytes() == np.delete(clean, 2, 0).tobytes()


def test_axes_are_summed_over_as_with_a_plain_weight():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(24, 4, 16)).astype(np.float32)
    x = rng.normal(size=(2, 3, 4, 16)).astype(np.float32)
    bias = rng.normal(size=24).astype(np.float32)
    quantised = quantise("w", weight, contract=2, digits=2)
    assert quantised.shape == (24, 4, 16) and quantised.scale.shape == (24,)
    found = linear.project(jnp.asarray(x), quantised, jnp.asarray(bias), contract=2)
    plain = linear.project(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(bias), contract=2)
    assert found.shape == plain.shape == (2, 3, 24)
    np.testing.assert_allclose(found, plain, atol=0.2)


def test_an_embedding_is_the_row_that_the_codes_stand_for():
    _, table = values(1, 96, 50)
    weight = jax.tree.map(jnp.asarray, quantise("e", table, contract=1, digits=1))
    tokens = jnp.asarray([[0, 7, 49], [7, 7, 3]])
    found = np.asarray(linear.embed(weight, tokens))
    np.testing.assert_allclose(found, restore(weight, contract=1)[tokens], atol=1e-5)
    largest = np.max(np.abs(rotated(table, weight.block)), axis=1)
    error = np.linalg.norm(restore(weight, contract=1) - table, axis=1)
    assert np.all(error <= 0.5 / 127 * largest * np.sqrt(96) + 1e-5)


def test_rounding_takes_the_nearest_code_and_loses_no_sign():
    matrix = np.array(
        [[1.0, -2.0, 0.49], [0, 0, 0], [1e-40, 0, 0], [3e38, -3e38, 1e37]], np.float32
    )
    found = round_to_nearest("w", matrix)
    assert found.codes.tolist()[:2] == [[64, -127, 31], [0, 0, 0]]
    assert found.codes.tolist()[3] == [127, -127, 4]
    assert not found.codes[2].any(), "what is below the range of float32 counts as zero"
    assert found.codes.min() >= -127
    assert np.isfinite(found.scale).all()


def test_a_large_matrix_is_rounded_as_its_parts_are():
    matrix = np.random.default_rng(1).normal(size=(9000, 8)).astype(np.float32)
    whole, part = round_to_nearest("w", matrix), round_to_nearest("w", matrix[8000:])
    assert whole.codes[8000:].tobytes() == part.codes.tobytes()
    assert whole.scale[8000:].tobytes() == part.scale.tobytes()


def test_no_program_holds_the_weights_in_another_dtype():
    spec = describe(ArraySpec((4096, 512), ("ffw", "embed"), contract=1), "w8a8")
    weight = abstract(spec, jnp.bfloat16)
    assert (weight.codes.dtype, weight.scale.dtype) == (jnp.int8, jnp.float32)
    weight = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), weight)
    for rows in (1, 8):
        text = compile_function(linear.project, jnp.ones((rows, 512)), weight).as_text()
        assert "s8[4096,512]" in text
        for dtype in ("f32", "s32", "bf16"):
            assert f"{dtype}[4096,512]" not in text and f"{dtype}[512,4096]" not in text


def test_a_description_has_the_structure_of_what_is_quantised():
    specs = {
        "matrix": ArraySpec((24, 4, 16), ("embed", "heads", None), contract=2),
        "norm": ArraySpec((24,), ("embed",), init="ones"),
    }
    assert describe(specs, "none") is specs
    found = describe(specs, "w8a16")
    made = quantise("matrix", np.ones((24, 4, 16), np.float32), contract=2, digits=2)
    assert jax.tree.structure(found["matrix"], is_leaf=lambda x: isinstance(x, ArraySpec)) == (
        jax.tree.structure(made)
    )
    assert found["matrix"].scale.shape == (24,) and found["matrix"].scale.axes == ("embed",)
    assert found["norm"] == specs["norm"]
    with pytest.raises(ConfigError, match="no quantisation scheme 'w3'; there are: w8a8, w8a16"):
        find_scheme("w3")


def test_a_rotation_undoes_itself():
    x = np.random.default_rng(0).normal(size=(5, 384)).astype(np.float32)
    assert leaf.block_of(384) == 128 and leaf.block_of(7) == 1
    twice = products.rotate(products.rotate(jnp.asarray(x), 128), 128)
    np.testing.assert_allclose(twice, x, atol=1e-5)
    np.testing.assert_allclose(products.rotate(jnp.asarray(x), 128), rotated(x, 128), atol=1e-5)
