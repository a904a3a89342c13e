"""What every product must do with rows that are not finite."""

from collections.abc import Callable

import numpy as np


def check_row_alone(run: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> None:
    """What is not finite stays so in its row, and changes no bit of another."""
    clean = run(x)
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = x.copy()
        spoilt[2, 5] = bad
        found = run(spoilt)
        assert not np.isfinite(found[2]).any()
        assert np.delete(found, 2, 0).tobytes() == np.delete(clean, 2, 0).tobytes()
