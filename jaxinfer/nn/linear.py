"""Matrix products with weights: the one place that knows what kinds of leaf there are."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.dims import Leaf
from jaxinfer.engine_config import MIN_ROWS
from jaxinfer.kernels.products import Floats, project_floats
from jaxinfer.quant import QTensor, Watched, products


def project(
    x: Float[Array, "..."],
    weight: Leaf,
    bias: Leaf | None = None,
    *,
    contract: int = 1,
    exact: bool = True,
) -> Float[Array, "..."]:
    """Multiplies the last `contract` axes of x with the last ones of `weight`; returns float32.

    Weights lie output-first ([..., N, K]), x is rounded to their dtype, and the sum is float32.
    Fewer than MIN_ROWS rows are padded up to it: below, XLA:CPU leaves its path for many rows, and
    a row's bits change with the row count. In bfloat16 that path is also the faster one; float32
    without `exact` goes without the padding.
    """
    lead = x.shape[: x.ndim - contract]
    flat = x.reshape(math.prod(lead), math.prod(x.shape[x.ndim - contract :]))
    if isinstance(weight, Watched):
        weight.seen.append(flat)
        weight = weight.values
    if isinstance(weight, QTensor):
        out = products.project(flat, weight, contract=contract)
    elif isinstance(weight, Floats):
        out = project_floats(flat, weight.values.reshape(-1, flat.shape[1]))
    else:
        out = _project(flat, weight, contract=contract, exact=exact)
    out = out.reshape(*lead, *weight.shape[: len(weight.shape) - contract])
    return out if bias is None else out + bias.astype(jnp.float32)


def embed(table: Leaf, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The rows of `table` for some token ids, in float32."""
    if isinstance(table, Watched | Floats):
        table = table.values
    if isinstance(table, QTensor):
        return products.embed(table, tokens)
    return table[tokens].astype(jnp.float32)


def _project(
    x: Float[Array, "rows K"], weight: Array, *, contract: int, exact: bool
) -> Float[Array, "rows N"]:
    rows, inner = x.shape
    flat = x.astype(weight.dtype)
    if rows < MIN_ROWS and (exact or weight.dtype != jnp.float32):
        flat = jnp.pad(flat, ((0, MIN_ROWS - rows), (0, 0)))
    table = weight.reshape(-1, inner)
    out = lax.dot_general(flat, table, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return out[:rows]
