"""Channels of activations against columns of weights: which of the two holds what is large.

A product stays what it is where a channel is divided by a number and its column multiplied with it,
and what divides the channel costs nothing where it joins a norm's gain, or the rows of the matrix
before (SmoothQuant, Xiao et al. 2023). Both sides are rounded with one step a row, so that their
errors grow with sum(c) and sum(v) over the channels: c the channel's mean square, v its column's.
The product of the two sums is least where channels are divided by (c / v)^(1/4).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jaxinfer.config import ModelConfig

SMALLEST = 1e-8  # of the mean: a channel that is never there is not made endlessly large
LAYER = "layers.{}."

Factors = tuple[np.ndarray, ...]
"""What a leaf is multiplied with: f32, each with as many axes as the leaf."""


class Balance(NamedTuple):
    """What leaves are multiplied with before they are rounded."""

    factors: dict[str, Factors]
    """By the dotted path of a leaf."""
    channels: dict[str, np.ndarray]
    """By the path of a matrix: what the channels of its input are multiplied with; f32 [K]."""


def balance(
    read: Callable[[str], np.ndarray],
    moments: Mapping[str, np.ndarray],
    config: ModelConfig,
) -> Balance:
    """Factors for a Llama model; `read` gives a leaf by its dotted path.

    Head and embedding stay as they are where they are one table.
    """
    made = Balance({}, {})
    for index in range(config.num_layers):
        at = LAYER.format(index)
        _after_rows(made, read, moments, config, at)
        _after_norm(made, read, moments, f"{at}attention_norm", f"{at}attention.qkv")
        _after_norm(made, read, moments, f"{at}mlp_norm", f"{at}mlp.gate_up")
    if not config.tie_embeddings:
        _after_norm(made, read, moments, "final_norm", "head")
    return made


def multiply(values: np.ndarray, factors: Factors) -> np.ndarray:
    """The leaf in float32, times what it is multiplied with."""
    out = values.astype(np.float32)
    for one in factors:
        out *= one
    return out


def divisors(mean_squares: np.ndarray, column_squares: np.ndarray) -> np.ndarray:
    """(c / v)^(1/4), around 1."""
    c, v = (
        np.maximum(one, SMALLEST * max(float(np.mean(one)), np.finfo(np.float64).tiny))
        for one in (mean_squares.astype(np.float64), column_squares.astype(np.float64))
    )
    logs = np.log(c / v) / 4
    return np.exp(logs - np.mean(logs)).astype(np.float32)


def _after_norm(
    made: Balance,
    read: Callable[[str], np.ndarray],
    moments: Mapping[str, np.ndarray],
    norm: str,
    matrix: str,
) -> None:
    """The norm's gain takes the division. It is rounded to its dtype; the columns to what it is."""
    gain, weight = read(norm), read(matrix)
    whole = multiply(weight, made.factors.get(matrix, ()))
    squares = _squares(whole.reshape(-1, whole.shape[-1]))
    divisor = divisors(np.diag(moments[matrix]), squares)
    before = gain.astype(np.float32)
    after = (before / divisor).astype(gain.dtype).astype(np.float32)
    is_lost = (before == 0) | (after == 0) | ~np.isfinite(after)
    kept = np.where(is_lost, np.float32(1), after / np.where(is_lost, np.float32(1), before))
    made.factors[norm] = (kept,)
    made.factors[matrix] = (*made.factors.get(matrix, ()), 1 / kept)
    made.channels[matrix] = kept


def _after_rows(
    made: Balance,
    read: Callable[[str], np.ndarray],
    moments: Mapping[str, np.ndarray],
    config: ModelConfig,
    at: str,
) -> None:
    """The rows of `up` take the division for `down`, those of the values for the output."""
    down, output = read(f"{at}mlp.down"), read(f"{at}attention.output")
    squares = _squares(down)
    divisor = divisors(np.diag(moments[f"{at}mlp.down"]), squares)
    made.factors[f"{at}mlp.down"] = (divisor[None],)
    made.channels[f"{at}mlp.down"] = 1 / divisor
    made.factors[f"{at}mlp.gate_up"] = (np.stack([np.ones_like(divisor), 1 / divisor])[..., None],)

    # All query heads of a group read one value head: they share its divisors.
    heads, size = config.num_kv_heads, config.head_dim
    shape = (heads, config.num_heads // heads, size)
    squares = _squares(output).reshape(shape).sum(1)
    means = np.diag(moments[f"{at}attention.output"]).reshape(shape).sum(1)
    divisor = divisors(means.reshape(-1), squares.reshape(-1)).reshape(heads, size)
    wide = np.repeat(divisor[:, None], shape[1], axis=1).reshape(config.num_heads, size)
    made.factors[f"{at}attention.output"] = (wide[None],)
    made.channels[f"{at}attention.output"] = 1 / wide.reshape(-1)
    rows = np.ones((heads, shape[1] + 2, size), np.float32)
    rows[:, -1] = 1 / divisor
    made.factors[f"{at}attention.qkv"] = (rows[..., None],)
    if config.qkv_bias:
        made.factors[f"{at}attention.qkv_bias"] = (rows,)


def _squares(weight: np.ndarray) -> np.ndarray:
    """Summed over the first axis."""
    return np.asarray(np.sum(np.square(weight.astype(np.float32)), axis=0, dtype=np.float64))
