"""What a lighthouse that was started anew has to hear first: which quorum was the last, of every node of the job.

Until then it can publish no failure, for it does not know which iteration that ends: losses are kept, and each is
repeated by its agent until it is taken.
"""

from __future__ import annotations

from collections.abc import Set

from msgspec.structs import replace

from seamark.protocol.messages import Failure, MemberLost, StoreLost
from seamarkd.lighthouse.incidents import away
from seamarkd.lighthouse.membership import Membership

ANNOUNCING = 5.0
"""Seconds after its last quorum in which a node has said who lives there, repeated reports included. Who is announced
later is new, and was in no iteration before."""


class Recall:
    """The nodes of a group that are to be heard.

    Attributes:
        until: when they are waited for no longer, in seconds.
    """

    def __init__(self) -> None:
        self.until = 0.0
        self._unheard: set[str] = set()
        self._iterations: dict[str, tuple[int, float]] = {}
        """By node: the iteration that it was in last, and when it said so."""
        self._deferred: dict[str, MemberLost | StoreLost] = {}

    @property
    def running(self) -> bool:
        """Whether some node was not heard yet."""
        return bool(self._unheard)

    @property
    def sentence(self) -> str:
        """What it waits for, for people."""
        return "waits to hear from " + ", ".join(sorted(self._unheard)) + " what the last quorum was"

    def begin(self, nodes: Set[str], until: float) -> None:
        """These nodes are to be heard; none, where nobody was there before."""
        self._unheard = set(nodes)
        self.until = until

    def heard(self, node: str) -> None:
        """This one was."""
        self._unheard.discard(node)

    def was_in(self, now: float, node: str, iteration: int) -> None:
        """The iteration that its workers were in last."""
        self._iterations[node] = (iteration, now)

    def forget_deserted(self, now: float) -> None:
        """Nobody lives on those nodes that have not said so by now."""
        self._iterations = {node: one for node, one in self._iterations.items() if now - one[1] <= ANNOUNCING}

    def give_up(self) -> None:
        """Those that were not heard are waited for no longer."""
        self._unheard.clear()

    def defer(self, report: MemberLost | StoreLost) -> None:
        """Keeps a loss until it is known which iteration it ends."""
        self._deferred[report.store.incarnation if isinstance(report, StoreLost) else report.incarnation] = report

    def take_deferred(self) -> list[MemberLost | StoreLost]:
        """The losses that were kept, in their order."""
        deferred, self._deferred = self._deferred, {}
        return list(deferred.values())

    def cut_off(self, now: float, iteration: int, membership: Membership, active: Set[str]) -> list[Failure]:
        """Who was cut off while the others went on may wait for them in a collective that they have left.

        A node says which iteration it was in before it says who lives there: it is looked at once somebody does.

        Args:
            now: seconds.
            iteration: the present one.
            membership: of the group.
            active: the members of the last quorum.
        """
        found: list[Failure] = []
        for node, (last, _) in list(self._iterations.items()):
            here = [one for one in membership.on_node(node) if one.slot.member in membership.living]
            if not here:
                continue
            del self._iterations[node]
            if last < iteration and not any(one.slot.member in active for one in here):
                found.append(away(now, here[0].slot, here[0].incarnation, last, iteration))
        return found


def begin_chains(
    deferred: list[MemberLost | StoreLost], membership: Membership, answered: Set[str]
) -> list[MemberLost | StoreLost]:
    """The losses that were kept, as those who fill the slots now follow from them.

    Who died while recalling filled the slot when that began, though its replacement was announced meanwhile. Who was
    announced without being anybody's replacement, on a node that has its place again, follows who died last.
    """
    chains: dict[str, list[MemberLost]] = {}
    for report in deferred:
        if isinstance(report, MemberLost) and membership.reported(report) is not None:
            chains.setdefault(report.member, []).append(report)
    followed: dict[int, MemberLost] = {}
    for member, chain in chains.items():
        state, last = membership.members[member], chain[-1]
        if state.lost or member in answered:
            continue
        announced, state.incarnation = state.incarnation, chain[0].incarnation
        if announced and not last.replacement and all(one.incarnation != announced for one in chain):
            followed[id(last)] = replace(last, replacement=announced)
    return [followed.get(id(report), report) for report in deferred]
