"""The lighthouse as a state machine: (message, now) in, effects out.

It owns the liveness of every job's roster and answers quorums; it knows nothing of retries, of exit codes'
meaning or of where a replacement runs. Reports are idempotent: one that was taken before is acknowledged again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from seamark.protocol.messages import (
    RANKS,
    Acknowledged,
    Beat,
    BeatAnswer,
    Complete,
    EventBeat,
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
    Roster,
    SnapshotRequest,
    StoreLost,
    Welcome,
)
from seamarkd.effects import Effect, Send
from seamarkd.lighthouse.events import EventLog
from seamarkd.lighthouse.group import Group
from seamarkd.lighthouse.nodes import BEAT_INTERVAL, NodeWatch, ProbeResult

EPOCH_SHIFT = 32


class Lighthouse:
    """The whole state of one lighthouse.

    Args:
        epoch: rises with every start of the daemon; the upper half of its quorum ids.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.nodes = NodeWatch()
        self.groups: dict[str, Group] = {}
        self._events: dict[str, EventLog] = {}
        self._handlers: dict[type[Message], Callable[[float, bytes, Any], list[Effect]]] = {
            NodeHello: self._hello,
            Beat: self._beat,
            Roster: self._roster,
            MemberStarted: self._report,
            MemberLost: self._report,
            StoreLost: self._report,
            LastQuorum: self._report,
            MemberFaulted: self._faulted,
            Join: self._request,
            Complete: self._request,
            SnapshotRequest: self._snapshot,
        }

    def handle(self, now: float, route: bytes, message: Message) -> list[Effect]:
        """What follows from this message of this peer."""
        handler = self._handlers.get(type(message))
        if handler is None:
            sentence = f"{type(message).__name__} is not for a lighthouse"
            return [Send(route, Refused(getattr(message, "request", 0), "BAD_REQUEST", sentence))]
        return handler(now, route, message)

    def tick(self, now: float) -> list[Effect]:
        """What time alone completes."""
        effects, lost = self.nodes.tick(now)
        for node in lost:
            for group in self.groups.values():
                effects += group.node_lost(now, node)
        for group in self.groups.values():
            if group.waits:
                effects += group.tick(now)
        return effects

    def probed(self, node: str, incarnation: str, result: ProbeResult) -> None:
        """What came of a probe."""
        self.nodes.probed(node, incarnation, result)

    def event_beat(self) -> EventBeat:
        """The idle beat: the latest sequence number of every job, and what its members wait for."""
        latest = {job: events.sequence for job, events in self._events.items()}
        waiting = {job: group.reason for job, group in self.groups.items() if group.waits}
        return EventBeat(self.epoch, latest, waiting)

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
            waiting={job: group.reason for job, group in self.groups.items() if group.waits},
            dropped={},
            wall_clock=-1.0,
        )

    # --- handlers ------------------------------------------------------------------------------------------

    def _hello(self, now: float, route: bytes, hello: NodeHello) -> list[Effect]:
        self.nodes.hello(now, route, hello)
        return [Send(route, Welcome(self.epoch, BEAT_INTERVAL))]

    def _beat(self, now: float, route: bytes, beat: Beat) -> list[Effect]:
        known = self.nodes.beat(now, beat.node, beat.incarnation, route)
        return [Send(route, BeatAnswer(self.epoch, beat.sequence, known))]

    def _roster(self, now: float, route: bytes, roster: Roster) -> list[Effect]:
        group = self.groups.get(roster.job)
        if group is None:
            events = self._events.setdefault(roster.job, EventLog(roster.job, self.epoch))
            floor = self.epoch << EPOCH_SHIFT
            group = self.groups[roster.job] = Group(roster.job, RANKS, events, floor, self.nodes.last_beat)
        return [*group.set_roster(now, roster), Send(route, Acknowledged(roster.request))]

    def _report(
        self, now: float, route: bytes, report: MemberStarted | MemberLost | StoreLost | LastQuorum
    ) -> list[Effect]:
        group = self.groups.get(report.job)
        if group is None:
            return [Send(route, _unknown_job(report.request, report.job))]
        if group.recalling and isinstance(report, MemberLost | StoreLost):
            # Not acknowledged, so that it is repeated to whoever knows which iteration it ends.
            group.defer(report)
            return []
        match report:
            case MemberStarted():
                effects = group.started(now, report)
            case MemberLost():
                effects = group.lost(now, report)
            case StoreLost():
                effects = group.store_lost(now, report)
            case LastQuorum():
                effects = group.recall(now, report)
        return [*effects, Send(route, Acknowledged(report.request))]

    def _faulted(self, now: float, route: bytes, report: MemberFaulted) -> list[Effect]:
        group = self.groups.get(report.job)
        return group.faulted(now, report) if group else []

    def _request(self, now: float, route: bytes, request: Join | Complete) -> list[Effect]:
        group = self.groups.get(request.job)
        if group is None or request.group != group.name:
            return [Send(route, _unknown_job(request.request, request.job, request.member))]
        if isinstance(request, Join):
            return group.join(now, route, request)
        return group.complete(now, route, request)

    def _snapshot(self, now: float, route: bytes, request: SnapshotRequest) -> list[Effect]:
        group = self.groups.get(request.job)
        if group is None:
            return [Send(route, _unknown_job(request.request, request.job))]
        events = self._events[request.job]
        snapshot = events.snapshot(request.request, completed=group.done, reason=group.reason)
        return [Send(route, snapshot)]


def _unknown_job(request: int, job: str, member: str = "") -> Refused:
    return Refused(request, "UNKNOWN_JOB", f"this lighthouse has no roster of job {job} yet", job, member)
