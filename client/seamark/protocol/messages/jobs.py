"""A job: what a person asked for, who is to be in it (D1), and what nodes are told to start and stop of it."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from seamark.protocol.messages.base import (
    Count,
    Duration,
    Iteration,
    Message,
    Name,
    Part,
    Port,
    SharedText,
    Short,
    Text,
)

Policy = Literal["replace", "any-failed", "min-healthy"]
WorkerGroup = Literal["node", "rank"]
CpuBinding = Literal["none", "node", "socket", "exclusive", "core-complex"]
GpuBinding = Literal["none", "single"]


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


class JobEnded(Message, frozen=True):
    """The job has ended, and none of its workers runs: nobody of it is waited for, or lost, any more."""

    type_id = 17
    direction = "coordinator -> lighthouse"
    job: Name
    submission: Short


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
    """The keeper or the TCPStore service could not be started; ``reason`` says what to do.

    ``killed``: somebody has killed the keeper while it started. That is a failed start, and another may come to more.
    """

    type_id = 52
    direction = "agent -> coordinator"
    request: Count
    job: Name
    reason: Text
    killed: bool = False


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
