"""Products with a quantised weight: who computes them, XLA or native code."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinfer.dims import Leaf
from jaxinfer.errors import ConfigError
from jaxinfer.kernels import native

AUTO, NATIVE, XLA = "auto", native.NATIVE, "xla"
MAX_INNER = 1 << 16  # channels of a product; longer sums may not fit into int32


class Needs(NamedTuple):
    """All that decides who computes the products of an engine."""

    platform: str  # as jax calls it
    num_devices: int
    is_quantised: bool


class Choice(NamedTuple):
    """Who computes them, and why not another."""

    name: str
    reason: str = ""


def choose(name: str, needs: Needs) -> Choice:
    """Who was asked for, or native code for `auto` where it can be had.

    What was asked for and can't be had is refused, never replaced. Weights that are not quantised
    are always XLA's.
    """
    if name not in (AUTO, NATIVE, XLA):
        raise ConfigError(f"engine.products is {name!r}; there are: {AUTO}, {NATIVE}, {XLA}")
    if name == XLA or not needs.is_quantised:
        return Choice(XLA)
    reason = _refusal(needs)
    if reason and name == NATIVE:
        raise ConfigError(
            f"engine.products is {NATIVE!r}, and can't be: {reason}; choose {AUTO!r} or {XLA!r}"
        )
    return Choice(XLA, reason) if reason else Choice(NATIVE)


def project(
    x: Float[Array, "rows K"],
    codes: Leaf,
    scale: Leaf,
    *,
    digits: int,
    block: int,
) -> Float[Array, "rows N"]:
    """x times codes [N, K] * scale [N]: rotated by blocks, rounded row by row, summed exactly.

    A row's bits depend neither on the others nor on how many threads there are.
    """
    out = jax.ShapeDtypeStruct((x.shape[0], codes.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call(native.library().target("product"), out)
    return call(x, codes, scale, digits=np.int64(digits), block=np.int64(block))


def _refusal(needs: Needs) -> str:
    if needs.platform != "cpu":
        return f"native code is for CPUs, and this is a {needs.platform}"
    if needs.num_devices > 1:
        return f"weights that {needs.num_devices} devices share are XLA's"
    return native.refusal()
