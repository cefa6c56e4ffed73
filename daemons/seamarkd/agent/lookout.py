"""What an agent sees on its workers' progress pages, from time to time: their steps, and who is silent."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from seamark.protocol.messages import JobProgress
from seamarkd.agent.ground import Ground

log = logging.getLogger(__name__)

PROGRESS_INTERVAL = 1.0
HANG_INTERVAL = 0.5
"""Seconds. Time-outs are tens of seconds, and each look wakes up a processor that trains."""


class Lookout:
    """That of one node.

    Args:
        ground: what it stands on.
        tell: sends to the coordinator.
    """

    def __init__(self, ground: Ground, tell: Callable[[JobProgress], None]) -> None:
        self._core, self._jobs, _, self._perform = ground
        self._tell = tell

    def report_progress(self) -> float:
        """The coordinator is told where something has changed; seconds until the next look."""
        for name, kept in self._jobs.items():
            members = {process.held.process.slot: process.watched.page for process in kept.processes.values()}
            steps = {member: page.pings for member, page in members.items()}
            checkpoints = {member: page.checkpoint for member, page in members.items()}
            if (steps, checkpoints) != kept.steps:
                kept.steps = (steps, checkpoints)
                self._tell(JobProgress(name, steps, checkpoints))
        return PROGRESS_INTERVAL

    def look_for_hangs(self) -> float:
        """Who gives no sign of life is interrupted or ended; seconds until the next look."""
        now = time.monotonic()
        for name, kept in self._jobs.items():
            for incarnation, process in list(kept.processes.items()):
                silence = process.watched.look(now)
                if silence is not None:
                    log.warning("job %s: %s: %s", name, process.held.process.slot, silence.verdict.text)
                    self._perform(self._core.losses.hangs(now, name, incarnation, *silence))
        return HANG_INTERVAL
