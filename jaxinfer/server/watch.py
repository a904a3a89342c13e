"""Notices an engine that has work and ends no step: it is progress that counts, not latency."""

import math
import time
from collections.abc import Callable

from jaxinfer.runner import Pulse

LOOK_S = 0.1  # between two looks
MAX_GAP_S = 1.0  # of a longer time without a look no more than this counts: no one was there to see


class Watch:
    """How long there has been work without the end of a step.

    Whoever holds it looks every LOOK_S. Idle time never counts, and neither does time in which this
    process did not run at all, such as that of a machine that was suspended.
    """

    def __init__(self, limit_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """A limit of 0 is none."""
        self._limit_s = limit_s or math.inf
        self._clock = clock
        self._looked_s = clock()
        self._pulse = Pulse(0, False)
        self.stalled_s = 0.0
        """Since the last step ended while there was work; 0 where there is none."""

    @property
    def is_stalled(self) -> bool:
        """Whether that is longer than the limit."""
        return self.stalled_s > self._limit_s

    def look(self, pulse: Pulse) -> bool:
        """Takes a look; True where `is_stalled` has changed."""
        was_stalled, now_s = self.is_stalled, self._clock()
        before, self._pulse = self._pulse, pulse
        gap_s, self._looked_s = now_s - self._looked_s, now_s
        if pulse.has_work and before.has_work and pulse.num_steps == before.num_steps:
            self.stalled_s += min(gap_s, MAX_GAP_S)
        else:
            self.stalled_s = 0.0
        return self.is_stalled != was_stalled
