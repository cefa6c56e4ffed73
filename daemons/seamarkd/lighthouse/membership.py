"""The members of a group: the slots of the roster, who fills each, who is dead, and who is still expected (D1, D3)."""

from __future__ import annotations

from collections.abc import Collection

from msgspec import Struct

from seamark.protocol.messages import MemberLost, MemberStarted, Roster, Slot


class MemberState(Struct):
    """A slot of the roster and who fills it.

    ``incarnation`` is empty while nobody does, or as long as its agent has not told a lighthouse that was started
    anew. ``lost`` is the incarnation whose loss was published last; ``presumed`` says that no agent reported it, and it
    may come back with its node.
    """

    slot: Slot
    incarnation: str = ""
    lost: str = ""
    presumed: bool = False

    def is_elsewhere(self, node: str) -> bool:
        """Whether the slot's place is not, or no longer, on this node."""
        return bool(node) and node != self.slot.node

    def may_lose(self, report: MemberLost) -> bool:
        """True for the first report of the loss of who fills the slot, or filled it while nobody listened."""
        if report.incarnation == self.lost:
            return False
        if self.incarnation in ("", report.incarnation):
            return True
        return bool(report.replacement) and report.replacement == self.incarnation


class Membership:
    """Who is in the group, by its roster and by what agents say.

    Attributes:
        generation, placement: of the roster in force; -1 and 0 before the first.
        members: by name.
        living: those whose slot somebody fills.
        expected: by member, until when the next quorum waits for it, in seconds.
        dead: incarnations of this generation that are lost.
    """

    def __init__(self) -> None:
        self.generation = -1
        self.placement = 0
        self.members: dict[str, MemberState] = {}
        self.living: set[str] = set()
        self.expected: dict[str, float] = {}
        self.dead: set[str] = set()
        self._on_node: dict[str, list[str]] = {}
        self._join_timeout = 0.0
        self._start_timeout = 0.0

    @property
    def nodes(self) -> Collection[str]:
        """Those that its members are on."""
        return self._on_node.keys()

    def on_node(self, node: str) -> list[MemberState]:
        """The members of a node."""
        return [self.members[member] for member in self._on_node.get(node, ())]

    def reported(self, report: MemberLost) -> MemberState | None:
        """Whom the report is about, if it is of this generation and of where its place is."""
        state = self.members.get(report.member)
        if state is None or report.generation != self.generation or state.is_elsewhere(report.node):
            return None
        return state

    # --- rosters -------------------------------------------------------------------------------------------

    def renew(self, now: float, roster: Roster, patience: float) -> None:
        """The members of a new generation; each is expected for ``patience`` seconds."""
        self.generation, self.placement = roster.generation, roster.placement
        self._join_timeout, self._start_timeout = roster.join_timeout, roster.start_timeout
        self.members = {slot.member: MemberState(slot) for slot in roster.slots}
        self.living.clear()
        self.dead.clear()
        self._on_node = {}
        for slot in roster.slots:
            self._on_node.setdefault(slot.node, []).append(slot.member)
        self.expected = {slot.member: now + patience for slot in roster.slots}

    def place(self, now: float, roster: Roster) -> list[Slot]:
        """Slots of lost nodes have other places, or none for now, and there may be more of them.

        Returns:
            Those that have moved: who filled them has to end.
        """
        self.placement = roster.placement
        moved: list[Slot] = []
        for slot in roster.slots:
            state = self.members.get(slot.member)
            if state is not None and state.slot.placed == slot.placed:
                continue
            if state is None:
                state = self.members[slot.member] = MemberState(slot)
            elif state.slot.node != slot.node:
                moved.append(slot)
                self._on_node[state.slot.node].remove(slot.member)
                self.dead |= {state.incarnation} - {""}
                self.living.discard(slot.member)
                state.incarnation, state.presumed = "", False
            state.slot = slot
            on_node = self._on_node.setdefault(slot.node, [])
            if slot.member not in on_node:
                on_node.append(slot.member)
            if not state.incarnation:
                self.expected[slot.member] = now + self._join_timeout
        for member in self.members.keys() - {slot.member for slot in roster.slots}:
            self.expected.pop(member, None)
        return moved

    # --- who fills the slots -------------------------------------------------------------------------------

    def started(self, now: float, report: MemberStarted) -> None:
        """A slot has a new incarnation; the next quorum waits for it."""
        state = self.members.get(report.member)
        if state is None or report.generation != self.generation or state.incarnation == report.incarnation:
            return
        if state.is_elsewhere(report.node):
            # Its place is another node's by now.
            return
        if report.incarnation in self.dead:
            if not (state.presumed and state.lost == report.incarnation and not state.incarnation):
                # Announced before it was lost, and heard after it: nobody comes back from the dead.
                return
            self.dead.discard(report.incarnation)
            state.lost = ""
            state.presumed = False
        state.incarnation = report.incarnation
        self.living.add(report.member)
        self.expected[report.member] = now + self._start_timeout

    def fill(self, now: float, state: MemberState, incarnation: str) -> None:
        """Somebody else fills the slot, and the next quorum waits for it."""
        state.incarnation = incarnation
        self.living.add(state.slot.member)
        self.expected[state.slot.member] = now + self._join_timeout

    def vacate(self, state: MemberState) -> None:
        """Nobody fills the slot any more, and nobody is expected to."""
        state.incarnation = ""
        self.living.discard(state.slot.member)
        self.expected.pop(state.slot.member, None)

    def end(self) -> None:
        """Nobody fills any slot, and nobody is expected to."""
        self.living.clear()
        self.expected.clear()

    def expect_all(self, now: float) -> None:
        """All who live are on their way to a new wrapped call."""
        self.expected = dict.fromkeys(self.living, now + self._start_timeout)
