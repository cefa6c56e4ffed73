"""Who waits for an answer of a group: joins and completions that are open, and the answer that was given last.

Each route is answered once for all of its members. When to answer is ``group.py``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from seamark.protocol.messages import (
    Complete,
    Completed,
    Join,
    QuorumAnswer,
    QuorumReset,
    Recipient,
    Refused,
)
from seamarkd.effects import Effect, Send


class Waiter(Struct):
    """An unanswered request: where to answer, and since when it waits."""

    route: bytes
    request: int
    incarnation: str
    since: float


class Requests:
    """The requests of a group's members.

    Attributes:
        joins: by member, who waits for the next quorum.
        completions: by member, whose function has returned.
        answered: by member of the last quorum, the request that it answered.
        last_answer: that quorum's, to one of the routes.
    """

    def __init__(self, job: str, group: str) -> None:
        self._job = job
        self._group = group
        self.joins: dict[str, tuple[Waiter, Join]] = {}
        self.completions: dict[str, Waiter] = {}
        self.answered: dict[str, Waiter] = {}
        self.last_answer: QuorumAnswer | None = None

    def take(self, waiter: Waiter, request: Join) -> None:
        """Who asked before waits since then."""
        earlier = self.joins.get(request.member)
        if earlier is not None:
            waiter.since = earlier[0].since
        self.joins[request.member] = (waiter, request)
        self.completions.pop(request.member, None)

    def clear(self) -> None:
        """Nobody waits for anything; nobody is told."""
        self.joins.clear()
        self.completions.clear()

    def _take_all(self) -> dict[str, Waiter]:
        """All who wait for anything; from now on nobody does."""
        waiting = {member: waiter for member, (waiter, _) in self.joins.items()} | self.completions
        self.clear()
        return waiting

    # --- answers -------------------------------------------------------------------------------------------

    def answer(self, answer: QuorumAnswer, waiting: Mapping[str, Waiter]) -> list[Effect]:
        """The quorum, for those of its members who waited."""
        self.answered = dict(waiting)
        effects: list[Effect] = []
        for route, recipients in _by_route(waiting).items():
            self.last_answer = replace(answer, recipients=recipients)
            effects.append(Send(route, self.last_answer))
        return effects

    def answer_again(self, answer: QuorumAnswer, member: str, waiter: Waiter) -> Effect:
        """It was lost with the agent that should have delivered it."""
        return Send(waiter.route, replace(answer, recipients=[_recipient(member, waiter)]))

    def reset(self, why: str) -> list[Effect]:
        """Clears the participants (rule of the failure tick) and tells each waiting caller at once."""
        return [
            Send(route, QuorumReset(self._job, self._group, recipients, f"quorum reset: {why}"))
            for route, recipients in _by_route(self._take_all()).items()
        ]

    def reset_one(self, member: str, waiter: Waiter, why: str) -> Effect:
        """Its request came to nothing: it joins again."""
        return Send(waiter.route, QuorumReset(self._job, self._group, [_recipient(member, waiter)], why))

    def complete_all(self, call: int) -> list[Effect]:
        """This call is over: whoever waits is told so."""
        return [
            Send(route, Completed(self._job, self._group, recipients, call))
            for route, recipients in _by_route(self._take_all()).items()
        ]

    def complete_one(self, member: str, waiter: Waiter, call: int) -> Effect:
        """The call that it asks for is over."""
        return Send(waiter.route, Completed(self._job, self._group, [_recipient(member, waiter)], call))

    def refuse_all(self, why: str) -> list[Effect]:
        """The members of an earlier generation have to end."""
        waiting, self.joins = self.joins, {}
        self.completions.clear()
        return [Send(waiter.route, refused(request, "STALE_GENERATION", why)) for waiter, request in waiting.values()]

    def refuse_one(self, member: str, why: str) -> list[Effect]:
        """This member has to end, if it waits."""
        waiting = self.joins.pop(member, None)
        return [Send(waiting[0].route, refused(waiting[1], "STALE_GENERATION", why))] if waiting else []


def refused(request: Join | Complete, code: Literal["UNKNOWN_MEMBER", "STALE_GENERATION"], why: str) -> Refused:
    """The refusal of a member's request, with a sentence for people."""
    return Refused(request.request, code, why, request.job, request.member, request.incarnation)


def _recipient(member: str, waiter: Waiter) -> Recipient:
    return Recipient(member, waiter.incarnation, waiter.request)


def _by_route(waiting: Mapping[str, Waiter]) -> dict[bytes, list[Recipient]]:
    routes: dict[bytes, list[Recipient]] = {}
    for member, waiter in waiting.items():
        routes.setdefault(waiter.route, []).append(_recipient(member, waiter))
    return routes
