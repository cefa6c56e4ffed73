"""A living worker process as its agent watches it: its progress page, its death, its silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from seamark.progress import ProgressPage
from seamarkd.agent.hang import HangWatch, Reading, Verdict
from seamarkd.agent.watch import DeathWatch, How


class Silence(NamedTuple):
    """A worker gives no sign of life.

    Attributes:
        iteration: which one it is in.
        verdict: what is to be done.
        grace: seconds between SIGTERM and SIGKILL.
    """

    iteration: int
    verdict: Verdict
    grace: float


class Watched:
    """One such process.

    Args:
        pid, pidfd: which; the watch keeps a duplicate.
        page: its progress page, which is closed with this.
        on_dying: called in the event loop once it is sure to die, with what was seen first and when (monotonic
            seconds); not where its exit status says it as early, or the rank assignment has dropped it.

    Raises:
        OSError: no file descriptor is left.
    """

    def __init__(self, pid: int, pidfd: int, page: ProgressPage, on_dying: Callable[[How, float], None]) -> None:
        def dying(how: How, at: float) -> None:
            # The end of the process itself tells nothing that its exit status, on its way, doesn't tell better.
            if how != "pidfd" and not page.discarded:
                on_dying(how, at)

        self.page = page
        self._hang = HangWatch()
        self._death = DeathWatch(pid, pidfd, page, dying)

    def arm(self) -> None:
        """The worker may have named its canaries by now: they are watched, too."""
        self._death.arm()

    def look(self, now: float) -> Silence | None:
        """Whether it gives no sign of life, to be asked a few times a second."""
        reading = Reading.of(self.page, stopped=self._death.stopped)
        verdict = self._hang.look(now, reading)
        return Silence(reading.iteration, verdict, reading.timeouts.grace) if verdict is not None else None

    def close(self) -> None:
        """Lets go of its descriptors."""
        self._death.close()
        self.page.close()
