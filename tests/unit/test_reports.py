"""Reports of an agent: repeated until acknowledged, and never after what makes them untrue."""

from __future__ import annotations

from seamark.protocol.messages import LastQuorum, MemberStarted, Message, WorkerStarted
from seamarkd.agent.effects import ToCoordinator, ToLighthouse
from seamarkd.agent.reports import RESEND_INTERVAL, Reports


def started(request: int, incarnation: str = "i0") -> ToLighthouse:
    return ToLighthouse(MemberStarted(request, "job", 0, "job/0", incarnation, "here"))


def running(request: int) -> ToCoordinator:
    return ToCoordinator(WorkerStarted(request, "job", 0, "job/0", "i0", 7, 1.0, "", "here"))


def quorum(request: int) -> ToLighthouse:
    return ToLighthouse(LastQuorum(request, "job", 0, 0, -1, 0, [], False, "here"))


def messages(reports: Reports, now: float) -> list[Message]:
    return [effect.message for effect in reports.due(now) if isinstance(effect, ToLighthouse | ToCoordinator)]


def test_a_report_is_repeated_at_its_interval_until_it_is_acknowledged() -> None:
    reports = Reports()
    first = started(reports.next_request())
    assert reports.send(0.0, first) is first
    assert messages(reports, RESEND_INTERVAL - 0.01) == []
    assert messages(reports, RESEND_INTERVAL) == [first.message]
    assert messages(reports, RESEND_INTERVAL + 0.01) == []
    assert reports.acknowledged(first.message.request) == first.message  # type: ignore[attr-defined]
    assert reports.acknowledged(first.message.request) is None  # type: ignore[attr-defined]
    assert messages(reports, 9.0) == []
    assert not reports


def test_an_announcement_is_withdrawn_and_nothing_else_is() -> None:
    reports = Reports()
    sent = [started(1, "i0"), running(2), started(3, "i1")]
    for one in sent:
        reports.send(0.0, one)
    reports.withdraw_announcement("i0")
    assert messages(reports, 9.0) == [one.message for one in sent[1:]]


def test_a_new_lighthouse_is_told_anew_and_the_coordinator_as_before() -> None:
    reports = Reports()
    for one in (started(1), running(2)):
        reports.send(0.0, one)
    reports.forget_lighthouse()
    assert messages(reports, 9.0) == [running(2).message]


def test_who_comes_first_is_repeated_first() -> None:
    reports = Reports()
    reports.send(0.0, started(1))
    reports.send(0.0, quorum(2), first=True)
    assert messages(reports, 9.0) == [quorum(2).message, started(1).message]


def test_without_a_coordinator_nobody_acknowledges_what_it_would_be_told() -> None:
    reports = Reports(has_coordinator=False)
    assert reports.send(0.0, running(1)) == running(1)
    assert not reports
