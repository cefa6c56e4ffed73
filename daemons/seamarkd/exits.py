"""How workers end: what their exit status means, and how long they have."""

from __future__ import annotations

import signal

from seamark.protocol.messages import Cause

ABORT_EXIT_CODE = 130
"""A worker that ended by RestartAbort: the job is to end, nobody is to be restarted."""
PREEMPTION_GRACE = 30.0
"""Seconds workers have for an emergency checkpoint when their host goes away (D12)."""

UNKNOWN_STATUS = -1_000
"""How it ended nobody saw: it had lost its keeper, and had no agent either. No signal has this number."""
NOT_STARTED = -1_001
"""It was to be started and could not be."""


def discarded_cause(status: int) -> Cause:
    """The cause of the end of a worker that the job's own rank assignment had dropped."""
    return Cause(kind="discarded", status=status, text="dropped by the job's rank assignment")


def exit_cause(status: int) -> Cause:
    """The cause that an exit status tells: an exit code, or minus the number of a signal."""
    if status == UNKNOWN_STATUS:
        return Cause(kind="exit", status=status, text="exit status unknown: its keeper was killed before it")
    if status == NOT_STARTED:
        return Cause(kind="exit", status=status, text="could not be started")
    if status < 0:
        return Cause(kind="signal", status=-status, text=f"killed by {signal.Signals(-status).name}")
    return Cause(kind="exit", status=status, text=f"exited with code {status}")
