"""What the lighthouse publishes of a job, numbered without gaps, and what it tells whoever missed some (D11)."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

from seamark.protocol.messages.base import (
    Count,
    Duration,
    Iteration,
    Message,
    Moment,
    Name,
    Part,
    QuorumId,
    Short,
    Text,
)
from seamark.protocol.messages.ranks import Cause, Member
from seamark.protocol.messages.replicas import Replica


class Failure(Part, frozen=True):
    """A loss or fault as the lighthouse published it, or noted it as a consequence of an earlier one."""

    kind: Literal["lost", "faulted"]
    member: Name
    incarnation: Name
    rank: Annotated[int, Meta(ge=-1)]
    node: Short
    iteration: Iteration
    cause: Cause
    occurred_at: Moment
    detected_at: Moment
    published_at: Moment
    detector: Short


class FailureEvent(Message, frozen=True):
    """A failure, published once. ``sequence`` counts a job's events within an ``epoch`` without gaps."""

    type_id = 30
    direction = "lighthouse -> subscribers, re-published by agents"
    job: Name
    group: Name
    epoch: Count
    sequence: Count
    failure: Failure


class QuorumEvent(Message, frozen=True):
    """A quorum was answered. ``consequences``: faults of the incident which it ends that were not published alone."""

    type_id = 31
    direction = "lighthouse -> subscribers, re-published by agents"
    job: Name
    group: Name
    epoch: Count
    sequence: Count
    quorum_id: QuorumId
    generation: Count
    iteration: Count
    restarts: Count
    members: list[Member]
    answered_at: Moment
    ended_iteration: Iteration
    consequences: list[Failure]


class CompletedEvent(Message, frozen=True):
    """The job's group completed."""

    type_id = 32
    direction = "lighthouse -> subscribers, re-published by agents"
    job: Name
    group: Name
    epoch: Count
    sequence: Count


class RecoveredEvent(Message, frozen=True):
    """A member whose failure was published is there again; ``incarnation`` is the one that came back."""

    type_id = 36
    direction = "lighthouse -> subscribers"
    job: Name
    group: Name
    epoch: Count
    sequence: Count
    member: Name
    incarnation: Name


class ReplicaQuorumEvent(Message, frozen=True):
    """A quorum of replica groups was answered."""

    type_id = 37
    direction = "lighthouse -> subscribers"
    job: Name
    group: Name
    epoch: Count
    sequence: Count
    quorum_id: QuorumId
    participants: list[Replica]
    reason: Text


Event: TypeAlias = FailureEvent | QuorumEvent | CompletedEvent | RecoveredEvent | ReplicaQuorumEvent
"""What is published of a job and numbered: whoever follows a job reads all of them, and acts on those it knows."""


class EventBeat(Message, frozen=True):
    """The latest sequence number of every job, repeated while idle, so that a lost tail is seen.

    ``waiting`` says for each job whose members wait for a quorum what it waits for, in a sentence.
    """

    type_id = 33
    direction = "lighthouse -> subscribers"
    epoch: Count
    latest: dict[str, int]
    waiting: dict[str, Text]


class GroupMember(Part, frozen=True):
    """A living member of a group. ``step`` is -1 where the group knows none; ``joined``: it waits for the quorum."""

    member: Name
    incarnation: Short
    node: Short
    beat_age: Duration
    step: Annotated[int, Meta(ge=-1)]
    joined: bool


class GroupStatus(Part, frozen=True):
    """A group as of now.

    ``reason`` is the quorum's sentence. ``settled`` is false while a lighthouse that was started anew still waits to
    hear from members it does not know. ``failures`` are those in force: of members that did not come back.
    """

    job: Name
    group: Name
    quorum_id: QuorumId
    reason: Text
    settled: bool
    members: list[GroupMember]
    failures: list[FailureEvent]


class SnapshotRequest(Message, frozen=True):
    """After a gap, a new epoch or a fresh subscription: where does the job stand?"""

    type_id = 34
    direction = "agent, coordinator, subscriber -> lighthouse; worker -> agent"
    answer = "Snapshot | Refused"
    request: Count
    job: Name


class Snapshot(Message, frozen=True):
    """A job as of ``sequence``: its ring of failures, its last quorums, its end, its groups."""

    type_id = 35
    direction = "lighthouse -> whoever asked"
    request: Count
    job: Name
    epoch: Count
    sequence: Count
    failures: list[FailureEvent]
    quorums: list[QuorumEvent]
    completed: bool
    reason: Text
    recovered: list[RecoveredEvent] = []
    groups: list[GroupStatus] = []
