"""Who may send what: authority comes from the key that a connection was made with, never from a name in a message.

One table, role by type of message, and everything that is not in it is refused. A node's key speaks for that node
alone. Knows no socket, no file and no state of a job.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

from seamark.protocol.messages import (
    AbortJob,
    Acknowledged,
    Beat,
    CheckpointShard,
    CommitVote,
    Complete,
    CompleteShard,
    DatasetsRequest,
    DecisionsRequest,
    DrainNode,
    FailShard,
    FollowJob,
    IncidentsRequest,
    InjectFailure,
    JobEnded,
    JobProgress,
    Join,
    LastQuorum,
    LeaseShard,
    MemberFaulted,
    MemberLost,
    MemberStarted,
    MemberStuck,
    Message,
    NodeHello,
    NodeLeft,
    NodeRefusals,
    OpenShards,
    PrepareFailed,
    RankJoin,
    ReleaseShard,
    ReplicaBeat,
    ReplicaJoin,
    ReplicaLeave,
    ReplicaWithdraw,
    ReportFailure,
    Roster,
    ShardsRequest,
    SharedState,
    SnapshotRequest,
    StateAddressRequest,
    StatusRequest,
    StopJob,
    StoreLost,
    StoreReady,
    SubmitJob,
    Timeline,
    WorkerExited,
    WorkerHello,
    WorkerRegistered,
    WorkersStopped,
    WorkerStarted,
)

KeyRole: TypeAlias = Literal["daemon", "node", "operator", "client"]
"""What a key is for: the lighthouse and the coordinator; one agent, bound to its node's name; a person; managers of
replica groups, listeners, and the monitors of ``fork_and_monitor``."""
Role: TypeAlias = KeyRole | Literal["worker"]
"""A worker has no key: it speaks to its agent over a socket in a private directory."""
KEY_ROLES: tuple[KeyRole, ...] = get_args(KeyRole)

_OF_ITS_WORKERS = frozenset[type[Message]]({Join, Complete, MemberFaulted, AbortJob, SnapshotRequest})
"""What an agent forwards to the lighthouse."""
_OF_SHARDS = frozenset[type[Message]](
    {
        CheckpointShard,
        CompleteShard,
        FailShard,
        LeaseShard,
        OpenShards,
        ReleaseShard,
        ReportFailure,
        ShardsRequest,
    }
)
"""What it forwards to the coordinator for its workers' data sets."""
_OF_A_NODE = frozenset[type[Message]]({NodeHello, Beat, MemberStarted, MemberLost, LastQuorum, StoreLost})

MAY_SEND: dict[Role, frozenset[type[Message]]] = {
    "daemon": frozenset({JobEnded, Roster, SnapshotRequest, StoreLost}),
    "node": _OF_ITS_WORKERS
    | _OF_SHARDS
    | _OF_A_NODE
    | {
        Acknowledged,
        JobProgress,
        NodeLeft,
        NodeRefusals,
        PrepareFailed,
        SharedState,
        StoreReady,
        Timeline,
        WorkerExited,
        WorkerRegistered,
        WorkersStopped,
        WorkerStarted,
    },
    "operator": frozenset(
        {
            DatasetsRequest,
            DecisionsRequest,
            DrainNode,
            FollowJob,
            IncidentsRequest,
            InjectFailure,
            ShardsRequest,
            SnapshotRequest,
            StatusRequest,
            StopJob,
            SubmitJob,
        }
    ),
    # A rank under fork_and_monitor has an agent of its own, which tells the roster itself.
    "client": _OF_ITS_WORKERS
    | _OF_A_NODE
    | {
        CommitVote,
        RankJoin,
        ReplicaBeat,
        ReplicaJoin,
        ReplicaLeave,
        ReplicaWithdraw,
        Roster,
        StateAddressRequest,
    },
    "worker": _OF_ITS_WORKERS | _OF_SHARDS | {MemberStuck, SharedState, Timeline, WorkerHello},
}
"""What each may send to whoever listens; daemons refuse besides what is not for them."""


class Refusal(NamedTuple):
    """Why a message is not taken: the code under which it is counted, and a sentence for people."""

    reason: Literal["not_allowed", "other_node", "revoked_key"]
    sentence: str


def refusal(role: Role, name: str, message: Message) -> Refusal | None:
    """Whether this sender may send this message.

    Args:
        role: its key's; ``worker`` for who has none.
        name: its key's; that of a node's key is the node's name.
        message: what it sent.

    Returns:
        None if it may.
    """
    kind = type(message).__name__
    if type(message) not in MAY_SEND[role]:
        whose = f"the key {name} has the role {role}, which" if name else f"a {role}"
        return Refusal("not_allowed", f"{whose} may not send {kind}")
    if role == "node":
        claimed = getattr(message, "node", name)
        # An agent that starts its store anew names no node: the store stays where it was.
        if claimed != name and not (isinstance(message, StoreLost) and not claimed):
            return Refusal("other_node", f"the key of node {name} may not speak for node {claimed} ({kind})")
    if role == "client":
        return _beyond_a_client(name, kind, message)
    return None


def _beyond_a_client(name: str, kind: str, message: Message) -> Refusal | None:
    """What is a suite's is not a client's: nodes (its own are named ``JOB/RANK``) and submitted jobs."""
    claimed = getattr(message, "node", "")
    job = getattr(message, "job", "")
    if claimed and not (claimed.startswith(f"{job}/") if job else "/" in claimed):
        return Refusal("other_node", f"the key {name} has the role client, which may not speak for node {claimed}")
    if isinstance(message, Roster) and message.submission:
        return Refusal("not_allowed", f"the key {name} has the role client, which may not send {kind} of the suite")
    return None
