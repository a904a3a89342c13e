"""What one part of a check has found so far, in a file that is there whatever happens next."""

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.bench.hardware.sizes import Sizes
from jaxinfer.config import EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.kernels import paged_attention
from jaxinfer.kernels.paged_attention import Needs, pallas_triton

_ERROR_LENGTH = 600
T = TypeVar("T")
Place = Callable[[], AbstractContextManager[Any]]
"""Where a kernel runs."""


class Pretended(NamedTuple):
    """Hardware that an interpreter stands in for."""

    platform: str
    capability: str
    interpreter: Place


INTERPRETED = {
    "pallas_tpu": Pretended("tpu", "", pltpu.force_tpu_interpret_mode),
    "pallas_triton": Pretended("gpu", "8.0", pallas_triton.interpreter),
}
"""Kernels that run anywhere in a tiny check; the interpreter for Hopper has no public name yet."""


class Part:
    """Rows, facts and failures of one part; each is in the file as soon as it is known."""

    def __init__(
        self,
        path: Path,
        sizes: Sizes,
        *,
        budget_s: float,
        without: tuple[str, ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sizes, self.without = sizes, without
        self._path, self._clock = path, clock
        self._end_s = clock() + budget_s
        self._found: dict[str, Any] = {"facts": {}, "rows": [], "failures": [], "skipped": []}
        self._save()

    @property
    def is_late(self) -> bool:
        """Whether its time is up."""
        return self._clock() >= self._end_s

    def add(self, **row: Any) -> None:
        """One more row of figures."""
        self._found["rows"].append(row)
        self._save()

    def fact(self, **facts: Any) -> None:
        """What holds for the whole part."""
        self._found["facts"].update(facts)
        self._save()

    def skip(self, what: str, why: str) -> None:
        """What isn't here to be measured; said once."""
        entry = {"what": what, "why": why}
        if entry not in self._found["skipped"]:
            self._found["skipped"].append(entry)
            self._save()

    def attempt(self, what: str, act: Callable[[], T]) -> T | None:
        """Does one thing; where it fails that is noted, and the others go on.

        `running` names it meanwhile: a kernel may take its whole process with it.
        """
        if self.is_late:
            self.skip(what, "no time was left for it")
            return None
        self._found["running"] = what
        self._save()
        try:
            return act()
        except Exception as error:  # barrier: what one kernel or peer can't do must not hide others
            text = f"{type(error).__name__}: {error}"
            self._found["failures"].append({"what": what, "error": text[:_ERROR_LENGTH]})
            return None
        finally:
            del self._found["running"]
            self._save()

    def kernel(self, name: str, needs: Needs) -> Place | None:
        """Where a kernel runs: here, or in a tiny check in its interpreter; None where nowhere."""
        if name in self.without:
            self.skip(name, "it was wrong, failed or hung before in this check")
            return None
        pretended = INTERPRETED.get(name) if self.sizes.is_tiny else None
        if pretended is not None:
            needs = needs._replace(platform=pretended.platform, capability=pretended.capability)
        try:
            paged_attention.choose(name, needs)
        except ConfigError as error:
            self.skip(name, str(error))
            return None
        return nullcontext if pretended is None else pretended.interpreter

    def best(self, engine: EngineConfig, *, head_dim: int) -> EngineConfig:
        """The config with the platform's own kernel, or the reference where that can't serve."""
        for name in reversed(paged_attention.BACKENDS):
            if name in self.without:
                continue
            try:
                paged_attention.choose(name, needs_of(engine, head_dim=head_dim))
            except ConfigError:
                continue
            return replace(engine, attention=name)
        return replace(engine, attention="reference")

    def _save(self) -> None:
        half = self._path.with_suffix(".half")
        half.write_text(json.dumps(self._found), encoding="utf-8")
        half.replace(self._path)


def needs_of(engine: EngineConfig, *, head_dim: int) -> Needs:
    """What an engine of this device needs of attention."""
    from jaxinfer import cache as paged

    return paged_attention.needs_here(
        dtype=paged.kept_dtype(engine),
        head_dim=head_dim,
        page_size=engine.cache.page_size,
        block=engine.attention_block,
        compute_dtype=engine.compute_dtype,
    )


def device_name() -> str:
    """The first device, as jax calls it."""
    return str(jax.devices()[0].device_kind)
