"""The ``replicas`` group of a job: replica groups that beat, ask for quorums, end, and come back.

Nobody says who should be there: who beats is a member (torchft's lighthouse). The quorum decision is
``quorum.py``'s and the failure tick ``failures.py``'s; what is here is when to ask them and whom to tell. A member
ends by its heartbeats, by its own word, or by evidence: while a quorum waits for members that do not come, the
lighthouse connects to them, and where the host refuses (the listener went with its process) nobody waits for a
heartbeat timeout.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from msgspec import Struct

from seamark.protocol.messages import (
    REPLICAS,
    Acknowledged,
    BeatAnswer,
    Cause,
    Failure,
    FailureEvent,
    GroupMember,
    GroupStatus,
    QuorumReset,
    Recipient,
    Refused,
    Replica,
    ReplicaBeat,
    ReplicaJoin,
    ReplicaLeave,
    ReplicaQuorum,
    ReplicaWithdraw,
)
from seamarkd.effects import Effect, ProbeMember, Publish, Send, Wake
from seamarkd.lighthouse.events import EventLog
from seamarkd.lighthouse.failures import TIMEOUT_TEXT, failure_tick
from seamarkd.lighthouse.nodes import ProbeResult
from seamarkd.lighthouse.quorum import (
    Decision,
    Participant,
    PreviousQuorum,
    QuorumOptions,
    compute_quorum,
    next_quorum_id,
)

PROBE_AFTER = 0.02
"""Seconds a quorum waits for who beats and does not join before it has a look whether their processes live."""
PROBE_AGAIN = 0.02
"""Seconds until it looks again: a process's sockets close only after the kernel has freed its memory."""
LOOK_COST = 2e-5
"""Seconds that a look at one member costs at most: of many, it is taken less often."""
PROBES_AT_ONCE = 64
"""Members that are looked at together; a round trip to each is nothing, and no burst either."""
SURELY_ALIVE = 1.0
"""Seconds that a member has to beat on beside another process of its name: a dying one accepts connections, too."""
RIVALS_KEPT = 60.0
PUSHED_KEPT = 64
"""Failures that are pushed again to a manager whose beat says that it has not seen them."""
PUSH_AGAIN = 1.0
"""Seconds that a manager has to see what was pushed: one that is slow to read would be sent the more for it."""
OVER = -1
"""In the place of an answer: the request was answered by a reset, or withdrawn."""
FORGET_AFTER = 3_600.0
"""Seconds after which a member that failed and never came back is shown and remembered no longer."""


class ReplicaOptions(Struct, frozen=True):
    """A lighthouse's own limits for replica groups, in members and seconds. Defaults: torchft's."""

    min_members: int = 1
    join_timeout: float = 60.0
    heartbeat_timeout: float = 5.0
    failure_tick: float = 1.0


class Living(Struct):
    """A member that is heard of."""

    incarnation: str
    address: str
    route: bytes
    last_beat: float
    since: int = 0
    """The job's last event when it was answered a quorum: what failed before is not in that."""
    step: int = 0
    pushed_at: float = -PUSH_AGAIN
    """When failures were pushed to it last."""
    contested_until: float = 0.0
    """Seconds; up to then another process under its name is refused, for this one was just seen to live."""


class Waiting(Struct):
    """An unanswered request."""

    request: ReplicaJoin
    route: bytes
    since: float


class Failed(Struct):
    """A failure in force."""

    event: FailureEvent
    at: float


class ReplicaGroup:
    """The replica groups of one job.

    Args:
        job: its name.
        events: the job's numbered events.
        floor: quorum ids stay above it (the daemon's epoch in the upper bits).
        settles_at: up to then, in seconds, a daemon that served before may not know all who beat.
        options: its limits.
    """

    def __init__(self, job: str, events: EventLog, floor: int, settles_at: float, options: ReplicaOptions) -> None:
        self.job = job
        self.reason = "no quorum was asked for yet"
        self.members: dict[str, Living] = {}
        self._events = events
        self._floor = floor
        self._settles_at = settles_at
        self._options = options
        self._joins: dict[str, Waiting] = {}
        self._answered: dict[str, tuple[int, int]] = {}
        """By incarnation: the last of its requests that was answered, and by which answer."""
        self._round = 0
        """Counts the answers, and the ends of their quorums by a loss."""
        self._participants: list[Replica] = []
        self._previous: PreviousQuorum | None = None
        self._processes: frozenset[str] = frozenset()
        """The incarnations of its members; empty where a lighthouse before this one answered it."""
        self._broken = False
        """One of them was lost since it was answered."""
        self._expected: dict[str, float] = {}
        self._failures: dict[str, Failed] = {}
        self._pushed: deque[FailureEvent] = deque(maxlen=PUSHED_KEPT)
        self._ended: dict[str, float] = {}
        """Incarnations that said goodbye or whose death an agent saw: what still arrives of them is late."""
        self._newcomers: dict[str, Waiting] = {}
        """Requests of other processes under the name of a member, until it is known whether that one lives."""
        self._rivals: dict[tuple[str, str], float] = {}
        """Since when another process is heard of under a member's name."""
        self._tick_due = 0.0
        self._probe_at = 0.0

    # --- members -------------------------------------------------------------------------------------------

    def beat(self, now: float, route: bytes, beat: ReplicaBeat) -> list[Effect]:
        """A heartbeat; it makes its sender a member."""
        effects, taken = self._hear(now, route, beat.replica_id, beat.incarnation, beat.address)
        if taken is None:
            return effects
        taken.step = beat.step
        seen = max(beat.seen, taken.since)
        if self._pushed and self._pushed[-1].sequence > seen and now - taken.pushed_at >= PUSH_AGAIN:
            taken.pushed_at = now
            effects += [Send(route, event) for event in self._pushed if event.sequence > seen]
        if beat.waiting == 0:
            effects += [Send(route, event) for event in self._not_answered(now, beat)]
        waiting = self._joins.get(beat.replica_id)
        if waiting is not None and (beat.waiting == 0 or beat.waiting > waiting.request.request):
            del self._joins[beat.replica_id]  # it gave up, and the word of that was lost
        return [*effects, Send(route, BeatAnswer(self._events.epoch, beat.sequence, known=True))]

    def _hear(
        self, now: float, route: bytes, replica_id: str, incarnation: str, address: str, request: int = 0
    ) -> tuple[list[Effect], Living | None]:
        """A sign of life; None for another process under the name of one that may live."""
        known = self.members.get(replica_id)
        if known is not None and known.incarnation != incarnation:
            since = self._rivals.setdefault((replica_id, incarnation), now)
            if now < known.contested_until and known.last_beat > since + SURELY_ALIVE:
                sentence = (
                    f"replica_id {replica_id} of job {self.job} is in use by a process that answers on "
                    f"{known.address}: give this one another replica_id, or end the other"
                )
                return [Send(route, Refused(request, "NAME_TAKEN", sentence, self.job, replica_id))], None
            return [self._probe(replica_id, known)], None
        if known is not None:
            known.last_beat = max(known.last_beat, now)
            known.route = route
            return [], known
        if incarnation in self._ended:
            return [], None
        self.members[replica_id] = known = Living(incarnation, address, route, now)
        self._expected.pop(replica_id, None)
        failed = self._failures.pop(replica_id, None)
        if failed is None:
            return [], known
        effects: list[Effect] = [Publish(self.job, self._events.recovered(REPLICAS, replica_id, incarnation))]
        if failed.event.failure.incarnation == incarnation:
            # The others have cut their groups; it may wait for them in its own.
            effects.append(Send(route, failed.event))
        return effects, known

    def _probe(self, replica_id: str, living: Living) -> Effect:
        return ProbeMember(self.job, replica_id, living.incarnation, living.address)

    def probed(self, now: float, replica_id: str, incarnation: str, result: ProbeResult) -> list[Effect]:
        """What came of connecting to a member: refused means that its process is gone."""
        known = self.members.get(replica_id)
        if known is None or known.incarnation != incarnation:
            return []
        if result == "accepted":
            known.contested_until = now + self._options.heartbeat_timeout
            return []
        if result != "refused":
            return []
        text = f"its process is gone: nothing listens on {known.address} any more"
        effects = self._lose(now, {replica_id: Cause(kind="gone", text=text)}, "probe")
        newcomer = self._newcomers.pop(replica_id, None)
        return [*effects, *self.join(now, newcomer.route, newcomer.request)] if newcomer else effects

    def leave(self, now: float, route: bytes, leave: ReplicaLeave) -> list[Effect]:
        """A member ends in good order."""
        known = self.members.get(leave.replica_id)
        effects: list[Effect] = []
        if known is not None and known.incarnation == leave.incarnation:
            effects = self._lose(now, {leave.replica_id: Cause(kind="left", text=leave.reason)}, "manager")
        self._ended[leave.incarnation] = now
        return [*effects, Send(route, Acknowledged(leave.request))]

    def process_lost(self, now: float, incarnation: str, cause: Cause, detector: str) -> list[Effect]:
        """An agent saw a worker die; it may have been the manager of one of these replica groups."""
        for member, living in self.members.items():
            if living.incarnation == incarnation:
                self._ended[incarnation] = now
                return self._lose(now, {member: cause}, detector)
        return []

    def inject(self, now: float, member: str) -> list[Effect] | None:
        """A drill: the member's failure is published; None for a stranger."""
        if member not in self.members:
            return None
        return self._lose(now, {member: Cause(kind="injected", text="injected failure")}, "operator")

    def excuse(self, now: float, seconds: float) -> None:
        """This lighthouse's own loop ran late: its pause is nobody's death."""
        for living in self.members.values():
            living.last_beat = min(now, living.last_beat + seconds)

    def _lose(self, now: float, causes: dict[str, Cause], detector: str) -> list[Effect]:
        """These members are lost: each published once, and who waits asks again (rule of the failure tick)."""
        effects: list[Effect] = []
        for member, cause in causes.items():
            living = self.members.pop(member)
            self._joins.pop(member, None)
            if living.incarnation in self._processes and not self._broken:
                self._broken = True
                self._round += 1
            failure = Failure(
                kind="lost",
                member=member,
                incarnation=living.incarnation,
                rank=-1,
                node="",
                iteration=-1,
                cause=cause,
                occurred_at=-1.0,
                detected_at=now,
                published_at=now,
                detector=detector,
            )
            event = self._events.failure(REPLICAS, failure)
            self._failures[member] = Failed(event, now)
            self._pushed.append(event)
            effects.append(Publish(self.job, event))
            # Also straight to the other managers: they have no subscription, and their ranks may hang in a collective.
            for other in self.members.values():
                other.pushed_at = now
                effects.append(Send(other.route, event))
        return [*effects, *self._reset(", ".join(sorted(causes)) + (" was lost" if len(causes) == 1 else " were lost"))]

    def _reset(self, why: str) -> list[Effect]:
        waiting, self._joins = self._joins, {}
        for one in waiting.values():
            # Its repetition may be on its way: each request has one answer.
            self._answered[one.request.replica.incarnation] = (one.request.request, OVER)
        return [
            Send(route, QuorumReset(self.job, REPLICAS, recipients, f"quorum reset: {why}"))
            for route, recipients in _by_route(waiting.values()).items()
        ]

    # --- quorum --------------------------------------------------------------------------------------------

    def join(self, now: float, route: bytes, request: ReplicaJoin) -> list[Effect]:
        """A member asks for the next quorum and waits."""
        replica = request.replica
        heard, living = self._hear(
            now, route, replica.replica_id, replica.incarnation, replica.address, request.request
        )
        if living is None:
            if any(isinstance(effect, ProbeMember) for effect in heard):
                self._newcomers[replica.replica_id] = Waiting(request, route, now)
            return heard
        living.step = replica.step
        number, answer = self._answered.get(replica.incarnation, (-1, 0))
        if request.request < number:
            return heard
        if request.request == number:
            recipients = [Recipient(replica.replica_id, replica.incarnation, number)]
            if answer == self._round and self._previous is not None:
                again = ReplicaQuorum(self.job, recipients, self._previous.quorum_id, self._participants)
                return [*heard, Send(route, again)]
            # It may have the answer: then it waits for nothing, and takes no notice.
            return [*heard, Send(route, QuorumReset(self.job, REPLICAS, recipients, "quorum reset: it is over"))]
        heard += self._missed(now, request)
        contradiction = self._contradiction(request)
        if contradiction:
            return [*heard, Send(route, Refused(request.request, "BAD_REQUEST", contradiction, self.job))]
        earlier = self._joins.get(replica.replica_id)
        if earlier is not None and request.request < earlier.request.request:
            return heard
        if not self._joins:
            self._probe_at = now + PROBE_AFTER
            heard.append(Wake(PROBE_AFTER))
        self._joins[replica.replica_id] = Waiting(request, route, earlier.since if earlier else now)
        self._carry(now, request)
        if replica.commit_failures:
            self._probe_at = now
        if request.target_members or self._may_be_complete():
            heard += self.answer_if_ready(now)
        return [*heard, *self._probe_absent(now)]

    def _may_be_complete(self) -> bool:
        """False while the decision can only be to wait: every join of many members need not ask for it."""
        last = self._previous.members if self._previous else frozenset()
        return len(self._joins) >= len(self.members) or (bool(last) and last <= self._joins.keys())

    def _missed(self, now: float, request: ReplicaJoin) -> list[Effect]:
        """Who asks again and never was in the quorum that it is counted in: the others wait for it in vain."""
        replica, previous = request.replica, self._previous
        if self._broken or previous is None or replica.incarnation not in self._processes:
            return []
        if request.quorum_id >= previous.quorum_id:
            return []
        self._broken = True
        self._round += 1
        event = self._absence(now, replica, f"in quorum {previous.quorum_id}: its caller had given up")
        return [Send(self.members[one].route, event) for one in previous.members if one in self.members]

    def _not_answered(self, now: float, beat: ReplicaBeat) -> list[FailureEvent]:
        """Who waits for the quorum of a step that this one is in: its answer was lost with the lighthouse that gave it.

        Who is not in that quorum is not missed there; a manager takes notice of none but its own quorum's members.
        """
        if self._processes or self._events.epoch == 1:
            return []
        return [
            self._absence(now, request.replica, f"at step {request.replica.step}: it was not told of the quorum")
            for request in (waiting.request for waiting in self._joins.values())
            if request.replica.step <= beat.step
            and request.replica.commit_failures == 0
            and beat.replica_id in request.quorum_members
        ]

    def _absence(self, now: float, replica: Replica, where: str) -> FailureEvent:
        """Told to those who wait for it in vain; it is alive, so nobody else has to know."""
        failure = Failure(
            kind="faulted",
            member=replica.replica_id,
            incarnation=replica.incarnation,
            rank=-1,
            node="",
            iteration=-1,
            cause=Cause(kind="exception", text=f"it does not take part {where}"),
            occurred_at=-1.0,
            detected_at=now,
            published_at=now,
            detector="quorum",
        )
        return FailureEvent(self.job, REPLICAS, self._events.epoch, self._events.sequence, failure)

    def _contradiction(self, request: ReplicaJoin) -> str:
        """Limits of one quorum are the same for all who wait for it (D1)."""
        for member, waiting in self._joins.items():
            other = waiting.request
            if member == request.replica.replica_id:
                continue
            for name in ("min_members", "join_timeout"):
                asked, theirs = getattr(request, name), getattr(other, name)
                if asked != theirs:
                    return (
                        f"replica_id {request.replica.replica_id} of job {self.job} asks for {name}={asked:g}, and "
                        f"{member}, which waits for the same quorum, for {theirs:g}: give all replicas the same"
                    )
        return ""

    def _carry(self, now: float, request: ReplicaJoin) -> None:
        """A lighthouse that was started anew learns the last quorum from its members, and waits for them."""
        if not request.quorum_members or (self._previous and request.quorum_id <= self._previous.quorum_id):
            return
        self._previous = PreviousQuorum(request.quorum_id, frozenset(request.quorum_members))
        if now < self._settles_at:
            unheard = self._previous.members - self.members.keys() - self._failures.keys()
            self._expected = dict.fromkeys(unheard, self._settles_at)

    def _probe_absent(self, now: float) -> list[Effect]:
        """Others wait, or somebody's commit failed, and a member is not here: is it there at all?"""
        if not self._joins or now < self._probe_at:
            return []
        pause = max(PROBE_AGAIN, LOOK_COST * len(self.members))
        self._probe_at = now + pause
        wake: list[Effect] = [Wake(pause)]
        absent = sorted(
            (living.last_beat, member) for member, living in self.members.items() if member not in self._joins
        )
        return wake + [self._probe(member, self.members[member]) for _, member in absent[:PROBES_AT_ONCE]]

    def withdraw(self, route: bytes, withdrawal: ReplicaWithdraw) -> list[Effect]:
        """The caller gave up: without this it would be a ghost in the next quorum."""
        for waits in (self._newcomers, self._joins):
            waiting = waits.get(withdrawal.replica_id)
            if (
                waiting is not None
                and waiting.request.replica.incarnation == withdrawal.incarnation
                and waiting.request.request <= withdrawal.request
            ):
                del waits[withdrawal.replica_id]
        number, _ = self._answered.get(withdrawal.incarnation, (-1, OVER))
        if withdrawal.request > number:
            self._answered[withdrawal.incarnation] = (withdrawal.request, OVER)
        return [Send(route, Acknowledged(withdrawal.request))]

    def answer_if_ready(self, now: float) -> list[Effect]:
        """Answers the quorum as soon as its members are there."""
        if not self._joins:
            return []
        if not self._settled(now):
            self.reason = "this lighthouse was just started: it waits to hear from all who were there before"
            return []
        decision = self.decide(now)
        self.reason = decision.reason
        return [] if decision.members is None else self._answer(decision.members)

    def _settled(self, now: float) -> bool:
        return now >= self._settles_at or (self._previous is not None and not self._expected)

    def decide(self, now: float) -> Decision:
        """What the quorum decision is at this moment."""
        requests = [waiting.request for waiting in self._joins.values()]
        asked = next((request.join_timeout for request in requests if request.join_timeout >= 0), None)
        return compute_quorum(
            now=now,
            participants={
                member: Participant(
                    member,
                    waiting.since,
                    waiting.request.replica.shrink_only,
                    waiting.request.replica.commit_failures,
                )
                for member, waiting in self._joins.items()
            },
            heartbeats={member: living.last_beat for member, living in self.members.items()},
            previous=self._previous,
            options=QuorumOptions(
                min_members=max([self._options.min_members, *(request.min_members for request in requests)]),
                join_timeout=self._options.join_timeout if asked is None else asked,
                heartbeat_timeout=self._options.heartbeat_timeout,
                target_members=max((request.target_members for request in requests), default=0),
            ),
            expected=self._expected,
        )

    def _answer(self, chosen: list[str]) -> list[Effect]:
        joins = {member: self._joins.pop(member) for member in chosen}
        participants = [waiting.request.replica for waiting in joins.values()]
        failed = max(replica.commit_failures for replica in participants)
        processes = frozenset(replica.incarnation for replica in participants)
        # A process that was started anew under its old name is another member: everybody's group has to be made anew.
        # And where one of them was lost meanwhile, some have cut their groups and some have not.
        renewed = self._broken or processes != self._processes
        quorum_id = next_quorum_id(self._previous, chosen, max(failed, int(renewed)), floor=self._floor)
        self._processes, self._broken = processes, False
        self._participants = participants
        self._round += 1
        self._previous = PreviousQuorum(quorum_id, frozenset(chosen))
        effects: list[Effect] = []
        for route, recipients in _by_route(joins.values()).items():
            answer = ReplicaQuorum(self.job, recipients, quorum_id, participants)
            effects.append(Send(route, answer))
            for one in recipients:
                self._answered[one.incarnation] = (one.request, self._round)
        event = self._events.replica_quorum(REPLICAS, quorum_id, participants, self.reason)
        for member in chosen:
            self.members[member].since = event.sequence
        return [*effects, Publish(self.job, event)]

    # --- time ----------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Effect]:
        """What time alone completes: the failure tick, join timeouts, and what is not remembered any longer."""
        effects: list[Effect] = []
        if now >= self._tick_due:
            self._tick_due = now + self._options.failure_tick
            tick = failure_tick(
                now=now,
                heartbeats={member: living.last_beat for member, living in self.members.items()},
                participants=self._joins.keys(),
                failures=self._failures.keys(),
                heartbeat_timeout=self._options.heartbeat_timeout,
            )
            self._newcomers.clear()
            forgotten = now - RIVALS_KEPT
            self._rivals = {rival: since for rival, since in self._rivals.items() if since > forgotten}
            causes = {member: Cause(kind="heartbeat", text=TIMEOUT_TEXT) for member in tick.notifications}
            effects += self._lose(now, causes, "heartbeat timeout") if causes else []
            self._failures = {
                member: failed for member, failed in self._failures.items() if now - failed.at < FORGET_AFTER
            }
            self._ended = {one: at for one, at in self._ended.items() if now - at < FORGET_AFTER}
            known = {living.incarnation for living in self.members.values()}
            known |= {failed.event.failure.incarnation for failed in self._failures.values()}
            self._answered = {one: answered for one, answered in self._answered.items() if one in known}
        return [*effects, *self.answer_if_ready(now), *self._probe_absent(now)]

    @property
    def empty(self) -> bool:
        """True when nobody is left of whom anything has to be known."""
        return not self.members and not self._failures and not self._joins

    def status(self, now: float) -> GroupStatus:
        """The group as of now."""
        return GroupStatus(
            job=self.job,
            group=REPLICAS,
            quorum_id=self._previous.quorum_id if self._previous else 0,
            reason=self.decide(now).reason if self._joins and self._settled(now) else self.reason,
            settled=self._settled(now),
            members=[
                GroupMember(member, living.incarnation, "", max(0.0, now - living.last_beat), living.step, joined)
                for member, living in sorted(self.members.items())
                for joined in [member in self._joins]
            ],
            failures=[failed.event for failed in self._failures.values()],
        )


def _by_route(waiting: Iterable[Waiting]) -> dict[bytes, list[Recipient]]:
    routes: dict[bytes, list[Recipient]] = {}
    for one in waiting:
        replica: Replica = one.request.replica
        routes.setdefault(one.route, []).append(Recipient(replica.replica_id, replica.incarnation, one.request.request))
    return routes
