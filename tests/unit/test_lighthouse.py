"""The lighthouse's door: who is known, who has to introduce itself, what is refused."""

from __future__ import annotations

import msgspec
from test_group import KILLED, roster
from test_manifest import record

from seamark.protocol.messages import (
    Acknowledged,
    Beat,
    BeatAnswer,
    LastQuorum,
    MemberLost,
    NodeHello,
    Refused,
    SnapshotRequest,
    SubmitJob,
    Welcome,
)
from seamarkd.effects import Publish, Send
from seamarkd.lighthouse.core import Lighthouse


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
