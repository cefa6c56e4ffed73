"""Every message of the suite: its fields, who sends it to whom, and what answers it.

A message is a frozen, typed struct that knows nothing of sockets, clocks or bytes. Times are
``time.monotonic()`` seconds of the host of the process that saw the event, and mean nothing on another host;
-1.0 stands for "not observed". Durations are seconds.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeAlias

from msgspec import Meta, Struct

VERSION = 1
"""Version of the protocol; peers of different versions refuse each other, naming both."""

Name = Annotated[str, Meta(min_length=1, max_length=200)]
Short = Annotated[str, Meta(max_length=200)]
Text = Annotated[str, Meta(max_length=16_384)]
SharedText = Annotated[str, Meta(max_length=65_536)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Iteration = Annotated[int, Meta(ge=-1, le=2**53)]
"""A restart iteration; -1 before the first."""
QuorumId = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Port = Annotated[int, Meta(ge=0, le=65_535)]
Duration = Annotated[float, Meta(ge=0.0, le=1e9)]
Moment = Annotated[float, Meta(ge=-1.0, le=1e12)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Policy = Literal["replace", "any-failed", "min-healthy"]
WorkerGroup = Literal["node", "rank"]
CpuBinding = Literal["none", "node", "socket", "exclusive", "core-complex"]
GpuBinding = Literal["none", "single"]

ANSWER_EVERY = 10
"""The lighthouse answers one of so many beats of a known node, and all of a stranger's: an answer costs what three
beats cost."""
RANKS = "ranks"
"""The group whose members are the workers of a job."""
REPLICAS = "replicas"
"""The group whose members are replica groups, each with a ``seamark.Manager`` per rank."""


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all messages. ``direction`` and ``answer`` are documentation that tests hold to be complete."""

    type_id: ClassVar[int]
    direction: ClassVar[str]
    answer: ClassVar[str] = ""


# --- parts of messages -------------------------------------------------------------------------------------


class Part(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the structs that only occur inside messages."""


class StoreAddress(Part, frozen=True):
    """Where the TCPStore service of a job listens; ``incarnation`` changes when it is started anew."""

    host: Short = ""
    port: Port = 0
    incarnation: Short = ""


class Slot(Part, frozen=True):
    """A place in the roster: which rank runs on which node."""

    member: Name
    rank: Count
    local_rank: Count
    node: Name
    group_rank: Count
    placed: Count = 0
    """The roster's ``placement`` that put it on this node."""


class FailurePattern(Part, frozen=True):
    """What a failure that says this is: ``regex`` is searched for in each line, ``kind`` a class of failure."""

    regex: Short
    kind: Short


class JobSpec(Part, frozen=True):
    """What a person asked for: ``seamark run``'s arguments.

    ``argv`` is the script (or module) and its arguments; ``env`` the whole environment of the workers.
    """

    name: Name
    argv: Annotated[list[str], Meta(min_length=1, max_length=10_000)]
    module: bool
    python: Name
    cwd: Name
    env: dict[str, str]
    min_nodes: Annotated[int, Meta(ge=1, le=100_000)]
    max_nodes: Annotated[int, Meta(ge=1, le=100_000)]
    nproc_per_node: Annotated[int, Meta(ge=1, le=1_000)]
    policy: Policy
    max_restarts: Annotated[int, Meta(ge=0, le=1_000_000)]
    checkpoint_dir: str
    log_dir: Name
    master_port: Port = 0
    join_timeout: Duration = 30.0
    start_timeout: Duration = 120.0
    preload: list[Name] = []
    """Modules that each node imports once, before it forks workers."""
    worker_group: WorkerGroup = "node"
    """What policy ``min-healthy`` counts: nodes all of whose workers are well, or ranks."""
    cpu_binding: CpuBinding = "none"
    """Which processors of its node each rank gets; torchrun's words."""
    gpu_binding: GpuBinding = "none"
    """``single``: each rank sees the GPU of its local rank alone."""
    runtime: SharedText = ""
    """``seamark.RuntimeConfig.to_dict()`` as JSON: how its shards are retried; empty for the defaults."""
    failure_patterns: list[FailurePattern] = []
    independent: bool = False
    """Its ranks don't communicate: who fails is started anew alone, without a wrapper too."""

    @property
    def min_ranks(self) -> int:
        """Fewer of them are no job."""
        return self.min_nodes * self.nproc_per_node

    @property
    def max_ranks(self) -> int:
        """It takes no more."""
        return self.max_nodes * self.nproc_per_node


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


class Stamps(Part, frozen=True):
    """What one worker saw of one incident, in its own host's monotonic seconds; -1.0: not observed."""

    told: Moment = -1.0
    aborted: Moment = -1.0
    left: Moment = -1.0
    joined: Moment = -1.0
    answered: Moment = -1.0
    group_ready: Moment = -1.0
    first_step: Moment = -1.0


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


# --- sessions ----------------------------------------------------------------------------------------------


class NodeHello(Message, frozen=True):
    """An agent introduces its node. ``address`` is where the lighthouse may knock, to see whether the host lives.

    ``draining`` says why no worker is to be placed there, and those that are there leave; empty for a node that serves.
    ``unhealthy`` says why no job is to be placed there, although what runs there goes on.
    """

    type_id = 1
    direction = "agent -> lighthouse, coordinator"
    answer = "Welcome | Refused"
    node: Name
    incarnation: Name
    address: Short
    slots: Count
    software: Short = ""
    draining: Short = ""
    unhealthy: Short = ""


class DrainNode(Message, frozen=True):
    """A person wants this node to be left by its workers, and given no new ones; with ``undo`` to serve again."""

    type_id = 8
    direction = "operator -> coordinator -> agent"
    answer = "Acknowledged | Refused"
    request: Count
    node: Name
    reason: Short
    undo: bool = False


class NodeLeft(Message, frozen=True):
    """A node that drains was given places of this job, and will start nobody in them."""

    type_id = 9
    direction = "agent -> coordinator"
    job: Name
    node: Name


class Welcome(Message, frozen=True):
    """The session stands. ``beat_interval`` is the one to use from now on; ``epoch`` rises with every start."""

    type_id = 2
    direction = "lighthouse, coordinator -> agent; agent -> worker"
    epoch: Count
    beat_interval: Duration = 0.0


class Refused(Message, frozen=True):
    """A request that was understood and not granted; ``reason`` is a sentence for people.

    ``job``, ``member`` and ``incarnation`` say on whose behalf the request was forwarded.
    """

    type_id = 3
    direction = "any daemon -> whoever asked"
    request: Count
    code: Literal[
        "UNKNOWN_JOB",
        "UNKNOWN_MEMBER",
        "UNKNOWN_NODE",
        "STALE_GENERATION",
        "NAME_TAKEN",
        "NO_SLOTS",
        "POLICY",
        "READ_ONLY",
        "BAD_REQUEST",
        "TIMEOUT",
        "UNREACHABLE",
        "NOT_ALLOWED",
    ]
    reason: Text
    job: Short = ""
    member: Short = ""
    incarnation: Short = ""


class Beat(Message, frozen=True):
    """One heartbeat for a node and all its workers."""

    type_id = 4
    direction = "agent -> lighthouse | coordinator"
    answer = "BeatAnswer"
    node: Name
    incarnation: Name
    sequence: Count


class BeatAnswer(Message, frozen=True):
    """``known`` false means: register again. For a node that it knows the lighthouse has one each ``ANSWER_EVERY``."""

    type_id = 5
    direction = "lighthouse -> agent"
    epoch: Count
    sequence: Count
    known: bool


class Acknowledged(Message, frozen=True):
    """The report with this number was taken (or had been taken before)."""

    type_id = 6
    direction = "lighthouse, coordinator -> agent; agent -> coordinator"
    request: Count


class WorkerHello(Message, frozen=True):
    """A worker introduces itself to its agent. ``wrapped`` says that it uses the restart wrapper."""

    type_id = 7
    direction = "worker -> agent"
    answer = "Welcome | Refused"
    job: Name
    member: Name
    incarnation: Name
    pid: Count
    wrapped: bool


# --- roster ------------------------------------------------------------------------------------------------


class Roster(Message, frozen=True):
    """Who is to be in the job (D1). Idempotent; only the coordinator makes one.

    A higher generation replaces all workers. In the same one a higher ``placement`` moves slots whose node was lost, or
    adds some, and touches no other worker; a slot that it does not name has no place for now.
    """

    type_id = 10
    direction = "coordinator -> lighthouse, agent"
    answer = "Acknowledged"
    request: Count
    job: Name
    generation: Count
    policy: Policy
    min_members: Count
    slots: list[Slot]
    store: StoreAddress
    master_addr: Short
    master_port: Port
    base_iteration: Iteration
    join_timeout: Duration
    start_timeout: Duration
    allowance: Count
    spec: JobSpec
    running: bool = False
    """All workers of this generation were started before: who is not heard of soon is gone."""
    state: SharedText = ""
    """The latest that is known of ``call.state_dict``."""
    store_node: Short = ""
    """Where the job's TCPStore is; empty where nobody could move it."""
    submission: Short = ""
    """Which job of this name; empty where no coordinator is."""
    placement: Count = 0
    """Rises with every change of the slots in a generation."""


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


class MemberStuck(Message, frozen=True):
    """A worker that was told to leave its function can't: it asks to be ended and replaced."""

    type_id = 15
    direction = "worker -> agent"
    job: Name
    member: Name
    incarnation: Name


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


# --- quorum ------------------------------------------------------------------------------------------------


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


class AbortJob(Message, frozen=True):
    """A worker asks that the whole job end: RestartAbort. Where there is no coordinator the lighthouse tells all."""

    type_id = 25
    direction = "worker -> agent -> coordinator | lighthouse"
    job: Name
    member: Name
    incarnation: Name
    reason: Text


class JobAborted(Message, frozen=True):
    """Somebody ended the whole job: every worker ends as if it had been itself, with exit code 130."""

    type_id = 26
    direction = "agent -> worker; lighthouse -> agent"
    job: Name
    reason: Text


class SharedState(Message, frozen=True):
    """What a worker has put into its job's shared state, for the copy that outlives the TCPStore: JSON."""

    type_id = 27
    direction = "worker -> agent -> coordinator"
    job: Name
    member: Name
    incarnation: Name
    version: Count
    text: SharedText


# --- events ------------------------------------------------------------------------------------------------


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


class EventBeat(Message, frozen=True):
    """The latest sequence number of every job, repeated while idle, so that a lost tail is seen.

    ``waiting`` says for each job whose members wait for a quorum what it waits for, in a sentence.
    """

    type_id = 33
    direction = "lighthouse -> subscribers"
    epoch: Count
    latest: dict[str, int]
    waiting: dict[str, Text]


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


# --- replica groups ----------------------------------------------------------------------------------------


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


class InjectFailure(Message, frozen=True):
    """A drill: have this member's failure published, as if its heartbeats had stopped."""

    type_id = 65
    direction = "operator -> lighthouse"
    answer = "Acknowledged | Refused"
    request: Count
    job: Name
    group: Name
    member: Name


# --- shards ------------------------------------------------------------------------------------------------


class Dataset(Part, frozen=True):
    """A data set of a job: ``size`` samples, cut into shards, gone through ``epochs`` times.

    ``shuffle_seed`` -1 leaves the samples in their order. Shards are numbered through all epochs.
    """

    name: Name
    size: Count
    shard_size: Annotated[int, Meta(ge=1, le=2**53)]
    shuffle_seed: Annotated[int, Meta(ge=-1, le=2**63 - 1)] = -1
    epochs: Annotated[int, Meta(ge=1, le=1_000_000)] = 1

    @property
    def per_epoch(self) -> int:
        """Shards of one epoch."""
        return -(-self.size // self.shard_size)

    @property
    def total(self) -> int:
        """Shards of all epochs."""
        return self.per_epoch * self.epochs


class ShardLease(Part, frozen=True):
    """The right of one worker process to work on one shard; its id is never used again.

    ``progress`` batches were done durably by whoever had it before, those in ``skip`` are quarantined.
    """

    dataset: Name
    shard: Count
    lease_id: Count
    attempt: Count
    progress: Count = 0
    skip: list[int] = []
    batch_size_scale: Fraction = 1.0


class ShardRequest(Message, frozen=True):
    """Base of what a consumer asks: an iterator over a data set in a worker process.

    ``consumer`` is the worker's incarnation, ``#`` and the iterator's name in that process. ``request`` rises with
    every request of a consumer; the same number again gets the same answer.
    """

    request: Count
    job: Name
    member: Name
    consumer: Name
    dataset: Name

    @property
    def incarnation(self) -> str:
        """Of the worker process."""
        return self.consumer.partition("#")[0]


class OpenShards(ShardRequest, frozen=True):
    """What this consumer will ask of; the first of a job makes the data set, and all must describe it alike.

    ``afresh``: whose leases of it are given back first, because who had them in hand is no more: this consumer's, or
    those of all consumers in its process.
    """

    type_id = 80
    direction = "worker -> agent -> coordinator"
    answer = "ShardAnswer"
    spec: Dataset
    afresh: Literal["", "consumer", "process"] = ""


class LeaseShard(ShardRequest, frozen=True):
    """The next shard, please; who holds one already gets it again.

    Who reads ahead names its latest lease, ``after``, and gets another besides those that it holds.
    """

    type_id = 81
    direction = "worker -> agent -> coordinator"
    answer = "ShardAnswer"
    after: Count = 0


class CompleteShard(ShardRequest, frozen=True):
    """The shard is done. With ``more`` the answer brings the next, if one is ready. ``digest``: of the result."""

    type_id = 82
    direction = "worker -> agent -> coordinator"
    answer = "ShardAnswer"
    shard: Count
    lease_id: Count
    digest: Short = ""
    more: bool = False


class CheckpointShard(ShardRequest, frozen=True):
    """``progress`` batches of the shard are done and durable: who has it next begins behind them."""

    type_id = 83
    direction = "worker -> agent -> coordinator"
    answer = "ShardAnswer"
    shard: Count
    lease_id: Count
    progress: Count


class FailShard(ShardRequest, frozen=True):
    """The worker could not do it: ``kind`` as it knows better than anybody, or empty; ``batch`` -1 if it was none's."""

    type_id = 84
    direction = "worker -> agent -> coordinator"
    answer = "ShardAnswer"
    shard: Count
    lease_id: Count
    kind: Short = ""
    batch: Annotated[int, Meta(ge=-1, le=2**53)] = -1
    text: Text = ""


class ReleaseShard(ShardRequest, frozen=True):
    """The worker will not do it, and nothing failed."""

    type_id = 85
    direction = "worker -> agent -> coordinator"
    answer = "ShardAnswer"
    shard: Count
    lease_id: Count


class ReportFailure(Message, frozen=True):
    """What a worker knows of its own failure, which is about to end it or its iteration.

    ``lease_id``: of what it was working on; what else it holds was read ahead, and has not failed. 0: it doesn't say.
    """

    type_id = 86
    direction = "worker -> agent -> coordinator"
    job: Name
    member: Name
    incarnation: Name
    kind: Short
    batch: Annotated[int, Meta(ge=-1, le=2**53)] = -1
    text: Text = ""
    lease_id: Count = 0


class ShardAnswer(Message, frozen=True):
    """The answer to every request of a consumer; durable before it is sent.

    ``kind``: opened; leased (``lease``); recorded; stale (the lease is another's by now: what was done under it counts
    for nothing); wait (shards are in flight and may come back: the lease is pushed as soon as there is one); done
    (every shard is terminal); drain (this host goes away: no more for it); refused (``reason`` says why).
    """

    type_id = 87
    direction = "coordinator -> agent -> worker"
    request: Count
    job: Name
    consumer: Name
    kind: Literal["opened", "leased", "recorded", "stale", "wait", "done", "drain", "refused"]
    lease: ShardLease | None = None
    reason: Text = ""


class ShardsRequest(Message, frozen=True):
    """Which shards of a data set stand where? ``limit`` of them, from ``first`` on, those never leased left out."""

    type_id = 88
    direction = "operator -> coordinator; worker -> agent -> coordinator"
    answer = "ShardsPage | Refused"
    request: Count
    job: Name
    dataset: Name
    first: Count = 0
    limit: Annotated[int, Meta(ge=1, le=5_000)] = 5_000
    consumer: Short = ""
    """The worker's consumer who asks; empty for a person."""


class ShardEntry(Part, frozen=True):
    """A shard in the books. For a DONE one ``lease_id`` is the one under which it was done, ``digest`` its result's."""

    shard: Count
    state: Literal["PENDING", "LEASED", "DONE", "QUARANTINED", "FAILED"]
    lease_id: Count
    member: Short
    node: Short
    progress: Count
    skip: list[int]
    digest: Short


class ShardsPage(Message, frozen=True):
    """Shards by number; ``following`` is where the next page begins, -1 after the last."""

    type_id = 89
    direction = "coordinator -> operator | agent -> worker"
    request: Count
    job: Name
    consumer: Short
    spec: Dataset
    entries: list[ShardEntry]
    following: Annotated[int, Meta(ge=-1)]


class DatasetsRequest(Message, frozen=True):
    """Which data sets are in the books of a job, living or ended?"""

    type_id = 96
    direction = "operator -> coordinator"
    answer = "Datasets | Refused"
    request: Count
    job: Name


class Datasets(Message, frozen=True):
    """The data sets of a job, the first that was opened first."""

    type_id = 97
    direction = "coordinator -> operator"
    request: Count
    job: Name
    datasets: list[Dataset]


class DecisionsRequest(Message, frozen=True):
    """What was decided about failures of a job's shards? ``shard`` -1: of all."""

    type_id = 90
    direction = "operator -> coordinator"
    answer = "Decisions | Refused"
    request: Count
    job: Name
    dataset: Short = ""
    shard: Annotated[int, Meta(ge=-1)] = -1


class ShardDecision(Part, frozen=True):
    """What became of a shard after a failure, and why."""

    number: Count
    dataset: Name
    shard: Count
    lease_id: Count
    member: Short
    node: Short
    batch: Annotated[int, Meta(ge=-1)]
    at: Moment
    """Of the coordinator's monotonic clock."""
    kind: Short
    """The failure's class."""
    evidence: Text
    confidence: Fraction
    action: Short
    reason: Text


class Decisions(Message, frozen=True):
    """The decisions, oldest first; ``now`` is of the clock that theirs are of."""

    type_id = 91
    direction = "coordinator -> operator"
    request: Count
    job: Name
    now: Moment
    decisions: list[ShardDecision]


class DatasetStatus(Part, frozen=True):
    """How far a data set is."""

    name: Name
    total: Count
    done: Count
    leased: Count
    quarantined: Count
    failed: Count
    skipped: Count
    """Batches that were quarantined out of shards that went on."""


# --- jobs --------------------------------------------------------------------------------------------------


class SubmitJob(Message, frozen=True):
    """A person submits a job. ``submission`` is a random id: asked again with the same one, the same job answers."""

    type_id = 40
    direction = "operator -> coordinator"
    answer = "JobStatus | Refused"
    request: Count
    spec: JobSpec
    submission: Name


class FollowJob(Message, frozen=True):
    """Send JobStatus at every change for the next ten seconds; asked again to stay."""

    type_id = 41
    direction = "operator -> coordinator"
    answer = "JobStatus | Refused"
    request: Count
    job: Name


class JobStatus(Message, frozen=True):
    """Where a job stands. ``notice`` is advice that stays, ``result`` a sentence once it has ended."""

    type_id = 42
    direction = "coordinator -> operator"
    request: Count
    job: Name
    state: Literal[
        "PENDING", "STARTING", "RUNNING", "RESTARTING", "STOPPING", "SUCCEEDED", "FAILED", "ABORTED", "CANCELLED"
    ]
    generation: Count
    iteration: Iteration
    alive: Count
    world_size: Count
    restarts: Count
    process_restarts: Count
    step: Count
    pids: dict[str, int]
    sentence: Text
    notice: Text
    result: Text
    log_tail: list[str]
    incidents: Count
    running_for: Duration
    datasets: list[DatasetStatus] = []


class StopJob(Message, frozen=True):
    """End a job now."""

    type_id = 43
    direction = "operator -> coordinator"
    answer = "JobStatus | Refused"
    request: Count
    job: Name
    reason: Text


class IncidentsRequest(Message, frozen=True):
    """What happened to a job so far?"""

    type_id = 44
    direction = "operator -> coordinator"
    answer = "Incidents | Refused"
    request: Count
    job: Name


class Incident(Part, frozen=True):
    """One fault and everything it set off (D5). ``failures[0]`` is the root cause; stamps by member."""

    number: Count
    group: Name
    iteration: Iteration
    failures: list[Failure]
    consequences: list[Failure]
    next_iteration: Iteration
    quorum_at: Moment
    members: list[Member]
    stamps: dict[str, Stamps]
    started: dict[str, float]
    """When the keeper forked the replacement of a member."""
    log_tail: list[str]


class Incidents(Message, frozen=True):
    """The incident records of a job, oldest first."""

    type_id = 45
    direction = "coordinator -> operator"
    request: Count
    job: Name
    incidents: list[Incident]


class StatusRequest(Message, frozen=True):
    """How are you? Asked of each daemon that serves; the coordinator and the lighthouse see different things."""

    type_id = 46
    direction = "operator -> coordinator | lighthouse"
    answer = "CoordinatorStatus | LighthouseStatus"
    request: Count


class NodeStatus(Part, frozen=True):
    """A node's places as the coordinator knows them."""

    node: Name
    slots: Count
    used: Count
    draining: Short = ""
    refused: dict[str, int] = {}
    """Messages that its agent refused its workers, by reason."""
    unhealthy: Short = ""


class MemberStatus(Part, frozen=True):
    """A worker of a living job. ``step`` is -1 before its first progress report."""

    member: Name
    rank: Count
    node: Name
    pid: Count
    alive: bool
    step: Annotated[int, Meta(ge=-1)]


class CoordinatorStatus(Message, frozen=True):
    """What the coordinator knows. ``trouble`` is empty, or says what it can't do and what to do about it."""

    type_id = 47
    direction = "coordinator -> operator"
    request: Count
    epoch: Count
    software: Short
    pid: Count
    uptime: Duration
    trouble: Text
    nodes: list[NodeStatus]
    jobs: list[JobStatus]
    members: dict[str, list[MemberStatus]]
    commits: Count = 0
    """Transactions of the manifest since the start."""
    dropped: dict[str, int] = {}
    """Connections and messages that were refused, and frames that were no message, by reason."""


class NodeHealth(Part, frozen=True):
    """A node's heartbeat as the lighthouse sees it. ``verdict``: "", "agent down" or "frozen"."""

    node: Name
    beat_age: Duration
    verdict: Short


class LighthouseStatus(Message, frozen=True):
    """What the lighthouse knows. ``sentence`` is empty unless many nodes are silent at once."""

    type_id = 48
    direction = "lighthouse -> operator"
    request: Count
    epoch: Count
    software: Short
    pid: Count
    uptime: Duration
    sentence: Text
    nodes: list[NodeHealth]
    waiting: dict[str, Text]
    """By job: what its quorum waits for."""
    groups: list[GroupStatus]
    dropped: dict[str, int]
    """Connections and messages that were refused, and frames that were no message, by reason."""
    beat_interval: Duration
    """Seconds between two heartbeats of a node."""
    lateness: Duration
    """How late its loop came to its own timer at worst, in the last ten seconds or more."""
    wall_clock: Moment
    """Seconds since the epoch, when this was answered: whether hosts' clocks agree (``seamark doctor``)."""


# --- agent and coordinator ---------------------------------------------------------------------------------


class PrepareJob(Message, frozen=True):
    """Start the job's keeper, which imports torch for seconds, ahead of the roster.

    With ``store`` also reserve MASTER_PORT and start the TCPStore service on MASTER_PORT+2 of this node (D8), and
    answer once it listens.
    """

    type_id = 50
    direction = "coordinator -> agent"
    answer = "StoreReady | PrepareFailed"
    request: Count
    spec: JobSpec
    store: bool


class StoreReady(Message, frozen=True):
    """The TCPStore service listens."""

    type_id = 51
    direction = "agent -> coordinator"
    request: Count
    job: Name
    master_addr: Short
    master_port: Port
    store: StoreAddress


class PrepareFailed(Message, frozen=True):
    """The keeper or the TCPStore service could not be started; ``reason`` says what to do."""

    type_id = 52
    direction = "agent -> coordinator"
    request: Count
    job: Name
    reason: Text


class WorkerStarted(Message, frozen=True):
    """A worker process runs."""

    type_id = 53
    direction = "agent -> coordinator"
    answer = "Acknowledged"
    request: Count
    job: Name
    generation: Count
    member: Name
    incarnation: Name
    pid: Count
    forked_at: Moment
    replaces: Short
    node: Short = ""


class WorkerExited(Message, frozen=True):
    """A worker process ended. ``status``: exit code, or minus the signal; ``replacement``: who was started instead.

    ``discarded``: the job's own rank assignment dropped it, which is nobody's failure. ``node``: where it was; its
    place may be another node's by now. ``iteration``: the latest that its node knows of. ``drains``: why the node was
    being left then.
    """

    type_id = 54
    direction = "agent -> coordinator"
    answer = "Acknowledged"
    request: Count
    job: Name
    generation: Count
    member: Name
    incarnation: Name
    status: int
    wrapped: bool
    completed: bool
    ordered: bool
    replacement: Short
    log_path: Text
    log_tail: list[Text]
    charged: Count
    discarded: bool = False
    node: Short = ""
    iteration: Iteration = -1
    drains: Short = ""
    oom_kill: bool = False
    """The kernel has killed a process of this node's suite for want of memory since the last exit."""
    hang: Text = ""
    """Why its agent ended it: it gave no sign of life."""


class WorkerRegistered(Message, frozen=True):
    """A worker uses the restart wrapper: the policy must allow it."""

    type_id = 55
    direction = "agent -> coordinator"
    job: Name
    member: Name
    incarnation: Name


class JobProgress(Message, frozen=True):
    """The progress counters of a node's workers, read from their shared pages, by member."""

    type_id = 56
    direction = "agent -> coordinator"
    job: Name
    step: dict[str, int]
    checkpoint: dict[str, int]


class Timeline(Message, frozen=True):
    """What a worker saw of its way from a fault to its first step after it."""

    type_id = 57
    direction = "worker -> agent -> coordinator"
    job: Name
    member: Name
    incarnation: Name
    ended_iteration: Iteration
    iteration: Count
    stamps: Stamps


class StopWorkers(Message, frozen=True):
    """Stop all workers of a job on this node: for a restart of all (a higher generation follows), or for good.

    ``abort``: why somebody ended the job; workers that listen have a moment to end by themselves.
    """

    type_id = 58
    direction = "coordinator -> agent"
    answer = "WorkersStopped"
    request: Count
    job: Name
    generation: Count
    grace: Duration
    final: bool
    abort: Text = ""


class WorkersStopped(Message, frozen=True):
    """No worker of this job and generation runs on this node any more."""

    type_id = 59
    direction = "agent -> coordinator"
    request: Count
    job: Name
    generation: Count


# --- keys --------------------------------------------------------------------------------------------------


class NodeRefusals(Message, frozen=True):
    """What an agent has refused its workers since it started, by reason: messages that are not theirs to send."""

    type_id = 100
    direction = "agent -> coordinator"
    node: Name
    refused: Annotated[dict[Short, Count], Meta(max_length=20)]


def _all(cls: type[Message]) -> dict[int, type[Message]]:
    found: dict[int, type[Message]] = {}
    for sub in cls.__subclasses__():
        own = {sub.type_id: sub} if "type_id" in vars(sub) else _all(sub)
        for number, kind in own.items():
            if number in found:
                raise TypeError(f"{kind.__name__} and {found[number].__name__} share type {number}")
            found[number] = kind
    return found


Event: TypeAlias = FailureEvent | QuorumEvent | CompletedEvent | RecoveredEvent | ReplicaQuorumEvent
"""What is published of a job and numbered: whoever follows a job reads all of them, and acts on those it knows."""

TYPES: dict[int, type[Message]] = _all(Message)
"""Message types by the number that stands in the header."""
