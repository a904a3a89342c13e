"""Ragged paged attention: rows of queries against cached tokens that lie in pages."""

import importlib
import logging
from collections.abc import Callable

from jax import Array

from jaxinfer.errors import ConfigError
from jaxinfer.kernels.paged_attention.needs import Needs, needs_here

__all__ = ["AUTO", "BACKENDS", "Needs", "backend", "choose", "needs_here", "pick", "why_reference"]

AUTO = "auto"
BACKENDS = ("reference", "native", "pallas_tpu", "pallas_triton", "pallas_gpu")
"""Modules of this package, all with a `paged_attention` of one signature: the reference's. All
but the reference have a `refusal(needs)` that says why they can't serve an engine, or ""."""
_BEST_FIRST = {"cpu": ("native",), "tpu": ("pallas_tpu",), "gpu": ("pallas_gpu", "pallas_triton")}
log = logging.getLogger(__name__)


def backend(name: str) -> Callable[..., Array]:
    """The implementation of that name; a name that is not there is refused, never replaced."""
    if name not in BACKENDS:
        there = ", ".join(BACKENDS)
        raise ConfigError(f"engine.attention is {name!r}; there are: {there}")
    return importlib.import_module(f"{__name__}.{name}").paged_attention


def pick(name: str, needs: Needs) -> str:
    """What `choose` would take, without a word; what was asked for is taken as it is."""
    if name != AUTO:
        return name
    usable = (one for one in _BEST_FIRST.get(needs.platform, ()) if not _refusal(one, needs))
    return next(usable, "reference")


def choose(name: str, needs: Needs) -> str:
    """The backend that serves an engine: the one asked for, or the platform's best for `auto`.

    One that was asked for and can't serve the engine is refused, never replaced.
    """
    if name != AUTO:
        reason = _refusal(name, needs)
        if reason:
            raise ConfigError(
                f"engine.attention is {name!r}, which {reason}; choose {AUTO!r} or 'reference'"
            )
        return name
    for candidate in _BEST_FIRST.get(needs.platform, ()):
        reason = _refusal(candidate, needs)
        if not reason:
            log.info("attention: %s, the best of %s", candidate, needs)
            return candidate
        log.warning("attention: not %s, which %s", candidate, reason)
    log.info("attention: reference, for %s", needs)
    return "reference"


def why_reference(needs: Needs) -> str:
    """Why `auto` is the reference; "" where it is a kernel of the platform's own."""
    if pick(AUTO, needs) != "reference":
        return ""
    own = (f"{one} {_refusal(one, needs)}" for one in _BEST_FIRST.get(needs.platform, ()))
    return "; ".join(own) or f"there is no other kernel for a {needs.platform}"


def _refusal(name: str, needs: Needs) -> str:
    backend(name)
    if name == "reference":
        return ""
    return importlib.import_module(f"{__name__}.{name}").refusal(needs)
