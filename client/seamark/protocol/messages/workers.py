"""A worker process: what it says to its agent, and what its agent says of it to the coordinator."""

from __future__ import annotations

from seamark.protocol.messages.base import Count, Iteration, Message, Moment, Name, Part, SharedText, Short, Text


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


class WorkerRegistered(Message, frozen=True):
    """A worker uses the restart wrapper: the policy must allow it."""

    type_id = 55
    direction = "agent -> coordinator"
    job: Name
    member: Name
    incarnation: Name


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


class JobProgress(Message, frozen=True):
    """The progress counters of a node's workers, read from their shared pages, by member."""

    type_id = 56
    direction = "agent -> coordinator"
    job: Name
    step: dict[str, int]
    checkpoint: dict[str, int]


class Stamps(Part, frozen=True):
    """What one worker saw of one incident, in its own host's monotonic seconds; -1.0: not observed."""

    told: Moment = -1.0
    aborted: Moment = -1.0
    left: Moment = -1.0
    joined: Moment = -1.0
    answered: Moment = -1.0
    group_ready: Moment = -1.0
    first_step: Moment = -1.0


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


class SharedState(Message, frozen=True):
    """What a worker has put into its job's shared state, for the copy that outlives the TCPStore: JSON."""

    type_id = 27
    direction = "worker -> agent -> coordinator"
    job: Name
    member: Name
    incarnation: Name
    version: Count
    text: SharedText


class MemberStuck(Message, frozen=True):
    """A worker that was told to leave its function can't: it asks to be ended and replaced."""

    type_id = 15
    direction = "worker -> agent"
    job: Name
    member: Name
    incarnation: Name


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
