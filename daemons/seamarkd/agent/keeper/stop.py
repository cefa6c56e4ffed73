"""An orderly end: who is asked to go, who is killed, and when it is over. Signals nobody itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from signal import SIGCONT, SIGKILL, SIGTERM
from typing import NamedTuple

# How often to look for strays, how often to kill after the grace, and how much longer to try before giving up on
# what can't be killed (uninterruptible sleep).
STRAY_SECONDS = 0.2
KILL_SECONDS = 0.02
KILL_PATIENCE_SECONDS = 10.0


class Signal(NamedTuple):
    """To a process, or to a whole process group."""

    target: int
    number: int
    group: bool = False


class Left(NamedTuple):
    """Who still lives.

    Attributes:
        workers, stores: process ids of those that were started.
        all: every process below the keeper, by process id: its process group. None where there is not even a
            zombie.
    """

    workers: Set[int]
    stores: Set[int]
    all: Mapping[int, int] | None

    def pids(self, *, stores: bool) -> list[int]:
        """All processes below the keeper, with or without the stores."""
        return sorted(pid for pid in self.all or () if stores or pid not in self.stores)


@dataclass
class Stop:
    """An orderly end under way, and who has been asked to end so far.

    Unless it is final, stores live on and the keeper stays.
    """

    deadline: float
    final: bool
    asked: set[int] = field(default_factory=set)
    asked_groups: set[int] = field(default_factory=set)
    blind: bool = False
    """Whether it was said that not everybody can be seen."""

    def hasten(self, deadline: float, final: bool) -> None:
        """Asked for once more: the earlier deadline holds, and what is to end for good does."""
        self.deadline = min(self.deadline, deadline)
        self.final = self.final or final

    def pause(self, now: float) -> float:
        """Seconds until it is to be looked at again."""
        left = self.deadline - now
        return min(left, STRAY_SECONDS) if left > 0 else KILL_SECONDS

    def over(self, now: float, left: Left) -> bool:
        """Whether all have ended, or will not."""
        ended = left.all is None or not (self.final or left.workers or left.pids(stores=False))
        return ended or now >= self.deadline + KILL_PATIENCE_SECONDS

    def signals(self, now: float, left: Left) -> list[Signal]:
        """Whom to signal now."""
        if now >= self.deadline:
            return [Signal(pid, SIGKILL) for pid in left.pids(stores=self.final)]
        found: list[Signal] = []
        for pid, group in (left.all or {}).items():
            if pid not in left.stores | self.asked and group not in self.asked_groups:
                self.asked.add(pid)
                found.append(Signal(pid, SIGTERM))
        # The last checkpoints may need the store: it goes when nobody else is left, and heeds nothing less.
        if self.final and not left.pids(stores=False):
            found += [Signal(pid, SIGKILL, group=True) for pid in left.stores]
        return found

    def ask(self, groups: Iterable[int]) -> list[Signal]:
        """Process groups are asked to end."""
        found: list[Signal] = []
        for group in groups:
            self.asked_groups.add(group)
            # A process that was stopped would hear of it only at the end of the grace.
            found += [Signal(group, SIGTERM, group=True), Signal(group, SIGCONT, group=True)]
        return found
