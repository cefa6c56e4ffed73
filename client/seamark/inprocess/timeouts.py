"""The wrapper's timeouts: what its arguments say, checked, in seconds."""

from __future__ import annotations

from datetime import timedelta

from seamark.inprocess.deadline import seconds
from seamark.progress import Timeouts


def timeouts(
    *,
    soft: float | timedelta | None,
    hard: float | timedelta | None,
    grace: float | timedelta,
    initial: float | timedelta | None,
    outside: float | timedelta | None,
    safety: float | None = None,
) -> Timeouts:
    """The timeouts of a worker; None stands for "for ever".

    Raises:
        ValueError: one of them is not above 0, or the hard one not above the soft one; the factor is not above 1.
    """
    if safety is not None and not 1.0 < safety < float("inf"):
        raise ValueError(
            f"timeout_safety_factor={safety:g} must be more than 1: a step may take longer than those before it"
        )
    times = [0.0 if one is None else seconds(one) for one in (soft, hard, grace, initial, outside)]
    found = Timeouts(*times)._replace(safety=safety or 0.0)
    if found.soft and found.hard and found.hard <= found.soft:
        raise ValueError(
            f"hard_timeout={found.hard:g} s must be more than soft_timeout={found.soft:g} s: "
            "a rank is interrupted first, and ended only if that does not help"
        )
    return found
