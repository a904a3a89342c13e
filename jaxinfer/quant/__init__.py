"""Quantised weights: the leaf, how values are rounded to it, and products with it."""

from jaxinfer.quant.leaf import SCHEMES, QTensor, describe, find_scheme
from jaxinfer.quant.rounding import Rounding, quantise, restore, round_to_nearest

__all__ = [
    "SCHEMES",
    "QTensor",
    "Rounding",
    "describe",
    "find_scheme",
    "quantise",
    "restore",
    "round_to_nearest",
]
