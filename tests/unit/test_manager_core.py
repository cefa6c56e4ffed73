"""What a replica group's manager asks of the lighthouse, and what it tells its ranks."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest

from seamark.protocol.messages import (
    Acknowledged,
    BeatAnswer,
    CommitDecision,
    CommitVote,
    Message,
    QuorumReset,
    RankJoin,
    RankQuorum,
    Recipient,
    Refused,
    Replica,
    ReplicaBeat,
    ReplicaJoin,
    ReplicaLeave,
    ReplicaQuorum,
    ReplicaWithdraw,
    StateAddress,
    StateAddressRequest,
)
from seamark.replicas.core import (
    LIGHTHOUSE_PATIENCE,
    RECONNECT_AFTER,
    RESEND_INTERVAL,
    WITHDRAW_PATIENCE,
    Effect,
    ManagerCore,
    Reconnect,
    Settings,
    ToLighthouse,
    ToRank,
)

T = TypeVar("T", bound=Message)
ME = Settings("job", "a", "i", 2, "tcp://a:1", "a:2", "tcp://head:1")


class Bench:
    """A manager of two ranks, and what it said last."""

    def __init__(self) -> None:
        self.core = ManagerCore(ME, 0.0)
        self.now = 0.0
        self.said: list[Effect] = []

    def join(self, rank: int, request: int = 1, **fields: Any) -> None:
        made = {
            "step": 3,
            "state_address": f"rank-{rank}",
            "shrink_only": False,
            "commit_failures": 0,
            "min_members": 1,
            "target_members": 0,
            "join_timeout": 60.0,
            "timeout": 30.0,
        } | fields
        self.said = self.core.from_rank(self.now, b"r%d" % rank, RankJoin(request=request, group_rank=rank, **made))

    def vote(self, rank: int, commit: bool = True, *, request: int = 1, quorum_id: int = 7, step: int = 3) -> None:
        vote = CommitVote(request, rank, quorum_id, step, commit, 30.0)
        self.said = self.core.from_rank(self.now, b"r%d" % rank, vote)

    def hear(self, message: Message) -> None:
        self.said = self.core.from_lighthouse(self.now, message)

    def tick(self, now: float) -> None:
        self.now = now
        self.said = self.core.tick(now)

    def asked(self, kind: type[T]) -> list[T]:
        return [one.message for one in self.said if isinstance(one, ToLighthouse) and isinstance(one.message, kind)]

    def told(self, kind: type[T]) -> list[T]:
        return [one.message for one in self.said if isinstance(one, ToRank) and isinstance(one.message, kind)]

    def answer(self, request: int) -> None:
        replica = Replica("a", "i", ME.address, ME.store_address, 3, 2)
        self.hear(ReplicaQuorum("job", [Recipient("a", "i", request)], 7, [replica]))


def test_the_lighthouse_is_asked_once_all_ranks_did() -> None:
    bench = Bench()
    bench.join(0, commit_failures=1)
    assert bench.said == []
    bench.join(1)
    (request,) = bench.asked(ReplicaJoin)
    assert (request.replica.step, request.replica.commit_failures, request.replica.world_size) == (3, 1, 2)
    bench.answer(request.request)
    assert [one.quorum_id for one in bench.told(RankQuorum)] == [7, 7]
    bench.join(0)
    assert len(bench.told(RankQuorum)) == 1, "the answer was lost: the same request gets it again"
    bench.join(0, 2)
    bench.join(1, 2)
    (request,) = bench.asked(ReplicaJoin)
    assert (request.quorum_id, request.quorum_members) == (7, ["a"])


@pytest.mark.parametrize(("name", "value"), [("target_members", 4), ("min_members", 2), ("shrink_only", True)])
def test_ranks_that_contradict_each_other_are_refused(name: str, value: int) -> None:
    bench = Bench()
    bench.join(0)
    bench.join(1, **{name: value})
    (refusal,) = bench.told(Refused)
    assert f"{name}={value}" in refusal.reason
    bench.join(5)
    assert "world size is 2" in bench.told(Refused)[0].reason


def test_a_reset_is_asked_for_again_in_the_same_call_and_what_is_old_is_passed_over() -> None:
    bench = Bench()
    bench.join(0)
    bench.join(1)
    bench.hear(QuorumReset("job", "replicas", [Recipient("a", "i", 1)], "b was lost"))
    (request,) = bench.asked(ReplicaJoin)
    assert request.request == 2
    bench.answer(1)
    assert bench.said == []
    bench.hear(QuorumReset("job", "replicas", [Recipient("a", "i", 1)], "b was lost"))
    assert bench.said == []
    bench.answer(2)
    assert len(bench.told(RankQuorum)) == 2


def test_after_a_vote_was_given_up_the_next_quorum_is_a_new_one() -> None:
    """Under the old id the step could never be voted on again."""
    bench = Bench()
    bench.join(0)
    bench.join(1)
    bench.answer(1)
    bench.vote(0)
    bench.tick(40.0)
    bench.join(0, 2)
    bench.join(1, 2)
    (request,) = bench.asked(ReplicaJoin)
    assert request.replica.commit_failures == 1
    bench.hear(ReplicaQuorum("job", [Recipient("a", "i", 2)], 8, [request.replica]))
    bench.join(0, 3)
    bench.join(1, 3)
    (request,) = bench.asked(ReplicaJoin)
    assert request.replica.commit_failures == 0, "once"


def test_beats_and_unanswered_requests_are_repeated() -> None:
    bench = Bench()
    bench.tick(0.0)
    assert len(bench.asked(ReplicaBeat)) == 1
    bench.tick(0.05)
    assert bench.said == []
    bench.join(0)
    bench.join(1)
    bench.tick(0.05 + RESEND_INTERVAL)
    assert [one.request for one in bench.asked(ReplicaJoin)] == [1]
    assert bench.core.wake_at() <= bench.now + ME.heartbeat_interval


@pytest.mark.parametrize("heard", [True, False])
def test_a_caller_that_gives_up_is_withdrawn(heard: bool) -> None:
    bench = Bench()
    bench.join(0, timeout=1.0)
    bench.join(1, timeout=1.0)
    bench.hear(BeatAnswer(1, 1, known=True))
    bench.tick(1.0)
    assert [one.request for one in bench.asked(ReplicaWithdraw)] == [1]
    assert bench.told(Refused) == [], "its answer may be on its way"
    if heard:
        bench.hear(Acknowledged(1))
    else:
        bench.tick(1.0 + WITHDRAW_PATIENCE)
    assert {one.code for one in bench.told(Refused)} == {"TIMEOUT"}
    bench.join(0)
    assert {one.code for one in bench.told(Refused)} == {"TIMEOUT"}, (
        "a repetition of what was refused is no new request"
    )


def test_an_answer_that_crosses_the_withdrawal_counts() -> None:
    bench = Bench()
    bench.join(0, timeout=1.0)
    bench.join(1, timeout=1.0)
    bench.tick(1.0)
    bench.answer(1)
    assert len(bench.told(RankQuorum)) == 2


def test_the_step_of_the_rank_that_is_behind_is_that_of_the_group() -> None:
    bench = Bench()
    bench.join(0, step=3)
    bench.join(1, step=4)
    assert bench.asked(ReplicaJoin)[0].replica.step == 3


def test_a_vote_whose_time_is_over_is_withdrawn_from_the_ballot() -> None:
    bench = Bench()
    bench.vote(0)
    bench.tick(30.0)
    assert "ranks [1]" in bench.told(Refused)[0].reason
    bench.vote(1)
    assert "came too late" in bench.told(Refused)[0].reason


def test_a_rank_that_never_asks_is_named() -> None:
    bench = Bench()
    bench.join(0, timeout=1.0)
    bench.tick(1.0)
    assert "ranks [1]" in bench.told(Refused)[0].reason


def test_a_lighthouse_that_answers_nothing_is_reconnected_to_and_then_named() -> None:
    bench = Bench()
    bench.join(0)
    bench.join(1)
    bench.tick(RECONNECT_AFTER)
    assert Reconnect() in bench.said
    bench.tick(LIGHTHOUSE_PATIENCE + 0.1)
    refusals = bench.told(Refused)
    assert {one.code for one in refusals} == {"UNREACHABLE"}
    assert "tcp://head:1 has not answered" in refusals[0].reason


def test_all_votes_decide_and_each_gets_its_own_answer() -> None:
    bench = Bench()
    bench.vote(0)
    assert bench.said == []
    bench.vote(1, request=9)
    assert bench.told(CommitDecision) == [CommitDecision(1, True), CommitDecision(9, True)]
    bench.vote(1, request=9)
    assert bench.told(CommitDecision) == [CommitDecision(9, True)], "its answer was lost"
    bench.vote(0, step=4, request=2)
    bench.vote(1, False, step=4, request=10)
    assert [one.commit for one in bench.told(CommitDecision)] == [False, False]


def test_a_vote_that_comes_too_late_does_not_count() -> None:
    bench = Bench()
    bench.vote(0)
    bench.vote(0, quorum_id=8, request=2)
    bench.vote(1, False, request=1)
    assert "came too late" in bench.told(Refused)[0].reason
    bench.vote(1, quorum_id=8, request=2)
    assert [one.commit for one in bench.told(CommitDecision)] == [True, True]


def test_where_a_rank_offers_its_state() -> None:
    bench = Bench()
    bench.said = bench.core.from_rank(0.0, b"x", StateAddressRequest(1, 1))
    assert bench.told(Refused)
    bench.join(1)
    bench.said = bench.core.from_rank(0.0, b"x", StateAddressRequest(2, 1))
    assert bench.told(StateAddress) == [StateAddress(2, "rank-1")]


def test_leaving_is_repeated_until_it_is_acknowledged() -> None:
    bench = Bench()
    bench.said = bench.core.leave(0.0, "done")
    (leave,) = bench.asked(ReplicaLeave)
    bench.tick(RESEND_INTERVAL)
    assert bench.asked(ReplicaLeave) == [leave]
    assert bench.asked(ReplicaBeat) == [], "a beat would make it a member again"
    bench.hear(Acknowledged(leave.request))
    assert bench.core.left
