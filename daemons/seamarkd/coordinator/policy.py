"""What becomes of a job when a worker or a node is lost, comes or finishes: the three restart policies.

Pure: a job's ``Standing`` and what happened in, a ``Verdict`` out; ``losses.py`` and ``stops.py`` carry it out. The
words are torchrun's and nvidia-resiliency-ext's: a *worker group* is the workers of a node (or each rank alone,
``--worker-group rank``), MIN and MAX are ``--nnodes MIN:MAX``.

================  =================  ==============================  ==========================================
what happened     any-failed         min-healthy                     replace
================  =================  ==============================  ==========================================
a worker failed   restart all        go on while MIN groups are      its agent replaced it: go on;
                                     well, else restart all          it did not: restart all
a node is lost    restart all        the same                        fill its places; restart all where no
                                                                     wrapper or nobody is left
the assignment    go on; too few     the same                        go on; too few are left: fail
dropped a rank    are left: fail
a node is new     below MAX: grow    go on                           below MAX: fill its places
nobody runs       succeed            MIN groups finished: succeed    succeed
================  =================  ==============================  ==========================================
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from seamark.protocol.messages import Policy

Happening = Literal["worker-failed", "worker-replaced", "worker-discarded", "worker-finished", "node-lost", "node-new"]
Verdict = Literal["go-on", "fill", "grow", "restart", "succeed", "fail"]
"""``restart`` is charged to ``--max-restarts``; ``grow`` is a restart of all that is not."""


class Standing(Struct, frozen=True):
    """What the policies look at, after what happened. Groups are worker groups."""

    policy: Policy
    wrapped: bool
    """Some worker is in ``seamark.Wrapper``: survivors can restart in process."""
    least: int
    """Groups that the job needs."""
    well: int
    """Groups all of whose workers run or have finished."""
    finished: int
    """Groups all of whose workers have finished."""
    running: int
    """Workers that run."""
    missing: int
    """Places that are without a worker, up to MAX."""


def decide(happening: Happening, standing: Standing) -> Verdict:
    """The policy's answer.

    Args:
        happening: what happened to one worker or node.
        standing: the job after it.

    Returns:
        What to do about it.
    """
    if standing.policy == "min-healthy":
        return _min_healthy(happening, standing)
    if happening == "worker-failed":
        return "restart"
    if happening == "node-lost":
        survivors = standing.policy == "replace" and standing.wrapped and standing.running > 0
        return "fill" if survivors else "restart"
    if happening == "node-new":
        return _new_node(standing)
    if happening == "worker-discarded" and standing.well < standing.least:
        return "fail"
    if happening in ("worker-discarded", "worker-finished") and not standing.running:
        return "succeed"
    return "go-on"


def _new_node(standing: Standing) -> Verdict:
    # Who has finished is not started again for the sake of a node that comes at the end.
    if not standing.missing or standing.finished:
        return "go-on"
    if standing.policy == "any-failed":
        return "grow"
    return "fill" if standing.wrapped else "go-on"


def _min_healthy(happening: Happening, standing: Standing) -> Verdict:
    if happening in ("node-new", "worker-replaced"):
        return "go-on"
    if standing.well < standing.least:
        return "restart"
    # Nobody runs, and as many are well as are needed: they have finished.
    return "go-on" if standing.running else "succeed"
