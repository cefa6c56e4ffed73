"""The lighthouse as a state machine: (message, now) in, effects out.

It owns the liveness of every job's roster and answers quorums; it knows nothing of retries, of exit codes'
meaning or of where a replacement runs. Reports are idempotent: one that was taken before is acknowledged again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from seamark.protocol.messages import (
    ANSWER_EVERY,
    RANKS,
    AbortJob,
    Acknowledged,
    Beat,
    BeatAnswer,
    Complete,
    EventBeat,
    InjectFailure,
    JobAborted,
    JobEnded,
    Join,
    LastQuorum,
    LighthouseStatus,
    MemberFaulted,
    MemberLost,
    MemberStarted,
    Message,
    NodeHealth,
    NodeHello,
    Refused,
    ReplicaBeat,
    ReplicaJoin,
    ReplicaLeave,
    ReplicaWithdraw,
    Roster,
    SnapshotRequest,
    StoreLost,
    Welcome,
)
from seamarkd.effects import Effect, Send
from seamarkd.lighthouse.events import EventLog
from seamarkd.lighthouse.group import Group
from seamarkd.lighthouse.nodes import NodeWatch, ProbeResult
from seamarkd.lighthouse.replicas import ReplicaGroup, ReplicaOptions

EPOCH_SHIFT = 32
ENDED_KEPT = 100
"""Jobs that have ended and that are still told of, to whoever missed the end; the first are forgotten first."""
OF_RANKS = (
    AbortJob,
    Complete,
    Join,
    LastQuorum,
    MemberFaulted,
    MemberLost,
    MemberStarted,
    Roster,
    StoreLost,
)
"""What changes the group of a job's ranks."""


class Lighthouse:
    """The whole state of one lighthouse.

    Args:
        epoch: rises with every start of the daemon; the upper half of its quorum ids.
        started: when it began to serve, seconds.
        options: its limits for replica groups.
        nodes: how it watches nodes.
    """

    def __init__(
        self,
        epoch: int,
        started: float = 0.0,
        options: ReplicaOptions | None = None,
        nodes: NodeWatch | None = None,
    ) -> None:
        self.epoch = epoch
        self.nodes = nodes or NodeWatch()
        self.groups: dict[str, Group] = {}
        self.replicas: dict[str, ReplicaGroup] = {}
        self._options = options or ReplicaOptions()
        # In its first start there is nobody who was there before.
        self._settles_at = started + (self._options.heartbeat_timeout if epoch > 1 else 0.0)
        self._events: dict[str, EventLog] = {}
        self._ended: dict[str, None] = {}
        """Jobs that have ended by their coordinator's word, in that order."""
        self._quorum_floor = epoch << EPOCH_SHIFT
        self._event_floor = 0
        """Above what was forgotten: a name may come back, and neither of its numbers is used twice in an epoch."""
        self._handlers: dict[type[Message], Callable[[float, bytes, Any], list[Effect]]] = {
            NodeHello: self._hello,
            Beat: self._beat,
            Roster: self._roster,
            JobEnded: self._job_ended,
            MemberStarted: self._report,
            MemberLost: self._report,
            StoreLost: self._report,
            LastQuorum: self._report,
            MemberFaulted: self._faulted,
            Join: self._request,
            Complete: self._request,
            SnapshotRequest: self._snapshot,
            ReplicaBeat: self._replica_beat,
            ReplicaJoin: self._replica_join,
            ReplicaLeave: self._replica_leave,
            ReplicaWithdraw: self._replica_withdraw,
            InjectFailure: self._inject,
            AbortJob: self._abort,
        }

    def handle(self, now: float, route: bytes, message: Message) -> list[Effect]:
        """What follows from this message of this peer."""
        handler = self._handlers.get(type(message))
        if handler is None:
            sentence = f"{type(message).__name__} is not for a lighthouse"
            return [Send(route, Refused(getattr(message, "request", 0), "BAD_REQUEST", sentence))]
        return handler(now, route, message)

    def foreign(self, node: str, message: Message) -> bool:
        """Whether a message speaks for what is known to be another's, although it names no node.

        Args:
            node: whose key it came with; empty for a client's, who has no part in jobs that a coordinator has.
            message: what was sent.
        """
        group = self.groups.get(message.job) if isinstance(message, OF_RANKS) else None
        if group is None:
            return False
        if not node:
            return bool(group.submission) and not group.over
        match message:
            case Join() | Complete() | MemberFaulted():
                return group.is_elsewhere(message.member, message.incarnation, node)
            case StoreLost():
                return group.store_is_elsewhere(node)
            case AbortJob():
                return bool(group.submission)  # its coordinator is asked
            case _:
                return False

    @property
    def waits(self) -> bool:
        """True while time alone may change something for a member; of nodes it does so from beat to beat."""
        return bool(self.replicas) or any(group.waits for group in self.groups.values())

    def tick(self, now: float) -> list[Effect]:
        """What time alone completes."""
        effects, lost = self.nodes.tick(now)
        for node in lost:
            for group in self.groups.values():
                effects += group.node_lost(now, node)
        for group in self.groups.values():
            if group.waits:
                effects += group.tick(now)
        for job, replicas in list(self.replicas.items()):
            effects += replicas.tick(now)
            if replicas.empty:
                del self.replicas[job]
                self._forget_events(job)
        return effects

    def late(self, now: float, seconds: float) -> None:
        """This lighthouse's own loop ran late: its pause is nobody's death."""
        self.nodes.late(seconds)
        for replicas in self.replicas.values():
            replicas.excuse(now, seconds)

    def member_probed(self, now: float, job: str, member: str, incarnation: str, result: ProbeResult) -> list[Effect]:
        """What came of a probe of a replica group's manager."""
        replicas = self.replicas.get(job)
        return replicas.probed(now, member, incarnation, result) if replicas else []

    def probed(self, node: str, incarnation: str, result: ProbeResult) -> None:
        """What came of a probe."""
        self.nodes.probed(node, incarnation, result)

    def event_beat(self) -> EventBeat:
        """The idle beat: the latest sequence number of every job, and what its members wait for."""
        latest = {job: events.sequence for job, events in self._events.items()}
        return EventBeat(self.epoch, latest, self._waiting())

    def _waiting(self) -> dict[str, str]:
        return {job: group.reason for job, group in self.groups.items() if group.waits}

    def status(self, now: float, request: int) -> LighthouseStatus:
        """What this lighthouse knows, for people; the shell adds what it knows of its process."""
        return LighthouseStatus(
            request=request,
            epoch=self.epoch,
            software="",
            pid=0,
            uptime=0.0,
            sentence=self.nodes.sentence,
            nodes=[
                NodeHealth(node.name, max(0.0, now - node.last_beat), node.verdict)
                for node in self.nodes.nodes.values()
            ],
            waiting=self._waiting(),
            groups=[
                *(group.status(now) for group in self.groups.values()),
                *(group.status(now) for group in self.replicas.values()),
            ],
            dropped={},
            beat_interval=self.nodes.beat_interval,
            lateness=0.0,
            wall_clock=-1.0,
        )

    # --- handlers ------------------------------------------------------------------------------------------

    def _hello(self, now: float, route: bytes, hello: NodeHello) -> list[Effect]:
        self.nodes.hello(now, route, hello)
        effects: list[Effect] = [Send(route, Welcome(self.epoch, self.nodes.beat_interval))]
        for group in self.groups.values():
            effects += group.node_returned(now, hello.node)
        return effects

    def _beat(self, now: float, route: bytes, beat: Beat) -> list[Effect]:
        known = self.nodes.beat(now, beat.node, beat.incarnation, route)
        if known and beat.sequence % ANSWER_EVERY:
            return []
        return [Send(route, BeatAnswer(self.epoch, beat.sequence, known))]

    def _roster(self, now: float, route: bytes, roster: Roster) -> list[Effect]:
        group = self.groups.get(roster.job)
        if group is not None and group.session.done and not roster.submission and not roster.running:
            sentence = f"job {roster.job} has ended on this lighthouse: give another one another name (SEAMARK_JOB)"
            return [Send(route, Refused(roster.request, "NAME_TAKEN", sentence, roster.job))]
        if group is None or group.submission != roster.submission:
            # Above those of an earlier job of this name: an id never names two member lists.
            floor = max(self._quorum_floor, group.session.quorum_id if group else 0)
            self._ended.pop(roster.job, None)
            events = self._log(roster.job)
            if group is not None:
                events.forget()
            group = self.groups[roster.job] = Group(roster.job, RANKS, events, floor, self.nodes.last_beat)
        effects = [*group.set_roster(now, roster), Send(route, Acknowledged(roster.request))]
        return [*effects, Send(route, JobAborted(roster.job, group.aborted))] if group.aborted else effects

    def _job_ended(self, now: float, route: bytes, report: JobEnded) -> list[Effect]:
        group = self.groups.get(report.job)
        if group is None or group.submission != report.submission:
            return []
        group.end()
        self._ended[report.job] = None
        for job in list(self._ended)[:-ENDED_KEPT]:
            del self._ended[job]
            self._quorum_floor = max(self._quorum_floor, self.groups.pop(job).session.quorum_id)
            self._forget_events(job)
        return []

    def _forget_events(self, job: str) -> None:
        """Of a job that has no group any more."""
        if job not in self.groups and job not in self.replicas:
            self._event_floor = max(self._event_floor, self._events.pop(job).sequence)

    def _report(
        self, now: float, route: bytes, report: MemberStarted | MemberLost | StoreLost | LastQuorum
    ) -> list[Effect]:
        effects: list[Effect] = []
        if isinstance(report, MemberLost):
            for replicas in self.replicas.values():
                effects += replicas.process_lost(now, report.incarnation, report.cause, report.detector)
        group = self.groups.get(report.job)
        if group is None:
            return [*effects, Send(route, _unknown_job(report.request, report.job))]
        if group.recalling and isinstance(report, MemberLost | StoreLost):
            # Not acknowledged, so that it is repeated to whoever knows which iteration it ends.
            group.defer(report)
            return effects
        if isinstance(report, MemberStarted) and (report.generation, report.placement) > group.roster:
            # The agent heard of it first; it repeats what is not acknowledged.
            return effects
        match report:
            case MemberStarted():
                effects += group.started(now, report)
            case MemberLost():
                effects += group.lost(now, report)
            case StoreLost():
                effects += group.store_lost(now, report)
            case LastQuorum():
                effects += group.recall(now, report)
        return [*effects, Send(route, Acknowledged(report.request))]

    def _faulted(self, now: float, route: bytes, report: MemberFaulted) -> list[Effect]:
        group = self.groups.get(report.job)
        return group.faulted(now, report) if group else []

    def _request(self, now: float, route: bytes, request: Join | Complete) -> list[Effect]:
        group = self.groups.get(request.job)
        if group is None or request.group != group.name:
            return [Send(route, _unknown_job(request.request, request.job, request.member))]
        if group.aborted:
            return [Send(route, JobAborted(request.job, group.aborted))]
        if isinstance(request, Join):
            return group.join(now, route, request)
        return group.complete(now, route, request)

    def _abort(self, now: float, route: bytes, request: AbortJob) -> list[Effect]:
        """The end of a job that no coordinator has: all its nodes are told, and who comes back later, too."""
        group = self.groups.get(request.job)
        if group is None or group.aborted:
            return []
        group.aborted = f"{request.member}: {request.reason}"
        routes = [node.route for name, node in self.nodes.nodes.items() if name in group.membership.nodes]
        return [Send(to, JobAborted(request.job, group.aborted)) for to in routes]

    def _snapshot(self, now: float, route: bytes, request: SnapshotRequest) -> list[Effect]:
        group, replicas = self.groups.get(request.job), self.replicas.get(request.job)
        events = self._events.get(request.job)
        if events is None:
            return [Send(route, _unknown_job(request.request, request.job))]
        snapshot = events.snapshot(
            request.request,
            completed=group is not None and group.session.done,
            reason=group.reason if group else replicas.reason if replicas else "",
            groups=[one.status(now) for one in (group, replicas) if one is not None],
        )
        return [Send(route, snapshot)]

    def _log(self, job: str) -> EventLog:
        return self._events.setdefault(job, EventLog(job, self.epoch, self._event_floor))

    # --- replica groups ------------------------------------------------------------------------------------

    def _replica_group(self, job: str) -> ReplicaGroup:
        group = self.replicas.get(job)
        if group is None:
            floor = self.epoch << EPOCH_SHIFT
            group = self.replicas[job] = ReplicaGroup(job, self._log(job), floor, self._settles_at, self._options)
        return group

    def _replica_beat(self, now: float, route: bytes, beat: ReplicaBeat) -> list[Effect]:
        return self._replica_group(beat.job).beat(now, route, beat)

    def _replica_join(self, now: float, route: bytes, request: ReplicaJoin) -> list[Effect]:
        return self._replica_group(request.job).join(now, route, request)

    def _replica_leave(self, now: float, route: bytes, request: ReplicaLeave) -> list[Effect]:
        group = self.replicas.get(request.job)
        return group.leave(now, route, request) if group else [Send(route, Acknowledged(request.request))]

    def _replica_withdraw(self, now: float, route: bytes, request: ReplicaWithdraw) -> list[Effect]:
        group = self.replicas.get(request.job)
        return group.withdraw(route, request) if group else [Send(route, Acknowledged(request.request))]

    def _inject(self, now: float, route: bytes, request: InjectFailure) -> list[Effect]:
        group: Group | ReplicaGroup | None = (self.groups if request.group == RANKS else self.replicas).get(request.job)
        if group is None:
            return [Send(route, _unknown_job(request.request, request.job))]
        effects = group.inject(now, request.member)
        if effects is None:
            sentence = f"{request.member} is no living member of group {request.group} of job {request.job}"
            return [Send(route, Refused(request.request, "UNKNOWN_MEMBER", sentence, request.job, request.member))]
        return [*effects, Send(route, Acknowledged(request.request))]


def _unknown_job(request: int, job: str, member: str = "") -> Refused:
    return Refused(request, "UNKNOWN_JOB", f"this lighthouse has no roster of job {job} yet", job, member)
