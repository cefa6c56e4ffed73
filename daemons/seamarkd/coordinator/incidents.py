"""The incident record: one entry per fault, put together from what each process saw of it (D5, FIELD-NOTES 12).

Lighthouse events say what failed and when the quorum was answered, exit facts say how a process ended, timelines
say when each worker was told, had aborted, was in again. Pure; every time is copied from the process that saw it.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from seamark.protocol.messages import (
    Failure,
    FailureEvent,
    Incident,
    QuorumEvent,
    Timeline,
    WorkerExited,
    WorkerStarted,
)
from seamarkd.exits import exit_cause

KEPT = 1_000
"""Incidents kept per job; older ones are dropped from memory, their number stays."""
LOOKED_BACK = 64
"""Incidents that a late report may still belong to."""


class IncidentLog:
    """The incidents of one job, oldest first."""

    def __init__(self, incidents: list[Incident] | None = None) -> None:
        self.incidents = incidents or []
        self._open = bool(self.incidents) and _is_open(self.incidents[-1])
        self._exits: dict[str, WorkerExited] = {}
        self._starts: dict[str, WorkerStarted] = {}
        """By the incarnation that was replaced."""
        self._changed: set[int] = set()

    def take_changed(self) -> tuple[Incident, ...]:
        """The incidents that changed since this was asked last: those to be made durable."""
        changed = tuple(incident for incident in self.incidents if incident.number in self._changed)
        self._changed.clear()
        return changed

    @property
    def count(self) -> int:
        """How many there were."""
        return self.incidents[-1].number if self.incidents else 0

    def failed(self, event: FailureEvent, *, alone: bool = False) -> None:
        """A failure was published: it opens an incident or belongs to the open one.

        Args:
            event: the failure.
            alone: nobody restarts with who failed, so that no quorum will close it: it is an incident of its own.
        """
        failure = self._with_exit(event.failure)
        if self._has(failure):
            return
        replacement = self._starts.get(failure.incarnation)
        started = {failure.member: replacement.forked_at} if replacement else {}
        if self._continues(failure) if alone else self._open:
            incident = self.incidents[-1]
            failures = sorted([*incident.failures, failure], key=_precedence)
            self._change(-1, replace(incident, failures=failures, started=incident.started | started))
            return
        self._open = not alone
        self._changed.add(self.count + 1)
        exited = self._exits.get(failure.incarnation)
        self.incidents.append(
            Incident(
                number=self.count + 1,
                group=event.group,
                iteration=failure.iteration,
                failures=[failure],
                consequences=[],
                next_iteration=-1,
                quorum_at=-1.0,
                members=[],
                stamps={},
                started=started,
                log_tail=exited.log_tail if exited else [],
                closed=alone,
            )
        )
        del self.incidents[:-KEPT]

    def answered(self, event: QuorumEvent) -> bool:
        """A quorum ends the open incident; True if there was one."""
        if not self._open:
            return False
        self._open = False
        ended = replace(
            self.incidents[-1],
            consequences=event.consequences,
            next_iteration=event.iteration,
            quorum_at=event.answered_at,
            members=event.members,
        )
        self._change(-1, ended)
        return True

    def restarted(self) -> None:
        """All workers are started anew: that ends the open incident where nobody asks for a quorum."""
        if self._open:
            self._open = False
            self._change(-1, replace(self.incidents[-1], closed=True))

    def exited(self, report: WorkerExited) -> None:
        """How a process ended: the cause of its loss, which was published before this was known."""
        self._exits[report.incarnation] = report
        _bound(self._exits)
        for position in self._latest():
            incident = self.incidents[position]
            if any(failure.incarnation == report.incarnation for failure in incident.failures):
                failures = sorted(map(self._with_exit, incident.failures), key=_precedence)
                culprit = failures[0].incarnation == report.incarnation
                tail = report.log_tail if culprit else incident.log_tail
                self._change(position, replace(incident, failures=failures, log_tail=tail))

    def started(self, report: WorkerStarted) -> None:
        """A replacement was forked; the failure of whom it replaces may have been heard before it, or is yet to be."""
        if not report.replaces:
            return
        self._starts[report.replaces] = report
        _bound(self._starts)
        for position in self._latest():
            incident = self.incidents[position]
            if any(failure.incarnation == report.replaces for failure in incident.failures):
                started = {**incident.started, report.member: report.forked_at}
                self._change(position, replace(incident, started=started))
                return

    def timeline(self, report: Timeline) -> bool:
        """What a worker saw; True if it belongs to a known incident."""
        for position in range(len(self.incidents) - 1, -1, -1):
            incident = self.incidents[position]
            if incident.next_iteration == report.iteration:
                stamps = {**incident.stamps, report.member: report.stamps}
                self._change(position, replace(incident, stamps=stamps))
                return True
        return False

    def _latest(self) -> range:
        """Where the incidents are that a late report may belong to, the last one first."""
        last = len(self.incidents) - 1
        return range(last, max(-1, last - LOOKED_BACK), -1)

    def _continues(self, failure: Failure) -> bool:
        """Of ranks that are lost with their node: whether it is the node of the last incident, and another rank."""
        known = self.incidents[-1].failures if self.incidents else []
        same = any(one.cause.kind == failure.cause.kind == "node" and one.node == failure.node for one in known)
        return same and all(one.member != failure.member for one in known)

    def _has(self, failure: Failure) -> bool:
        """True for an event heard again: in a snapshot, or after a restart of either side.

        A process is lost once, even if a lighthouse started anew finds the others an iteration further.
        """
        return any(
            (known.kind, known.member, known.incarnation) == (failure.kind, failure.member, failure.incarnation)
            and (failure.kind == "lost" or known.iteration == failure.iteration)
            for incident in self.incidents[-LOOKED_BACK:]
            for known in incident.failures
        )

    def _change(self, position: int, incident: Incident) -> None:
        self.incidents[position] = incident
        self._changed.add(incident.number)

    def _with_exit(self, failure: Failure) -> Failure:
        report = self._exits.get(failure.incarnation)
        if report is None or failure.kind != "lost" or failure.cause.kind not in ("exit", "signal"):
            # Who was ended for a reason of ours died of that, and not of the signal.
            return failure
        return replace(failure, cause=exit_cause(report.status))


def _is_open(incident: Incident) -> bool:
    return incident.next_iteration < 0 and not incident.closed


def _bound(reports: dict[str, Any]) -> None:
    while len(reports) > KEPT:
        del reports[next(iter(reports))]


def _precedence(failure: Failure) -> tuple[int, float]:
    """The root cause first: the earliest loss, else the earliest fault of its own, else the earliest (D5)."""
    rank = 0 if failure.kind == "lost" else 2 if failure.cause.communication else 1
    return rank, failure.detected_at
