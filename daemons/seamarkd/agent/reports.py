"""Reports that are repeated until somebody acknowledges them."""

from __future__ import annotations

from msgspec import Struct

from seamark.protocol.messages import MemberStarted, Message, WorkerExited
from seamarkd.agent.effects import Effect, ToCoordinator, ToLighthouse

RESEND_INTERVAL = 0.5
"""Seconds between two sendings of a report that nobody acknowledged."""


class Report(Struct):
    """A report that has to be acknowledged."""

    effect: ToLighthouse | ToCoordinator
    due: float


class Reports:
    """Those of one agent.

    Args:
        has_coordinator: without one, what is meant for it is repeated by nobody.
    """

    def __init__(self, *, has_coordinator: bool = True) -> None:
        self._has_coordinator = has_coordinator
        self._request = 0
        self._waiting: dict[int, Report] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def next_request(self) -> int:
        """A number for the next report."""
        self._request += 1
        return self._request

    def send(self, now: float, effect: ToLighthouse | ToCoordinator, *, first: bool = False) -> Effect:
        """The report itself, which is repeated from now on; with ``first`` before all others."""
        request: int = getattr(effect.message, "request")  # noqa: B009 - every report has one
        if self._has_coordinator or isinstance(effect, ToLighthouse):
            report = Report(effect, now + RESEND_INTERVAL)
            if first:
                self._waiting = {request: report} | self._waiting
            else:
                self._waiting[request] = report
        return effect

    def acknowledged(self, request: int) -> Message | None:
        """What the report was, unless that was known already."""
        report = self._waiting.pop(request, None)
        return report.effect.message if report is not None else None

    def withdraw_announcement(self, incarnation: str) -> None:
        """Repeated after the news of the worker's end it would raise it from the dead."""
        for request, report in list(self._waiting.items()):
            message = report.effect.message
            if isinstance(message, MemberStarted) and message.incarnation == incarnation:
                del self._waiting[request]

    def forget_lighthouse(self) -> None:
        """To a lighthouse that is new all is told anew."""
        self._waiting = {
            request: report for request, report in self._waiting.items() if isinstance(report.effect, ToCoordinator)
        }

    def exits(self) -> set[str]:
        """The incarnations whose exit is being reported."""
        messages = [report.effect.message for report in self._waiting.values()]
        return {message.incarnation for message in messages if isinstance(message, WorkerExited)}

    def due(self, now: float) -> list[Effect]:
        """Those to send again."""
        effects: list[Effect] = []
        for report in self._waiting.values():
            if now >= report.due:
                report.due = now + RESEND_INTERVAL
                effects.append(report.effect)
        return effects
