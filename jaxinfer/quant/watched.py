"""A leaf that notes what it is multiplied with, for calibration."""

import dataclasses
from typing import Any

from jaxinfer.dims import Leaf


@dataclasses.dataclass(frozen=True, eq=False)
class Watched:
    """Takes the place of an array while a program is traced, and of nothing outside it.

    Every product with it appends its other side to `seen`: a value of the program that is traced,
    [rows, K], which that program can then sum up. To JAX it is a leaf of no known kind.
    """

    values: Leaf
    seen: list[Any] = dataclasses.field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.values.shape
