"""Which members of a quorum take part in an iteration, and under which ranks (NVRx's ``inprocess.rank_assignment``).

An assignment takes ``Ranks`` and returns them; ``seamark.inprocess.Compose`` chains several, the last one first. Every
member assigns all of them from the same quorum, so all come to the same end and nobody asks anybody: what a member
alone can tell, such as the name of its host, travelled in its join (``keys_of``). Pure.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from types import CodeType, FunctionType
from typing import Any, TypeAlias

from seamark.inprocess.compose import parts_of
from seamark.inprocess.exceptions import RestartAbort

SAME = "assignment"
"""The key by which members see that all of them assign alike."""


@dataclass(frozen=True, slots=True)
class Place:
    """A member and the rank that it has so far."""

    member: str
    rank: int
    keys: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Ranks:
    """The members of a quorum on their way to their ranks.

    Attributes:
        places: the members, by rank.
        world_size: ranks from 0 up; those that are in no place are gaps, left by members that are gone.
        active_world_size: so many of the lowest ranks take part, the others are spares; None for all.
        discarded: members that were dropped by an assignment, with the reason.
    """

    places: tuple[Place, ...]
    world_size: int
    active_world_size: int | None = None
    discarded: Mapping[str, str] | None = None

    @property
    def gaps(self) -> list[int]:
        """Ranks that nobody has."""
        return sorted(set(range(self.world_size)) - {place.rank for place in self.places})


Assignment: TypeAlias = Callable[[Ranks], Ranks]


class ActivateAllRanks:
    """All ranks take part, also where a later assignment of a ``Compose`` left spares."""

    def __call__(self, ranks: Ranks) -> Ranks:
        return replace(ranks, active_world_size=None)


@dataclass(frozen=True)
class MaxActiveWorldSize:
    """At most so many ranks take part; the others are warm spares that wait, and take over after a loss.

    Args:
        max_active_world_size: in ranks; None for all of them.

    Raises:
        ValueError: it is less than 1.
    """

    max_active_world_size: int | None = None

    def __post_init__(self) -> None:
        if self.max_active_world_size is not None and self.max_active_world_size < 1:
            raise ValueError(f"max_active_world_size must be at least 1, not {self.max_active_world_size}")

    def __call__(self, ranks: Ranks) -> Ranks:
        if self.max_active_world_size is None:
            return ranks
        return replace(ranks, active_world_size=min(_active(ranks), self.max_active_world_size))


@dataclass(frozen=True)
class ActiveWorldSizeDivisibleBy:
    """As many ranks take part as the divisor allows; the others are warm spares.

    Args:
        divisor: in ranks, for instance those of one model-parallel group.

    Raises:
        ValueError: it is less than 1.
    """

    divisor: int = 1

    def __post_init__(self) -> None:
        if self.divisor < 1:
            raise ValueError(f"divisor must be at least 1, not {self.divisor}")

    def __call__(self, ranks: Ranks) -> Ranks:
        return replace(ranks, active_world_size=_active(ranks) // self.divisor * self.divisor)


class ShiftRanks:
    """Closes gaps: ranks keep their order, each moves down past the ranks that are gone."""

    def __call__(self, ranks: Ranks) -> Ranks:
        places = tuple(replace(place, rank=rank) for rank, place in enumerate(ranks.places))
        return replace(ranks, places=places, world_size=len(places))


class FillGaps:
    """Closes gaps: the first ranks keep theirs, the last ones move into the gaps."""

    def __call__(self, ranks: Ranks) -> Ranks:
        world_size = len(ranks.places)
        gaps = iter(gap for gap in ranks.gaps if gap < world_size)
        moved = [place if place.rank < world_size else replace(place, rank=next(gaps)) for place in ranks.places]
        return replace(ranks, places=tuple(sorted(moved, key=lambda place: place.rank)), world_size=world_size)


@dataclass(frozen=True)
class FilterGroupedByKey:
    """Drops whole groups of ranks, for instance hosts with fewer than 8 healthy ones.

    A dropped rank leaves the job: its call of the wrapped function raises ``RankDiscarded``.

    Args:
        key_or_fn: what tells a rank's group: a function of (rank, world size), called once by each rank for itself
            before it joins; or the name of an environment variable of the rank.
        condition: whether a group of so many ranks may stay.

    Example:
        >>> Compose(
        ...     ShiftRanks(),
        ...     FilterGroupedByKey(lambda *_: socket.gethostname(), condition=lambda count: count == 8),
        ... )

    Raises:
        TypeError: ``key_or_fn`` is neither a name nor a function, or ``condition`` is no function.
    """

    key_or_fn: str | Callable[[int, int], object]
    condition: Callable[[int], bool]

    def __post_init__(self) -> None:
        if not (isinstance(self.key_or_fn, str) or callable(self.key_or_fn)):
            raise TypeError(f"key_or_fn is the name of an environment variable or a function, not {self.key_or_fn!r}")
        if not callable(self.condition):
            raise TypeError(f"condition is a function of the number of ranks in a group, not {self.condition!r}")

    @property
    def key(self) -> str:
        """Under which name the group travels in a join."""
        return f"group:{_digest(self.key_or_fn)}"

    def group_of(self, rank: int, world_size: int, environ: Mapping[str, str]) -> str:
        """The group of this process.

        Raises:
            KeyError: there is no such environment variable.
        """
        if isinstance(self.key_or_fn, str):
            return environ[self.key_or_fn]
        return str(self.key_or_fn(rank, world_size))

    def __call__(self, ranks: Ranks) -> Ranks:
        groups = {place.member: place.keys[self.key] for place in ranks.places}
        sizes = Counter(groups.values())
        fits = {group: self.condition(size) for group, size in sizes.items()}
        discarded = {
            member: f"its group {group!r} has {sizes[group]} ranks, which the job's FilterGroupedByKey does not accept"
            for member, group in groups.items()
            if not fits[group]
        }
        staying = tuple(place for place in ranks.places if place.member not in discarded)
        return replace(ranks, places=staying, discarded={**(ranks.discarded or {}), **discarded})


DEFAULT: Assignment = ShiftRanks()


def keys_of(
    assignment: Assignment, rank: int, world_size: int, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """What a member says of itself in its join, for all to assign by.

    Args:
        assignment: the job's.
        rank, world_size: those that this process was started with.
        environ: where names of environment variables are looked up.

    Raises:
        KeyError: a filter goes by an environment variable that this process does not have.
    """
    parts = parts_of(assignment)
    filters = [part for part in parts if isinstance(part, FilterGroupedByKey)]
    return {SAME: _digest(parts)} | {one.key: one.group_of(rank, world_size, environ) for one in filters}


def assign(assignment: Assignment, places: Iterable[Place], world_size: int) -> Ranks:
    """The ranks of all members.

    Args:
        assignment: the job's.
        places: the members of the quorum with the ranks that they were started with.
        world_size: that the job was started with.

    Raises:
        RestartAbort: members assign differently, the ranks have gaps, or nobody takes part: no restart can help.
    """
    ordered = tuple(sorted(places, key=lambda place: place.rank))
    if len({place.keys.get(SAME, "") for place in ordered}) > 1:
        raise RestartAbort("ranks were started with different rank assignments: give all of them the same script")
    ranks = assignment(Ranks(ordered, world_size))
    if ranks.gaps:
        missing = ", ".join(map(str, ranks.gaps))
        raise RestartAbort(f"nobody has rank {missing}: compose the rank assignment with ShiftRanks() or FillGaps()")
    if ranks.active_world_size == 0 and ranks.places:
        raise RestartAbort(f"of {ranks.world_size} ranks the rank assignment lets none take part")
    return ranks


def _active(ranks: Ranks) -> int:
    return len(ranks.places) if ranks.active_world_size is None else ranks.active_world_size


def _digest(what: object) -> str:
    return hashlib.sha256(repr(_described(what)).encode()).hexdigest()[:16]


def _described(what: Any) -> object:
    """The same in every process that runs the same script: no address, no value of this host."""
    if isinstance(what, FunctionType):
        return _described(what.__code__)
    if isinstance(what, CodeType):
        return (what.co_code, what.co_names, *map(_described, what.co_consts))
    if isinstance(what, tuple | list):
        return tuple(map(_described, what))
    if is_dataclass(what) and not isinstance(what, type):
        return (type(what).__qualname__, *(_described(getattr(what, one.name)) for one in fields(what)))
    if isinstance(what, str | bytes | int | float | bool | None):
        return what
    return type(what).__qualname__
