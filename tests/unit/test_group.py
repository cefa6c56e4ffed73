"""What a group does about losses, faults, joins and completions: one fault, one event, one restart."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import msgspec
import pytest

from seamark.protocol.codec import decode, encode
from seamark.protocol.messages import (
    RANKS,
    Cause,
    Complete,
    Completed,
    CompletedEvent,
    FailureEvent,
    JobSpec,
    Join,
    LastQuorum,
    MemberFaulted,
    MemberLost,
    MemberStarted,
    Message,
    QuorumAnswer,
    QuorumEvent,
    QuorumReset,
    Refused,
    Roster,
    Slot,
    StoreAddress,
    StoreLost,
)
from seamarkd.effects import Effect, Publish, Send
from seamarkd.lighthouse.events import EventLog
from seamarkd.lighthouse.group import HEARTBEAT_TIMEOUT, PLACEMENT_WINDOW, Group
from seamarkd.lighthouse.incidents import CONSEQUENCES_KEPT, EVIDENCE_WINDOW
from seamarkd.lighthouse.quorum import Decision, compute_quorum

T = TypeVar("T", bound=Message)
WORLD = 4
STORE = StoreAddress("127.0.0.1", 29502, "s0")
COMMUNICATION = Cause(kind="exception", text="Connection closed by peer", communication=True)
OWN = Cause(kind="exception", text="ValueError: no")
KILLED = Cause(kind="signal", status=9, text="killed by SIGKILL")


class Bench:
    """A group of four on one node, its clock, and everything it said."""

    def __init__(self, min_members: int = WORLD) -> None:
        self.now = 100.0
        self.said: list[Effect] = []
        self.request = 0
        self.incarnations = {member: f"{member}#0" for member in members()}
        self.last = dict.fromkeys(members(), -1)
        self.group = Group("job", RANKS, EventLog("job", 1), 1 << 32, lambda node: self.now)
        self.do(self.group.set_roster(self.now, roster(0, min_members=min_members)))
        for member in members():
            self.start(member)

    def do(self, effects: list[Effect]) -> list[Effect]:
        self.said += effects
        return effects

    def sent(self, kind: type[T]) -> list[T]:
        return [effect.message for effect in self.said if isinstance(effect, Send) and isinstance(effect.message, kind)]

    def published(self, kind: type[T]) -> list[T]:
        return [
            effect.message for effect in self.said if isinstance(effect, Publish) and isinstance(effect.message, kind)
        ]

    def start(self, member: str, generation: int = 0) -> None:
        node = self.group.membership.members[member].slot.node
        started = MemberStarted(0, "job", generation, member, self.incarnations[member], node)
        self.do(self.group.started(self.now, started))

    def join(self, *ranks: int, generation: int = 0, call: int = 0) -> None:
        for rank in ranks:
            member = f"job/{rank}"
            self.request += 1
            join = Join(
                job="job",
                group=RANKS,
                generation=generation,
                member=member,
                incarnation=self.incarnations[member],
                request=self.request,
                iteration=self.last[member],
                restarts=0,
                quorum_id=0,
                quorum_members=[],
                commit_failures=1 if self.last[member] >= 0 else 0,
                call=call,
            )
            answers = self.do(self.group.join(self.now, f"w{rank}".encode(), join))
            for effect in answers:
                if isinstance(effect, Send) and isinstance(effect.message, QuorumAnswer):
                    for one in effect.message.recipients:
                        self.last[one.member] = effect.message.iteration

    def fault(self, rank: int, cause: Cause, iteration: int = 0) -> None:
        member = f"job/{rank}"
        report = MemberFaulted("job", member, self.incarnations[member], iteration, cause, self.now)
        self.do(self.group.faulted(self.now, report))

    def lose(self, rank: int, *, replaced: bool = True) -> None:
        member = f"job/{rank}"
        old = self.incarnations[member]
        new = f"{member}#{int(old.rpartition('#')[2]) + 1}" if replaced else ""
        report = MemberLost(0, "job", 0, member, old, KILLED, -1.0, self.now, "canary", new)
        self.do(self.group.lost(self.now, report))
        if replaced:
            self.incarnations[member] = new
            self.last[member] = -1

    def complete(self, *ranks: int, iteration: int = 0, call: int = 0) -> None:
        for rank in ranks:
            member = f"job/{rank}"
            self.request += 1
            request = Complete("job", RANKS, 0, member, self.incarnations[member], self.request, iteration, call)
            self.do(self.group.complete(self.now, f"w{rank}".encode(), request))


def members() -> list[str]:
    return [f"job/{rank}" for rank in range(WORLD)]


def roster(generation: int, base: int = -1, min_members: int = WORLD) -> Roster:
    spec = JobSpec(
        name="job",
        argv=["train.py"],
        module=False,
        python="python",
        cwd="/",
        env={},
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=WORLD,
        policy="replace",
        max_restarts=3,
        checkpoint_dir="",
        log_dir="/tmp",
    )
    slots = [Slot(member, rank, rank, "n0", 0) for rank, member in enumerate(members())]
    return Roster(
        1, "job", generation, "replace", min_members, slots, STORE, "127.0.0.1", 29500, base, 30.0, 120.0, 3, spec
    )


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def running(bench: Bench) -> Bench:
    bench.join(0, 1, 2, 3)
    assert bench.group.session.iteration == 0
    bench.said.clear()
    return bench


def test_the_first_quorum_waits_for_the_whole_roster(bench: Bench) -> None:
    bench.join(0, 1, 2)
    assert bench.sent(QuorumAnswer) == []
    bench.join(3)
    (event,) = bench.published(QuorumEvent)
    assert [member.member for member in event.members] == members()
    assert (event.iteration, event.restarts, event.quorum_id) == (0, 0, (1 << 32) + 1)


def test_ten_thousand_joins_are_decided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decision looks at every member: one for each join would be a hundred million looks."""
    monkeypatch.setattr(sys.modules[__name__], "WORLD", 10_000)
    decisions = 0

    def counted(**arguments: Any) -> Decision:
        nonlocal decisions
        decisions += 1
        return compute_quorum(**arguments)

    monkeypatch.setattr("seamarkd.lighthouse.group.compute_quorum", counted)
    bench = Bench()
    for iteration in range(2):
        bench.join(*range(WORLD))
        (event,) = bench.published(QuorumEvent)[iteration:]
        assert len(event.members) == WORLD
        assert decisions == iteration + 1
        bench.fault(0, OWN, iteration)


def test_what_ten_thousand_ranks_say_of_one_fault_fits_into_the_message_that_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "WORLD", 10_000)
    bench = Bench()
    bench.join(*range(WORLD))
    bench.said.clear()
    for rank in range(WORLD):
        bench.fault(rank, msgspec.structs.replace(COMMUNICATION, text="Connection closed by peer " * 50))
    bench.join(*range(WORLD))
    (event,) = bench.published(QuorumEvent)
    assert len(event.consequences) == CONSEQUENCES_KEPT - 1, "the first was published, for nothing explained it"
    assert decode(encode(event)) == event


def test_a_member_list_travels_once_per_route(bench: Bench) -> None:
    for rank in range(WORLD):
        member = f"job/{rank}"
        join = Join("job", RANKS, 0, member, bench.incarnations[member], rank, -1, 0, 0, [])
        bench.do(bench.group.join(bench.now, b"node-0", join))
    (answer,) = bench.sent(QuorumAnswer)
    assert {one.member for one in answer.recipients} == set(members())


def test_a_kill_is_one_event_one_restart_and_one_iteration(running: Bench) -> None:
    running.lose(2)
    running.fault(0, COMMUNICATION)
    running.join(0, 1, 3)
    assert running.sent(QuorumAnswer) == []
    running.join(2)
    (failure,) = running.published(FailureEvent)
    assert (failure.failure.member, failure.failure.kind, failure.failure.iteration) == ("job/2", "lost", 0)
    (quorum,) = running.published(QuorumEvent)
    assert (quorum.iteration, quorum.restarts, quorum.ended_iteration) == (1, 1, 0)
    assert [one.member for one in quorum.consequences] == ["job/0"]


def test_communication_faults_that_overtake_the_death_report_are_no_event_of_their_own(running: Bench) -> None:
    running.fault(0, COMMUNICATION)
    running.fault(1, COMMUNICATION)
    running.join(0, 1)
    running.now += EVIDENCE_WINDOW / 2
    running.lose(2)
    running.join(3, 2)
    (failure,) = running.published(FailureEvent)
    assert failure.failure.member == "job/2"
    assert [one.member for one in running.published(QuorumEvent)[0].consequences] == ["job/0", "job/1"]
    assert running.sent(QuorumReset) == [], "those who wait already need not ask again"


def test_a_communication_fault_without_a_better_cause_is_published_after_the_window(running: Bench) -> None:
    running.fault(1, COMMUNICATION)
    assert running.published(FailureEvent) == []
    running.now += EVIDENCE_WINDOW
    running.do(running.group.tick(running.now))
    (failure,) = running.published(FailureEvent)
    assert (failure.failure.member, failure.failure.kind) == ("job/1", "faulted")


def test_held_evidence_is_published_at_the_latest_with_the_quorum_that_it_caused(running: Bench) -> None:
    for rank in range(WORLD):
        running.fault(rank, COMMUNICATION)
        running.join(rank)
    (failure,) = running.published(FailureEvent)
    (quorum,) = running.published(QuorumEvent)
    assert failure.sequence < quorum.sequence
    assert len(quorum.consequences) == WORLD - 1


def test_a_fault_with_a_cause_of_its_own_is_published_at_once_and_once(running: Bench) -> None:
    running.fault(3, COMMUNICATION)
    running.fault(1, OWN)
    running.fault(0, OWN)
    (failure,) = running.published(FailureEvent)
    assert failure.failure.member == "job/1"
    running.join(0, 1, 2, 3)
    assert [one.member for one in running.published(QuorumEvent)[0].consequences] == ["job/3", "job/0"]


def test_a_report_of_an_older_iteration_is_dropped(running: Bench) -> None:
    running.fault(1, OWN)
    running.join(0, 1, 2, 3)
    running.said.clear()
    running.fault(2, OWN, iteration=0)
    assert running.said == []


def test_a_loss_is_published_once_per_incarnation(running: Bench) -> None:
    report = MemberLost(0, "job", 0, "job/2", "job/2#0", KILLED, -1.0, running.now, "canary", "job/2#1")
    for _ in range(3):
        running.do(running.group.lost(running.now, report))
    assert len(running.published(FailureEvent)) == 1


def test_two_losses_are_two_events_of_one_incident(running: Bench) -> None:
    running.lose(1)
    running.join(0)
    running.lose(3)
    running.join(1, 2, 3)
    assert [one.failure.member for one in running.published(FailureEvent)] == ["job/1", "job/3"]
    (quorum,) = running.published(QuorumEvent)
    assert quorum.iteration == 1


def test_losing_a_member_that_waits_resets_the_others_at_once(running: Bench) -> None:
    running.lose(1)
    running.join(0, 2)
    running.lose(2)
    assert {one.member for reset in running.sent(QuorumReset) for one in reset.recipients} == {"job/0"}
    running.join(0, 1, 2, 3)
    assert running.group.session.iteration == 1


def test_a_replacement_that_dies_before_it_joins_is_waited_for_again(running: Bench) -> None:
    running.lose(1)
    running.join(0, 2, 3)
    running.lose(1)
    assert {one.member for reset in running.sent(QuorumReset) for one in reset.recipients} == {
        "job/0",
        "job/2",
        "job/3",
    }
    running.join(0, 2, 3, 1)
    assert [one.iteration for one in running.published(QuorumEvent)] == [1]


def test_a_loss_between_answer_and_entry_belongs_to_the_new_iteration(running: Bench) -> None:
    running.fault(0, OWN)
    running.join(0, 1, 2, 3)
    running.lose(3)
    assert [one.failure.iteration for one in running.published(FailureEvent)] == [0, 1]


def test_survivors_do_not_go_on_below_the_minimum(running: Bench) -> None:
    running.lose(2)
    running.join(0, 1, 3)
    running.now += 31.0
    running.do(running.group.tick(running.now))
    assert running.sent(QuorumAnswer) == []
    assert "need min_replicas 4" in running.group.reason


def test_an_old_incarnation_is_refused(running: Bench) -> None:
    running.lose(2)
    stale = Join("job", RANKS, 0, "job/2", "job/2#0", 99, 0, 0, 0, [])
    running.do(running.group.join(running.now, b"w2", stale))
    (refused,) = running.sent(Refused)
    assert (refused.code, refused.member) == ("STALE_GENERATION", "job/2")


def test_a_stranger_is_refused(running: Bench) -> None:
    running.do(running.group.join(running.now, b"x", Join("job", RANKS, 0, "job/9", "x", 1, -1, 0, 0, [])))
    assert [one.code for one in running.sent(Refused)] == ["UNKNOWN_MEMBER"]


def test_all_new_processes_begin_the_next_hundred(running: Bench) -> None:
    running.do(running.group.set_roster(running.now, roster(1, base=0)))
    for member in members():
        running.incarnations[member] = f"{member}#9"
        running.last[member] = -1
        running.start(member, generation=1)
    running.join(0, 1, 2, 3, generation=1)
    (quorum,) = running.published(QuorumEvent)
    assert (quorum.iteration, quorum.restarts) == (100, 1)


def test_nobody_leaves_before_all_have_completed(running: Bench) -> None:
    running.complete(0, 1, 2)
    assert running.sent(Completed) == []
    running.complete(3)
    assert {one.member for done in running.sent(Completed) for one in done.recipients} == set(members())
    assert len(running.published(CompletedEvent)) == 1


def test_a_loss_before_the_last_completion_sends_everybody_in_again(running: Bench) -> None:
    running.complete(0, 1, 2)
    running.lose(3)
    assert {one.member for reset in running.sent(QuorumReset) for one in reset.recipients} == {
        "job/0",
        "job/1",
        "job/2",
    }
    running.join(0, 1, 2, 3)
    running.complete(0, 1, 2, 3, iteration=1)
    assert running.group.session.done


def test_a_late_completion_of_a_given_up_iteration_is_told_so(running: Bench) -> None:
    running.lose(3)
    running.complete(0)
    (reset,) = running.sent(QuorumReset)
    assert "iteration 0" in reset.reason


def test_completion_is_sticky_and_later_deaths_restart_nothing(running: Bench) -> None:
    running.complete(0, 1, 2, 3)
    running.said.clear()
    running.lose(1, replaced=False)
    running.complete(0)
    assert running.published(FailureEvent) == []
    assert len(running.sent(Completed)) == 1


def test_the_loss_of_the_store_restarts_everybody_on_the_new_one(running: Bench) -> None:
    new = StoreAddress("127.0.0.1", 29502, "s1")
    running.do(running.group.store_lost(running.now, StoreLost(0, "job", 0, new, running.now)))
    (failure,) = running.published(FailureEvent)
    assert failure.failure.cause.kind == "store"
    running.join(0, 1, 2, 3)
    assert {answer.store for answer in running.sent(QuorumAnswer)} == {new}


def test_a_repeated_join_keeps_its_place_in_time(running: Bench) -> None:
    running.lose(2, replaced=False)
    running.join(0)
    running.now += 20.0
    running.join(0)
    running.now += 11.0
    running.do(running.group.tick(running.now))
    assert "0 expected" not in running.group.reason


def test_a_survivor_that_can_not_be_freed_is_a_consequence_and_is_waited_for_anew(running: Bench) -> None:
    running.lose(2)
    running.join(0, 3, 2)
    stuck = Cause(kind="stuck", text="blocked")
    report = MemberLost(0, "job", 0, "job/1", "job/1#0", stuck, -1.0, running.now, "wrapper", "job/1#1")
    running.do(running.group.lost(running.now, report))
    assert running.sent(QuorumReset) == []
    running.incarnations["job/1"], running.last["job/1"] = "job/1#1", -1
    running.join(1)
    assert [one.failure.member for one in running.published(FailureEvent)] == ["job/2"]
    (quorum,) = running.published(QuorumEvent)
    assert [one.member for one in quorum.consequences] == ["job/1"]


# --- a lighthouse that is started anew ---------------------------------------------------------------------


def recall(iteration: int, *, completed: bool = False, node: str = "n0") -> LastQuorum:
    return LastQuorum(1, "job", 0, (1 << 32) + 9 + iteration, iteration, iteration, members(), completed, node)


def nothing_to_recall(node: str = "n0") -> LastQuorum:
    return LastQuorum(1, "job", 0, 0, -1, 0, [], False, node)


@pytest.fixture
def anew() -> Bench:
    """A group of a later epoch that has the roster of a running job, and nothing else yet."""
    bench = Bench.__new__(Bench)
    bench.now, bench.request, bench.said = 50.0, 0, []
    bench.incarnations = {member: f"{member}#0" for member in members()}
    bench.last = dict.fromkeys(members(), 4)
    bench.group = Group("job", RANKS, EventLog("job", 2), 2 << 32, lambda node: bench.now)
    bench.group.set_roster(bench.now, msgspec.structs.replace(roster(0, base=4), running=True))
    return bench


def announce(bench: Bench, *ranks: int) -> None:
    for rank in ranks:
        member = f"job/{rank}"
        node = bench.group.membership.members[member].slot.node
        report = MemberStarted(0, "job", 0, member, bench.incarnations[member], node)
        bench.do(bench.group.started(bench.now, report))


def test_a_join_before_the_announcement_is_not_refused(anew: Bench) -> None:
    anew.join(0)
    assert anew.said == []
    announce(anew, 0, 1, 2, 3)
    anew.join(0, 1, 2, 3)
    (event,) = anew.published(QuorumEvent)
    assert event.iteration == 5
    assert event.quorum_id > 2 << 32


def test_a_completion_of_an_iteration_it_has_not_heard_of_waits(anew: Bench) -> None:
    announce(anew, 0, 1, 2, 3)
    anew.complete(0, 1, 2, 3, iteration=6)
    assert anew.said == []
    anew.do(anew.group.recall(anew.now, recall(6)))
    anew.complete(0, 1, 2, iteration=6)
    assert not anew.group.session.done
    anew.complete(3, iteration=6)
    assert anew.group.session.done


def test_a_completion_stays_a_completion(anew: Bench) -> None:
    announce(anew, 0, 1, 2, 3)
    anew.do(anew.group.recall(anew.now, recall(6, completed=True)))
    anew.lose(2)
    assert anew.published(FailureEvent) == []
    anew.complete(0, iteration=6)
    assert len(anew.sent(Completed)) == 1


@pytest.mark.parametrize("announced_first", [False, True])
def test_a_loss_while_it_was_away_is_published_once_in_the_right_iteration(anew: Bench, announced_first: bool) -> None:
    anew.do(anew.group.recall(anew.now, recall(6)))
    lost = MemberLost(0, "job", 0, "job/2", "job/2#0", KILLED, -1.0, anew.now, "canary", "job/2#1")
    anew.incarnations["job/2"] = "job/2#1"
    if announced_first:
        announce(anew, 0, 1, 2, 3)
    for _ in range(2):
        anew.do(anew.group.lost(anew.now, lost))
    (event,) = anew.published(FailureEvent)
    assert (event.failure.iteration, event.epoch) == (6, 2)


def test_it_waits_a_heartbeat_s_time_for_members_of_a_running_job(anew: Bench) -> None:
    announce(anew, 0, 1, 2)
    anew.do(anew.group.recall(anew.now, nothing_to_recall()))
    anew.join(0, 1, 2)
    anew.now += HEARTBEAT_TIMEOUT / 2
    anew.do(anew.group.tick(anew.now))
    assert anew.sent(QuorumAnswer) == []
    assert "1 expected" in anew.group.reason


@pytest.fixture
def of_two_nodes(anew: Bench) -> Bench:
    """Like ``anew``; ranks 2 and 3 are on n1."""
    slots = [msgspec.structs.replace(slot, node=f"n{slot.rank // 2}") for slot in roster(0).slots]
    bench = anew
    bench.group = Group("job", RANKS, EventLog("job", 2), 2 << 32, lambda node: bench.now)
    bench.group.set_roster(bench.now, msgspec.structs.replace(roster(0, base=4), running=True, slots=slots))
    return bench


def test_no_iteration_is_known_before_all_nodes_have_been_heard(of_two_nodes: Bench) -> None:
    """One node may have the answer that was lost on its way to the other."""
    group, now = of_two_nodes.group, of_two_nodes.now
    announce(of_two_nodes, 0, 1, 2, 3)
    of_two_nodes.join(3)
    of_two_nodes.do(group.recall(now, recall(5, node="n1")))
    assert group.recalling
    of_two_nodes.do(group.tick(now))
    assert "n0" in group.reason
    of_two_nodes.do(group.recall(now, recall(6, node="n0")))
    assert not group.recalling
    of_two_nodes.now += EVIDENCE_WINDOW
    of_two_nodes.do(group.tick(of_two_nodes.now))
    (event,) = of_two_nodes.published(FailureEvent)
    assert (event.failure.member, event.failure.iteration) == ("job/3", 6), "it joins, and the others are in 6"


def test_a_node_that_is_never_heard_is_not_waited_for_for_ever(of_two_nodes: Bench) -> None:
    of_two_nodes.do(of_two_nodes.group.recall(of_two_nodes.now, recall(5, node="n1")))
    of_two_nodes.now += HEARTBEAT_TIMEOUT
    assert of_two_nodes.group.waits
    of_two_nodes.do(of_two_nodes.group.tick(of_two_nodes.now))
    assert not of_two_nodes.group.recalling


def test_a_loss_that_is_heard_after_its_replacement_is_in_a_quorum_ends_no_iteration(anew: Bench) -> None:
    announce(anew, 0, 1, 3)
    anew.incarnations["job/2"] = "job/2#1"
    announce(anew, 2)
    anew.do(anew.group.recall(anew.now, recall(6)))
    anew.join(0, 1, 2, 3)
    assert [one.iteration for one in anew.published(QuorumEvent)] == [7]
    lost = MemberLost(0, "job", 0, "job/2", "job/2#0", KILLED, -1.0, anew.now, "canary", "job/2#1")
    anew.do(anew.group.lost(anew.now, lost))
    anew.now += EVIDENCE_WINDOW
    anew.do(anew.group.tick(anew.now))
    assert [one.failure.iteration for one in anew.published(FailureEvent)] == [6], "only the join was unexplained"


def test_an_announcement_that_arrives_after_the_loss_raises_nobody(running: Bench) -> None:
    first = running.incarnations["job/2"]
    running.lose(2)
    running.do(running.group.started(running.now, MemberStarted(0, "job", 0, "job/2", first, "n0")))
    running.join(0, 1, 2, 3)
    assert len(running.published(QuorumEvent)) == 1


def test_a_replacement_that_joins_while_its_predecessor_s_loss_is_deferred_is_not_refused(of_two_nodes: Bench) -> None:
    bench = of_two_nodes
    bench.do(bench.group.recall(bench.now, recall(5, node="n0")))
    announce(bench, 0, 1)
    first, second = (
        MemberLost(0, "job", 0, "job/1", f"job/1#{n}", KILLED, -1.0, bench.now, "canary", f"job/1#{n + 1}")
        for n in (0, 1)
    )
    bench.group.defer(first)
    bench.incarnations["job/1"] = "job/1#1"
    bench.join(1)
    bench.group.defer(second)
    bench.incarnations["job/1"] = "job/1#2"
    announce(bench, 1)
    assert bench.sent(Refused) == []
    bench.do(bench.group.recall(bench.now, recall(5, node="n1")))
    assert [one.failure.incarnation for one in bench.published(FailureEvent)] == ["job/1#0", "job/1#1"]
    announce(bench, 2, 3)
    bench.last = dict.fromkeys(members(), 5)
    bench.join(0, 1, 2, 3)
    assert [one.iteration for one in bench.published(QuorumEvent)] == [6]


def test_who_is_announced_after_a_deferred_loss_that_names_nobody_has_the_slot(
    of_two_nodes: Bench,
) -> None:
    bench = of_two_nodes
    bench.do(bench.group.recall(bench.now, recall(5, node="n0")))
    announce(bench, 0, 1)
    bench.group.defer(MemberLost(0, "job", 0, "job/1", "job/1#0", KILLED, -1.0, bench.now, "placement"))
    bench.incarnations["job/1"] = "job/1#1"
    announce(bench, 1)
    bench.do(bench.group.recall(bench.now, recall(5, node="n1")))
    announce(bench, 2, 3)
    assert [one.failure.incarnation for one in bench.published(FailureEvent)] == ["job/1#0"]
    bench.last = dict.fromkeys(members(), 5)
    bench.join(0, 1, 2, 3)
    assert [len(one.members) for one in bench.published(QuorumEvent)] == [WORLD]


def test_members_of_a_node_that_was_given_up_come_back_with_it(running: Bench) -> None:
    running.do(running.group.node_lost(running.now, "n0"))
    assert len(running.published(FailureEvent)) == 4
    announce(running, 0, 1, 2, 3)
    running.join(0, 1, 2, 3)
    assert [one.iteration for one in running.published(QuorumEvent)] == [1]


def test_what_the_coordinator_heard_ends_an_iteration_that_no_node_remembers(anew: Bench) -> None:
    """A worker leaves at a failure of its iteration or of a later one."""
    announce(anew, 0, 1, 2, 3)
    anew.do(anew.group.recall(anew.now, recall(3)))
    anew.lose(2)
    assert [one.failure.iteration for one in anew.published(FailureEvent)] == [4]


def test_an_answer_that_was_lost_is_given_again(running: Bench) -> None:
    request = running.request
    running.request -= 1
    running.join(3)
    (answer,) = running.sent(QuorumAnswer)
    assert (answer.iteration, [(one.member, one.request) for one in answer.recipients]) == (0, [("job/3", request)])
    running.request -= 2
    running.said.clear()
    member = "job/3"
    old = Join("job", RANKS, 0, member, running.incarnations[member], request - 1, -1, 0, 0, [])
    assert running.do(running.group.join(running.now, b"w3", old)) == []


def test_a_join_whose_fault_report_was_lost_is_a_fault(running: Bench) -> None:
    running.join(1)
    assert running.published(FailureEvent) == []
    running.now += EVIDENCE_WINDOW
    running.do(running.group.tick(running.now))
    (event,) = running.published(FailureEvent)
    assert (event.failure.member, event.failure.iteration) == ("job/1", 0)
    running.join(0, 2, 3)
    assert [one.iteration for one in running.published(QuorumEvent)] == [1]


def test_an_answer_lost_with_the_lighthouse_that_gave_it_starts_a_new_iteration(anew: Bench) -> None:
    announce(anew, 0, 1, 2, 3)
    anew.do(anew.group.recall(anew.now, recall(5)))
    anew.join(2)
    anew.now += EVIDENCE_WINDOW
    anew.do(anew.group.tick(anew.now))
    (event,) = anew.published(FailureEvent)
    assert event.failure.iteration == 5
    anew.join(0, 1, 3)
    assert [one.iteration for one in anew.published(QuorumEvent)] == [6]


def test_who_was_dropped_by_the_assignment_ends_without_an_incident_and_is_not_waited_for() -> None:
    bench = Bench()
    bench.join(0, 1, 2, 3)
    bench.complete(0, 1, 2)
    assert not bench.sent(Completed)
    report = MemberLost(0, "job", 0, "job/3", "job/3#0", Cause(kind="discarded", status=1), -1.0, bench.now, "exit")
    bench.do(bench.group.lost(bench.now, report))
    assert bench.published(FailureEvent) == []
    told = [one.member for message in bench.sent(Completed) for one in message.recipients]
    assert sorted(told) == ["job/0", "job/1", "job/2"]


def test_who_was_dropped_by_the_assignment_is_not_expected_in_the_next_quorum() -> None:
    bench = Bench(min_members=3)
    bench.join(0, 1, 2, 3)
    report = MemberLost(0, "job", 0, "job/3", "job/3#0", Cause(kind="discarded", status=1), -1.0, bench.now, "exit")
    bench.do(bench.group.lost(bench.now, report))
    bench.fault(1, OWN)
    bench.join(0, 1, 2)
    assert [one.member for one in bench.sent(QuorumAnswer)[-1].members] == ["job/0", "job/1", "job/2"]
    assert bench.group.session.iteration == 1


def test_a_second_wrapped_call_is_a_new_iteration_and_no_restart() -> None:
    bench = Bench()
    bench.join(0, 1, 2, 3)
    bench.complete(0, 1, 2, 3)
    bench.join(0, 1, 2, call=1)
    assert len(bench.sent(QuorumAnswer)) == 4, "it waits for the last one"
    bench.join(3, call=1)
    answer = bench.sent(QuorumAnswer)[-1]
    assert (answer.call, answer.iteration, answer.restarts) == (1, 1, 0)
    bench.fault(2, OWN, iteration=1)
    bench.join(0, 1, 2, 3, call=1)
    assert (bench.group.session.iteration, bench.group.session.restarts) == (2, 1)
    bench.complete(0, 1, 2, 3, iteration=2, call=1)
    assert {one.call for one in bench.sent(Completed)} == {0, 1}
    assert bench.group.session.done


def test_who_was_replaced_in_the_second_call_is_told_that_the_first_is_over() -> None:
    bench = Bench()
    bench.join(0, 1, 2, 3)
    bench.complete(0, 1, 2, 3)
    bench.join(0, 1, 2, 3, call=1)
    bench.lose(1)
    bench.said.clear()
    bench.join(1)
    (completed,) = bench.sent(Completed)
    assert ([one.member for one in completed.recipients], completed.call) == (["job/1"], 0)
    bench.join(0, 2, 3, call=1)
    assert not bench.sent(QuorumAnswer), "it is on its way"
    bench.join(1, call=1)
    assert (bench.group.session.iteration, bench.group.session.restarts) == (2, 1)


def test_who_still_waits_to_complete_when_others_are_further_is_told() -> None:
    """The lighthouse that answered the others is another one, which knows nothing of the first call."""
    bench = Bench()
    bench.join(0, 1, 2, 3)
    bench.complete(3)
    bench.join(0, 1, 2, call=1)
    (completed,) = bench.sent(Completed)
    assert ([one.member for one in completed.recipients], completed.call) == (["job/3"], 0)


def test_a_quorum_waits_for_the_store_whose_host_was_lost() -> None:
    bench = Bench(min_members=1)
    slots = [msgspec.structs.replace(slot, node=f"n{slot.rank // 2}") for slot in roster(1).slots]
    spread = msgspec.structs.replace(roster(1, min_members=1), slots=slots, store_node="n0")
    bench.do(bench.group.set_roster(bench.now, spread))
    for member in members():
        bench.start(member, generation=1)
    bench.join(0, 1, 2, 3, generation=1)
    bench.do(bench.group.node_lost(bench.now, "n0"))
    bench.join(2, 3, generation=1)
    assert len(bench.sent(QuorumAnswer)) == len(members())
    assert bench.group.reason == "waits for another TCPStore: node n0, where it was, is gone"
    moved = StoreAddress("10.0.0.2", 29502, "s1")
    bench.do(bench.group.store_lost(bench.now, StoreLost(0, "job", 1, moved, bench.now, "n1")))
    answer = bench.sent(QuorumAnswer)[-1]
    assert (answer.iteration, answer.store) == (1, moved)
    assert [member.member for member in answer.members] == ["job/2", "job/3"]
    assert {event.failure.member for event in bench.published(FailureEvent)} == {"job/0", "job/1"}


def test_the_return_of_the_stores_host_ends_the_wait() -> None:
    bench = Bench(min_members=1)
    spread = msgspec.structs.replace(roster(1, min_members=1), store_node="n9")
    bench.do(bench.group.set_roster(bench.now, spread))
    for member in members():
        bench.start(member, generation=1)
    bench.do(bench.group.node_lost(bench.now, "n9"))
    bench.join(0, 1, 2, 3, generation=1)
    assert bench.sent(QuorumAnswer) == []
    bench.do(bench.group.node_returned(bench.now, "n9"))
    assert len(bench.sent(QuorumAnswer)) == len(members())


# --- places that change nodes ------------------------------------------------------------------------------


def placed(placement: int, **nodes: str) -> Roster:
    """Two ranks on n0, and on the nodes given (by rank, as r2) those; who is not named has no place."""
    base = roster(0, min_members=1)
    slots = [base.slots[0], base.slots[1]]
    for name, node in nodes.items():
        rank = int(name[1:])
        slots.append(Slot(f"job/{rank}", rank, rank % 2, node, rank // 2, placement))
    return msgspec.structs.replace(base, slots=slots, submission="s", placement=placement)


@pytest.fixture
def spread() -> Bench:
    """Ranks 0 and 1 on n0, 2 and 3 on n1; they run; then n1 is lost."""
    bench = Bench.__new__(Bench)
    bench.now, bench.said, bench.request = 100.0, [], 0
    bench.incarnations = {member: f"{member}#0" for member in members()}
    bench.last = dict.fromkeys(members(), -1)
    bench.group = Group("job", RANKS, EventLog("job", 1), 1 << 32, lambda node: bench.now)
    bench.do(bench.group.set_roster(bench.now, placed(0, r2="n1", r3="n1")))
    for member in members():
        bench.start(member)
    bench.join(0, 1, 2, 3)
    bench.do(bench.group.node_lost(bench.now, "n1"))
    bench.said.clear()
    return bench


def newcomer(bench: Bench, *ranks: int) -> None:
    for rank in ranks:
        bench.incarnations[f"job/{rank}"] += "+"
        bench.last[f"job/{rank}"] = -1
        bench.start(f"job/{rank}")


def answered(bench: Bench) -> list[list[str]]:
    return [[member.member for member in event.members] for event in bench.published(QuorumEvent)]


def test_survivors_of_a_lost_node_wait_to_hear_whether_its_ranks_get_other_places(spread: Bench) -> None:
    spread.join(0, 1)
    assert answered(spread) == []
    spread.do(spread.group.set_roster(spread.now, placed(1, r2="n2", r3="n2")))
    newcomer(spread, 2, 3)
    spread.join(2)
    assert answered(spread) == []
    spread.join(3)
    assert answered(spread) == [members()]
    assert [one.node for one in spread.published(QuorumEvent)[0].members] == ["n0", "n0", "n2", "n2"]


def test_where_there_is_no_other_place_survivors_go_on_at_once(spread: Bench) -> None:
    spread.join(0, 1)
    spread.do(spread.group.set_roster(spread.now, placed(1)))
    assert answered(spread) == [["job/0", "job/1"]]


def test_survivors_wait_for_no_coordinator_that_says_nothing(spread: Bench) -> None:
    spread.join(0, 1)
    spread.now += PLACEMENT_WINDOW
    spread.do(spread.group.tick(spread.now))
    assert answered(spread) == [["job/0", "job/1"]]


def test_survivors_wait_for_who_was_to_come_no_longer_than_the_join_timeout(spread: Bench) -> None:
    spread.join(0, 1)
    spread.do(spread.group.set_roster(spread.now, placed(1, r2="n2", r3="n2")))
    spread.now += 29.0
    spread.do(spread.group.tick(spread.now))
    assert answered(spread) == []
    spread.now += 2.0
    spread.do(spread.group.tick(spread.now))
    assert answered(spread) == [["job/0", "job/1"]]


def test_who_comes_later_enters_the_running_session_and_all_begin_again(spread: Bench) -> None:
    spread.join(0, 1)
    spread.do(spread.group.set_roster(spread.now, placed(1)))
    spread.do(spread.group.set_roster(spread.now, placed(2, r2="n3", r3="n3")))
    newcomer(spread, 2, 3)
    assert spread.published(FailureEvent) == []
    spread.join(2)
    assert spread.published(FailureEvent) == [], "the other one is on its way"
    spread.join(3)
    (event,) = spread.published(FailureEvent)
    assert (event.failure.cause.kind, event.failure.cause.text) == ("joined", "ranks 2, 3 joined")
    spread.join(0, 1)
    assert answered(spread) == [["job/0", "job/1"], members()]
    assert len(spread.published(FailureEvent)) == 1, "one restart for both"
    assert spread.group.session.iteration == 2


def test_who_came_waits_for_its_neighbours_no_longer_than_they_have(spread: Bench) -> None:
    spread.join(0, 1)
    spread.do(spread.group.set_roster(spread.now, placed(1)))
    spread.do(spread.group.set_roster(spread.now, placed(2, r2="n3", r3="n3")))
    newcomer(spread, 2)
    spread.join(2)
    spread.now += 29.0
    spread.do(spread.group.tick(spread.now))
    assert spread.published(FailureEvent) == []
    spread.now += 2.0
    spread.do(spread.group.tick(spread.now))
    assert len(spread.published(FailureEvent)) == 1


def test_a_job_may_grow_beyond_what_it_began_with(spread: Bench) -> None:
    spread.join(0, 1)
    spread.do(spread.group.set_roster(spread.now, placed(1)))
    spread.do(spread.group.set_roster(spread.now, placed(2, r4="n4")))
    spread.incarnations["job/4"], spread.last["job/4"] = "job/4#0", -1
    spread.start("job/4")
    spread.join(4)
    spread.join(0, 1)
    assert answered(spread)[-1] == ["job/0", "job/1", "job/4"]


def test_who_comes_when_some_have_completed_interrupts_nobody(spread: Bench) -> None:
    spread.join(0, 1)
    spread.do(spread.group.set_roster(spread.now, placed(1)))
    spread.complete(0, iteration=1)
    spread.do(spread.group.set_roster(spread.now, placed(2, r2="n3", r3="n3")))
    newcomer(spread, 2, 3)
    spread.join(2, 3)
    assert spread.published(FailureEvent) == []
    spread.complete(1, iteration=1)
    assert {one.member for completed in spread.sent(Completed) for one in completed.recipients} == set(members())


def test_a_node_that_was_only_cut_off_gets_its_places_back_with_its_processes(spread: Bench) -> None:
    spread.join(0, 1)
    spread.do(spread.group.set_roster(spread.now, placed(1)))
    for rank in (2, 3):
        spread.start(f"job/{rank}")
    spread.do(spread.group.set_roster(spread.now, placed(2, r2="n1", r3="n1")))
    spread.last |= {"job/2": 0, "job/3": 0}
    spread.join(2, 3)
    spread.join(0, 1)
    assert answered(spread)[-1] == members()


def test_processes_of_a_node_that_lost_its_places_to_another_are_refused(spread: Bench) -> None:
    spread.do(spread.group.set_roster(spread.now, placed(1, r2="n2", r3="n2")))
    spread.join(0, 1)
    before = MemberStarted(0, "job", 0, "job/2", "job/2#0", "n1")
    spread.do(spread.group.started(spread.now, before))
    spread.join(2)
    (refused,) = spread.sent(Refused)
    assert (refused.code, refused.member) == ("STALE_GENERATION", "job/2")
    newcomer(spread, 2, 3)
    spread.join(2, 3)
    assert answered(spread) == [members()]


def test_the_same_places_heard_again_change_nothing(spread: Bench) -> None:
    moved = placed(1, r2="n2", r3="n2")
    spread.do(spread.group.set_roster(spread.now, moved))
    newcomer(spread, 2, 3)
    spread.join(0, 1, 2, 3)
    assert spread.do(spread.group.set_roster(spread.now, moved)) == []
    assert spread.do(spread.group.set_roster(spread.now, placed(0, r2="n1", r3="n1"))) == []
    assert len(answered(spread)) == 1


def test_a_node_is_lost_with_the_ranks_that_it_has_now(spread: Bench) -> None:
    spread.do(spread.group.set_roster(spread.now, placed(1, r2="n2", r3="n2")))
    newcomer(spread, 2, 3)
    spread.join(0, 1, 2, 3)
    spread.said.clear()
    spread.do(spread.group.node_lost(spread.now, "n1"))
    assert spread.published(FailureEvent) == []
    spread.do(spread.group.node_lost(spread.now, "n2"))
    assert [event.failure.member for event in spread.published(FailureEvent)] == ["job/2", "job/3"]


def test_who_is_lost_before_it_has_entered_interrupts_nobody(spread: Bench) -> None:
    spread.join(0, 1)
    spread.do(spread.group.set_roster(spread.now, placed(1)))
    spread.do(spread.group.set_roster(spread.now, placed(2, r2="n3", r3="n3")))
    newcomer(spread, 2, 3)
    spread.join(2)
    spread.lose(3, replaced=False)
    lost, joined = spread.published(FailureEvent)
    assert (lost.failure.kind, lost.failure.iteration) == ("lost", -1)
    assert joined.failure.cause.kind == "joined", "nobody else is on the way"


@pytest.mark.parametrize("last_of_all", [False, True])
def test_who_was_away_while_the_others_went_on_is_called_back_by_a_new_lighthouse(
    spread: Bench, last_of_all: bool
) -> None:
    """It may wait for them in a collective that they have left; its own lighthouse would have told it."""
    spread.group = Group("job", RANKS, EventLog("job", 2), 2 << 32, lambda node: spread.now)
    again = msgspec.structs.replace(placed(0, r2="n1", r3="n1"), running=True)
    spread.do(spread.group.set_roster(spread.now, again))
    everybody, two = members(), members()[:2]
    of_n1 = LastQuorum(0, "job", 0, 5, 0, 0, everybody, False, "n1")
    of_n0 = LastQuorum(0, "job", 0, 6, 1, 1, two, False, "n0")
    # Each node says what it was in, and then who lives there.
    for last, ranks in ((of_n1, (2, 3)), (of_n0, (0, 1)))[:: -1 if last_of_all else 1]:
        spread.do(spread.group.recall(spread.now, last))
        for rank in ranks:
            spread.start(f"job/{rank}")
    (event,) = spread.published(FailureEvent)
    assert (event.failure.member, event.failure.iteration) == ("job/2", 0)
    assert event.failure.cause.text == "node n1 was away when iteration 1 began"
    spread.join(2, 3)
    assert [one.failure.cause.kind for one in spread.published(FailureEvent)] == ["stuck", "joined"]


def test_who_is_new_on_a_node_that_was_away_was_not_away_itself(spread: Bench) -> None:
    spread.group = Group("job", RANKS, EventLog("job", 2), 2 << 32, lambda node: spread.now)
    again = msgspec.structs.replace(placed(0, r2="n1", r3="n1"), running=True)
    spread.do(spread.group.set_roster(spread.now, again))
    spread.do(spread.group.recall(spread.now, LastQuorum(0, "job", 0, 5, 0, 0, members(), False, "n1")))
    spread.do(spread.group.recall(spread.now, LastQuorum(0, "job", 0, 6, 1, 1, members()[:2], False, "n0")))
    for rank in (0, 1):
        spread.start(f"job/{rank}")
    spread.now += 6.0
    spread.start("job/2")
    assert spread.published(FailureEvent) == []


def test_survivors_wait_for_the_placement_of_ranks_whose_node_drains_too(spread: Bench) -> None:
    spread.do(spread.group.set_roster(spread.now, placed(1, r2="n2", r3="n2")))
    newcomer(spread, 2, 3)
    spread.join(0, 1, 2, 3)
    drains = Cause(kind="node", text="node n2 drains: spot")
    for rank in (2, 3):
        gone = spread.incarnations[f"job/{rank}"]
        report = MemberLost(0, "job", 0, f"job/{rank}", gone, drains, -1.0, spread.now, "exit", "", "n2")
        spread.do(spread.group.lost(spread.now, report))
    spread.join(0, 1)
    assert len(answered(spread)) == 1, "nobody knows yet whether they get other places"
    spread.do(spread.group.set_roster(spread.now, placed(2)))
    assert answered(spread)[-1] == ["job/0", "job/1"]


def test_who_asks_from_a_place_that_is_another_node_s_by_now_is_refused(spread: Bench) -> None:
    spread.do(spread.group.set_roster(spread.now, placed(1, r2="n2", r3="n2")))
    newcomer(spread, 2, 3)
    spread.join(0, 1, 2, 3)
    spread.fault(0, OWN, iteration=1)
    spread.join(3)
    spread.do(spread.group.set_roster(spread.now, placed(2, r2="n3", r3="n3")))
    (refused,) = spread.sent(Refused)
    assert (refused.member, refused.incarnation) == ("job/3", "job/3#0+")
    newcomer(spread, 2, 3)
    spread.join(0, 1, 2, 3)
    assert answered(spread)[-1] == members()


def test_the_loss_of_a_node_is_told_also_after_the_completion(spread: Bench) -> None:
    """Another call may follow, and somebody has to take its places for that."""
    spread.join(0, 1)
    spread.do(spread.group.set_roster(spread.now, placed(1)))
    spread.complete(0, 1, iteration=1)
    spread.said.clear()
    spread.do(spread.group.node_lost(spread.now, "n0"))
    assert {event.failure.iteration for event in spread.published(FailureEvent)} == {-1}


def test_a_new_generation_waits_for_all_of_it_whoever_was_in_the_last_quorum(spread: Bench) -> None:
    spread.join(0, 1)
    spread.do(spread.group.set_roster(spread.now, placed(1)))
    assert answered(spread) == [["job/0", "job/1"]]
    anew = msgspec.structs.replace(placed(0, r2="n1", r3="n1"), generation=1)
    spread.do(spread.group.set_roster(spread.now, anew))
    for member in members():
        spread.incarnations[member] += "+"
        spread.last[member] = -1
        spread.start(member, generation=1)
    spread.join(0, 1, generation=1)
    assert len(answered(spread)) == 1
    spread.join(2, 3, generation=1)
    assert answered(spread)[-1] == members()
    ids = [event.quorum_id for event in spread.published(QuorumEvent)]
    assert ids == sorted(set(ids))
