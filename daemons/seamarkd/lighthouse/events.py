"""The numbered events of one job: what was published, in which order, and what a late-comer is told.

An event is *sent* once it has a number and stands in the ring (D11). The ring is bounded; whoever missed more
than it holds learns the present state from a snapshot. Knows nothing of who listens.
"""

from __future__ import annotations

from collections import deque

from msgspec.structs import replace

from seamark.protocol.messages import (
    CompletedEvent,
    Failure,
    FailureEvent,
    GroupStatus,
    Member,
    QuorumEvent,
    RecoveredEvent,
    Replica,
    ReplicaQuorumEvent,
    Snapshot,
)

RING = 4_096
QUORUMS_KEPT = 64
MEMBERS_TOLD = 10_000
"""Members of all quorums of a snapshot, unless the last has more: with 64 of a large job it would fit into no frame."""
WHOLE_TEXTS = 64
"""So many of the last failures of a snapshot are told with their whole text."""
TEXT_TOLD = 200
"""Characters that are told of the others' texts."""


class EventLog:
    """Numbers a job's events within one epoch of the lighthouse, without gaps.

    Args:
        job: its name.
        epoch: the lighthouse's.
        sequence: the numbers begin above it.
    """

    def __init__(self, job: str, epoch: int, sequence: int = 0) -> None:
        self.job = job
        self.epoch = epoch
        self.sequence = sequence
        self.failures: deque[FailureEvent] = deque(maxlen=RING)
        self.quorums: deque[QuorumEvent] = deque(maxlen=QUORUMS_KEPT)
        self.recoveries: deque[RecoveredEvent] = deque(maxlen=RING)

    def forget(self) -> None:
        """Another job of this name begins: what happened to the last one is none of its business."""
        self.failures.clear()
        self.quorums.clear()
        self.recoveries.clear()

    def failure(self, group: str, failure: Failure) -> FailureEvent:
        """The event of this failure, numbered."""
        self.sequence += 1
        event = FailureEvent(self.job, group, self.epoch, self.sequence, failure)
        self.failures.append(event)
        return event

    def quorum(
        self,
        group: str,
        *,
        quorum_id: int,
        generation: int,
        iteration: int,
        restarts: int,
        members: list[Member],
        answered_at: float,
        ended_iteration: int,
        consequences: list[Failure],
    ) -> QuorumEvent:
        """The event of this answered quorum, numbered."""
        self.sequence += 1
        event = QuorumEvent(
            self.job,
            group,
            self.epoch,
            self.sequence,
            quorum_id,
            generation,
            iteration,
            restarts,
            members,
            answered_at,
            ended_iteration,
            consequences,
        )
        self.quorums.append(event)
        return event

    def completed(self, group: str) -> CompletedEvent:
        """The event of the group's completion, numbered."""
        self.sequence += 1
        return CompletedEvent(self.job, group, self.epoch, self.sequence)

    def recovered(self, group: str, member: str, incarnation: str) -> RecoveredEvent:
        """The event of a failed member's return, numbered."""
        self.sequence += 1
        event = RecoveredEvent(self.job, group, self.epoch, self.sequence, member, incarnation)
        self.recoveries.append(event)
        return event

    def replica_quorum(
        self, group: str, quorum_id: int, participants: list[Replica], reason: str
    ) -> ReplicaQuorumEvent:
        """The event of this answered quorum of replica groups, numbered."""
        self.sequence += 1
        return ReplicaQuorumEvent(self.job, group, self.epoch, self.sequence, quorum_id, participants, reason)

    def snapshot(self, request: int, *, completed: bool, reason: str, groups: list[GroupStatus]) -> Snapshot:
        """The job as of now, in one message: every failure of the ring, and as many of the quorums as it holds."""
        return Snapshot(
            request,
            self.job,
            self.epoch,
            self.sequence,
            _shortened(list(self.failures)),
            _last(list(self.quorums)),
            completed,
            reason,
            list(self.recoveries),
            groups,
        )


def _shortened(failures: list[FailureEvent]) -> list[FailureEvent]:
    long = [one for one in failures[:-WHOLE_TEXTS] if len(one.failure.cause.text) > TEXT_TOLD]
    if not long:
        return failures
    short = {one.sequence: _with_less_text(one) for one in long}
    return [short.get(one.sequence, one) for one in failures]


def _with_less_text(event: FailureEvent) -> FailureEvent:
    cause = replace(event.failure.cause, text=event.failure.cause.text[:TEXT_TOLD])
    return replace(event, failure=replace(event.failure, cause=cause))


def _last(quorums: list[QuorumEvent]) -> list[QuorumEvent]:
    members, first = 0, len(quorums)
    while first > 0 and (members := members + len(quorums[first - 1].members)) <= MEMBERS_TOLD:
        first -= 1
    return quorums[min(first, len(quorums) - 1) :] if quorums else []
