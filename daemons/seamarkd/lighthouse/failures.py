"""The failure tick: who has not been heard of for too long, and who is back.

One pure function over plain data: ``failure_tick(now, heartbeats, participants, failures, heartbeat_timeout)``. Its
rules are those of torchft's fork with failure notification (FIELD-NOTES 1, ``failure_tick`` of the vectors): a
member is notified once, recorded, and removed from the heartbeats and the participants; whoever beats again leaves
the failures; when anything was notified, all participants are cleared, so that the quorum forms anew.

    tick = failure_tick(
        now=10.0, heartbeats={"a": 9.9, "b": 4.0}, participants={"b"}, failures=set(), heartbeat_timeout=5.0
    )
    tick.notifications  # ["b"]

It knows no job, no socket and no clock: every time is an argument, in seconds of one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from msgspec import Struct

TIMEOUT_TEXT = "heartbeat timeout"


class FailureTick(Struct, frozen=True):
    """What the tick found, and the state after it. Lists are sorted by member id."""

    notifications: list[str]
    recovered: list[str]
    heartbeats: dict[str, float]
    participants: set[str]
    failures: set[str]


def failure_tick(
    *,
    now: float,
    heartbeats: Mapping[str, float],
    participants: Set[str],
    failures: Set[str],
    heartbeat_timeout: float,
) -> FailureTick:
    """One failure tick.

    Args:
        now: the present, seconds.
        heartbeats: last heartbeat by member id, seconds.
        participants: who waits for a quorum.
        failures: who was notified and has not been heard of since.
        heartbeat_timeout: seconds; at exactly this age a member is unhealthy for a quorum and not yet failed.

    Returns:
        Who is to be notified, who recovered, and the state after it.
    """
    stale = {member for member, at in heartbeats.items() if now - at > heartbeat_timeout}
    notifications = sorted(stale - failures)
    recovered = sorted(member for member in failures if member in heartbeats and member not in stale)
    return FailureTick(
        notifications=notifications,
        recovered=recovered,
        heartbeats={member: at for member, at in heartbeats.items() if member not in notifications},
        participants=set() if notifications else set(participants),
        failures=(set(failures) - set(recovered)) | set(notifications),
    )
