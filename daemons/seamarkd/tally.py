"""What a daemon did not take, by reason: how often, and when last.

A count alone alarms for ever: of a stranger who came once, long ago, nobody has to be told in red.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable


class Tally(Counter[str]):
    """Counts by reason, and when each rose last, in seconds of the monotonic clock."""

    def __init__(self) -> None:
        super().__init__()
        self.rose: dict[str, float] = {}

    def __setitem__(self, reason: str, count: int) -> None:
        super().__setitem__(reason, count)
        self.rose[reason] = time.monotonic()


def counts(tallies: Iterable[Tally]) -> dict[str, int]:
    """All of them together, by reason."""
    return dict(sum(tallies, Counter()))


def ages(now: float, tallies: Iterable[Tally]) -> dict[str, float]:
    """Seconds since each of them rose last, by reason."""
    found: dict[str, float] = {}
    for tally in tallies:
        for reason, at in tally.rose.items():
            age = max(0.0, now - at)
            found[reason] = min(found.get(reason, age), age)
    return found
