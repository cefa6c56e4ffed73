"""The restart iteration of a quorum: the one place where it is computed (D4).

Within a process session the iteration rises by one; across processes it goes to the next free hundred, so that
the key space ``iteration_<n>_*`` of an old session is never used again, however many restarts it had.
"""

from __future__ import annotations

from collections.abc import Iterable

SESSION_STRIDE = 100
"""Iterations reserved for a process session (the step of the auto-restart proposal, FIELD-NOTES 3)."""


def next_iteration(joiners: Iterable[int], last_issued: int, roster_base: int) -> int:
    """The iteration of the quorum that these joiners form.

    Args:
        joiners: for each active member the iteration of its last answered quorum, -1 for a new process.
        last_issued: the group's last issued iteration, -1 if none.
        roster_base: the highest iteration the coordinator knows of, -1 if none.

    Returns:
        0 for the first quorum of a job; one more than all of these when an old process enters again; the next
        hundred when every member is a new process.
    """
    own = list(joiners)
    base = max([last_issued, roster_base, *own])
    if base < 0:
        return 0
    if any(iteration >= 0 for iteration in own):
        return base + 1
    return (base // SESSION_STRIDE + 1) * SESSION_STRIDE
