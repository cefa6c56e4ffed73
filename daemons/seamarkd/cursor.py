"""Where a reader of the lighthouse's events stands, so that it knows when it missed some.

Events are published, not acknowledged: a reader that was away, or connected late, sees a gap in a job's numbers, or a
higher number in the idle beat, and asks for a snapshot (D11). Pure; used by every daemon that subscribes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Turn = Literal["old", "same", "new"]


class EventCursor:
    """The last number read of each job's events, within one epoch of the lighthouse.

    A job of which nothing was read yet stands at 0, so that a reader started anew asks for what went before it.
    """

    def __init__(self) -> None:
        self._epoch = -1
        self._read: dict[str, int] = {}

    def turn(self, epoch: int) -> Turn:
        """Whose event this is: of a lighthouse that was replaced, of the present one, or of a new one."""
        if epoch <= self._epoch:
            return "same" if epoch == self._epoch else "old"
        self._epoch = epoch
        self._read.clear()
        return "new"

    def position(self, job: str) -> int:
        """The number read last."""
        return self._read.get(job, 0)

    def advance(self, job: str, sequence: int) -> None:
        """Everything up to this number was read."""
        self._read[job] = max(sequence, self.position(job))

    def behind(self, latest: Mapping[str, int]) -> list[str]:
        """The jobs with newer events than were read."""
        return [job for job, sequence in latest.items() if sequence > self.position(job)]
