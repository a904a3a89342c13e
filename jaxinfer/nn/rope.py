"""Rotary position embedding, half-split as in Hugging Face checkpoints."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.config import ModelConfig, RopeScaling


class Rotation(NamedTuple):
    """The cosines and sines of a step's positions, once for all layers."""

    cos: Float[Array, "B T 1 half"]
    sin: Float[Array, "B T 1 half"]


def angles(positions: Int[Array, "B T"], *, config: ModelConfig) -> Rotation:
    """The rotation at each position (Su et al. 2021).

    The branch is always taken. What comes out of one is stored; without it XLA:CPU computes the
    cosine again for every head of every layer.
    """
    frequencies = inverse_frequencies(config)

    def compute() -> Rotation:
        angle = positions[..., None].astype(jnp.float32) * frequencies
        return Rotation(jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :])

    nothing = jnp.zeros((*positions.shape, 1, len(frequencies)), jnp.float32)
    return lax.cond(jnp.max(positions) >= 0, compute, lambda: Rotation(nothing, nothing))


def rotate(x: Float[Array, "B T N H"], rotation: Rotation) -> Float[Array, "B T N H"]:
    """Turns the pair (x[i], x[i + H/2]) by the angle of its position."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = rotation
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """theta^(-2i/H) for i < H/2, stretched as the checkpoint asks; float32 [H/2]."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    plain = (1.0 / config.rope_theta**exponents).astype(np.float32)
    return _stretch(plain, config.rope_scaling).astype(np.float32)


def _stretch(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    if scaling.kind == "none":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # Llama 3.1: long waves are slowed by `factor`, short ones kept, and those between blended.
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_positions / wavelengths
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor
