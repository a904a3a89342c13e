"""Calibrated rounding: what one column is rounded by is made good in the columns after it.

GPTQ (Frantar et al. 2023). It knows how the channels of an input go together, from their second
moments over some text, and lets errors cancel where they do.
"""

from collections.abc import Mapping

import numpy as np

from jaxinfer.errors import ConfigError
from jaxinfer.quant.leaf import block_of
from jaxinfer.quant.rounding import LARGEST, Rounded, Rounding, rotate, round_to_nearest, scales

DAMPING = 0.01
"""Added to each channel's moment, in means of all channels': for channels that are nearly sums of
others, and for what the text has not shown."""
COLUMNS_AT_ONCE = 64  # rounded one by one, before the columns after them hear of it

UNCHANGED: Mapping[str, np.ndarray] = {}


def calibrated(
    moments: Mapping[str, np.ndarray],
    *,
    channels: Mapping[str, np.ndarray] = UNCHANGED,
    damping: float = DAMPING,
) -> Rounding:
    """A rounding for leaves whose inputs' moments are known; the others go to the nearest code.

    `moments` has, by the dotted path of a leaf, sum(x x^T) of its inputs, not rotated: [K, K].
    `channels` has what the inputs are multiplied with since: see quant.balance.
    """

    def rounding(path: str, values: np.ndarray) -> Rounded:
        if path not in moments:
            return round_to_nearest(path, values)
        found = moments[path]
        num_channels = values.shape[1]
        if found.shape != (num_channels, num_channels):
            raise ConfigError(
                f"the moments of {path} are of {found.shape[0]} channels, and it has "
                f"{num_channels}; calibrate with the model that is quantised"
            )
        if not np.isfinite(found).all():
            raise ConfigError(
                f"the moments of {path} hold NaN or infinity: the model overflows on the text "
                "that it is calibrated with; use engine.compute_dtype float32, or another text"
            )
        if path in channels:
            found = found * np.multiply.outer(channels[path], channels[path])
        block = block_of(num_channels)
        turned = rotate(rotate(found, block).T, block)
        return round_columns(values, turned, damping=damping)

    return rounding


def round_columns(values: np.ndarray, moments: np.ndarray, *, damping: float) -> Rounded:
    """Codes whose product with inputs of these moments is near that of the values.

    Scales are those of round_to_nearest. Channels with large moments come first: what they are
    rounded by is made good in those that matter less.
    """
    scale = scales(values)
    order, factor = _order(moments, damping)
    left = np.ascontiguousarray(values[:, order].T)  # [K, N]: a column at a time
    divisor = np.where(scale > np.finfo(np.float32).tiny, scale, np.float32(np.inf))
    kept = np.where(np.isinf(divisor), np.float32(0), divisor)
    codes = np.empty(left.shape, np.int8)
    for first in range(0, len(left), COLUMNS_AT_ONCE):
        last = min(first + COLUMNS_AT_ONCE, len(left))
        errors = np.empty((last - first, left.shape[1]), np.float32)
        for place in range(first, last):
            whole = np.clip(np.rint(left[place] / divisor), -LARGEST, LARGEST)
            codes[place] = whole
            error = (left[place] - whole * kept) / factor[place, place]
            left[place + 1 : last] -= factor[place, place + 1 : last, None] * error
            errors[place - first] = error
        left[last:] -= factor[first:last, last:].T @ errors
    found = np.empty(values.shape, np.int8)
    found[:, order] = codes.T
    return Rounded(found, scale)


def _order(moments: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Columns, largest moment first, and the upper Cholesky factor of the inverse in that order.

    Channels that are always zero are given the moment that damping gives all.
    """
    exact = moments.astype(np.float64)
    mean = float(np.mean(np.diag(exact)))
    if mean <= 0:  # no input was ever anything: all errors weigh the same
        return np.arange(len(exact)), np.eye(len(exact), dtype=np.float32)
    order = np.argsort(-np.diag(exact), kind="stable")
    sorted_moments = exact[np.ix_(order, order)] / mean
    while True:
        damped = sorted_moments + damping * np.eye(len(exact))
        try:
            upper = np.linalg.cholesky(np.linalg.inv(damped)).T
            return order, upper.astype(np.float32)
        except np.linalg.LinAlgError:
            damping = max(10 * damping, 1e-6)
