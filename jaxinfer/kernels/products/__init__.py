"""Products with int8 and bfloat16 weights: who computes them, XLA or native code."""

import dataclasses
import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from jaxinfer.dims import Leaf
from jaxinfer.errors import ConfigError
from jaxinfer.kernels import native

AUTO, NATIVE, XLA, PALLAS_GPU = "auto", native.NATIVE, "xla", "pallas_gpu"
THERE = (AUTO, NATIVE, XLA, PALLAS_GPU)
INT8, BFLOAT16 = "int8", "bfloat16"  # weights that native code multiplies
MAX_INNER = 1 << 16  # channels of a product; longer sums may not fit into int32


@dataclasses.dataclass(frozen=True, eq=False)
class Floats:
    """A weight in bfloat16 that native code multiplies.

    It takes the place of an array while a program is traced, and of nothing outside it.
    """

    values: Leaf

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.values.shape


class Needs(NamedTuple):
    """All that decides who computes the products of an engine."""

    platform: str  # as jax calls it
    num_devices: int
    weights: str  # what they are kept in: int8, or a dtype
    capability: str = ""  # of a GPU, as "9.0"


class Choice(NamedTuple):
    """Who computes them, and why not another."""

    name: str
    reason: str = ""


def choose(name: str, needs: Needs) -> Choice:
    """Who was asked for, or native code for `auto` where it can be had.

    What was asked for and can't be had is refused, never replaced. Weights in other types
    are always XLA's.
    """
    if name not in THERE:
        raise ConfigError(f"engine.products is {name!r}; there are: {', '.join(THERE)}")
    if name == PALLAS_GPU:
        if reason := _refusal_on_gpu(needs):
            raise _refused(name, reason)
        return Choice(PALLAS_GPU)
    if name == XLA or needs.weights not in (INT8, BFLOAT16):
        return Choice(XLA)
    reason = _refusal(needs)
    if reason and name == NATIVE:
        raise _refused(name, reason)
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


def sums_on_gpu(rows: Int8[Array, "rows K"], table: Leaf) -> Array | None:
    """Sums of products of all rows with all of the table's, by the kernel for Hopper GPUs.

    None where it has no tiles for them. It is imported where it is used: others need no Mosaic.
    """
    own = importlib.import_module(f"{__name__}.{PALLAS_GPU}")
    return own.sums(rows, table) if own.fits(len(rows), *table.shape) else None


def project_floats(x: Float[Array, "rows K"], weights: Leaf) -> Float[Array, "rows N"]:
    """x, rounded to bfloat16, times weights [N, K] of that type, which are read as they lie.

    Sums are float32 in one order of channels: a row's bits depend neither on the others nor on how
    many threads there are.
    """
    out = jax.ShapeDtypeStruct((x.shape[0], weights.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(native.library().target("float_product"), out)(x, weights)


def _refused(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"engine.products is {name!r}, and can't be: {reason}; choose {AUTO!r} or {XLA!r}"
    )


def _refusal_on_gpu(needs: Needs) -> str:
    if needs.platform != "gpu":
        return f"its kernel is for Hopper GPUs, and this is a {needs.platform}"
    if needs.weights != INT8:
        return f"its kernel takes int8 weights, and these are {needs.weights}: see --quant"
    if needs.capability.split(".")[0] != "9":
        return (
            "its kernel is for Hopper GPUs (9.0), and this one's compute capability is "
            f"{needs.capability}"
        )
    return ""


def _refusal(needs: Needs) -> str:
    if needs.platform != "cpu":
        return f"native code is for CPUs, and this is a {needs.platform}"
    if needs.num_devices > 1:
        return f"weights that {needs.num_devices} devices share are XLA's"
    return native.lacks("avx512_bf16") if needs.weights == BFLOAT16 else native.refusal()
