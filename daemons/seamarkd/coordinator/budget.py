"""How often a job's processes may be restarted: so many per rolling hour without checkpoint progress (D16)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

WINDOW = 3_600.0
"""Seconds after which a restart no longer counts."""


class RestartBudget:
    """Restarts left to a job.

    Args:
        limit: restarts allowed within the window.
        spent: when some were taken already, oldest first.
    """

    def __init__(self, limit: int, spent: Iterable[float] = ()) -> None:
        self.limit = limit
        self._spent: deque[float] = deque(spent, maxlen=limit + 1)

    @property
    def spent(self) -> list[float]:
        """When restarts were taken that may still count, oldest first."""
        return list(self._spent)

    def remaining(self, now: float) -> int:
        """Restarts left now."""
        while self._spent and now - self._spent[0] >= WINDOW:
            self._spent.popleft()
        return max(0, self.limit - len(self._spent))

    def spend(self, now: float) -> bool:
        """Takes one restart out of the budget; False if none is left."""
        if self.remaining(now) == 0:
            return False
        self._spent.append(now)
        return True

    def renew(self) -> bool:
        """A new durable checkpoint: the job makes progress. True if anything had been spent."""
        spent = bool(self._spent)
        self._spent.clear()
        return spent
