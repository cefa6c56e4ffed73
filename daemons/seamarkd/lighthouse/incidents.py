"""One fault is one incident and one event (D5), keyed by the iteration that it ends.

The first loss, or the first fault with a cause of its own, is published; later faults are its consequences. A
*communication* fault ("connection closed by peer") is evidence of somebody else's end and nearly always overtakes the
death report, so it is held for ``EVIDENCE_WINDOW`` and published only if no better cause turns up: thus one kill is one
event.
"""

from __future__ import annotations

from msgspec import Struct, field

from seamark.protocol.messages import Cause, Failure, FailureEvent, MemberFaulted, MemberLost, Slot, StoreLost
from seamarkd.effects import Effect, Publish
from seamarkd.lighthouse.events import EventLog

EVIDENCE_WINDOW = 0.1
"""Seconds a communication fault waits for the loss that explains it; a death report takes about a millisecond."""
CONSEQUENCES_KEPT = 64
"""Consequences of one incident that are told with the quorum after it: ten thousand ranks say the same of one cause,
and the message that holds them has to fit into a frame."""


class Incident(Struct):
    """The fault in progress. Unpublished while all that is known of it are communication faults."""

    iteration: int
    published: bool
    hold_until: float
    consequences: list[Failure] = field(default_factory=list)

    def add(self, failure: Failure) -> None:
        """A consequence, unless it is known or there are enough."""
        told = (failure.kind, failure.member, failure.incarnation, failure.cause.kind)
        known = {(one.kind, one.member, one.incarnation, one.cause.kind) for one in self.consequences}
        if len(self.consequences) < CONSEQUENCES_KEPT and told not in known:
            self.consequences.append(failure)


class Incidents:
    """The incident of a group, while there is one.

    Args:
        group: its name.
        events: the job's numbered events.

    Attributes:
        current: the incident in progress.
        in_force: by member, the failures that no quorum was answered after.
    """

    def __init__(self, group: str, events: EventLog) -> None:
        self._group = group
        self._events = events
        self.current: Incident | None = None
        self.in_force: dict[str, FailureEvent] = {}

    @property
    def held(self) -> bool:
        """Whether evidence waits for what explains it."""
        return self.current is not None and not self.current.published

    def publish(self, failure: Failure) -> Effect:
        """Tells everybody; the failure is in force until the next quorum."""
        event = self.in_force[failure.member] = self._events.failure(self._group, failure)
        return Publish(event.job, event)

    def lost(self, now: float, iteration: int, failure: Failure) -> tuple[Effect, bool]:
        """A loss of the present iteration: its event, and whether it is the first that is known of the incident."""
        opens = self.current is None
        if self.current is None:
            self.current = Incident(iteration, published=True, hold_until=now)
        else:
            self.current.published = True
        return self.publish(failure), opens

    def faulted(self, now: float, failure: Failure) -> list[Effect]:
        """A fault of the present iteration: its event, or nothing for a consequence, or for evidence that is held."""
        incident = self.current
        if incident is None:
            incident = self.current = Incident(failure.iteration, False, now + EVIDENCE_WINDOW)
        if incident.published or failure.cause.communication:
            incident.add(failure)
            return []
        incident.published = True
        return [self.publish(failure)]

    def due(self, now: float) -> list[Effect]:
        """The evidence that nothing has explained in its time."""
        if self.current is None or self.current.published or now < self.current.hold_until:
            return []
        return self._publish_held(self.current)

    def drop(self) -> None:
        """Nobody is to be told of any more."""
        self.current = None
        self.in_force.clear()

    def end(self) -> tuple[list[Effect], Incident | None]:
        """A quorum is answered: evidence that was held till now is published, and no failure is in force any more."""
        incident, self.current = self.current, None
        effects = self._publish_held(incident) if incident is not None and not incident.published else []
        self.in_force.clear()
        return effects, incident

    def _publish_held(self, incident: Incident) -> list[Effect]:
        incident.published = True
        return [self.publish(incident.consequences.pop(0))]


def loss(now: float, report: MemberLost, slot: Slot, iteration: int) -> Failure:
    """A member's loss, as it is published."""
    return Failure(
        kind="lost",
        member=report.member,
        incarnation=report.incarnation,
        rank=slot.rank,
        node=slot.node,
        iteration=iteration,
        cause=report.cause,
        occurred_at=report.occurred_at,
        detected_at=report.detected_at,
        published_at=now,
        detector=report.detector,
    )


def fault(now: float, report: MemberFaulted, slot: Slot) -> Failure:
    """A member's fault, as it is published."""
    return Failure(
        kind="faulted",
        member=report.member,
        incarnation=report.incarnation,
        rank=slot.rank,
        node=slot.node,
        iteration=report.iteration,
        cause=report.cause,
        occurred_at=report.occurred_at,
        detected_at=report.occurred_at,
        published_at=now,
        detector="wrapper",
    )


def store_fault(now: float, report: StoreLost, incarnation: str, iteration: int) -> Failure:
    """The loss of the TCPStore's ``incarnation``: a fault of everybody's iteration."""
    return Failure(
        kind="faulted",
        member="store",
        incarnation=incarnation or "unknown",
        rank=-1,
        node="",
        iteration=iteration,
        cause=Cause(kind="store", text="the TCPStore service was lost"),
        occurred_at=-1.0,
        detected_at=report.detected_at,
        published_at=now,
        detector="agent",
    )


def away(now: float, slot: Slot, incarnation: str, iteration: int, present: int) -> Failure:
    """A node was cut off in ``iteration`` while the others went on to the ``present`` one."""
    return Failure(
        kind="faulted",
        member=slot.member,
        incarnation=incarnation or "unknown",
        rank=slot.rank,
        node=slot.node,
        iteration=iteration,
        cause=Cause(kind="stuck", text=f"node {slot.node} was away when iteration {present} began"),
        occurred_at=-1.0,
        detected_at=now,
        published_at=now,
        detector="lighthouse",
    )
