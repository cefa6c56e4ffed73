"""Which failures a listener delivers: each first sight once, and a word where some were missed (D11).

The lighthouse publishes without acknowledgement, so events are lost on the way, and a lighthouse that is started anew
numbers from the beginning. ``Listening`` takes what came, in whatever order, and says what to deliver and which jobs
to ask a snapshot for. It knows no socket, thread or clock.

A failure is new by its number within one epoch of the lighthouse, and by its identity across epochs: ``lost`` is one
per (job, member, incarnation) until that incarnation is seen alive again, ``faulted`` one per (job, group, iteration).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from msgspec import Struct

from seamark.protocol.messages import (
    RANKS,
    Cause,
    CompletedEvent,
    Event,
    EventBeat,
    Failure,
    FailureEvent,
    GroupStatus,
    QuorumEvent,
    RecoveredEvent,
    ReplicaQuorumEvent,
    Snapshot,
)

RING = 4_096
"""Failures of a job that the lighthouse keeps for snapshots; a shorter list holds all of its epoch."""
SEEN_KEPT = 10_000
"""Identities remembered per job. More than the ring holds, which is what can come twice: a failure that was followed
by so many has left the ring, and the agent that reported it was acknowledged long ago."""
WAITING_KEPT = RING
"""Events per job held behind a gap; what is let go of beyond that stands in the snapshot's ring."""
ABSENT_BEATS = 50
"""Idle beats (one per 0.2 s, so 10 s, two heartbeat timeouts) of a new lighthouse that never heard of a group of
replicas, until its members are gone. The ranks of a job are known to it by a roster, which may come much later."""


class EventsLost(Struct, frozen=True):
    """Up to ``count`` failures of this job were missed and nobody keeps them any more."""

    job: str
    count: int


Delivery: TypeAlias = FailureEvent | RecoveredEvent | EventsLost
"""What a listener delivers. A failure with ``sequence`` 0 was concluded by the listener, not published."""
Identity: TypeAlias = tuple[Literal["lost"], str, str] | tuple[Literal["faulted"], str, int]


class Heard(NamedTuple):
    """What follows from a message: deliveries in their order, and the jobs to ask a snapshot for now."""

    deliver: list[Delivery]
    ask: list[str]


class Place(NamedTuple):
    """Where a member was when it was last spoken of."""

    node: str = ""
    rank: int = -1


@dataclass(slots=True)
class _Job:
    """Where the listener stands in one job's events, within the present epoch."""

    name: str
    position: int
    current: bool
    """The failures in force go before everything else: events wait for the snapshot that has them."""
    latest: int = 0
    heard: bool = False
    """The present lighthouse speaks of this job, so it can be asked about it."""
    listed: bool = False
    asked_events: bool = False
    asked_members: bool = False
    unsettled: bool = True
    """Who its members are has to be asked, and asked again until the lighthouse knows."""
    completed: bool = False
    waiting: dict[int, Event] = field(default_factory=dict)
    members: dict[tuple[str, str], str] = field(default_factory=dict)
    """Incarnations of living members, by group and member."""
    before: dict[tuple[str, str, str], None] = field(default_factory=dict)
    """Those that an earlier lighthouse knew and the present one was not compared with yet."""
    places: dict[tuple[str, str], Place] = field(default_factory=dict)
    iterations: dict[str, int] = field(default_factory=dict)
    seen: dict[Identity, None] = field(default_factory=dict)

    @property
    def wants(self) -> bool:
        return self.heard and (self.unsettled or self.behind)

    @property
    def behind(self) -> bool:
        return self.position < self.latest


class Listening:
    """What one listener has heard.

    Args:
        job: the only one to listen to; None for all.
        group: the only group whose events are delivered; None for all.
        include_current: deliver the failures in force at the beginning; otherwise only those from now on.
        recoveries: deliver ``RecoveredEvent``s, too.
    """

    def __init__(self, job: str | None, group: str | None, include_current: bool, *, recoveries: bool = False) -> None:
        self._job = job
        self._group = group
        self._include_current = include_current
        self._recoveries = recoveries
        self._epoch = -1
        self._beats = 0
        self._begun = False
        """Jobs that turn up from now on are read from their first event."""
        self._jobs: dict[str, _Job] = {}

    def take(self, message: Event | Snapshot | EventBeat) -> Heard:
        """What follows from this message; one of a lighthouse that was replaced says nothing any more."""
        heard = Heard([], [])
        foreign = not isinstance(message, EventBeat) and self._job not in (None, message.job)
        if foreign or message.epoch < self._epoch:
            return heard
        if message.epoch > self._epoch:
            self._turn(message.epoch, heard.deliver)
        match message:
            case EventBeat():
                self._beat(message, heard)
            case Snapshot():
                self._snapshot(message, heard)
            case _:
                self._event(message, heard)
        return heard

    @property
    def wanted(self) -> list[str]:
        """The jobs whose snapshot is still missing, or did not settle things: to be asked for again."""
        return [job.name for job in self._jobs.values() if job.wants]

    @property
    def ready(self) -> bool:
        """It knows where it stands and who the members are: from now on nothing is missed."""
        return self._begun and not self.wanted

    # --- what comes ----------------------------------------------------------------------------------------

    def _beat(self, beat: EventBeat, heard: Heard) -> None:
        self._beats += 1
        for name, latest in beat.latest.items():
            if self._job in (None, name):
                job = self._known(name, latest)
                job.heard = job.listed = True
                job.latest = max(job.latest, latest)
                self._ask(job, heard)
        for job in [job for job in self._jobs.values() if job.name not in beat.latest]:
            if job.listed:
                # The lighthouse has forgotten it; should it come back, its numbers begin again.
                self._give_up(job, heard.deliver)
                del self._jobs[job.name]
            elif self._beats >= ABSENT_BEATS:
                self._compare(job, {}, heard.deliver)
        self._begun = True

    def _event(self, event: Event, heard: Heard) -> None:
        job = self._known(event.job, event.sequence - 1)
        job.heard = True
        if event.sequence <= job.position:
            return
        job.latest = max(job.latest, event.sequence)
        job.waiting[event.sequence] = event
        if len(job.waiting) > WAITING_KEPT:
            del job.waiting[next(iter(job.waiting))]
        self._advance(job, heard.deliver)
        self._ask(job, heard)

    def _snapshot(self, snapshot: Snapshot, heard: Heard) -> None:
        job = self._known(snapshot.job, snapshot.sequence)
        job.heard = True
        job.latest = max(job.latest, snapshot.sequence)
        if snapshot.sequence < job.position:
            # Overtaken by events: its members are not those of now.
            return
        in_force = [event for status in snapshot.groups for event in status.failures]
        if job.current:
            for event in sorted(in_force, key=lambda event: event.sequence):
                if event.sequence <= job.position:
                    self._read(job, event, heard.deliver)
            job.current = False
        self._catch_up(job, snapshot, in_force, heard.deliver)
        job.completed = job.completed or snapshot.completed
        statuses = {status.group: status for status in snapshot.groups}
        self._meet(job, statuses)
        self._compare(job, statuses, heard.deliver)
        self._advance(job, heard.deliver)
        job.unsettled = bool(job.before) or not all(status.settled for status in snapshot.groups)
        job.asked_events = False
        self._ask(job, heard)

    # --- one job -------------------------------------------------------------------------------------------

    def _known(self, name: str, now: int) -> _Job:
        job = self._jobs.get(name)
        if job is None:
            position = 0 if self._begun else now
            job = self._jobs[name] = _Job(name, position, current=self._include_current and position > 0)
        return job

    def _ask(self, job: _Job, heard: Heard) -> None:
        """Asks once; what is unanswered, or answered by a lighthouse that is not settled, is ``wanted``."""
        if (job.behind and not job.asked_events) or (job.unsettled and not job.asked_members):
            job.asked_members = True
            job.asked_events = job.behind
            heard.ask.append(job.name)

    def _advance(self, job: _Job, deliver: list[Delivery]) -> None:
        while not job.current and (event := job.waiting.pop(job.position + 1, None)) is not None:
            job.position += 1
            self._read(job, event, deliver)

    def _catch_up(self, job: _Job, snapshot: Snapshot, in_force: list[FailureEvent], deliver: list[Delivery]) -> None:
        """Reads up to the snapshot's number, and says how much of that nobody keeps."""
        kept: dict[int, Event] = {}
        for events in (in_force, snapshot.failures, snapshot.quorums, snapshot.recovered, job.waiting.values()):
            kept |= {event.sequence: event for event in events if job.position < event.sequence <= snapshot.sequence}
        rings = [[event.sequence for event in snapshot.failures]]
        if self._recoveries:
            rings.append([event.sequence for event in snapshot.recovered])
        oldest = max((min(ring) for ring in rings if len(ring) >= RING), default=0)
        missed = oldest - job.position - 1 - sum(sequence < oldest for sequence in kept)
        if missed > 0:
            deliver.append(EventsLost(job.name, missed))
        for sequence in sorted(kept):
            job.position = sequence
            self._read(job, kept[sequence], deliver)
        job.position = snapshot.sequence
        job.waiting = {number: event for number, event in job.waiting.items() if number > job.position}

    def _read(self, job: _Job, event: Event, deliver: list[Delivery]) -> None:
        """An event in its order."""
        match event:
            case FailureEvent(failure=failure):
                self._failed(job, event, failure, deliver)
            case RecoveredEvent():
                self._alive(job, event.group, event.member, event.incarnation)
                if self._recoveries and self._group in (None, event.group):
                    deliver.append(event)
            case QuorumEvent():
                job.completed = False
                job.iterations[event.group] = event.iteration
                for rank, member in enumerate(event.members):
                    self._alive(job, event.group, member.member, member.incarnation, Place(member.node, rank))
            case ReplicaQuorumEvent():
                for replica in event.participants:
                    self._alive(job, event.group, replica.replica_id, replica.incarnation)
            case CompletedEvent():
                job.completed = True

    def _failed(self, job: _Job, event: FailureEvent, failure: Failure, deliver: list[Delivery]) -> None:
        identity: Identity = ("faulted", event.group, failure.iteration)
        if failure.kind == "lost":
            identity = ("lost", failure.member, failure.incarnation)
            if job.members.get((event.group, failure.member)) == failure.incarnation:
                del job.members[event.group, failure.member]
                job.places.pop((event.group, failure.member), None)
        if identity in job.seen or failure.cause.kind == "joined":
            # Who joined has not failed.
            return
        job.seen[identity] = None
        if len(job.seen) > SEEN_KEPT:
            del job.seen[next(iter(job.seen))]
        if self._group in (None, event.group):
            deliver.append(event)

    def _alive(self, job: _Job, group: str, member: str, incarnation: str, place: Place | None = None) -> None:
        job.members[group, member] = incarnation
        if place is not None:
            job.places[group, member] = place
        # It came back (a frozen process, a cut cable): should it be lost again, that is another failure.
        job.seen.pop(("lost", member, incarnation), None)

    def _meet(self, job: _Job, statuses: Mapping[str, GroupStatus]) -> None:
        """The members as the lighthouse knows them."""
        for group, status in statuses.items():
            for member in status.members:
                if member.incarnation:
                    known = job.places.get((group, member.member), Place())
                    place = Place(member.node or known.node, known.rank)
                    self._alive(job, group, member.member, member.incarnation, place)
            if status.settled:
                names = {member.member for member in status.members}
                for key in [key for key in job.members if key[0] == group and key[1] not in names]:
                    del job.members[key]
                    job.places.pop(key, None)

    # --- a lighthouse that was away ------------------------------------------------------------------------

    def _turn(self, epoch: int, deliver: list[Delivery]) -> None:
        """Another lighthouse: it numbers from the beginning, and has to learn who the members are."""
        self._begun = self._begun or self._epoch >= 0
        self._epoch = epoch
        self._beats = 0
        for job in self._jobs.values():
            self._give_up(job, deliver)
            job.before |= {(group, member, incarnation): None for (group, member), incarnation in job.members.items()}
            job.members.clear()
            job.position = job.latest = 0
            job.heard = job.listed = job.asked_events = job.asked_members = job.current = False
            job.unsettled = True

    def _give_up(self, job: _Job, deliver: list[Delivery]) -> None:
        """No snapshot of this epoch will come: what was received goes out, the rest is said to be lost."""
        for sequence in sorted(job.waiting):
            self._skip(job, sequence - 1, deliver)
            job.position = sequence
            self._read(job, job.waiting[sequence], deliver)
        job.waiting.clear()
        self._skip(job, job.latest, deliver)

    def _skip(self, job: _Job, sequence: int, deliver: list[Delivery]) -> None:
        if sequence > job.position:
            deliver.append(EventsLost(job.name, sequence - job.position))
            job.position = sequence

    def _compare(self, job: _Job, statuses: Mapping[str, GroupStatus], deliver: list[Delivery]) -> None:
        """Whom the lighthouse before this one knew, and this one does not: lost in between."""
        if job.completed:
            # Its members end because they are done.
            job.before.clear()
        for group, member, incarnation in list(job.before):
            status = statuses.get(group)
            if status is None and (group == RANKS or self._beats < ABSENT_BEATS):
                continue
            if status is not None and not status.settled:
                continue
            del job.before[group, member, incarnation]
            there = {one.member: one.incarnation for one in status.members} if status is not None else {}
            # An empty incarnation says that somebody is there, and no more.
            if there.get(member) not in (incarnation, ""):
                event = self._missing(job, group, member, incarnation, replaced=member in there)
                self._failed(job, event, event.failure, deliver)
            if (group, member) not in job.members:
                job.places.pop((group, member), None)

    def _missing(self, job: _Job, group: str, member: str, incarnation: str, *, replaced: bool) -> FailureEvent:
        place = job.places.get((group, member), Place())
        what = "another process is in its place" if replaced else "it is not there any more"
        failure = Failure(
            kind="lost",
            member=member,
            incarnation=incarnation,
            rank=place.rank,
            node=place.node,
            iteration=job.iterations.get(group, -1),
            cause=Cause(kind="gone", text=f"lost while the lighthouse was away: {what}"),
            occurred_at=-1.0,
            detected_at=-1.0,
            published_at=-1.0,
            detector="listener",
        )
        return FailureEvent(job.name, group, self._epoch, 0, failure)
