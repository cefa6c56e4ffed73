"""One group of a job: what becomes of its members' reports and requests, the quorum they wait for, its completion.

Takes what agents and members report, with the time, and returns effects. The quorum decision is ``quorum.py``'s,
the iteration ``iteration.py``'s; what is here is when to ask them and whom to tell. Who is a member is
``membership.py``'s, how far they are together ``session.py``'s, who waits ``requests.py``'s, what is one incident
``incidents.py``'s, and what a lighthouse that was started anew has to hear first ``recall.py``'s.
"""

from __future__ import annotations

from collections.abc import Callable

from seamark.protocol.messages import (
    Cause,
    Complete,
    GroupMember,
    GroupStatus,
    Join,
    LastQuorum,
    Member,
    MemberFaulted,
    MemberLost,
    MemberStarted,
    QuorumAnswer,
    Roster,
    StoreAddress,
    StoreLost,
)
from seamarkd.effects import Effect, Publish, Send
from seamarkd.lighthouse.events import EventLog
from seamarkd.lighthouse.incidents import Incidents, fault, loss, store_fault
from seamarkd.lighthouse.membership import Membership, MemberState
from seamarkd.lighthouse.quorum import Participant, QuorumOptions, compute_quorum
from seamarkd.lighthouse.recall import Recall, begin_chains
from seamarkd.lighthouse.requests import Requests, Waiter, refused
from seamarkd.lighthouse.session import Session

HEARTBEAT_TIMEOUT = 5.0
"""Seconds; torchft's default, for a member's health in the quorum decision."""
PLACEMENT_WINDOW = 1.0
"""Seconds a quorum waits to hear whether the members of a lost node get another place; that takes milliseconds."""


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
        self.submission = ""
        """Which of the jobs of its name."""
        self.aborted = ""
        """Why somebody ended the whole job, where no coordinator is."""
        self.reason = "no quorum was asked for yet"
        self.session = Session(floor)
        self.membership = Membership()
        self._requests = Requests(job, name)
        self._incidents = Incidents(name, events)
        self._recall = Recall()
        self._events = events
        self._beat_of = beat_of
        self._options = QuorumOptions()
        self._refills = False
        """The coordinator gives a lost node's members other places, and the group takes in who comes."""
        self._store = StoreAddress()
        self._store_node = ""
        self._store_gone = False
        """Its host was lost: no quorum could use it."""

    @property
    def over(self) -> bool:
        """Whether its job has completed or was ended."""
        return self.session.done or bool(self.aborted)

    @property
    def roster(self) -> tuple[int, int]:
        """Generation and placement of the roster in force."""
        return self.membership.generation, self.membership.placement

    def is_elsewhere(self, member: str, incarnation: str, node: str) -> bool:
        """Whether this very process of the member is known to be on another node."""
        state = self.membership.members.get(member)
        return state is not None and state.incarnation == incarnation != "" and state.is_elsewhere(node)

    def store_is_elsewhere(self, node: str) -> bool:
        """Whether the TCPStore is known to be on another node."""
        return self._store_node not in ("", node)

    # --- rosters -------------------------------------------------------------------------------------------

    def set_roster(self, now: float, roster: Roster) -> list[Effect]:
        """A new roster: higher generations replace the members, the same one is heard again without effect."""
        generation, placement = self.roster
        if roster.generation == generation and roster.placement > placement:
            return self._place(now, roster)
        if roster.generation <= generation:
            return []
        self._refills = roster.policy == "replace" and bool(roster.submission)
        self.submission = roster.submission
        self._store = roster.store
        self._store_node, self._store_gone = roster.store_node, False
        self.session.renew(roster)
        self._options = QuorumOptions(roster.min_members, roster.join_timeout, HEARTBEAT_TIMEOUT)
        self.membership.renew(now, roster, HEARTBEAT_TIMEOUT if roster.running else roster.start_timeout)
        unheard = {slot.node for slot in roster.slots} if roster.running else set()
        self._recall.begin(unheard, now + HEARTBEAT_TIMEOUT)
        return self._requests.refuse_all("a newer generation of this job has been started")

    def _place(self, now: float, roster: Roster) -> list[Effect]:
        effects: list[Effect] = []
        for slot in self.membership.place(now, roster):
            sentence = f"{slot.member} has its place on node {slot.node} now: this process must end"
            effects += self._requests.refuse_one(slot.member, sentence)
        return [*effects, *self.answer_if_ready(now)]

    def end(self) -> None:
        """Its job has ended, by the coordinator's word: nobody lives, waits or is expected, and nothing is in force."""
        self.membership.end()
        self._requests.clear()
        self._incidents.drop()
        self._recall.give_up()

    # --- after a start of the lighthouse -------------------------------------------------------------------

    def recall(self, now: float, last: LastQuorum) -> list[Effect]:
        """What a node knows of the last quorum, which a lighthouse that was started anew did not see."""
        generation, _ = self.roster
        if last.generation > generation:
            return []
        self._recall.heard(last.node)
        if last.generation < generation or not last.members:
            return self._all_heard(now)
        self._recall.was_in(now, last.node, last.iteration)
        self.session.recall(last)
        return self._all_heard(now)

    @property
    def recalling(self) -> bool:
        """True while this group does not know yet which iteration its members are in: it can publish no failure."""
        return self._recall.running

    def defer(self, report: MemberLost | StoreLost) -> None:
        """A loss heard while recalling: taken once it is known which iteration it ends, and repeated until then."""
        if isinstance(report, StoreLost) or report.member in self.membership.members:
            self._recall.defer(report)

    def _all_heard(self, now: float) -> list[Effect]:
        if self.recalling:
            return []
        effects: list[Effect] = []
        deferred = self._recall.take_deferred()
        for report in begin_chains(deferred, self.membership, self._requests.answered.keys()):
            effects += self.lost(now, report) if isinstance(report, MemberLost) else self.store_lost(now, report)
        for _, request in list(self._requests.joins.values()):
            effects += self._unexplained(now, request)
        return [*effects, *self._call_back(now), *self.answer_if_ready(now)]

    def _call_back(self, now: float) -> list[Effect]:
        if self.recalling:
            return []
        session = self.session
        cut_off = self._recall.cut_off(now, session.iteration, self.membership, session.active)
        return [Publish(self.job, self._events.failure(self.name, failure)) for failure in cut_off]

    # --- starts, losses and faults -------------------------------------------------------------------------

    def started(self, now: float, report: MemberStarted) -> list[Effect]:
        """A slot has a new process, or a lighthouse that was started anew hears of the one that it has."""
        if not self.recalling:
            self._recall.forget_deserted(now)
        self.membership.started(now, report)
        return self._call_back(now)

    def lost(self, now: float, report: MemberLost) -> list[Effect]:
        """A member is dying or dead: published once per incarnation."""
        membership, requests = self.membership, self._requests
        state = membership.reported(report)
        if state is None:
            return []
        membership.dead.add(report.incarnation)
        if not state.may_lose(report):
            if report.replacement and not state.incarnation:
                # Lost with its node, which is back, and where it was replaced meanwhile.
                membership.fill(now, state, report.replacement)
            return []
        state.lost = report.incarnation
        state.presumed = False
        answered = requests.answered.get(report.member)
        if answered is not None and answered.incarnation == report.replacement:
            # Heard late, from an agent that a new lighthouse had not answered yet: that quorum came after this loss.
            return []
        was_counted_on = report.member in requests.joins or report.member in membership.expected
        requests.joins.pop(report.member, None)
        membership.vacate(state)
        if report.replacement:
            membership.fill(now, state, report.replacement)
        elif self._refills and report.cause.kind == "node":
            membership.expected[report.member] = now + PLACEMENT_WINDOW
        if self.session.done and report.cause.kind != "node":
            return []
        if report.cause.kind == "discarded":
            # Everybody's assignment goes without it already: nobody has to be told, and nobody waits for it.
            self.session.active -= {report.member}
            return self._completed_by_all() or self.answer_if_ready(now)
        return self._publish_loss(now, report, state, was_counted_on=was_counted_on)

    def _publish_loss(
        self, now: float, report: MemberLost, state: MemberState, *, was_counted_on: bool
    ) -> list[Effect]:
        incident = self._incidents.current
        # Who has not entered yet ends no iteration: the others know nothing of it.
        apart = self.session.active_in == self.membership.generation and report.member not in self.session.active
        if self.session.done or (incident is None and apart):
            return [self._incidents.publish(loss(now, report, state.slot, -1)), *self._take_in(now)]
        failure = loss(now, report, state.slot, self.session.iteration)
        if incident is not None and report.cause.kind == "stuck":
            # Its recovery from this very incident failed: nobody has to be told to restart who is not restarting.
            incident.add(failure)
            return self.answer_if_ready(now)
        published, opens = self._incidents.lost(now, self.session.iteration, failure)
        effects = [published]
        if opens or was_counted_on:
            effects += self._requests.reset(f"{report.member} was lost")
        return effects + self.answer_if_ready(now)

    def node_lost(self, now: float, node: str) -> list[Effect]:
        """All members of a lost node expire together."""
        effects: list[Effect] = []
        self._store_gone = self._store_gone or (node == self._store_node != "")
        for state in self.membership.on_node(node):
            member = state.slot.member
            if member in self.membership.living:
                cause = Cause(kind="node", text=f"node {node} is gone")
                generation, _ = self.roster
                report = MemberLost(
                    0, self.job, generation, member, state.incarnation, cause, -1.0, now, "missed heartbeats"
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
        state = self.membership.members.get(report.member)
        if state is None or state.incarnation != report.incarnation:
            return []
        if self.session.done or report.iteration != self.session.iteration:
            return []
        published = self._incidents.faulted(now, fault(now, report, state.slot))
        if not published or report.cause.kind == "joined":
            # Who waits is who came: it need not ask again.
            return published
        return [*published, *self._requests.reset(f"{report.member} failed"), *self.answer_if_ready(now)]

    def store_lost(self, now: float, report: StoreLost) -> list[Effect]:
        """The TCPStore service was lost and started anew: a fault of everybody's iteration."""
        if report.generation != self.membership.generation or report.store == self._store:
            return []
        failure = store_fault(now, report, self._store.incarnation, self.session.iteration)
        self._store = report.store
        self._store_node = report.node or self._store_node
        self._store_gone = False
        published = [] if self.session.done else self._incidents.faulted(now, failure)
        reset = self._requests.reset("store failed") if published else []
        return [*published, *reset, *self.answer_if_ready(now)]

    def inject(self, now: float, member: str) -> list[Effect] | None:
        """A drill: the member's failure is published, and it joins again; None for a stranger."""
        state = self.membership.members.get(member)
        if state is None or member not in self.membership.living:
            return None
        cause = Cause(kind="injected", text="injected failure")
        return self.faulted(now, MemberFaulted(self.job, member, state.incarnation, self.session.iteration, cause, now))

    # --- requests of members -------------------------------------------------------------------------------

    def join(self, now: float, route: bytes, request: Join) -> list[Effect]:
        """A member asks for the next quorum and waits."""
        refusal = self._refusal(route, request)
        if refusal is not None:
            return refusal
        requests = self._requests
        waiter = Waiter(route, request.request, request.incarnation, now)
        if self.session.has_completed(request.call):
            return [requests.complete_one(request.member, waiter, request.call)]
        begun = self._begin_call(now, request.call)
        answered = requests.answered.get(request.member)
        if answered is not None and answered.incarnation == request.incarnation:
            if request.request < answered.request:
                return begun
            answer = self._answer_in_force()
            if request.request == answered.request and answer is not None:
                return [*begun, requests.answer_again(answer, request.member, waiter)]
        requests.take(waiter, request)
        self.membership.expected.pop(request.member, None)
        effects = [*begun, *self._unexplained(now, request), *self._take_in(now)]
        return [*effects, *self.answer_if_ready(now)] if self._may_be_complete(now) else effects

    def _begin_call(self, now: float, call: int) -> list[Effect]:
        """The first one of a new wrapped call: all others are on their way to it."""
        if call <= self.session.call:
            return []
        effects = self._requests.complete_all(self.session.call)
        self.session.begin_call(call)
        self._incidents.current = None
        self.membership.expect_all(now)
        return effects

    def _may_be_complete(self, now: float) -> bool:
        """False while the decision can only be to wait: every join of many members need not ask for it."""
        joined, previous = len(self._requests.joins), self.session.previous
        if previous is not None and joined >= len(previous.members):
            return True
        on_their_way = any(now < deadline for deadline in self.membership.expected.values())
        return not on_their_way and joined >= len(self.membership.living)

    def _answer_in_force(self) -> QuorumAnswer | None:
        answer = self._requests.last_answer
        if answer is None or answer.iteration != self.session.iteration or self._incidents.current is not None:
            return None
        return answer

    def _unexplained(self, now: float, request: Join) -> list[Effect]:
        """A member of the present iteration asks for the next one, and no fault is known: its report was lost.

        Or the answer was, with the lighthouse that gave it. The others may wait for this member in a collective.
        """
        if self._incidents.current is not None or self.recalling or request.member not in self.session.active:
            return []
        cause = Cause(kind="exception", text="left the iteration; its report was lost on the way", communication=True)
        iteration = self.session.iteration
        return self.faulted(now, MemberFaulted(self.job, request.member, request.incarnation, iteration, cause, now))

    def _take_in(self, now: float) -> list[Effect]:
        """Who was missing asks to enter a session that runs without it: all begin again, with it.

        Once for all who are on their way. Not under other policies, and not where some have returned already: there it
        waits for what comes.
        """
        session, membership, joins = self.session, self.membership, self._requests.joins
        if not self._refills or self._incidents.current is not None or self.recalling:
            return []
        if self._requests.completions or session.fresh:
            return []
        inside = session.active & membership.living if session.active_in == membership.generation else frozenset()
        newcomers = joins.keys() - session.active
        coming = any(now < at for one, at in membership.expected.items() if one not in inside)
        if not newcomers or coming or not inside - joins.keys():
            return []
        first, *_ = states = sorted((membership.members[one] for one in newcomers), key=lambda one: one.slot.rank)
        ranks = ", ".join(str(one.slot.rank) for one in states)
        cause = Cause(kind="joined", text=f"rank{'s' * (len(states) > 1)} {ranks} joined")
        member, incarnation = first.slot.member, first.incarnation
        return self.faulted(now, MemberFaulted(self.job, member, incarnation, session.iteration, cause, now))

    def complete(self, now: float, route: bytes, request: Complete) -> list[Effect]:
        """A member's function returned; all are told once the last active one has completed."""
        refusal = self._refusal(route, request)
        if refusal is not None:
            return refusal
        waiter = Waiter(route, request.request, request.incarnation, now)
        if self.session.has_completed(request.call):
            return [self._requests.complete_one(request.member, waiter, request.call)]
        if request.iteration > self.session.iteration:
            # Answered by a lighthouse before this one: the agent will say so, and the member ask again.
            return []
        if request.iteration != self.session.iteration or self._incidents.current is not None:
            reason = f"iteration {request.iteration} was given up before all members had completed it"
            return [self._requests.reset_one(request.member, waiter, reason)]
        self._requests.completions[request.member] = waiter
        return self._completed_by_all()

    def _completed_by_all(self) -> list[Effect]:
        completions = self._requests.completions
        if not completions or not self.session.active <= completions.keys():
            return []
        self.session.done = True
        effects = self._requests.complete_all(self.session.call)
        return [*effects, Publish(self.job, self._events.completed(self.name))]

    def _refusal(self, route: bytes, request: Join | Complete) -> list[Effect] | None:
        """What to say to a request that is not taken; None for one that is."""
        generation, _ = self.roster
        state = self.membership.members.get(request.member)
        if state is None:
            sentence = f"{request.member} is not in the roster of job {self.job}"
            return [Send(route, refused(request, "UNKNOWN_MEMBER", sentence))]
        if request.generation < generation or request.incarnation in self.membership.dead:
            sentence = f"{request.member} was replaced by a newer process of job {self.job}: this one must end"
            return [Send(route, refused(request, "STALE_GENERATION", sentence))]
        if request.generation > generation or request.incarnation != state.incarnation:
            # The roster, its announcement or the loss it follows is on its way; the member asks again.
            return []
        return None

    # --- time and decision ---------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """True while time alone may change something: somebody waits or is to be heard, or evidence is held."""
        return bool(self._requests.joins) or self.recalling or self._incidents.held

    def tick(self, now: float) -> list[Effect]:
        """What time alone completes: held evidence, join timeouts, the wait for nodes that are gone."""
        effects: list[Effect] = []
        if self.recalling and now >= self._recall.until:
            self._recall.give_up()
            effects += self._all_heard(now)
        return [*effects, *self._incidents.due(now), *self._take_in(now), *self.answer_if_ready(now)]

    def answer_if_ready(self, now: float) -> list[Effect]:
        """Answers the quorum as soon as its members are there."""
        joins = self._requests.joins
        if not joins or self.session.done:
            return []
        if self._store_gone:
            self.reason = f"waits for another TCPStore: node {self._store_node}, where it was, is gone"
            return []
        if self.recalling and len(joins) < len(self.membership.members):
            self.reason = self._recall.sentence
            return []
        decision = compute_quorum(
            now=now,
            participants={
                member: Participant(member, waiter.since, commit_failures=request.commit_failures)
                for member, (waiter, request) in joins.items()
            },
            heartbeats=self._heartbeats(now),
            previous=self.session.previous,
            options=self._options,
            expected=self.membership.expected,
        )
        self.reason = decision.reason
        return [] if decision.members is None else self._answer(now, decision.members)

    def _answer(self, now: float, chosen: list[str]) -> list[Effect]:
        session = self.session
        joins = {member: self._requests.joins.pop(member) for member in chosen}
        requests = [request for _, request in joins.values()]
        generation, _ = self.roster
        quorum_id = session.advance(generation, chosen, requests)
        members = sorted((self._member(request) for request in requests), key=lambda member: member.initial_rank)
        effects, incident = self._incidents.end()
        self._requests.completions.clear()
        answer = QuorumAnswer(
            job=self.job,
            group=self.name,
            recipients=[],
            quorum_id=quorum_id,
            generation=generation,
            iteration=session.iteration,
            restarts=session.restarts,
            members=members,
            store=self._store,
            call=session.call,
        )
        effects += self._requests.answer(answer, {member: waiter for member, (waiter, _) in joins.items()})
        event = self._events.quorum(
            self.name,
            quorum_id=quorum_id,
            generation=generation,
            iteration=session.iteration,
            restarts=session.restarts,
            members=members,
            answered_at=now,
            ended_iteration=incident.iteration if incident else -1,
            consequences=incident.consequences if incident else [],
        )
        return [*effects, Publish(self.job, event)]

    def _member(self, request: Join) -> Member:
        slot = self.membership.members[request.member].slot
        return Member(request.member, request.incarnation, slot.rank, slot.node, slot.local_rank, request.keys)

    def _heartbeats(self, now: float) -> dict[str, float]:
        beats = {}
        for member in self.membership.living:
            joined = self._requests.joins.get(member)
            at = self._beat_of(self.membership.members[member].slot.node)
            beats[member] = max(joined[0].since if joined else -1.0, at if at is not None else -1.0)
        return {member: at for member, at in beats.items() if at >= 0}

    def status(self, now: float) -> GroupStatus:
        """The group as of now."""
        beats = self._heartbeats(now)
        members = self.membership.members
        return GroupStatus(
            job=self.job,
            group=self.name,
            quorum_id=self.session.quorum_id,
            reason=self.reason,
            settled=not self.recalling and all(state.incarnation for state in members.values() if not state.lost),
            members=[
                GroupMember(
                    member=member,
                    incarnation=state.incarnation,
                    node=state.slot.node,
                    beat_age=max(0.0, now - beats.get(member, now)),
                    step=-1,
                    joined=member in self._requests.joins,
                )
                for member, state in members.items()
                if member in self.membership.living
            ],
            failures=list(self._incidents.in_force.values()),
        )
