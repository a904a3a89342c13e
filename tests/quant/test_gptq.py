"""Calibrated rounding against its definition, and what it is worth."""

import numpy as np
import pytest

from jaxinfer.errors import ConfigError
from jaxinfer.quant.gptq import calibrated, round_columns
from jaxinfer.quant.rounding import rotate, round_to_nearest


def inputs(rows: int, channels: int, *, seed: int = 0) -> np.ndarray:
    """Channels that go together, some of them large."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, channels // 4)) @ rng.normal(size=(channels // 4, channels))
    mixed = (mixed + 0.3 * rng.normal(size=(rows, channels))) * rng.uniform(0.1, 3, channels)
    return mixed.astype(np.float32)


def weight(outer: int, channels: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(outer, channels)).astype(np.float32)


def by_definition(values: np.ndarray, moments: np.ndarray, damping: float) -> np.ndarray:
    """One column after the other; all that are left take the error up as well as they can.

    The least change of the product with these inputs, where column j moves by e, is
    -e * Hinv[j, left] / Hinv[j, j], with Hinv the inverse of the moments of the columns left
    (Hassibi and Stork 1993): inverted anew for every column.
    """
    scale = np.max(np.abs(values), axis=1) / 127
    damped = moments + damping * np.mean(np.diag(moments)) * np.eye(len(moments))
    left, codes = list(np.argsort(-np.diag(moments), kind="stable")), np.zeros(values.shape)
    matrix = values.astype(np.float64)
    while left:
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        place = left[0]
        codes[:, place] = np.clip(np.rint(matrix[:, place] / scale), -127, 127)
        error = matrix[:, place] - codes[:, place] * scale
        matrix[:, left] -= np.outer(error, inverse[0] / inverse[0, 0])
        left = left[1:]
    return codes


def error(values: np.ndarray, found, x: np.ndarray) -> float:
    """Of the product, against its size."""
    restored = found.codes * found.scale[:, None]
    return np.linalg.norm(x @ (values - restored).T) / np.linalg.norm(x @ values.T)


@pytest.mark.parametrize(("channels", "outer"), [(24, 5), (150, 9)])  # within a block, and beyond
def test_codes_are_those_of_the_definition(channels, outer):
    x, values = inputs(400, channels), weight(outer, channels)
    moments = (x.T @ x).astype(np.float64)
    found = round_columns(values, moments, damping=0.01)
    wanted = by_definition(values, moments, 0.01)
    # In float32 a value may lie on the other side of one half.
    assert np.mean(found.codes != wanted) < 0.005
    assert np.max(np.abs(found.codes - wanted)) <= 1
    nearest = round_to_nearest("w", values)
    assert np.array_equal(found.scale, nearest.scale)
    assert np.mean(found.codes != nearest.codes) > 0.15, "it differs from rounding to nearest"


def test_products_are_nearer_than_with_the_nearest_codes_on_other_inputs_too():
    values, every = weight(48, 96), inputs(2500, 96)
    known, new = every[:2000], every[2000:]
    found = round_columns(values, known.T @ known, damping=0.01)
    nearest = round_to_nearest("w", values)
    assert error(values, found, known) < 0.7 * error(values, nearest, known)
    assert error(values, found, new) < 0.7 * error(values, nearest, new)


def test_channels_that_have_nothing_to_do_with_each_other_get_the_nearest_codes():
    values = weight(6, 32)
    nearest = round_to_nearest("w", values)
    for moments in (np.diag(np.arange(1.0, 33.0)), np.zeros((32, 32))):
        assert np.array_equal(round_columns(values, moments, damping=0.01).codes, nearest.codes)


def test_channels_that_are_never_there_or_always_alike_are_no_trouble():
    x = inputs(300, 32)
    x[:, 5], x[:, 9] = 0, x[:, 8]
    values = weight(6, 32)
    values[2] = 0
    for damping in (0.0, 0.01):
        found = round_columns(values, x.T @ x, damping=damping)
        assert not found.codes[2].any() and found.scale[2] == 0
        assert error(values, found, x) < 0.01


def test_a_rounding_turns_the_moments_as_the_values_are_turned():
    x, values = inputs(400, 64), weight(12, 64)
    turned = rotate(values, 64)
    rounding = calibrated({"layers.0.mlp.down": x.T @ x})
    found = rounding("layers.0.mlp.down", turned)
    assert error(turned, found, rotate(x, 64)) < 0.7 * error(
        turned, round_to_nearest("w", turned), rotate(x, 64)
    )
    before = x * 10.0 ** np.linspace(-1, 1, 64)
    channels = {"w": 10.0 ** np.linspace(1, -1, 64)}
    again = calibrated({"w": before.T @ before}, channels=channels)("w", turned)
    assert np.mean(again.codes != found.codes) < 0.005
    other = rounding("layers.1.mlp.down", turned)
    assert np.array_equal(other.codes, round_to_nearest("w", turned).codes)


def test_moments_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="of 64 channels, and it has 32"):
        calibrated({"w": np.eye(64)})("w", weight(3, 32))
    moments = np.eye(32)
    moments[3, 4] = np.nan
    with pytest.raises(ConfigError, match="moments of w hold NaN or infinity"):
        calibrated({"w": moments})("w", weight(3, 32))
