"""An incident as consecutive segments: what each phase of a restart cost.

Every boundary is the moment at which the *last* rank had passed a phase, as that rank's own process saw it; a phase
that nobody saw is "not observed", and its time belongs to the next one that was. So the segments add up to the total.
Pure: an incident record in, rows out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from seamark.protocol.messages import Incident, Stamps


@dataclass(frozen=True, slots=True)
class Segment:
    """One phase. ``begin`` and ``end`` are seconds since the first moment observed; None if nobody saw its end."""

    name: str
    begin: float
    end: float | None
    rank: int | None
    """The rank that was last through it."""

    @property
    def duration(self) -> float | None:
        """Seconds, or None if not observed."""
        return None if self.end is None else self.end - self.begin


def segments(incident: Incident) -> list[Segment]:
    """The phases of an incident in their order."""
    culprit = incident.failures[0]
    ranks = {member.member: rank for rank, member in enumerate(incident.members)}
    survivors = {member: stamps for member, stamps in incident.stamps.items() if stamps.left >= 0}
    opened = min(failure.detected_at for failure in incident.failures)
    published = min(failure.published_at for failure in incident.failures)
    start = culprit.occurred_at if culprit.occurred_at >= 0 else opened

    def last(stamps: Iterable[tuple[str, Stamps]], field: Callable[[Stamps], float]) -> tuple[float, int | None]:
        times = [(field(one), ranks.get(member)) for member, one in stamps]
        return max(times, default=(-1.0, None), key=lambda item: item[0])

    everybody = incident.stamps.items()
    kept = survivors.items()
    moments: list[tuple[str, tuple[float, int | None]]] = [
        ("fault detected", (opened if culprit.occurred_at >= 0 else -1.0, None)),
        ("failure published", (published, None)),
        ("survivors told", last(kept, lambda one: one.told)),
        ("collectives cut", last(kept, lambda one: one.aborted)),
        ("function left", last(kept, lambda one: one.left)),
        ("all asked to join", last(everybody, lambda one: one.joined)),
        ("quorum answered", last(everybody, lambda one: one.answered)),
        ("process group up", last(everybody, lambda one: one.group_ready)),
        ("first step done", last(everybody, lambda one: one.first_step)),
    ]
    rows: list[Segment] = []
    reached = 0.0
    for name, (moment, rank) in moments:
        if moment < 0:
            rows.append(Segment(name, reached, None, None))
            continue
        end = max(reached, moment - start)
        rows.append(Segment(name, reached, end, rank))
        reached = end
    return rows


def total(rows: list[Segment]) -> float:
    """Seconds from the first moment observed to the last."""
    return max((row.end for row in rows if row.end is not None), default=0.0)
