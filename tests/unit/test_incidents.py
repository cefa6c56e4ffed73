"""The incident record and its picture: root cause first, segments that add up."""

from __future__ import annotations

import io

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from seamark.protocol.messages import (
    Cause,
    Failure,
    FailureEvent,
    Incident,
    Member,
    QuorumEvent,
    Stamps,
    Timeline,
    WorkerExited,
    WorkerStarted,
)
from seamarkd.cli.timeline import segments, total
from seamarkd.cli.why import show
from seamarkd.coordinator.incidents import IncidentLog

MEMBERS = [Member(f"j/{rank}", f"i{rank}", rank, "n", rank) for rank in range(3)]


def failure(rank: int, kind: str = "lost", *, at: float = 1.0, communication: bool = False) -> Failure:
    cause = Cause(kind="exception" if kind == "faulted" else "signal", text="killed", communication=communication)
    occurred = at if kind == "faulted" else -1.0
    return Failure(kind, f"j/{rank}", f"i{rank}", rank, "n", 0, cause, occurred, at, at + 0.001, "canary")


def failed(log: IncidentLog, one: Failure, sequence: int = 1) -> None:
    log.failed(FailureEvent("j", "ranks", 1, sequence, one))


def answered(log: IncidentLog, iteration: int = 1, at: float = 1.05) -> bool:
    return log.answered(QuorumEvent("j", "ranks", 1, 9, 1, 0, iteration, iteration, MEMBERS, at, iteration - 1, []))


def exited(log: IncidentLog, rank: int, status: int) -> None:
    log.exited(WorkerExited(0, "j", 0, f"j/{rank}", f"i{rank}", status, True, False, False, "", "", ["bye"], 0))


def test_an_exit_status_names_the_cause_whether_it_comes_before_or_after_the_event() -> None:
    for late in (True, False):
        log = IncidentLog()
        if not late:
            exited(log, 1, -9)
        failed(log, failure(1))
        if late:
            answered(log)
            exited(log, 1, -9)
        (incident,) = log.incidents
        assert incident.failures[0].cause == Cause(kind="signal", status=9, text="killed by SIGKILL")
        assert incident.log_tail == ["bye"]


def test_the_root_cause_comes_first() -> None:
    log = IncidentLog()
    failed(log, failure(0, "faulted", at=1.0, communication=True))
    failed(log, failure(1, "faulted", at=1.1))
    failed(log, failure(2, at=1.2))
    assert [one.rank for one in log.incidents[0].failures] == [2, 1, 0]


def test_one_quorum_ends_one_incident() -> None:
    log = IncidentLog()
    assert not answered(log, iteration=0)
    failed(log, failure(1))
    assert answered(log)
    failed(log, failure(2))
    assert answered(log, iteration=2)
    assert [(one.number, one.next_iteration) for one in log.incidents] == [(1, 1), (2, 2)]


def test_what_changed_is_handed_out_once() -> None:
    log = IncidentLog()
    failed(log, failure(1))
    assert [one.number for one in log.take_changed()] == [1]
    assert log.take_changed() == ()
    log.started(WorkerStarted(0, "j", 0, "j/1", "new", 5, 1.01, "i1"))
    (changed,) = log.take_changed()
    assert changed.started == {"j/1": 1.01}


def alone(log: IncidentLog, *failures: Failure) -> None:
    for sequence, one in enumerate(failures, log.count + 1):
        log.failed(FailureEvent("j", "ranks", 1, sequence, one), alone=True)


def replaced(rank: int, at: float) -> WorkerStarted:
    return WorkerStarted(0, "j", 0, f"j/{rank}", "new", 5, at, f"i{rank}")


@pytest.mark.parametrize("early", [False, True])
def test_of_ranks_that_are_started_anew_alone_each_has_an_incident_with_its_cost(early: bool) -> None:
    """Its replacement is reported by its agent, its failure by the lighthouse: either may be heard first."""
    log = IncidentLog()
    if early:
        log.started(replaced(1, 1.25))
    alone(log, failure(0, at=1.0), failure(1, at=1.2))
    if not early:
        log.started(replaced(1, 1.25))
    assert [(one.number, [each.rank for each in one.failures], one.started) for one in log.incidents] == [
        (1, [0], {}),
        (2, [1], {"j/1": 1.25}),
    ]
    console = Console(record=True, width=200, file=io.StringIO())
    show(console, "j", "runs", log.incidents, every_rank=False)
    text = console.export_text()
    assert "rank 1 on n was started anew alone: forked 50.0 ms after that, as seen by canary" in text
    again = IncidentLog(log.incidents)
    alone(again, failure(2, at=1.4))
    assert again.count == 3, "nor is one open to a coordinator that was started anew"


def test_ranks_that_go_with_their_node_have_one_incident() -> None:
    log = IncidentLog()
    gone = Cause(kind="node", text="its node is lost")
    alone(log, *(msgspec.structs.replace(failure(rank), cause=gone) for rank in range(2)))
    alone(log, msgspec.structs.replace(failure(2), cause=gone, node="another"))
    assert [[one.rank for one in incident.failures] for incident in log.incidents] == [[0, 1], [2]]


def test_an_incident_that_a_restart_of_all_has_ended_is_not_opened_by_a_restart_of_the_coordinator() -> None:
    log = IncidentLog()
    failed(log, failure(0))
    log.restarted()
    (changed, *_) = log.take_changed()
    assert changed.closed
    again = IncidentLog([changed])
    failed(again, failure(1))
    assert again.count == 2


def test_a_timeline_belongs_to_the_incident_that_led_to_its_iteration() -> None:
    log = IncidentLog()
    failed(log, failure(1))
    answered(log)
    assert log.timeline(Timeline("j", "j/0", "i0", 0, 1, Stamps(told=1.01)))
    assert not log.timeline(Timeline("j", "j/0", "i0", -1, 0, Stamps()))
    assert log.incidents[0].stamps["j/0"].told == 1.01


MOMENT = st.one_of(st.just(-1.0), st.floats(1.0, 2.0))


@given(
    st.lists(st.builds(Stamps, *[MOMENT] * 7), min_size=1, max_size=3),
    st.sampled_from([failure(1), failure(1, "faulted")]),
)
def test_segments_follow_each_other_and_add_up_to_the_total(stamps: list[Stamps], culprit: Failure) -> None:
    by_member = {f"j/{rank}": one for rank, one in enumerate(stamps)}
    rows = segments(Incident(1, "ranks", 0, [culprit], [], 1, 1.05, MEMBERS, by_member, {}, []))
    observed = [row for row in rows if row.duration is not None]
    assert all(row.duration >= 0 for row in observed if row.duration is not None)
    assert sum(row.duration or 0.0 for row in rows) == pytest.approx(total(rows), abs=1e-6)
    assert rows[0].end is None or culprit.kind == "faulted", "the kernel tells no time of death"


def test_the_last_rank_through_a_phase_is_named() -> None:
    stamps = {"j/0": Stamps(told=1.01, left=1.02), "j/2": Stamps(told=1.03, left=1.02), "j/1": Stamps(joined=1.2)}
    rows = {
        row.name: row for row in segments(Incident(1, "ranks", 0, [failure(1)], [], 1, 1.3, MEMBERS, stamps, {}, []))
    }
    assert rows["survivors told"].rank == 2
    assert rows["all asked to join"].rank == 1
    assert rows["process group up"].end is None


def test_brackets_in_an_error_are_shown_as_they_are() -> None:
    log = IncidentLog()
    text = "RuntimeError: [/gloo/pair.cc:561] [bold]"
    failed(log, msgspec.structs.replace(failure(1), cause=Cause(kind="exception", text=text)))
    failed(log, msgspec.structs.replace(failure(2), cause=Cause(kind="exception", text=text)), 2)
    answered(log)
    console = Console(record=True, width=200, file=io.StringIO())
    show(console, "job[/]", text, log.incidents, every_rank=True)
    assert console.export_text().count(text) == 3
