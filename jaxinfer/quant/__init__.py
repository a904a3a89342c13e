"""Quantised weights: the leaf, how values are rounded to it, and products with it."""

from jaxinfer.quant.balance import Factors, multiply
from jaxinfer.quant.leaf import SCHEMES, QTensor, describe, digits_of, find_scheme, using
from jaxinfer.quant.rounding import Rounding, quantise, restore, round_to_nearest
from jaxinfer.quant.watched import Watched

__all__ = [
    "SCHEMES",
    "Factors",
    "QTensor",
    "Rounding",
    "Watched",
    "describe",
    "digits_of",
    "find_scheme",
    "multiply",
    "quantise",
    "restore",
    "round_to_nearest",
    "using",
]
