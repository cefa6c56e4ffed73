"""Replica groups: their managers and the lighthouse, ranks and their manager, one manager and another."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from seamark.protocol.messages.base import Count, Duration, Message, Moment, Name, Part, QuorumId, Short, Text
from seamark.protocol.messages.ranks import Recipient


class Replica(Part, frozen=True):
    """A replica group as it joins and as a quorum lists it (torchft's quorum member).

    ``address`` is where the manager of its rank 0 listens: for the group's other ranks, for whoever heals from it, and
    for the lighthouse's probe. ``data`` is the caller's own.
    """

    replica_id: Name
    incarnation: Name
    address: Short
    store_address: Short
    step: Count
    world_size: Annotated[int, Meta(ge=1, le=1_000_000)]
    shrink_only: bool = False
    commit_failures: Count = 0
    data: Text = ""


class ReplicaBeat(Message, frozen=True):
    """The heartbeat of a replica group, by the manager of its rank 0. ``address``: see Replica.

    ``waiting`` is the request that it waits for, 0 if none: who gave up is known even if the word of that was lost.
    ``seen`` is the number of the last failure that reached it in this epoch: later ones are pushed to it again.
    """

    type_id = 60
    direction = "manager -> lighthouse"
    answer = "BeatAnswer | Refused"
    job: Name
    replica_id: Name
    incarnation: Name
    address: Short
    sequence: Count
    step: Count
    waiting: Count = 0
    seen: Count = 0


class ReplicaJoin(Message, frozen=True):
    """A replica group asks for the next quorum and waits; asking is a heartbeat.

    ``quorum_id`` and ``quorum_members`` are of its last quorum, as in Join. ``min_members`` and ``join_timeout`` (-1:
    the lighthouse's) are the limits it asks for, the same for all who wait; ``target_members`` (0: none) are waited
    for up to the join timeout, and then nobody else.
    """

    type_id = 61
    direction = "manager -> lighthouse"
    answer = "ReplicaQuorum | QuorumReset | Refused"
    job: Name
    request: Count
    replica: Replica
    quorum_id: QuorumId
    quorum_members: list[Name]
    min_members: Count = 0
    target_members: Count = 0
    join_timeout: Moment = -1.0


class ReplicaQuorum(Message, frozen=True):
    """The quorum, once per connection; participants sorted by id."""

    type_id = 62
    direction = "lighthouse -> manager"
    job: Name
    recipients: list[Recipient]
    quorum_id: QuorumId
    participants: list[Replica]


class ReplicaWithdraw(Message, frozen=True):
    """The caller gave up waiting: the request with this number counts no longer."""

    type_id = 63
    direction = "manager -> lighthouse"
    job: Name
    replica_id: Name
    incarnation: Name
    request: Count


class ReplicaLeave(Message, frozen=True):
    """A replica group ends in good order: the others need not wait for its silence."""

    type_id = 64
    direction = "manager -> lighthouse"
    answer = "Acknowledged"
    job: Name
    request: Count
    replica_id: Name
    incarnation: Name
    reason: Text


class RankJoin(Message, frozen=True):
    """A rank of a replica group asks its manager for the next quorum; asked of the lighthouse once all ranks did.

    ``state_address`` is where this rank's state can be fetched. Limits as in ReplicaJoin; ``timeout`` is the caller's.
    """

    type_id = 66
    direction = "rank -> its manager"
    answer = "RankQuorum | Refused"
    request: Count
    group_rank: Count
    step: Count
    state_address: Short
    shrink_only: bool
    commit_failures: Count
    min_members: Count
    target_members: Count
    join_timeout: Moment
    timeout: Duration
    data: Text = ""


class RankQuorum(Message, frozen=True):
    """The quorum that the replica group is in."""

    type_id = 67
    direction = "manager -> rank"
    request: Count
    quorum_id: QuorumId
    participants: list[Replica]


class CommitVote(Message, frozen=True):
    """A rank's vote on this step of this quorum: may its replica group commit it?"""

    type_id = 68
    direction = "rank -> its manager"
    answer = "CommitDecision | Refused"
    request: Count
    group_rank: Count
    quorum_id: QuorumId
    step: Count
    commit: bool
    timeout: Duration


class CommitDecision(Message, frozen=True):
    """All ranks of the replica group voted: ``commit`` if all were for it."""

    type_id = 69
    direction = "manager -> rank"
    request: Count
    commit: bool


class StateAddressRequest(Message, frozen=True):
    """A rank that heals asks another replica group's manager: where does my counterpart offer its state?"""

    type_id = 70
    direction = "rank -> another manager"
    answer = "StateAddress | Refused"
    request: Count
    group_rank: Count


class StateAddress(Message, frozen=True):
    """Where that rank's state can be fetched."""

    type_id = 71
    direction = "manager -> rank"
    request: Count
    address: Short
