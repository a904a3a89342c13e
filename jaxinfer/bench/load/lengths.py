"""How long prompts and answers are: one number, a range, or a range about a median."""

import math
import random
import re
from dataclasses import dataclass

from jaxinfer.errors import ConfigError

_TEXT = re.compile(r"(\d+)(?:-(\d+))?(?:~(\d+))?")


@dataclass(frozen=True)
class Lengths:
    """Evenly from low to high; with a median, log-normal about it and cut to that range.

    Four standard deviations of the logarithm span the range, so a wide range has a long tail.
    """

    low: int
    high: int
    median: int | None = None

    def draw(self, rng: random.Random) -> int:
        """One length; without a median it is what the simulator draws."""
        if self.median is None:
            return rng.randint(self.low, self.high)
        sigma = math.log(self.high / self.low) / 4
        drawn = round(self.median * math.exp(sigma * rng.gauss(0.0, 1.0)))
        return min(max(drawn, self.low), self.high)


def lengths_of(option: str, text: str) -> Lengths:
    """`100`, `20-60` or `20-2000~300`."""
    found = _TEXT.fullmatch(text)
    if found:
        low, high = int(found[1]), int(found[2] or found[1])
        median = None if found[3] is None else int(found[3])
        if 1 <= low <= high and (median is None or low <= median <= high):
            return Lengths(low, high, median)
    raise ConfigError(
        f"{option} is {text!r}; it must be a number, a range (20-60) or a range about a median "
        "(20-2000~300), from 1 up"
    )
