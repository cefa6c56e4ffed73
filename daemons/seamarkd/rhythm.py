"""When timers fire: all at multiples of their period, so that they share their wake-ups.

A wake-up finds the processor's caches full of the training, and costs more than most of what is done in it. Timers
whose periods are multiples of each other fire together on one host, in one process or in several; on another host,
whose clock began at another time, they don't, so that no daemon hears from all nodes at once. Nor do they drift. Pure.
"""

from __future__ import annotations

import math

EARLY = 0.001
"""Of a period: a timer that fires so much before its time has fired."""


def next_beat(now: float, period: float) -> float:
    """The first multiple of a period that is still to come.

    Args:
        now: seconds of the monotonic clock.
        period: seconds, above 0.
    """
    return (math.floor(now / period + EARLY) + 1) * period
