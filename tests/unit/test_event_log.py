"""The numbered events of a job, and the snapshot of them: one message, whatever happened."""

from __future__ import annotations

from seamark.protocol.codec import decode, encode
from seamark.protocol.messages import RANKS, Cause, Failure, Member
from seamarkd.lighthouse.events import MEMBERS_TOLD, RING, WHOLE_TEXTS, EventLog


def failed(log: EventLog, text: str) -> None:
    cause = Cause(kind="exception", text=text)
    failure = Failure("faulted", "job/0", "job/0#0", 0, "n0", 0, cause, 0.0, 0.0, 0.0, "wrapper")
    log.failure(RANKS, failure)


def answered(log: EventLog, size: int) -> None:
    log.quorum(
        RANKS,
        quorum_id=log.sequence,
        generation=0,
        iteration=log.sequence,
        restarts=0,
        members=[Member(f"job/{rank}", f"{rank:032x}", rank, f"node-{rank // 8}", rank % 8) for rank in range(size)],
        answered_at=0.0,
        ended_iteration=-1,
        consequences=[],
    )


def test_a_snapshot_of_a_large_job_that_failed_often_is_a_message() -> None:
    log = EventLog("job", 1)
    for _ in range(RING):
        failed(log, "x" * 16_384)
    for _ in range(64):
        answered(log, MEMBERS_TOLD // 4)
    snapshot = log.snapshot(1, completed=False, reason="", groups=[])
    assert decode(encode(snapshot)) == snapshot
    assert [event.sequence for event in snapshot.failures] == list(range(1, RING + 1)), "each of them is told"
    assert all(len(event.failure.cause.text) == 16_384 for event in snapshot.failures[-WHOLE_TEXTS:])
    assert [event.sequence for event in snapshot.quorums] == list(range(log.sequence - 3, log.sequence + 1))


def test_the_last_quorum_is_in_the_snapshot_however_large_it_is() -> None:
    log = EventLog("job", 1)
    answered(log, 1)
    answered(log, MEMBERS_TOLD + 1)
    (quorum,) = log.snapshot(1, completed=False, reason="", groups=[]).quorums
    assert quorum.sequence == log.sequence


def test_the_snapshot_of_a_small_job_holds_everything_as_it_was() -> None:
    log = EventLog("job", 1)
    assert log.snapshot(1, completed=False, reason="", groups=[]).quorums == []
    for _ in range(3):
        failed(log, "x" * 1_000)
        answered(log, 4)
    snapshot = log.snapshot(1, completed=False, reason="", groups=[])
    assert (snapshot.failures, snapshot.quorums) == (list(log.failures), list(log.quorums))
