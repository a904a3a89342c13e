"""When requests come: at random, in bursts or at an even beat; the same seed, the same times."""

import math
import random
from dataclasses import dataclass

from jaxinfer.errors import ConfigError

KINDS = ("poisson", "even", "gamma", "bursts")


@dataclass(frozen=True)
class Pattern:
    """How arrivals of one mean rate are spread."""

    kind: str = "poisson"
    value: float = 1.0
    """gamma: the shape, 1 is Poisson and less is more uneven; bursts: requests a burst."""


def pattern_of(text: str) -> Pattern:
    """`poisson`, `even`, `gamma:0.25` or `bursts:8`."""
    kind, _, number = text.partition(":")
    try:
        value = float(number) if number else 1.0
    except ValueError:
        value = math.nan
    has_value = kind in ("gamma", "bursts")
    is_fine = has_value == bool(number) and 0 < value < math.inf
    if kind not in KINDS or not is_fine or (kind == "bursts" and value != int(value)):
        raise ConfigError(
            f"--arrivals is {text!r}; it must be poisson, even, gamma:SHAPE (0.25) or "
            "bursts:SIZE (8)"
        )
    return Pattern(kind, value)


def times(pattern: Pattern, *, rate_per_s: float, count: int, seed: int) -> list[float]:
    """Seconds from the start, the first at 0; Poisson ones are those of the simulator."""
    rng = random.Random(f"arrivals {seed}")
    found: list[float] = []
    at_s = 0.0
    while len(found) < count:
        found += [at_s] * min(_at_once(pattern), count - len(found))
        at_s += _gap_s(pattern, rate_per_s, rng)
    return found


def _at_once(pattern: Pattern) -> int:
    return int(pattern.value) if pattern.kind == "bursts" else 1


def _gap_s(pattern: Pattern, rate_per_s: float, rng: random.Random) -> float:
    match pattern.kind:
        case "even":
            return 1 / rate_per_s
        case "gamma":
            return rng.gammavariate(pattern.value, 1 / (rate_per_s * pattern.value))
        case "bursts":
            return rng.expovariate(rate_per_s / pattern.value)
        case _:
            return rng.expovariate(rate_per_s)
