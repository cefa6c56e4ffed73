"""Follow what the ranks report, and say when a restart is complete.

It reads the lines that `training/loop.py` writes, and believes no process list and no log: a restart is
complete when every rank of the expected world has reported its first collective under one new attempt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


class ContradictoryReports(Exception):
    """Two processes reported as the same rank of the same attempt."""


@dataclass(frozen=True)
class Report:
    """One line of a rank. `monotonic` is CLOCK_MONOTONIC in seconds."""

    event: str
    monotonic: float
    attempt: int
    rank: int
    world_size: int
    pid: int


class Reports:
    """All reports of one job so far."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._offsets: dict[Path, int] = {}
        self.attempts: dict[int, dict[int, Report]] = {}
        self.faults: list[Report] = []

    def read(self) -> None:
        """Take in the complete lines that were written since the last call."""
        for path in self._directory.iterdir():
            offset = self._offsets.get(path, 0)
            if path.stat().st_size == offset:
                continue
            with path.open("rb") as file:
                file.seek(offset)
                complete, _, _ = file.read().rpartition(b"\n")
            for line in complete.splitlines():
                self._add(Report(**json.loads(line)))
            self._offsets[path] = offset + len(complete) + (1 if complete else 0)

    def _add(self, report: Report) -> None:
        if report.event == "fault":
            self.faults.append(report)
            return
        ranks = self.attempts.setdefault(report.attempt, {})
        earlier = ranks.setdefault(report.rank, report)
        if earlier is not report:
            who = f"rank {report.rank} of attempt {report.attempt}"
            raise ContradictoryReports(f"{who} reported by pids {earlier.pid} and {report.pid}")

    def latest_attempt(self) -> int:
        """The highest attempt that any rank reported; -1 before the first report."""
        return max(self.attempts, default=-1)

    def complete_attempt(self, world_size: int, after: int, since: float = 0.0) -> int | None:
        """The first attempt later than `after` in which ranks 0 to `world_size` - 1 all reported, if any.

        `since`: CLOCK_MONOTONIC in seconds; what was reached before that answers an earlier fault.
        """
        for attempt in sorted(self.attempts):
            ranks = self.attempts[attempt]
            whole = ranks.keys() == set(range(world_size))
            answering = all(r.world_size == world_size and r.monotonic > since for r in ranks.values())
            if attempt > after and whole and answering:
                return attempt
        return None
