"""Values to codes and scales, on the host: round to nearest, and where other methods join."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxinfer.quant.leaf import QTensor, block_of

LARGEST = 127  # -128 is left out: a code and its negative are both there
ROWS_AT_ONCE = 1 << 12  # of a matrix in float32


class Rounded(NamedTuple):
    """A matrix in whole numbers."""

    codes: np.ndarray  # i8 [N, K]
    scale: np.ndarray  # f32 [N]


Rounding = Callable[[str, np.ndarray], Rounded]
"""Given the dotted path of a leaf and its values, rotated, f32 [N, K].

Calibrated methods are other functions of this type: what they learnt stands under the path.
"""


def round_to_nearest(path: str, values: np.ndarray) -> Rounded:
    """Each row by its own largest value, which becomes 127 or -127."""
    codes = np.empty(values.shape, np.int8)
    scale = scales(values)
    for first in range(0, len(values), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        # What is too small to divide by counts as zero.
        divisor = np.where(scale[rows] > np.finfo(np.float32).tiny, scale[rows], np.inf)
        codes[rows] = np.rint(values[rows] / divisor[:, None])
    return Rounded(codes, scale)


def scales(values: np.ndarray) -> np.ndarray:
    """What 127 stands for in each row: its largest value. Near normal values that is the best."""
    most = np.empty(len(values), np.float32)
    for first in range(0, len(values), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        most[rows] = np.max(np.abs(values[rows]), axis=1, initial=0.0)
    return most / np.float32(LARGEST)


def quantise(
    path: str,
    values: np.ndarray,
    *,
    contract: int,
    digits: int,
    rounding: Rounding = round_to_nearest,
) -> QTensor:
    """One leaf in host memory; a product sums over its last `contract` axes."""
    kept = values.shape[: values.ndim - contract]
    matrix = values.reshape(math.prod(kept), -1)
    block = block_of(matrix.shape[1])
    found = rounding(path, rotate(matrix, block))
    return QTensor(found.codes.reshape(values.shape), found.scale.reshape(kept), digits, block)


def restore(weight: QTensor, *, contract: int) -> np.ndarray:
    """The values that a leaf stands for, in float32."""
    codes, scale = np.asarray(weight.codes), np.asarray(weight.scale)
    rotated = codes.astype(np.float32) * scale.reshape(scale.shape + (1,) * contract)
    flat = rotated.reshape(scale.size, -1)
    return rotate(flat, weight.block).reshape(codes.shape)


def rotate(values: np.ndarray, block: int) -> np.ndarray:
    """Each block of channels times a Hadamard matrix, in float32; twice is as it was."""
    matrix = values.astype(np.float32, copy=False)
    if block == 1:
        return matrix
    return (matrix.reshape(-1, block) @ hadamard(block)).reshape(matrix.shape)


@functools.cache
def hadamard(size: int) -> np.ndarray:
    """Sylvester's orthogonal matrix for a power of two; its own transpose."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / math.sqrt(size)).astype(np.float32)
