"""What a person asks of the suite, by the ``seamark`` command, and what it is answered."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from seamark.protocol.messages.base import Count, Duration, Iteration, Message, Moment, Name, Part, Short, Text
from seamark.protocol.messages.events import Failure, GroupStatus
from seamark.protocol.messages.jobs import JobSpec
from seamark.protocol.messages.ranks import Member
from seamark.protocol.messages.shards import DatasetStatus
from seamark.protocol.messages.workers import Stamps


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
    closed: bool = False
    """What fails from now on is another incident's, although no quorum has answered this one."""


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
    refused_ago: dict[str, float] = {}
    """Seconds since each of them rose last."""


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
    dropped_ago: dict[str, float] = {}
    """Seconds since each of them rose last."""


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
    dropped_ago: dict[str, float] = {}
    """Seconds since each of ``dropped`` rose last."""


class InjectFailure(Message, frozen=True):
    """A drill: have this member's failure published, as if its heartbeats had stopped."""

    type_id = 65
    direction = "operator -> lighthouse"
    answer = "Acknowledged | Refused"
    request: Count
    job: Name
    group: Name
    member: Name
