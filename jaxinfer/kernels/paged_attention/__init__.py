"""Ragged paged attention: rows of queries against cached tokens that lie in pages."""

from collections.abc import Callable

from jax import Array

from jaxinfer.errors import ConfigError
from jaxinfer.kernels.paged_attention.reference import paged_attention as reference

__all__ = ["BACKENDS", "backend"]

BACKENDS: dict[str, Callable[..., Array]] = {"reference": reference}
"""Name -> implementation, all of one signature: that of reference.paged_attention."""


def backend(name: str) -> Callable[..., Array]:
    """The implementation of that name; a name that is not there is refused, never replaced."""
    if name not in BACKENDS:
        raise ConfigError(f"engine.attention is {name!r}; there are: {', '.join(BACKENDS)}")
    return BACKENDS[name]
