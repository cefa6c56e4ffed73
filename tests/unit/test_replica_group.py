"""Replica groups as the lighthouse sees them: who is a member, who is lost and by what evidence, who is waited for."""

from __future__ import annotations

from typing import Any, TypeVar

from seamark.protocol.messages import (
    Acknowledged,
    BeatAnswer,
    Cause,
    FailureEvent,
    Message,
    QuorumReset,
    RecoveredEvent,
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
from seamarkd.lighthouse.replicas import PROBE_AFTER, PUSH_AGAIN, SURELY_ALIVE, ReplicaGroup, ReplicaOptions

T = TypeVar("T", bound=Message)
TIMEOUT = 5.0


class Bench:
    """A group, a clock, and what was said last."""

    def __init__(self, *, settles_at: float = 0.0, epoch: int = 1) -> None:
        self.now = 0.0
        self.group = ReplicaGroup("job", EventLog("job", epoch), epoch << 32, settles_at, ReplicaOptions())
        self.said: list[Effect] = []
        self.requests: dict[str, int] = {}
        self.last: ReplicaQuorum | None = None

    def beat(self, *names: str, incarnation: str = "", **fields: int) -> None:
        self.said = []
        for name in names:
            who = incarnation or f"{name}-1"
            beat = ReplicaBeat("job", name, who, f"tcp://{who}:1", 1, fields.pop("step", 0), **fields)
            self.said += self.group.beat(self.now, who.encode(), beat)

    def join(self, name: str, *, incarnation: str = "", last: ReplicaQuorum | None = None, **fields: Any) -> None:
        who = incarnation or f"{name}-1"
        last = last or self.last
        number = self.requests[who] = self.requests.get(who, 0) + 1
        failures = fields.pop("commit_failures", 0)
        shrink = fields.pop("shrink_only", False)
        step = fields.pop("step", 0)
        request = ReplicaJoin(
            "job",
            number,
            Replica(name, who, f"tcp://{who}:1", "", step, 1, shrink, failures),
            last.quorum_id if last else 0,
            [one.replica_id for one in last.participants] if last else [],
            **fields,
        )
        self.said = self.group.join(self.now, who.encode(), request)

    def tick(self, now: float) -> None:
        self.now = now
        self.said = self.group.tick(now)

    def sent(self, kind: type[T]) -> list[T]:
        return [one.message for one in self.said if isinstance(one, Send) and isinstance(one.message, kind)]

    def published(self, kind: type[T]) -> list[T]:
        return [one.message for one in self.said if isinstance(one, Publish) and isinstance(one.message, kind)]

    def probes(self) -> list[str]:
        return [one.incarnation for one in self.said if isinstance(one, ProbeMember)]

    def quorum(self, *names: str) -> ReplicaQuorum:
        """All of these join; the answer."""
        self.beat(*names)
        for name in names:
            self.join(name)
        answer = self.last = self.sent(ReplicaQuorum)[0]
        assert members(answer) == list(names)
        return answer


def members(answer: ReplicaQuorum) -> list[str]:
    return [one.replica_id for one in answer.participants]


def test_who_beats_is_waited_for_and_who_joins_last_completes_the_quorum() -> None:
    bench = Bench()
    bench.beat("a", "b")
    assert len(bench.sent(BeatAnswer)) == 2
    bench.join("a")
    assert bench.sent(ReplicaQuorum) == []
    bench.join("b")
    assert [members(answer) for answer in bench.sent(ReplicaQuorum)] == [["a", "b"]] * 2


def test_silence_is_one_failure_and_tells_the_others() -> None:
    bench = Bench()
    bench.beat("a", "b")
    bench.now = TIMEOUT
    bench.beat("a")
    bench.join("a")
    bench.tick(TIMEOUT + 0.01)
    (lost,) = bench.published(FailureEvent)
    assert (lost.failure.member, lost.failure.cause.kind) == ("b", "heartbeat")
    assert bench.sent(FailureEvent) == [lost], "straight to a, which may hang in a collective with it"
    assert len(bench.sent(QuorumReset)) == 1
    bench.tick(TIMEOUT + 2.0)
    assert bench.published(FailureEvent) == []
    bench.beat("b")
    assert [one.member for one in bench.published(RecoveredEvent)] == ["b"]
    assert bench.group.status(bench.now).failures == []


def test_who_comes_back_is_told_of_what_it_missed_until_it_has_seen_it() -> None:
    """Cut off and declared lost, it waits in a collective with another that is lost as well."""
    bench = Bench()
    answer = bench.quorum("a", "b")
    bench.tick(10.0)
    lost = {one.failure.member: one.sequence for one in bench.published(FailureEvent)}
    assert lost.keys() == {"a", "b"}
    for seen in (0, 0, lost["a"], lost["b"]):
        bench.beat("b", seen=seen)
        told = {one.failure.member for one in bench.sent(FailureEvent)}
        assert {member for member, sequence in lost.items() if sequence > seen} <= told
        bench.beat("b", seen=seen)
        assert bench.sent(FailureEvent) == [], "who is slow to read is not sent the more for it"
        bench.now += PUSH_AGAIN
    assert told == set()
    bench.beat("a", incarnation="a-2")
    bench.join("a", incarnation="a-2")
    bench.join("b", last=answer)
    assert len(bench.sent(ReplicaQuorum)) == 2
    bench.beat("b")
    assert bench.sent(FailureEvent) == [], "what failed before a quorum is not in it"


def test_an_answer_that_was_lost_with_its_lighthouse_is_missed_by_who_waits_for_it() -> None:
    """The others have it, and wait in the collective for one that asks the new lighthouse."""
    before = Bench().quorum("a", "b", "c")
    bench = Bench(epoch=2, settles_at=5.0)
    bench.join("c", last=before)
    bench.beat("a", step=0)
    (event,) = bench.sent(FailureEvent)
    assert (event.failure.kind, event.failure.member) == ("faulted", "c")
    bench.beat("a", step=0, waiting=7)
    assert bench.sent(FailureEvent) == [], "it waits, too"


def test_who_is_done_with_its_step_waits_for_the_others() -> None:
    before = Bench().quorum("a", "b", "c")
    bench = Bench(epoch=2, settles_at=5.0)
    bench.join("c", last=before, step=1)
    bench.beat("a", step=0)
    assert bench.sent(FailureEvent) == []


def test_who_does_not_join_is_looked_for_and_a_refused_connection_ends_the_wait() -> None:
    bench = Bench()
    bench.quorum("a", "b")
    bench.join("a")
    assert Wake(PROBE_AFTER) in bench.said
    assert bench.probes() == []
    bench.tick(PROBE_AFTER)
    assert bench.probes() == ["b-1"]
    for result in ("accepted", "silent"):
        assert bench.group.probed(bench.now, "b", "b-1", result) == []
    assert bench.group.probed(bench.now, "b", "b-0", "refused") == [], "of another process"
    bench.said = bench.group.probed(bench.now, "b", "b-1", "refused")
    assert [one.failure.cause.kind for one in bench.published(FailureEvent)] == ["gone"]
    assert len(bench.sent(QuorumReset)) == 1
    bench.join("a")
    assert members(bench.sent(ReplicaQuorum)[0]) == ["a"]


def test_a_failed_commit_is_evidence_at_once() -> None:
    bench = Bench()
    bench.quorum("a", "b", "c")
    bench.join("a", commit_failures=1)
    assert bench.probes() == ["b-1", "c-1"]


def test_an_agent_s_report_ends_the_replica_of_that_process() -> None:
    bench = Bench()
    bench.quorum("a", "b")
    assert bench.group.process_lost(bench.now, "x", Cause(kind="signal", text="killed"), "canary") == []
    bench.said = bench.group.process_lost(bench.now, "b-1", Cause(kind="signal", text="killed"), "canary")
    assert [one.failure.detector for one in bench.published(FailureEvent)] == ["canary"]


def test_leaving_is_acknowledged_however_often_it_is_said() -> None:
    bench = Bench()
    bench.beat("a", "b")
    for published in (1, 0):
        bench.said = bench.group.leave(bench.now, b"b-1", ReplicaLeave("job", 7, "b", "b-1", "done"))
        assert bench.sent(Acknowledged) == [Acknowledged(7)]
        assert len(bench.published(FailureEvent)) == published


def test_a_second_process_under_a_living_name_is_refused_and_one_after_its_death_is_let_in() -> None:
    bench = Bench()
    bench.beat("a")
    bench.join("a", incarnation="a-2")
    assert bench.probes() == ["a-1"], "does the first one live?"
    bench.group.probed(bench.now, "a", "a-1", "accepted")
    bench.join("a", incarnation="a-2")
    assert bench.sent(Refused) == [], "a dying process accepts connections, too"
    bench.now = SURELY_ALIVE + 0.1
    bench.beat("a")
    bench.join("a", incarnation="a-2")
    (refusal,) = bench.sent(Refused)
    assert (refusal.code, refusal.request) == ("NAME_TAKEN", 3)
    bench.now = 4.0 + TIMEOUT
    bench.beat("a")
    bench.join("a", incarnation="a-2")
    bench.said = bench.group.probed(bench.now, "a", "a-1", "refused")
    assert [one.failure.incarnation for one in bench.published(FailureEvent)] == ["a-1"]
    assert members(bench.sent(ReplicaQuorum)[0]) == ["a"], "its request was kept meanwhile"


def test_a_process_started_anew_makes_the_quorum_a_new_one() -> None:
    bench = Bench()
    first = bench.quorum("a", "b")
    second = bench.quorum("a", "b")
    assert second.quorum_id == first.quorum_id
    bench.group.process_lost(bench.now, "b-1", Cause(kind="signal"), "canary")
    bench.beat("b", incarnation="b-2")
    bench.join("a")
    bench.join("b", incarnation="b-2")
    assert bench.sent(ReplicaQuorum)[0].quorum_id > second.quorum_id


def test_the_same_request_gets_the_same_answer_and_an_older_one_none() -> None:
    bench = Bench()
    bench.beat("a")
    bench.join("a")
    first = bench.sent(ReplicaQuorum)[0]
    bench.requests["a-1"] -= 1
    bench.join("a")
    assert bench.sent(ReplicaQuorum)[0].quorum_id == first.quorum_id
    bench.requests["a-1"] -= 2
    bench.join("a")
    assert bench.sent(ReplicaQuorum) == []


def test_a_caller_that_gave_up_is_no_ghost() -> None:
    bench = Bench()
    bench.beat("a", "b")
    bench.join("a")
    bench.group.withdraw(b"a", ReplicaWithdraw("job", "a", "a-0", 9))
    assert bench.group.status(0.0).members[0].joined, "of another process"
    bench.said = bench.group.withdraw(b"a", ReplicaWithdraw("job", "a", "a-1", 1))
    assert bench.sent(Acknowledged) == [Acknowledged(1)]
    assert not bench.group.status(0.0).members[0].joined


def test_a_target_waits_for_nobody_else() -> None:
    bench = Bench()
    bench.beat("a", "b", "c")
    bench.join("a", target_members=2)
    bench.join("b", target_members=2)
    assert members(bench.sent(ReplicaQuorum)[0]) == ["a", "b"]


def test_a_target_is_waited_for_although_nobody_else_is_known_yet() -> None:
    bench = Bench()
    bench.beat("a")
    bench.join("a", target_members=2, join_timeout=3.0)
    bench.tick(2.9)
    assert bench.sent(ReplicaQuorum) == []
    assert "waits for 1 more to make the 2" in bench.group.status(bench.now).reason
    bench.tick(3.0)
    assert members(bench.sent(ReplicaQuorum)[0]) == ["a"]


def test_limits_have_to_agree() -> None:
    bench = Bench()
    bench.beat("a", "b")
    bench.join("a", min_members=2)
    bench.join("b", min_members=1)
    (refusal,) = bench.sent(Refused)
    assert "min_members=1" in refusal.reason


def test_a_shrunk_quorum_is_not_below_the_minimum() -> None:
    bench = Bench()
    bench.quorum("a", "b")
    bench.group.process_lost(bench.now, "b-1", Cause(kind="signal"), "canary")
    bench.beat("c")
    bench.join("c", min_members=2)
    bench.join("a", min_members=2, shrink_only=True)
    assert bench.sent(ReplicaQuorum) == []
    assert "shrink_only" in bench.group.status(bench.now).reason


def test_a_lighthouse_started_anew_waits_for_the_members_of_the_last_quorum() -> None:
    last = Bench().quorum("a", "b")
    bench = Bench(settles_at=TIMEOUT, epoch=2)
    bench.beat("c")
    bench.join("c")
    assert bench.sent(ReplicaQuorum) == []
    assert "just started" in bench.group.status(bench.now).reason
    bench.beat("a")
    bench.join("a", last=last)
    assert not bench.group.status(bench.now).settled
    bench.beat("b")
    bench.join("b", last=last)
    (answer, *_) = bench.sent(ReplicaQuorum)
    assert members(answer) == ["a", "b", "c"]
    assert answer.quorum_id > last.quorum_id


def test_what_is_over_is_forgotten() -> None:
    bench = Bench()
    bench.beat("a")
    assert not bench.group.empty
    bench.group.leave(0.0, b"a-1", ReplicaLeave("job", 1, "a", "a-1", "done"))
    bench.tick(10.0)
    assert not bench.group.empty, "a failure is shown for an hour"
    bench.tick(3_700.0)
    assert bench.group.empty
