"""What the lighthouse says of the jobs: losses, quorums, completions, in their order and each once.

The lighthouse owns who lives (D1). Its events are numbered: one that comes after a gap waits for the snapshot that
fills it, and a lighthouse that was started anew is told the rosters.
"""

from __future__ import annotations

from seamark.protocol.messages import (
    RANKS,
    Acknowledged,
    CompletedEvent,
    Event,
    EventBeat,
    FailureEvent,
    Message,
    QuorumEvent,
    RecoveredEvent,
    ReplicaQuorumEvent,
    Slot,
    Snapshot,
    SnapshotRequest,
)
from seamarkd.coordinator.cluster import Cluster
from seamarkd.coordinator.dispatch import Dispatch
from seamarkd.coordinator.effects import Effect, ToLighthouse, persist
from seamarkd.coordinator.job import ENDED, FRUITLESS_RESTARTS, Job, first_line
from seamarkd.coordinator.losses import Losses
from seamarkd.coordinator.stops import Stops
from seamarkd.coordinator.stores import StoreMoves
from seamarkd.cursor import EventCursor


class Liveness:
    """Reads the lighthouse.

    Args:
        cluster: nodes and jobs.
        dispatch: is told whose work has failed.
        losses: decides on nodes that are lost.
        stops: ends a job that only restarts.
        stores: moves a store whose node is lost.
    """

    def __init__(self, cluster: Cluster, dispatch: Dispatch, losses: Losses, stops: Stops, stores: StoreMoves) -> None:
        self._cluster = cluster
        self._dispatch = dispatch
        self._losses = losses
        self._stops = stops
        self._stores = stores
        self._cursor = EventCursor()

    def heard(self, now: float, message: Message) -> list[Effect]:
        """What follows from an answer or an event of the lighthouse."""
        effects: list[Effect] = []
        if isinstance(message, Event | EventBeat | Snapshot):
            turn = self._cursor.turn(message.epoch)
            if turn == "old":
                return []
            if turn == "new":
                effects += self._lighthouse_is_new(now)
        match message:
            case Acknowledged():
                effects += self._taken(now, message)
            case FailureEvent() | QuorumEvent() | CompletedEvent() | RecoveredEvent() | ReplicaQuorumEvent():
                job = self._cluster.jobs.get(message.job)
                if job is not None:
                    effects += self._in_order(now, job, message)
            case EventBeat():
                effects += self._missed(message)
                effects += self._waiting(message)
            case Snapshot():
                effects += self._caught_up(now, message)
            case _:
                pass
        return effects

    # --- one after the other -------------------------------------------------------------------------------

    def _lighthouse_is_new(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for job in self._cluster.jobs.values():
            if job.state in ("STARTING", "RUNNING") and job.store.port:
                effects += [*self._cluster.announce(now, job), self._ask(job.spec.name)]
        return effects

    def _ask(self, job: str) -> Effect:
        return ToLighthouse(SnapshotRequest(self._cluster.next_request(), job))

    def _taken(self, now: float, answer: Acknowledged) -> list[Effect]:
        """A roster goes to the nodes once the lighthouse has it."""
        effects: list[Effect] = []
        for job in self._cluster.jobs.values():
            if job.store_lost is not None and job.store_lost.request == answer.request:
                job.store_lost = None
            if job.roster_request == answer.request and job.state in ("STARTING", "RUNNING"):
                job.roster_request = 0
                effects += self._cluster.to_nodes(job, self._cluster.roster(now, job))
        return effects

    def _in_order(self, now: float, job: Job, event: Event) -> list[Effect]:
        """An event after a gap waits for the snapshot that fills it: a quorum closes the incident of its failure."""
        position = self._cursor.position(event.job)
        if event.sequence <= position:
            return []
        if event.sequence > position + 1:
            return [self._ask(event.job)]
        self._cursor.advance(event.job, event.sequence)
        return self._event(now, job, event)

    def _missed(self, beat: EventBeat) -> list[Effect]:
        return [self._ask(job) for job in self._cursor.behind(beat.latest) if job in self._cluster.jobs]

    def _caught_up(self, now: float, snapshot: Snapshot) -> list[Effect]:
        """Events that went past while this daemon, or its connection, was away; those seen before change nothing."""
        job = self._cluster.jobs.get(snapshot.job)
        if job is None:
            return []
        # Also of a job that has ended: else it would be asked about for ever.
        self._cursor.advance(snapshot.job, snapshot.sequence)
        if job.state in ENDED or _is_unannounced(job):
            return []
        effects: list[Effect] = []
        job.completed = job.completed or snapshot.completed
        events: list[FailureEvent | QuorumEvent] = [*snapshot.failures, *snapshot.quorums]
        for event in sorted(events, key=lambda one: one.sequence):
            iteration = event.failure.iteration if isinstance(event, FailureEvent) else event.iteration - 1
            of_a_node = isinstance(event, FailureEvent) and event.failure.cause.kind == "node"
            if iteration >= job.iteration or of_a_node:
                effects += self._event(now, job, event)
        return effects

    # --- what they say -------------------------------------------------------------------------------------

    def _event(self, now: float, job: Job, event: Event) -> list[Effect]:
        """Replica groups are in nobody's roster: what becomes of them changes nothing here."""
        if (event.epoch, event.sequence) <= job.heard or _is_unannounced(job):
            return []
        job.heard = (event.epoch, event.sequence)
        match event:
            case FailureEvent(group=group) if group == RANKS:
                return self._failure(now, job, event)
            case QuorumEvent():
                return self._quorum(now, job, event)
            case CompletedEvent():
                job.completed = True
                job.sentence = "all ranks completed"
        return []

    def _failure(self, now: float, job: Job, event: FailureEvent) -> list[Effect]:
        failure = event.failure
        if failure.iteration >= 0 or job.iteration < 0:
            # Else it was lost before it entered the session, which goes on.
            job.incidents.failed(event, alone=job.spec.independent and not job.wrapped)
        given = (
            self._dispatch.faulted(now, job, failure.incarnation, failure.cause) if failure.kind == "faulted" else []
        )
        if failure.cause.kind == "node":
            effects = self._losses.node_gone(now, job, failure.node)
            if failure.node == job.store_node and not job.moving and job.state == "RUNNING":
                effects += self._stores.move(now, job)
            return [*effects, *self._cluster.tell(job)]
        if job.state in ("STARTING", "RUNNING"):
            who = "the store" if failure.rank < 0 else f"rank {failure.rank}"
            job.sentence = f"restarts: {who} {failure.kind} ({first_line(failure.cause.text)})"
            if failure.cause.kind == "joined":
                job.sentence = f"restarts in process: {first_line(failure.cause.text)}"
        return [*given, *self._cluster.tell(job)]

    def _quorum(self, now: float, job: Job, event: QuorumEvent) -> list[Effect]:
        if event.generation != job.generation or event.iteration <= job.iteration:
            return []
        job.incidents.answered(event)
        job.iteration = event.iteration
        _recognise(job, event)
        job.completed = False
        again, job.restarts = event.restarts > job.restarts, event.restarts
        if again and not job.fruitless.spend(now) and job.state == "RUNNING":
            why = job.sentence.removeprefix("restarts: ")
            result = f"{FRUITLESS_RESTARTS} restarts followed each other without a ping(); the last: {why}"
            return self._stops.end(now, job, "FAILED", result)
        job.sentence = "runs"
        return [persist(job), *self._cluster.tell(job)]

    def _waiting(self, beat: EventBeat) -> list[Effect]:
        effects: list[Effect] = []
        for name, reason in beat.waiting.items():
            job = self._cluster.jobs.get(name)
            if job is not None and job.state == "RUNNING" and job.sentence != reason:
                job.sentence = reason
                effects += self._cluster.tell(job)
        return effects


def _is_unannounced(job: Job) -> bool:
    """The lighthouse has not heard of this job: what it says is of an earlier one of the same name."""
    return job.generation < 0


def _recognise(job: Job, event: QuorumEvent) -> None:
    """Who is in a quorum lives, also who was thought to be gone with its node: that was only cut off."""
    job.failed -= {member.member for member in event.members}
    placed = {slot.member for slot in job.slots}
    for one in event.members:
        if one.member not in placed:
            group_rank = one.initial_rank // job.spec.nproc_per_node
            job.slots.append(Slot(one.member, one.initial_rank, one.local_rank, one.node, group_rank))
            job.left.discard(one.node)
    job.slots.sort(key=lambda slot: slot.rank)
