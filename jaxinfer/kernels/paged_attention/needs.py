"""What an engine needs of attention, and where: each backend says whether it can."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Needs(NamedTuple):
    """All that decides which backends can serve an engine."""

    platform: str  # cpu, gpu or tpu
    capability: str  # of a GPU, as "9.0"; empty elsewhere
    dtype: str  # of the values in pages
    head_dim: int
    page_size: int
    block: int  # keys that are reduced at a time
    compute_dtype: str = ""  # what int8 pages are read as


def needs_here(
    *, dtype: str, head_dim: int, page_size: int, block: int, compute_dtype: str = ""
) -> Needs:
    """The needs of an engine on the first device of this process."""
    device = jax.devices()[0]
    known = str(device.platform)
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(known, known)
    capability = str(device.compute_capability) if platform == "gpu" else ""
    name = jnp.dtype(dtype).name
    return Needs(platform, capability, name, head_dim, page_size, block, compute_dtype)
