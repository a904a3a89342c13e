"""How fast an engine is at best: tells a deadline that can be met from one that can't."""

import math
from collections import deque
from statistics import median
from typing import NamedTuple

from jaxinfer.host.plan import Plan

_WINDOW = 32
_BEST = 0.5  # of the usual time: who could not make it at twice the usual speed is told at once


class Pace(NamedTuple):
    """Seconds that nothing beats; 0 where nothing is known."""

    prefill_token_s: float = 0.0
    step_s: float = 0.0


class PaceMeter:
    """Makes a pace of the steps that have returned."""

    def __init__(self) -> None:
        self.pace = Pace()
        self._prefill: deque[float] = deque(maxlen=_WINDOW)
        self._steps: deque[float] = deque(maxlen=_WINDOW)
        self._returned_s = -math.inf

    def returned(self, plan: Plan, began_s: float, now_s: float) -> None:
        """A step has been read; the pace changes once in a window."""
        seconds = now_s - max(began_s, self._returned_s)
        self._returned_s = now_s
        tokens = sum(chunk.length for chunk in plan.chunks)
        times = self._prefill if tokens else self._steps
        times.append(seconds / max(1, tokens))
        if len(times) < _WINDOW:
            return
        best = _BEST * median(times)
        times.clear()
        self.pace = self.pace._replace(**{"prefill_token_s" if tokens else "step_s": best})
