"""How far the members of a group have come together: the last quorum, its iteration, their wrapped call (D4, D10)."""

from __future__ import annotations

from collections.abc import Sequence

from seamark.protocol.messages import Join, LastQuorum, Roster
from seamarkd.lighthouse.iteration import next_iteration
from seamarkd.lighthouse.quorum import PreviousQuorum, next_quorum_id


class Session:
    """What goes on from quorum to quorum.

    Args:
        floor: quorum ids stay above it (the daemon's epoch in the upper bits).

    Attributes:
        iteration: of the last quorum; -1 before the first.
        restarts: quorums after the first.
        call: which wrapped call the members are in, or have completed.
        done: they have completed it.
        fresh: no quorum of this call was answered yet, and it is not the first.
        previous: the last quorum.
        active, active_in: its members as far as they count for this call, and their generation.
    """

    def __init__(self, floor: int) -> None:
        self.iteration = -1
        self.restarts = 0
        self.call = 0
        self.done = False
        self.fresh = False
        self.previous: PreviousQuorum | None = None
        self.active: frozenset[str] = frozenset()
        self.active_in = -1
        self._floor = floor
        self._base_iteration = -1

    @property
    def quorum_id(self) -> int:
        """Of the last quorum; 0 before the first."""
        return self.previous.quorum_id if self.previous else 0

    def renew(self, roster: Roster) -> None:
        """A new generation begins, or is taken up by a lighthouse that was started anew."""
        if roster.running:
            # What the coordinator heard, should no node remember it: too high an iteration ends the present one, too.
            self.iteration = max(self.iteration, roster.base_iteration)
        if self.previous is not None:
            # Who was in the last quorum is gone with its generation: its places alone are no quorum of this one.
            self.previous = PreviousQuorum(self.previous.quorum_id)
        self._base_iteration = max(self._base_iteration, roster.base_iteration)

    def recall(self, last: LastQuorum) -> None:
        """What a node knows of the last quorum, which a lighthouse that was started anew did not see."""
        if last.call >= self.call:
            self.done = last.completed or (self.done and last.call == self.call)
            self.call, self.fresh = last.call, False
        if self.previous is None or last.quorum_id > self.previous.quorum_id:
            self.previous = PreviousQuorum(last.quorum_id, frozenset(last.members))
            self.active, self.active_in = self.previous.members, last.generation
            self.iteration = max(self.iteration, last.iteration)
            self.restarts = max(self.restarts, last.restarts)

    def has_completed(self, call: int) -> bool:
        """Whether this wrapped call is over."""
        return call < self.call or (self.done and call == self.call)

    def begin_call(self, call: int) -> None:
        """A new wrapped call: nobody is in it yet."""
        self.call, self.done = call, False
        self.fresh = True
        self.active = frozenset()

    def advance(self, generation: int, chosen: Sequence[str], requests: Sequence[Join]) -> int:
        """The next quorum, of these members, by what their requests say.

        Returns:
            Its id: above the last one that any of them knows.
        """
        carried = max(
            (PreviousQuorum(r.quorum_id, frozenset(r.quorum_members)) for r in requests if r.quorum_members),
            key=lambda quorum: quorum.quorum_id,
            default=None,
        )
        previous = self.previous
        if carried is not None and (previous is None or carried.quorum_id > previous.quorum_id):
            previous = carried
        commit_failures = max(r.commit_failures for r in requests)
        quorum_id = next_quorum_id(previous, chosen, commit_failures, floor=self._floor)
        known_before = max([self.iteration, self._base_iteration, *(r.iteration for r in requests)])
        self.iteration = next_iteration([r.iteration for r in requests], self.iteration, self._base_iteration)
        again = known_before >= 0 and not self.fresh
        self.restarts = max([self.restarts, *(r.restarts for r in requests)]) + int(again)
        self.fresh = False
        self.previous = PreviousQuorum(quorum_id, frozenset(chosen))
        self.active, self.active_in = frozenset(chosen), generation
        return quorum_id
