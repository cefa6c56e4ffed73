"""The quorum decision: may these participants go on together, and if not, why not.

One pure function over plain data: ``compute_quorum(now, participants, heartbeats, previous, options)``. Its nine
rules and their order are those of torchft's lighthouse, so that its vectors pass unchanged; ``expected`` (members
that were announced and are on their way) is ours, and without any the decision is the reference's, bit for bit.

    decision = compute_quorum(
        now=10.0,
        participants={"a": Participant("a", joined_at=9.0), "b": Participant("b", joined_at=9.5)},
        heartbeats={"a": 9.9, "b": 9.9},
        previous=None,
        options=QuorumOptions(min_members=1),
    )
    decision.members  # ["a", "b"], or None with decision.reason saying what it waits for

It knows no job, no socket and no clock: every time is an argument, in seconds of one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from msgspec import Struct, field

Kind = Literal["fast_quorum", "valid_quorum", "below_min_replicas", "not_majority_of_healthy", "waiting_for_stragglers"]


class QuorumOptions(Struct, frozen=True):
    """Limits of a group's quorum, in members and seconds. Defaults: torchft's."""

    min_members: int = 1
    join_timeout: float = 60.0
    heartbeat_timeout: float = 5.0
    target_members: int = 0
    """So many are waited for up to the join timeout, and then nobody else; 0: no such number (ours, D14)."""


class Participant(Struct, frozen=True):
    """A member that asked for the next quorum and waits for it."""

    member: str
    joined_at: float
    shrink_only: bool = False
    commit_failures: int = 0


class Decision(Struct, frozen=True):
    """What was decided: ``members`` (sorted) or None, its kind, and a sentence for people."""

    members: list[str] | None
    kind: Kind
    reason: str
    joined: int
    participants: int
    healthy: int
    shrink_only: bool


class PreviousQuorum(Struct, frozen=True):
    """The last answered quorum of the group."""

    quorum_id: int
    members: frozenset[str] = field(default_factory=frozenset)


def compute_quorum(
    *,
    now: float,
    participants: Mapping[str, Participant],
    heartbeats: Mapping[str, float],
    previous: PreviousQuorum | None,
    options: QuorumOptions,
    expected: Mapping[str, float] | None = None,
) -> Decision:
    """Decides whether the group's participants form a quorum now.

    Args:
        now: the present, seconds.
        participants: who asked, by member id.
        heartbeats: last sign of life by member id, seconds; asking for a quorum is one.
        previous: the last answered quorum, if there was one.
        options: the group's limits.
        expected: members on their way, with the time up to which the quorum waits for each.

    Returns:
        The decision with its reason.
    """
    healthy = {member for member, at in heartbeats.items() if now - at < options.heartbeat_timeout}
    joined = {member: participant for member, participant in participants.items() if member in healthy}
    coming = {member for member, deadline in (expected or {}).items() if now < deadline and member not in joined}
    healthy |= coming

    shrink_only = any(participant.shrink_only for participant in joined.values())
    candidates = sorted(joined)
    if shrink_only:
        before = previous.members if previous else frozenset()
        candidates = [member for member in candidates if member in before]

    state = f"[{len(joined)}/{len(participants)} participants healthy][{len(healthy)} heartbeating]"
    state += f"[shrink_only={str(shrink_only).lower()}]"
    state += f"[{len(coming)} expected]" if coming else ""

    def decide(members: list[str] | None, kind: Kind, sentence: str) -> Decision:
        return Decision(members, kind, f"{sentence} {state}", len(joined), len(participants), len(healthy), shrink_only)

    first = min((participant.joined_at for participant in joined.values()), default=now)
    if len(joined) < options.target_members and now - first < options.join_timeout:
        return decide(
            None,
            "waiting_for_stragglers",
            f"New quorum waits for {options.target_members - len(joined)} more to make the {options.target_members} "
            f"that were asked for, up to the join timeout of {options.join_timeout:g} s",
        )
    if (
        previous is not None
        and previous.members
        and all(member in joined for member in previous.members)
        and (not shrink_only or len(candidates) >= options.min_members)
    ):
        return decide(candidates, "fast_quorum", "every member of the previous quorum has joined again")
    if len(joined) < options.min_members:
        return decide(
            None,
            "below_min_replicas",
            f"New quorum not ready, only have {len(joined)} participants, need min_replicas {options.min_members}",
        )
    if len(candidates) < options.min_members:
        return decide(
            None,
            "below_min_replicas",
            f"New quorum not ready, only {len(candidates)} members of the previous quorum have joined (shrink_only), "
            f"need min_replicas {options.min_members}",
        )
    if len(joined) <= len(healthy) // 2:
        return decide(
            None,
            "not_majority_of_healthy",
            f"New quorum not ready, only have {len(joined)} participants, need at least half of "
            f"{len(healthy)} healthy workers",
        )
    stragglers = healthy - joined.keys()
    waiting_for = coming if now - first >= options.join_timeout else stragglers
    if waiting_for and not 0 < options.target_members <= len(joined):
        return decide(
            None,
            "waiting_for_stragglers",
            f"New quorum waits for {_some(sorted(waiting_for))}: healthy and not joined within the join timeout "
            f"of {options.join_timeout:g} s",
        )
    return decide(candidates, "valid_quorum", "a valid quorum")


def next_quorum_id(
    previous: PreviousQuorum | None, members: Sequence[str], commit_failures: int, *, floor: int = 0
) -> int:
    """The id of the quorum that these members form.

    One more than before if the members changed or any reports failed commits, else unchanged (torchft's rule);
    never below ``floor``, which a daemon derives from its epoch so that ids rise through restarts.
    """
    if previous is None:
        return floor + 1
    changed = previous.members != frozenset(members)
    return max(previous.quorum_id + (1 if changed or commit_failures > 0 else 0), floor + 1)


def _some(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
