"""One group of a job: its members, the incident in progress, the quorum they wait for, its completion.

Takes what agents and members report, with the time, and returns effects. The quorum decision is ``quorum.py``'s,
the iteration ``iteration.py``'s; what is here is when to ask them and whom to tell.

One fault is one incident (D5), keyed by the iteration that it ends. The first loss, or the first fault with a
cause of its own, is published; later faults are its consequences. A *communication* fault ("connection closed by
peer") is evidence of somebody else's end and nearly always overtakes the death report, so it is held for
``EVIDENCE_WINDOW`` and published only if no better cause turns up: thus one kill is one event.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Literal

from msgspec import Struct, field
from msgspec.structs import replace

from seamark.protocol.messages import (
    Cause,
    Complete,
    Completed,
    Failure,
    FailureEvent,
    GroupMember,
    GroupStatus,
    Join,
    LastQuorum,
    Member,
    MemberFaulted,
    MemberLost,
    MemberStarted,
    QuorumAnswer,
    QuorumReset,
    Recipient,
    Refused,
    Roster,
    Slot,
    StoreAddress,
    StoreLost,
)
from seamarkd.effects import Effect, Publish, Send
from seamarkd.lighthouse.events import EventLog
from seamarkd.lighthouse.iteration import next_iteration
from seamarkd.lighthouse.quorum import (
    Participant,
    PreviousQuorum,
    QuorumOptions,
    compute_quorum,
    next_quorum_id,
)

EVIDENCE_WINDOW = 0.1
"""Seconds a communication fault waits for the loss that explains it; a death report takes about a millisecond."""
HEARTBEAT_TIMEOUT = 5.0
"""Seconds; torchft's default, for a member's health in the quorum decision."""
PLACEMENT_WINDOW = 1.0
"""Seconds a quorum waits to hear whether the members of a lost node get another place; that takes milliseconds."""


class MemberState(Struct):
    """A slot of the roster and who fills it.

    ``incarnation`` is empty while nobody does, or as long as its agent has not told a lighthouse that was started
    anew. ``lost`` is the incarnation whose loss was published last; ``presumed`` says that no agent reported it, and it
    may come back with its node.
    """

    slot: Slot
    incarnation: str = ""
    lost: str = ""
    presumed: bool = False

    def is_elsewhere(self, node: str) -> bool:
        """Whether the slot's place is not, or no longer, on this node."""
        return bool(node) and node != self.slot.node

    def may_lose(self, report: MemberLost) -> bool:
        """True for the first report of the loss of who fills the slot, or filled it while nobody listened."""
        if report.incarnation == self.lost:
            return False
        if self.incarnation in ("", report.incarnation):
            return True
        return bool(report.replacement) and report.replacement == self.incarnation


class Waiter(Struct):
    """An unanswered request: where to answer, and since when it waits."""

    route: bytes
    request: int
    incarnation: str
    since: float


class Incident(Struct):
    """The fault in progress. Unpublished while all that is known of it are communication faults."""

    iteration: int
    published: bool
    hold_until: float
    consequences: list[Failure] = field(default_factory=list)


class Group:
    """The ``ranks`` group of a job.

    Args:
        events: the job's numbered events.
        floor: quorum ids stay above it (the daemon's epoch in the upper bits).
        beat_of: last heartbeat of a node, in seconds of the same clock as ``now``.
    """

    def __init__(
        self, job: str, name: str, events: EventLog, floor: int, beat_of: Callable[[str], float | None]
    ) -> None:
        self.job = job
        self.name = name
        self.generation = -1
        self.iteration = -1
        self.restarts = 0
        self.call = 0
        """Which wrapped call its members are in, or have completed."""
        self.done = False
        self.submission = ""
        """Which of the jobs of its name."""
        self.aborted = ""
        """Why somebody ended the whole job, where no coordinator is."""
        self.reason = "no quorum was asked for yet"
        self.members: dict[str, MemberState] = {}
        self._living: set[str] = set()
        self._on_node: dict[str, list[str]] = {}
        self._events = events
        self._floor = floor
        self._beat_of = beat_of
        self._options = QuorumOptions()
        self._base_iteration = -1
        self._start_timeout = 0.0
        self._placement = 0
        self._refills = False
        """The coordinator gives a lost node's members other places, and the group takes in who comes."""
        self._store = StoreAddress()
        self._store_node = ""
        self._store_gone = False
        """Its host was lost: no quorum could use it."""
        self._joins: dict[str, tuple[Waiter, Join]] = {}
        self._expected: dict[str, float] = {}
        self._previous: PreviousQuorum | None = None
        self._active: frozenset[str] = frozenset()
        self._active_in = -1
        """The generation of those."""
        self._completions: dict[str, Waiter] = {}
        self._answered: dict[str, Waiter] = {}
        self._last_answer: QuorumAnswer | None = None
        self._incident: Incident | None = None
        self._fresh = False
        """No quorum of this call was answered yet, and it is not the first."""
        self._unheard: set[str] = set()
        self._unheard_until = 0.0
        self._recalled: dict[str, int] = {}
        """By node: the iteration that it was in last."""
        self._deferred: dict[str, MemberLost | StoreLost] = {}
        self._dead: set[str] = set()
        self._in_force: dict[str, FailureEvent] = {}
        """By member: the failures that no quorum was answered after."""

    @property
    def over(self) -> bool:
        """Whether its job has completed or was ended."""
        return self.done or bool(self.aborted)

    @property
    def roster(self) -> tuple[int, int]:
        """Generation and placement of the roster in force."""
        return self.generation, self._placement

    @property
    def quorum_id(self) -> int:
        """Of the last quorum; 0 before the first."""
        return self._previous.quorum_id if self._previous else 0

    @property
    def nodes(self) -> Collection[str]:
        """Those that its members are on."""
        return self._on_node.keys()

    def is_elsewhere(self, member: str, incarnation: str, node: str) -> bool:
        """Whether this very process of the member is known to be on another node."""
        state = self.members.get(member)
        return state is not None and state.incarnation == incarnation != "" and state.is_elsewhere(node)

    def store_is_elsewhere(self, node: str) -> bool:
        """Whether the TCPStore is known to be on another node."""
        return self._store_node not in ("", node)

    # --- membership ----------------------------------------------------------------------------------------

    def set_roster(self, now: float, roster: Roster) -> list[Effect]:
        """A new roster: higher generations replace the members, the same one is heard again without effect."""
        if roster.generation == self.generation and roster.placement > self._placement:
            return self._place(now, roster)
        if roster.generation <= self.generation:
            return []
        self._placement = roster.placement
        self._refills = roster.policy == "replace" and bool(roster.submission)
        self.submission = roster.submission
        self._store = roster.store
        self._store_node, self._store_gone = roster.store_node, False
        self.generation = roster.generation
        self._dead.clear()
        if roster.running:
            # What the coordinator heard, should no node remember it: too high an iteration ends the present one, too.
            self.iteration = max(self.iteration, roster.base_iteration)
        self._options = QuorumOptions(roster.min_members, roster.join_timeout, HEARTBEAT_TIMEOUT)
        if self._previous is not None:
            # Who was in the last quorum is gone with its generation: its places alone are no quorum of this one.
            self._previous = PreviousQuorum(self._previous.quorum_id)
        self._base_iteration = max(self._base_iteration, roster.base_iteration)
        self._start_timeout = roster.start_timeout
        stale = self._refuse_waiting("a newer generation of this job has been started")
        self.members = {slot.member: MemberState(slot) for slot in roster.slots}
        self._living.clear()
        self._on_node = {}
        for slot in roster.slots:
            self._on_node.setdefault(slot.node, []).append(slot.member)
        wait = HEARTBEAT_TIMEOUT if roster.running else roster.start_timeout
        self._expected = {slot.member: now + wait for slot in roster.slots}
        self._completions.clear()
        self._unheard = {slot.node for slot in roster.slots} if roster.running else set()
        self._unheard_until = now + HEARTBEAT_TIMEOUT
        return stale

    def _place(self, now: float, roster: Roster) -> list[Effect]:
        """Slots of lost nodes have other places, or none for now, and there may be more of them."""
        self._placement = roster.placement
        effects: list[Effect] = []
        for slot in roster.slots:
            state = self.members.get(slot.member)
            if state is not None and state.slot.placed == slot.placed:
                continue
            if state is None:
                state = self.members[slot.member] = MemberState(slot)
            elif state.slot.node != slot.node:
                waiting = self._joins.pop(slot.member, None)
                if waiting is not None:
                    sentence = f"{slot.member} has its place on node {slot.node} now: this process must end"
                    effects.append(Send(waiting[0].route, _refused(waiting[1], "STALE_GENERATION", sentence)))
                self._on_node[state.slot.node].remove(slot.member)
                self._dead |= {state.incarnation} - {""}
                self._living.discard(slot.member)
                state.incarnation, state.presumed = "", False
            state.slot = slot
            on_node = self._on_node.setdefault(slot.node, [])
            if slot.member not in on_node:
                on_node.append(slot.member)
            if not state.incarnation:
                self._expected[slot.member] = now + self._options.join_timeout
        for member in self.members.keys() - {slot.member for slot in roster.slots}:
            self._expected.pop(member, None)
        return [*effects, *self.answer_if_ready(now)]

    def started(self, now: float, report: MemberStarted) -> list[Effect]:
        """A slot has a new incarnation; the next quorum waits for it."""
        state = self.members.get(report.member)
        if state is None or report.generation != self.generation or state.incarnation == report.incarnation:
            return []
        if state.is_elsewhere(report.node):
            # Its place is another node's by now.
            return []
        if report.incarnation in self._dead:
            if not (state.presumed and state.lost == report.incarnation and not state.incarnation):
                # Announced before it was lost, and heard after it: nobody comes back from the dead.
                return []
            self._dead.discard(report.incarnation)
            state.lost = ""
            state.presumed = False
        state.incarnation = report.incarnation
        self._living.add(report.member)
        self._expected[report.member] = now + self._start_timeout
        return []

    def recall(self, now: float, last: LastQuorum) -> list[Effect]:
        """What a node knows of the last quorum, which a lighthouse that was started anew did not see."""
        if last.generation > self.generation:
            return []
        self._unheard.discard(last.node)
        if last.generation < self.generation or not last.members:
            return self._all_heard(now)
        self._recalled[last.node] = last.iteration
        if last.call >= self.call:
            self.done = last.completed or (self.done and last.call == self.call)
            self.call, self._fresh = last.call, False
        if self._previous is None or last.quorum_id > self._previous.quorum_id:
            self._previous = PreviousQuorum(last.quorum_id, frozenset(last.members))
            self._active, self._active_in = self._previous.members, last.generation
            self.iteration = max(self.iteration, last.iteration)
            self.restarts = max(self.restarts, last.restarts)
        return self._all_heard(now)

    @property
    def recalling(self) -> bool:
        """True while this group does not know yet which iteration its members are in: it can publish no failure."""
        return bool(self._unheard)

    def defer(self, report: MemberLost | StoreLost) -> None:
        """A loss heard while recalling: taken once it is known which iteration it ends, and repeated until then."""
        if isinstance(report, StoreLost):
            self._deferred[report.store.incarnation] = report
        elif report.member in self.members:
            self._deferred[report.incarnation] = report

    def _all_heard(self, now: float) -> list[Effect]:
        if self.recalling:
            return []
        effects: list[Effect] = []
        deferred, self._deferred = self._deferred, {}
        self._begin_chains([one for one in deferred.values() if isinstance(one, MemberLost)])
        for report in deferred.values():
            effects += self.lost(now, report) if isinstance(report, MemberLost) else self.store_lost(now, report)
        for _, request in list(self._joins.values()):
            effects += self._unexplained(now, request)
        return effects + self._call_back(now) + self.answer_if_ready(now)

    def _call_back(self, now: float) -> list[Effect]:
        """Who was cut off while the others went on may wait for them in a collective that they have left."""
        effects: list[Effect] = []
        for node, iteration in self._recalled.items():
            here = [self.members[member] for member in self._on_node.get(node, ()) if member in self._living]
            if iteration < self.iteration and here and not any(one.slot.member in self._active for one in here):
                slot = here[0].slot
                failure = Failure(
                    kind="faulted",
                    member=slot.member,
                    incarnation=here[0].incarnation or "unknown",
                    rank=slot.rank,
                    node=node,
                    iteration=iteration,
                    cause=Cause(kind="stuck", text=f"node {node} was away when iteration {self.iteration} began"),
                    occurred_at=-1.0,
                    detected_at=now,
                    published_at=now,
                    detector="lighthouse",
                )
                effects.append(Publish(self.job, self._events.failure(self.name, failure)))
        self._recalled.clear()
        return effects

    def _begin_chains(self, losses: list[MemberLost]) -> None:
        """Who died while recalling filled the slot when that began, though its replacement was announced meanwhile."""
        first: dict[str, str] = {}
        for report in losses:
            state = self.members.get(report.member)
            if report.generation == self.generation and state is not None and not state.is_elsewhere(report.node):
                first.setdefault(report.member, report.incarnation)
        for member, incarnation in first.items():
            state = self.members.get(member)
            if state is not None and not state.lost and member not in self._answered:
                state.incarnation = incarnation

    def lost(self, now: float, report: MemberLost) -> list[Effect]:
        """A member is dying or dead: published once per incarnation."""
        state = self.members.get(report.member)
        if state is None or report.generation != self.generation or state.is_elsewhere(report.node):
            return []
        self._dead.add(report.incarnation)
        if not state.may_lose(report):
            if report.replacement and not state.incarnation:
                # Lost with its node, which is back, and where it was replaced meanwhile.
                self._fill(now, state, report.replacement)
            return []
        state.lost = report.incarnation
        state.presumed = False
        answered = self._answered.get(report.member)
        if answered is not None and answered.incarnation == report.replacement:
            # Heard late, from an agent that a new lighthouse had not answered yet: that quorum came after this loss.
            return []
        was_counted_on = report.member in self._joins or report.member in self._expected
        self._joins.pop(report.member, None)
        self._expected.pop(report.member, None)
        state.incarnation = ""
        if report.replacement:
            self._fill(now, state, report.replacement)
        else:
            self._living.discard(report.member)
            if self._refills and report.cause.kind == "node":
                self._expected[report.member] = now + PLACEMENT_WINDOW
        if self.done and report.cause.kind != "node":
            return []
        if report.cause.kind == "discarded":
            # Everybody's assignment goes without it already: nobody has to be told, and nobody waits for it.
            self._active -= {report.member}
            return self._completed_by_all() or self.answer_if_ready(now)
        # Who has not entered yet ends no iteration: the others know nothing of it.
        apart = self._active_in == self.generation and report.member not in self._active
        outside = self.done or (self._incident is None and apart)
        failure = Failure(
            kind="lost",
            member=report.member,
            incarnation=report.incarnation,
            rank=state.slot.rank,
            node=state.slot.node,
            iteration=-1 if outside else self.iteration,
            cause=report.cause,
            occurred_at=report.occurred_at,
            detected_at=report.detected_at,
            published_at=now,
            detector=report.detector,
        )
        if outside:
            return [self._publish(failure), *self._take_in(now)]
        incident = self._incident
        if incident is not None and report.cause.kind == "stuck":
            # Its recovery from this very incident failed: nobody has to be told to restart who is not restarting.
            incident.consequences.append(failure)
            return self.answer_if_ready(now)
        opens = incident is None
        if incident is None:
            self._incident = Incident(self.iteration, published=True, hold_until=now)
        else:
            incident.published = True
        effects = [self._publish(failure)]
        if opens or was_counted_on:
            effects += self._reset(f"{report.member} was lost")
        return effects + self.answer_if_ready(now)

    def _fill(self, now: float, state: MemberState, incarnation: str) -> None:
        """Somebody else fills the slot, and the next quorum waits for it."""
        state.incarnation = incarnation
        self._living.add(state.slot.member)
        self._expected[state.slot.member] = now + self._options.join_timeout

    def node_lost(self, now: float, node: str) -> list[Effect]:
        """All members of a lost node expire together."""
        effects: list[Effect] = []
        self._store_gone = self._store_gone or (node == self._store_node != "")
        for member in self._on_node.get(node, ()):
            state = self.members[member]
            if member in self._living:
                cause = Cause(kind="node", text=f"node {node} is gone")
                report = MemberLost(
                    0, self.job, self.generation, member, state.incarnation, cause, -1.0, now, "missed heartbeats"
                )
                effects += self.lost(now, report)
                state.presumed = True
        return effects

    def node_returned(self, now: float, node: str) -> list[Effect]:
        """A node that was lost is heard again; with it a TCPStore that nobody could move."""
        if not self._store_gone or node != self._store_node:
            return []
        self._store_gone = False
        return self.answer_if_ready(now)

    def faulted(self, now: float, report: MemberFaulted) -> list[Effect]:
        """A member left the function by an exception; it will join again."""
        state = self.members.get(report.member)
        if state is None or state.incarnation != report.incarnation:
            return []
        failure = Failure(
            kind="faulted",
            member=report.member,
            incarnation=report.incarnation,
            rank=state.slot.rank,
            node=state.slot.node,
            iteration=report.iteration,
            cause=report.cause,
            occurred_at=report.occurred_at,
            detected_at=report.occurred_at,
            published_at=now,
            detector="wrapper",
        )
        return self._fault(now, failure)

    def store_lost(self, now: float, report: StoreLost) -> list[Effect]:
        """The TCPStore service was lost and started anew: a fault of everybody's iteration."""
        if report.generation != self.generation or report.store == self._store:
            return []
        failure = Failure(
            kind="faulted",
            member="store",
            incarnation=self._store.incarnation or "unknown",
            rank=-1,
            node="",
            iteration=self.iteration,
            cause=Cause(kind="store", text="the TCPStore service was lost"),
            occurred_at=-1.0,
            detected_at=report.detected_at,
            published_at=now,
            detector="agent",
        )
        self._store = report.store
        self._store_node = report.node or self._store_node
        self._store_gone = False
        return [*self._fault(now, failure), *self.answer_if_ready(now)]

    # --- requests of members -------------------------------------------------------------------------------

    def join(self, now: float, route: bytes, request: Join) -> list[Effect]:
        """A member asks for the next quorum and waits."""
        waiter = Waiter(route, request.request, request.incarnation, now)
        refusal = self._refusal(route, request)
        if refusal is not None:
            return refusal
        if self._has_completed(request.call):
            return [self._completed(route, request.call, [_recipient(request.member, waiter)])]
        begun = self._begin_call(now, request.call)
        answered = self._answered.get(request.member)
        if answered is not None and answered.incarnation == request.incarnation:
            if request.request < answered.request:
                return begun
            answer = self._answer_in_force()
            if request.request == answered.request and answer is not None:
                # It was lost with the agent that should have delivered it.
                return [*begun, Send(route, replace(answer, recipients=[_recipient(request.member, waiter)]))]
        earlier = self._joins.get(request.member)
        if earlier is not None:
            waiter.since = earlier[0].since
        self._joins[request.member] = (waiter, request)
        self._expected.pop(request.member, None)
        self._completions.pop(request.member, None)
        effects = [*begun, *self._unexplained(now, request), *self._take_in(now)]
        return [*effects, *self.answer_if_ready(now)] if self._may_be_complete(now) else effects

    def _has_completed(self, call: int) -> bool:
        return call < self.call or (self.done and call == self.call)

    def _completed(self, route: bytes, call: int, recipients: list[Recipient]) -> Effect:
        return Send(route, Completed(self.job, self.name, recipients, call))

    def _begin_call(self, now: float, call: int) -> list[Effect]:
        """The first one of a new wrapped call: all others are on their way to it."""
        if call <= self.call:
            return []
        late = {member: waiter for member, (waiter, _) in self._joins.items()} | self._completions
        effects = [self._completed(route, self.call, recipients) for route, recipients in _by_route(late).items()]
        self.call, self.done = call, False
        self._fresh = True
        self._active = frozenset()
        self._incident = None
        self._joins.clear()
        self._completions.clear()
        self._expected = dict.fromkeys(self._living, now + self._start_timeout)
        return effects

    def _may_be_complete(self, now: float) -> bool:
        """False while the decision can only be to wait: every join of many members need not ask for it."""
        if self._previous is not None and len(self._joins) >= len(self._previous.members):
            return True
        on_their_way = any(now < deadline for deadline in self._expected.values())
        return not on_their_way and len(self._joins) >= len(self._living)

    def _answer_in_force(self) -> QuorumAnswer | None:
        answer = self._last_answer
        return answer if answer is not None and answer.iteration == self.iteration and not self._incident else None

    def _unexplained(self, now: float, request: Join) -> list[Effect]:
        """A member of the present iteration asks for the next one, and no fault is known: its report was lost.

        Or the answer was, with the lighthouse that gave it. The others may wait for this member in a collective.
        """
        if self._incident is not None or self.recalling or request.member not in self._active:
            return []
        cause = Cause(kind="exception", text="left the iteration; its report was lost on the way", communication=True)
        report = MemberFaulted(self.job, request.member, request.incarnation, self.iteration, cause, now)
        return self.faulted(now, report)

    def _take_in(self, now: float) -> list[Effect]:
        """Who was missing asks to enter a session that runs without it: all begin again, with it.

        Once for all who are on their way. Not under other policies, and not where some have returned already: there it
        waits for what comes.
        """
        if not self._refills or self._incident is not None or self.recalling or self._completions or self._fresh:
            return []
        inside = self._active & self._living if self._active_in == self.generation else frozenset()
        newcomers = self._joins.keys() - self._active
        coming = any(now < at for one, at in self._expected.items() if one not in inside)
        if not newcomers or coming or not inside - self._joins.keys():
            return []
        member = min(newcomers, key=lambda one: self.members[one].slot.rank)
        state = self.members[member]
        ranks = sorted(self.members[one].slot.rank for one in newcomers)
        text = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} joined"
        cause = Cause(kind="joined", text=text)
        return self.faulted(now, MemberFaulted(self.job, member, state.incarnation, self.iteration, cause, now))

    def complete(self, now: float, route: bytes, request: Complete) -> list[Effect]:
        """A member's function returned; all are told once the last active one has completed."""
        refusal = self._refusal(route, request)
        if refusal is not None:
            return refusal
        waiter = Waiter(route, request.request, request.incarnation, now)
        if self._has_completed(request.call):
            return [self._completed(route, request.call, [_recipient(request.member, waiter)])]
        if request.iteration > self.iteration:
            # Answered by a lighthouse before this one: the agent will say so, and the member ask again.
            return []
        if request.iteration != self.iteration or self._incident is not None:
            reason = f"iteration {request.iteration} was given up before all members had completed it"
            reset = QuorumReset(self.job, self.name, [_recipient(request.member, waiter)], reason)
            return [Send(route, reset)]
        self._completions[request.member] = waiter
        return self._completed_by_all()

    def _completed_by_all(self) -> list[Effect]:
        if not self._completions or not self._active <= self._completions.keys():
            return []
        self.done = True
        waiting = dict(self._completions)
        waiting.update({member: waiter for member, (waiter, _) in self._joins.items()})
        self._completions.clear()
        self._joins.clear()
        effects = [self._completed(to, self.call, recipients) for to, recipients in _by_route(waiting).items()]
        return [*effects, Publish(self.job, self._events.completed(self.name))]

    # --- time and decision ---------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """True while time alone may change something: somebody waits or is to be heard, or evidence is held."""
        return bool(self._joins) or self.recalling or (self._incident is not None and not self._incident.published)

    def tick(self, now: float) -> list[Effect]:
        """What time alone completes: held evidence, join timeouts, the wait for nodes that are gone."""
        incident = self._incident
        effects: list[Effect] = []
        if self.recalling and now >= self._unheard_until:
            self._unheard.clear()
            effects += self._all_heard(now)
        if incident is not None and not incident.published and now >= incident.hold_until:
            effects += self._publish_held(incident)
        return effects + self._take_in(now) + self.answer_if_ready(now)

    def answer_if_ready(self, now: float) -> list[Effect]:
        """Answers the quorum as soon as its members are there."""
        if not self._joins or self.done:
            return []
        if self._store_gone:
            self.reason = f"waits for another TCPStore: node {self._store_node}, where it was, is gone"
            return []
        if self.recalling and len(self._joins) < len(self.members):
            self.reason = "waits to hear from " + ", ".join(sorted(self._unheard)) + " what the last quorum was"
            return []
        participants = {
            member: Participant(member, waiter.since, commit_failures=request.commit_failures)
            for member, (waiter, request) in self._joins.items()
        }
        decision = compute_quorum(
            now=now,
            participants=participants,
            heartbeats=self._heartbeats(now),
            previous=self._previous,
            options=self._options,
            expected=self._expected,
        )
        self.reason = decision.reason
        if decision.members is None:
            return []
        return self._answer(now, decision.members)

    def _answer(self, now: float, chosen: list[str]) -> list[Effect]:
        joins = {member: self._joins.pop(member) for member in chosen}
        requests = [request for _, request in joins.values()]
        carried = max(
            (PreviousQuorum(r.quorum_id, frozenset(r.quorum_members)) for r in requests if r.quorum_members),
            key=lambda quorum: quorum.quorum_id,
            default=None,
        )
        previous = self._previous
        if carried is not None and (previous is None or carried.quorum_id > previous.quorum_id):
            previous = carried
        quorum_id = next_quorum_id(previous, chosen, max(r.commit_failures for r in requests), floor=self._floor)
        known_before = max([self.iteration, self._base_iteration, *(r.iteration for r in requests)])
        iteration = next_iteration([r.iteration for r in requests], self.iteration, self._base_iteration)
        again = known_before >= 0 and not self._fresh
        restarts = max([self.restarts, *(r.restarts for r in requests)]) + int(again)
        self._fresh = False
        members = sorted((self._member(request) for request in requests), key=lambda member: member.initial_rank)
        effects: list[Effect] = []
        incident = self._incident
        if incident is not None and not incident.published:
            effects += self._publish_held(incident)
        self._incident = None
        self._in_force.clear()
        self.iteration = iteration
        self.restarts = restarts
        self._previous = PreviousQuorum(quorum_id, frozenset(chosen))
        self._active, self._active_in = frozenset(chosen), self.generation
        self._completions.clear()
        waiting = {member: waiter for member, (waiter, _) in joins.items()}
        for route, recipients in _by_route(waiting).items():
            answer = QuorumAnswer(
                self.job,
                self.name,
                recipients,
                quorum_id,
                self.generation,
                iteration,
                restarts,
                members,
                self._store,
                self.call,
            )
            effects.append(Send(route, answer))
            self._last_answer = answer
        self._answered = waiting
        event = self._events.quorum(
            self.name,
            quorum_id=quorum_id,
            generation=self.generation,
            iteration=iteration,
            restarts=restarts,
            members=members,
            answered_at=now,
            ended_iteration=incident.iteration if incident else -1,
            consequences=incident.consequences if incident else [],
        )
        return [*effects, Publish(self.job, event)]

    def _member(self, request: Join) -> Member:
        slot = self.members[request.member].slot
        return Member(request.member, request.incarnation, slot.rank, slot.node, slot.local_rank, request.keys)

    def _heartbeats(self, now: float) -> dict[str, float]:
        beats = {}
        for member in self._living:
            joined = self._joins.get(member)
            at = self._beat_of(self.members[member].slot.node)
            beats[member] = max(joined[0].since if joined else -1.0, at if at is not None else -1.0)
        return {member: at for member, at in beats.items() if at >= 0}

    def status(self, now: float) -> GroupStatus:
        """The group as of now."""
        beats = self._heartbeats(now)
        return GroupStatus(
            job=self.job,
            group=self.name,
            quorum_id=self.quorum_id,
            reason=self.reason,
            settled=not self.recalling and all(state.incarnation for state in self.members.values() if not state.lost),
            members=[
                GroupMember(
                    member, state.incarnation, state.slot.node, max(0.0, now - beats.get(member, now)), -1, joined
                )
                for member, state in self.members.items()
                if member in self._living
                for joined in [member in self._joins]
            ],
            failures=list(self._in_force.values()),
        )

    def inject(self, now: float, member: str) -> list[Effect] | None:
        """A drill: the member's failure is published, and it joins again; None for a stranger."""
        state = self.members.get(member)
        if state is None or member not in self._living:
            return None
        cause = Cause(kind="injected", text="injected failure")
        return self.faulted(now, MemberFaulted(self.job, member, state.incarnation, self.iteration, cause, now))

    # --- incidents -----------------------------------------------------------------------------------------

    def _fault(self, now: float, failure: Failure) -> list[Effect]:
        if self.done or failure.iteration != self.iteration:
            return []
        incident = self._incident
        if incident is None:
            incident = self._incident = Incident(self.iteration, False, now + EVIDENCE_WINDOW)
        if incident.published or failure.cause.communication:
            told = (failure.member, failure.cause.kind)
            if told not in ((one.member, one.cause.kind) for one in incident.consequences):
                incident.consequences.append(failure)
            return []
        incident.published = True
        if failure.cause.kind == "joined":
            # Who waits is who came: it need not ask again.
            return [self._publish(failure)]
        return [self._publish(failure), *self._reset(f"{failure.member} failed"), *self.answer_if_ready(now)]

    def _publish_held(self, incident: Incident) -> list[Effect]:
        incident.published = True
        return [self._publish(incident.consequences.pop(0))]

    def _publish(self, failure: Failure) -> Effect:
        event = self._in_force[failure.member] = self._events.failure(self.name, failure)
        return Publish(self.job, event)

    def _reset(self, why: str) -> list[Effect]:
        """Clears the participants (rule of the failure tick) and tells each waiting caller at once."""
        waiting = {member: waiter for member, (waiter, _) in self._joins.items()}
        waiting.update(self._completions)
        self._joins.clear()
        self._completions.clear()
        return [
            Send(route, QuorumReset(self.job, self.name, recipients, f"quorum reset: {why}"))
            for route, recipients in _by_route(waiting).items()
        ]

    def _refuse_waiting(self, why: str) -> list[Effect]:
        effects: list[Effect] = [
            Send(waiter.route, _refused(request, "STALE_GENERATION", why)) for waiter, request in self._joins.values()
        ]
        self._joins.clear()
        return effects

    def _refusal(self, route: bytes, request: Join | Complete) -> list[Effect] | None:
        """What to say to a request that is not taken; None for one that is."""
        state = self.members.get(request.member)
        if state is None:
            sentence = f"{request.member} is not in the roster of job {self.job}"
            return [Send(route, _refused(request, "UNKNOWN_MEMBER", sentence))]
        if request.generation < self.generation or request.incarnation in self._dead:
            sentence = f"{request.member} was replaced by a newer process of job {self.job}: this one must end"
            return [Send(route, _refused(request, "STALE_GENERATION", sentence))]
        if request.generation > self.generation or request.incarnation != state.incarnation:
            # The roster, its announcement or the loss it follows is on its way; the member asks again.
            return []
        return None


def _refused(request: Join | Complete, code: Literal["UNKNOWN_MEMBER", "STALE_GENERATION"], why: str) -> Refused:
    return Refused(request.request, code, why, request.job, request.member, request.incarnation)


def _recipient(member: str, waiter: Waiter) -> Recipient:
    return Recipient(member, waiter.incarnation, waiter.request)


def _by_route(waiting: Mapping[str, Waiter]) -> dict[bytes, list[Recipient]]:
    routes: dict[bytes, list[Recipient]] = {}
    for member, waiter in waiting.items():
        routes.setdefault(waiter.route, []).append(_recipient(member, waiter))
    return routes
