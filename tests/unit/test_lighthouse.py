"""The lighthouse's door: who is known, who has to introduce itself, what is refused."""

from __future__ import annotations

import msgspec
import pytest
from test_group import KILLED, roster
from test_manifest import record

from seamark.protocol.messages import (
    RANKS,
    AbortJob,
    Acknowledged,
    Beat,
    BeatAnswer,
    Complete,
    Completed,
    JobAborted,
    JobEnded,
    Join,
    LastQuorum,
    MemberFaulted,
    MemberLost,
    MemberStarted,
    Message,
    NodeHello,
    QuorumAnswer,
    Refused,
    ReplicaBeat,
    ReplicaLeave,
    Roster,
    SnapshotRequest,
    StoreAddress,
    StoreLost,
    SubmitJob,
    Welcome,
)
from seamarkd.effects import Publish, Send
from seamarkd.lighthouse.core import ENDED_KEPT, Lighthouse
from seamarkd.lighthouse.replicas import FORGET_AFTER


def answers(effects: list[object]) -> list[object]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


def test_a_stranger_s_beat_is_answered_register_again() -> None:
    lighthouse = Lighthouse(epoch=3)
    assert answers(lighthouse.handle(0.0, b"a", Beat("n", "i", 7))) == [BeatAnswer(3, 7, known=False)]
    (welcome,) = answers(lighthouse.handle(0.0, b"a", NodeHello("n", "i", "ipc:///x", 4)))
    assert isinstance(welcome, Welcome)
    said = [answers(lighthouse.handle(0.1, b"a", Beat("n", "i", number))) for number in range(8, 13)]
    assert said == [[], [], [BeatAnswer(3, 10, known=True)], [], []], "of five beats one is answered"
    assert answers(lighthouse.handle(0.1, b"a", Beat("n", "other", 13))) == [BeatAnswer(3, 13, known=False)]


def test_a_report_about_an_unknown_job_is_refused_so_that_it_is_repeated() -> None:
    report = MemberLost(5, "nope", 0, "nope/0", "i", KILLED, -1.0, 0.0, "canary")
    (refused,) = answers(Lighthouse(1).handle(0.0, b"a", report))
    assert isinstance(refused, Refused)
    assert (refused.code, refused.request) == ("UNKNOWN_JOB", 5)


def test_a_report_is_acknowledged_as_often_as_it_comes() -> None:
    lighthouse = Lighthouse(1)
    lighthouse.handle(0.0, b"c", roster(0))
    report = MemberLost(5, "job", 0, "job/1", "x", KILLED, -1.0, 0.0, "canary")
    published, *acknowledged = lighthouse.handle(0.0, b"a", report)
    assert isinstance(published, Publish)
    assert answers(acknowledged) == [Acknowledged(5)]
    assert lighthouse.handle(0.0, b"a", report) == acknowledged


def test_a_loss_is_not_acknowledged_before_it_is_known_which_iteration_it_ends() -> None:
    lighthouse = Lighthouse(2)
    lighthouse.handle(0.0, b"c", msgspec.structs.replace(roster(0), running=True))
    report = MemberLost(5, "job", 0, "job/1", "x", KILLED, -1.0, 0.0, "canary")
    assert lighthouse.handle(0.0, b"a", report) == []
    last = LastQuorum(6, "job", 0, 1 << 32, 7, 7, [f"job/{rank}" for rank in range(4)], False, "n0")
    published, *acknowledged = lighthouse.handle(0.0, b"a", last)
    assert published.message.failure.iteration == 7
    assert answers(acknowledged) == [Acknowledged(6)]
    assert lighthouse.handle(0.0, b"a", report) == [Send(b"a", Acknowledged(5))]


def test_a_snapshot_says_where_the_job_stands() -> None:
    lighthouse = Lighthouse(1)
    lighthouse.handle(0.0, b"c", roster(0))
    (snapshot,) = answers(lighthouse.handle(0.0, b"a", SnapshotRequest(9, "job")))
    assert (snapshot.request, snapshot.sequence, snapshot.completed) == (9, 0, False)
    assert lighthouse.event_beat().latest == {"job": 0}


def test_a_message_for_another_daemon_is_refused() -> None:
    (refused,) = answers(Lighthouse(1).handle(0.0, b"a", SubmitJob(1, record().spec, "once")))
    assert "not for a lighthouse" in refused.reason


def one_run(lighthouse: Lighthouse, submission: str, life: str) -> tuple[list[object], list[object]]:
    """What its four members are told, from their joins to their completion."""
    lighthouse.handle(0.0, b"c", msgspec.structs.replace(roster(0), submission=submission))
    joined, completed = [], []
    for rank in range(4):
        member = f"job/{rank}"
        lighthouse.handle(0.0, b"a", MemberStarted(0, "job", 0, member, f"{life}{rank}", "n0"))
    for rank in range(4):
        member = f"job/{rank}"
        joined += lighthouse.handle(0.0, b"a", Join("job", RANKS, 0, member, f"{life}{rank}", 1, -1, 0, 0, [], 0))
    for rank in range(4):
        member = f"job/{rank}"
        completed += lighthouse.handle(0.0, b"a", Complete("job", RANKS, 0, member, f"{life}{rank}", 2, 0))
    return answers(joined), answers(completed)


def test_a_job_of_a_name_that_was_used_is_another_job() -> None:
    lighthouse = Lighthouse(1)
    quorums = []
    for submission in ("first", "second"):
        (answer,), (completed,) = one_run(lighthouse, submission, submission)
        assert isinstance(answer, QuorumAnswer)
        assert isinstance(completed, Completed)
        quorums.append(answer.quorum_id)
    assert quorums[1] > quorums[0], "an id names one member list"


def test_without_a_coordinator_a_name_that_was_used_is_refused() -> None:
    lighthouse = Lighthouse(1)
    one_run(lighthouse, "", "first")
    (refused,) = answers(lighthouse.handle(1.0, b"x", roster(0)))
    assert isinstance(refused, Refused)
    assert (refused.code, "SEAMARK_JOB" in refused.reason) == ("NAME_TAKEN", True)
    (known,) = answers(lighthouse.handle(1.0, b"x", msgspec.structs.replace(roster(0), running=True)))
    assert isinstance(known, Acknowledged), "an agent that was there before"


def test_the_end_of_a_job_that_no_coordinator_has_is_told_to_all_and_to_who_comes_later() -> None:
    lighthouse = Lighthouse(1)
    lighthouse.handle(0.0, b"a", NodeHello("n0", "i", "ipc:///x", 4))
    lighthouse.handle(0.0, b"b", NodeHello("other", "i", "ipc:///y", 4))
    lighthouse.handle(0.0, b"a", roster(0))
    told = lighthouse.handle(0.0, b"a", AbortJob("job", "job/1", "x", "enough"))
    assert told == [Send(b"a", JobAborted("job", "job/1: enough"))]
    assert lighthouse.handle(0.0, b"a", AbortJob("job", "job/2", "y", "again")) == []
    later = lighthouse.handle(0.0, b"a", Join("job", RANKS, 0, "job/0", "z", 1, -1, 0, 0, [], 0))
    assert later == told
    running = msgspec.structs.replace(roster(0), running=True)
    assert JobAborted("job", "job/1: enough") in answers(lighthouse.handle(0.0, b"a", running))


STORE = StoreAddress("127.0.0.1", 20002, "s1")


@pytest.mark.parametrize(
    ("message", "from_its_node", "from_another", "from_a_client"),
    [
        (Join("job", RANKS, 0, "job/1", "x1", 1, -1, 0, 0, []), False, True, True),
        (Join("job", RANKS, 0, "job/1", "not heard of yet", 1, -1, 0, 0, []), False, False, True),
        (Complete("job", RANKS, 0, "job/1", "x1", 2, 0), False, True, True),
        (MemberFaulted("job", "job/1", "x1", 0, KILLED, 0.0), False, True, True),
        (StoreLost(3, "job", 0, STORE, 0.0), False, True, True),
        (AbortJob("job", "job/1", "x1", "why"), True, True, True),
        (roster(0), False, False, True),
        (SnapshotRequest(4, "job"), False, False, False),
        (Join("another", RANKS, 0, "another/1", "x1", 1, -1, 0, 0, []), False, False, False),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, bool) else None,
)
def test_what_names_no_node_is_held_against_what_is_known_of_it(
    message: Message, from_its_node: bool, from_another: bool, from_a_client: bool
) -> None:
    lighthouse = Lighthouse(1)
    lighthouse.handle(0.0, b"c", msgspec.structs.replace(roster(0), submission="s", store_node="n0"))
    lighthouse.handle(0.0, b"a", MemberStarted(0, "job", 0, "job/1", "x1", "n0"))
    assert lighthouse.foreign("n0", message) is from_its_node
    assert lighthouse.foreign("n1", message) is from_another
    assert lighthouse.foreign("", message) is from_a_client


def test_a_client_has_its_own_jobs() -> None:
    lighthouse = Lighthouse(1)
    join = Join("job", RANKS, 0, "job/1", "x1", 1, -1, 0, 0, [])
    assert not lighthouse.foreign("", roster(0)), "a new one"
    lighthouse.handle(0.0, b"a", roster(0))
    assert not lighthouse.foreign("", join)


# --- jobs that have ended ----------------------------------------------------------------------------------


def submitted(name: str, submission: str = "once") -> Roster:
    made = roster(0)
    return msgspec.structs.replace(made, job=name, submission=submission)


def joined(lighthouse: Lighthouse, job: str, ranks: range) -> list[object]:
    said: list[object] = []
    for rank in ranks:
        member = f"job/{rank}"
        lighthouse.handle(0.0, b"a", MemberStarted(rank, job, 0, member, f"{member}#0", "n0"))
        said += lighthouse.handle(0.0, b"a", Join(job, RANKS, 0, member, f"{member}#0", 1, -1, 0, 0, []))
    return said


def test_of_a_job_that_has_ended_nobody_waits_and_nobody_is_lost() -> None:
    lighthouse = Lighthouse(1)
    lighthouse.handle(0.0, b"a", NodeHello("n0", "i", "", 4))
    lighthouse.handle(0.0, b"c", submitted("job"))
    joined(lighthouse, "job", range(3))
    assert lighthouse.event_beat().waiting.keys() == {"job"}
    lighthouse.handle(0.0, b"c", JobEnded("job", "another"))
    assert lighthouse.event_beat().waiting.keys() == {"job"}
    lighthouse.handle(0.0, b"c", JobEnded("job", "once"))
    assert lighthouse.event_beat().waiting == {}
    (group,) = lighthouse.status(0.0, 1).groups
    assert (group.members, group.failures) == ([], [])
    assert lighthouse.groups["job"].node_lost(1.0, "n0") == []
    assert answers(lighthouse.handle(1.0, b"a", SnapshotRequest(2, "job")))[0].request == 2, "it is still told of"


def test_ended_jobs_are_forgotten_and_their_numbers_never_come_back() -> None:
    lighthouse = Lighthouse(1)
    lighthouse.handle(0.0, b"c", submitted("job"))
    (first,) = [one.message for one in joined(lighthouse, "job", range(4)) if isinstance(one, Publish)]
    lighthouse.handle(0.0, b"c", JobEnded("job", "once"))
    for number in range(ENDED_KEPT):
        lighthouse.handle(0.0, b"c", submitted(f"other{number}"))
        lighthouse.handle(0.0, b"c", JobEnded(f"other{number}", "once"))
    assert len(lighthouse.groups) == len(lighthouse.event_beat().latest) == ENDED_KEPT
    assert "job" not in lighthouse.groups
    lighthouse.handle(0.0, b"c", submitted("job", "again"))
    (again,) = [one.message for one in joined(lighthouse, "job", range(4)) if isinstance(one, Publish)]
    assert again.quorum_id > first.quorum_id
    assert again.sequence > first.sequence


def test_a_job_of_a_name_that_has_ended_is_not_forgotten_with_the_earlier_one() -> None:
    lighthouse = Lighthouse(1)
    lighthouse.handle(0.0, b"c", submitted("job"))
    lighthouse.handle(0.0, b"c", JobEnded("job", "once"))
    lighthouse.handle(0.0, b"c", submitted("job", "again"))
    for number in range(ENDED_KEPT + 1):
        lighthouse.handle(0.0, b"c", submitted(f"other{number}"))
        lighthouse.handle(0.0, b"c", JobEnded(f"other{number}", "once"))
    assert lighthouse.groups["job"].submission == "again"


def test_the_events_of_replica_groups_are_forgotten_with_the_last_of_them() -> None:
    lighthouse = Lighthouse(1)
    lighthouse.handle(0.0, b"m", ReplicaBeat("job", "A", "A#0", "tcp://127.0.0.1:1", 1, 0))
    lighthouse.handle(1.0, b"m", ReplicaLeave("job", 1, "A", "A#0", "done"))
    assert lighthouse.event_beat().latest == {"job": 1}
    lighthouse.tick(2.0 + FORGET_AFTER)
    assert lighthouse.event_beat().latest == {}
    lighthouse.handle(9_000.0, b"m", ReplicaBeat("job", "A", "A#1", "tcp://127.0.0.1:1", 1, 0))
    lighthouse.handle(9_001.0, b"m", ReplicaLeave("job", 1, "A", "A#1", "done"))
    assert lighthouse.event_beat().latest == {"job": 2}
