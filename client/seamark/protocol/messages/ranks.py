"""The group of a job's ranks: who is in it, who is lost or faulted, and the quorum that they wait for."""

from __future__ import annotations

from typing import Literal

from seamark.protocol.messages.base import Count, Iteration, Message, Moment, Name, Part, QuorumId, Short, Text
from seamark.protocol.messages.jobs import StoreAddress


class Cause(Part, frozen=True):
    """Why a member was lost or faulted.

    ``kind``: exit (status is the code), signal (status is the signal's number), exception, store (the TCPStore
    service was lost), node (its host was lost), stuck (it could not leave the function), heartbeat (it was not heard of
    for the timeout), gone (its host lives and its process doesn't), left (it said goodbye), discarded (the job's own
    rank assignment dropped it), hang (it gave no sign of life for its timeout), joined (no failure: a rank that was
    missing has come, and all begin again together), injected (a drill).
    ``communication`` marks an exception that only says that a peer went away: evidence of another's failure, seldom a
    cause.
    """

    kind: Literal[
        "exit",
        "signal",
        "exception",
        "store",
        "node",
        "stuck",
        "heartbeat",
        "gone",
        "left",
        "discarded",
        "hang",
        "joined",
        "injected",
    ]
    status: int = 0
    text: Text = ""
    communication: bool = False


class Member(Part, frozen=True):
    """A participant of an answered quorum, in rank order."""

    member: Name
    incarnation: Name
    initial_rank: Count
    node: Name
    local_rank: Count
    keys: dict[str, str] = {}


class Recipient(Part, frozen=True):
    """Whom an answer that travels once per node is for."""

    member: Name
    incarnation: Name
    request: Count


class MemberStarted(Message, frozen=True):
    """A slot has a new incarnation; it is expected to join until its time has passed (D3).

    ``placement`` is of the roster that the agent knows: a lighthouse that has not heard of it yet does not answer.
    """

    type_id = 11
    direction = "agent -> lighthouse"
    answer = "Acknowledged | Refused"
    request: Count
    job: Name
    generation: Count
    member: Name
    incarnation: Name
    node: Name
    placement: Count = 0


class LastQuorum(Message, frozen=True):
    """What a node's workers know of their group's last quorum: a lighthouse that was started anew learns it back.

    ``quorum_id`` is 0 and ``members`` empty where they know of none: that, too, has to be heard.
    """

    type_id = 16
    direction = "agent -> lighthouse"
    answer = "Acknowledged | Refused"
    request: Count
    job: Name
    generation: Count
    quorum_id: QuorumId
    iteration: Iteration
    restarts: Count
    members: list[Name]
    completed: bool
    node: Name
    call: Count = 0


class MemberLost(Message, frozen=True):
    """A worker is dying or dead. ``replacement`` announces the incarnation that takes its place, if one does.

    ``node`` is where it was: its place may be another node's by now.
    """

    type_id = 12
    direction = "agent -> lighthouse"
    answer = "Acknowledged | Refused"
    request: Count
    job: Name
    generation: Count
    member: Name
    incarnation: Name
    cause: Cause
    occurred_at: Moment
    detected_at: Moment
    detector: Short
    replacement: Short = ""
    node: Short = ""


class MemberFaulted(Message, frozen=True):
    """A worker left the function by an exception and will join again."""

    type_id = 13
    direction = "worker -> agent -> lighthouse"
    answer = ""
    job: Name
    member: Name
    incarnation: Name
    iteration: Iteration
    cause: Cause
    occurred_at: Moment


class StoreLost(Message, frozen=True):
    """The TCPStore service of a job died; ``store`` is the one that takes its place."""

    type_id = 14
    direction = "agent, coordinator -> lighthouse"
    answer = "Acknowledged | Refused"
    request: Count
    job: Name
    generation: Count
    store: StoreAddress
    detected_at: Moment
    node: Short = ""
    """Where the new one is."""


class Join(Message, frozen=True):
    """A member asks for the next quorum and waits.

    ``iteration`` and ``restarts`` are those of its last answered quorum, -1 and 0 in a process that had none;
    ``quorum_id`` and ``quorum_members`` likewise: the highest of all joiners is taken as the previous quorum.
    ``call`` counts the wrapped calls of a process: who is in one has seen those before it completed.
    """

    type_id = 20
    direction = "worker -> agent -> lighthouse"
    answer = "QuorumAnswer | QuorumReset | Completed | Refused"
    job: Name
    group: Name
    generation: Count
    member: Name
    incarnation: Name
    request: Count
    iteration: Iteration
    restarts: Count
    quorum_id: QuorumId
    quorum_members: list[Name]
    commit_failures: Count = 0
    keys: dict[str, str] = {}
    call: Count = 0


class QuorumAnswer(Message, frozen=True):
    """The quorum, once per node; ``recipients`` says which of the node's members waited for it."""

    type_id = 21
    direction = "lighthouse -> agent -> worker"
    job: Name
    group: Name
    recipients: list[Recipient]
    quorum_id: QuorumId
    generation: Count
    iteration: Count
    restarts: Count
    members: list[Member]
    store: StoreAddress
    call: Count = 0


class QuorumReset(Message, frozen=True):
    """The wait was cut short because the membership changed: join again inside the same call."""

    type_id = 22
    direction = "lighthouse -> agent -> worker"
    job: Name
    group: Name
    recipients: list[Recipient]
    reason: Text


class Complete(Message, frozen=True):
    """The function returned in this iteration; the member waits for the others (D10)."""

    type_id = 23
    direction = "worker -> agent -> lighthouse"
    answer = "Completed | QuorumReset | Refused"
    job: Name
    group: Name
    generation: Count
    member: Name
    incarnation: Name
    request: Count
    iteration: Count
    call: Count = 0


class Completed(Message, frozen=True):
    """All active members completed this wrapped call; sticky."""

    type_id = 24
    direction = "lighthouse -> agent -> worker"
    job: Name
    group: Name
    recipients: list[Recipient]
    call: Count = 0
