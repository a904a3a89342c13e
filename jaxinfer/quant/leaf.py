"""The quantised leaf: whole numbers, a scale for each output, and how activations meet them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.dims import Leaf
from jaxinfer.errors import ConfigError
from jaxinfer.spec import ArraySpec, map_specs

SCHEMES = {"w8a8": 1, "w8a16": 2}
"""How many int8 digits an activation is rounded to in the layers, by the name of the scheme."""
HEAD_DIGITS = 2
"""In the product with the head, which makes the logits themselves: a second digit there takes a
quarter off the divergence of a calibrated SmolLM2-135M."""
MAX_BLOCK = 128  # a larger rotation costs more than it mends


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A weight as codes * scale, the scale one for each output: the last axes are summed over.

    It takes the place of an array in the tree of params; nn.linear tells the two apart. Both sides
    of a product are rotated before they are rounded, which changes no product and spreads what is
    large in one channel over `block` of them (Ashkboos et al. 2024, QuaRot). Without that, one
    scale a token costs SmolLM2-135M ten times the divergence.
    """

    codes: Leaf  # int8, in the shape of the weight
    scale: Leaf  # f32, that shape without the axes that a product sums over
    digits: int = dataclasses.field(metadata={"static": True})
    """1: activations are rounded to int8, one scale a token. 2: to two of them, near 16 bits."""
    block: int = dataclasses.field(metadata={"static": True})
    """Channels that a rotation mixes: the codes are those of the rotated weight. 1: none."""
    product: str = dataclasses.field(default="xla", metadata={"static": True})
    """Who multiplies: a name of kernels.products. Trees at rest have the default; see `using`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.codes.shape


def using(params: Any, product: str) -> Any:
    """A tree of params for a program: its quantised leaves are multiplied by `product`."""

    def one(leaf: Any) -> Any:
        return dataclasses.replace(leaf, product=product) if isinstance(leaf, QTensor) else leaf

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, QTensor))


def find_scheme(name: str) -> int:
    """The digits of a scheme in the layers; ConfigError where there is none of that name."""
    if name not in SCHEMES:
        raise ConfigError(f"no quantisation scheme {name!r}; there are: {', '.join(SCHEMES)}")
    return SCHEMES[name]


def digits_of(spec: ArraySpec, scheme: str) -> int:
    """The digits of what a matrix is multiplied with: more for a table of logits."""
    digits = find_scheme(scheme)
    return max(digits, HEAD_DIGITS) if "vocab" in spec.axes else digits


def block_of(num_channels: int) -> int:
    """How many channels are rotated together: a power of two that divides them."""
    return min(MAX_BLOCK, num_channels & -num_channels)


def describe(specs: Any, scheme: str) -> Any:
    """The tree of specs as `scheme` stores it: matrices as QTensor, the rest as it was."""
    if scheme == "none":
        return specs
    find_scheme(scheme)

    def one(spec: ArraySpec) -> Any:
        if not spec.contract:
            return spec
        kept = len(spec.shape) - spec.contract
        return QTensor(
            codes=spec._replace(dtype=jnp.int8),
            scale=ArraySpec(spec.shape[:kept], spec.axes[:kept], dtype=jnp.float32, init="ones"),
            digits=digits_of(spec, scheme),
            block=block_of(math.prod(spec.shape[kept:])),
        )

    return map_specs(one, specs)
