"""What a rank knows of its place in the job, as the wrapped function and the wrapper's components see it."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from seamark.inprocess.rank_assignment import Assignment, Place, assign
from seamark.protocol.messages import Member

NODE_KEY = "node"
"""What a member names its host by in its joins, where each has an agent of its own, and so a node of its own."""


class Mode(enum.Enum):
    """What a rank does in an iteration."""

    INITIALIZED = enum.auto()
    """It has joined none yet."""
    ACTIVE = enum.auto()
    INACTIVE = enum.auto()
    """A warm spare: it waits, and takes part after the next loss."""
    TERMINATED = enum.auto()
    """The rank assignment has dropped it."""


@dataclass(frozen=True, slots=True)
class State:
    """A rank's place in one iteration.

    Attributes:
        rank: among all members of the quorum, spares included.
        world_size: members of the quorum.
        active_rank: among those that take part, which RANK says; None for a rank that does not.
        active_world_size: how many take part, which WORLD_SIZE says.
        local_rank: on its node, as the process was started: a device that it has bound stays its own.
        local_world_size: how many take part on its node.
        initial_rank: that the process was started with.
        initial_world_size: that the job was started with.
        iteration: rises at every restart and is never used twice in a job.
        restarts: of the job so far, of either kind, the same on every rank.
        mode: whether it takes part.
        fn_exception: what the function raised on this rank in the iteration before, without its traceback; None where
            it raised nothing.
    """

    iteration: int
    restarts: int
    rank: int
    world_size: int
    active_rank: int | None
    active_world_size: int
    local_rank: int
    local_world_size: int
    initial_rank: int
    initial_world_size: int
    mode: Mode = Mode.ACTIVE
    fn_exception: Exception | None = None

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> State:
        """The state of a process that has joined no quorum yet.

        Args:
            environ: RANK, WORLD_SIZE, and where set LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun sets them.

        Raises:
            KeyError: RANK or WORLD_SIZE is missing.
            ValueError: one of them is no number.
        """
        rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        return cls(
            iteration=-1,
            restarts=0,
            rank=rank,
            world_size=world_size,
            active_rank=None,
            active_world_size=0,
            local_rank=int(environ.get("LOCAL_RANK", "0")),
            local_world_size=int(environ.get("LOCAL_WORLD_SIZE", "1")),
            initial_rank=rank,
            initial_world_size=world_size,
            mode=Mode.INITIALIZED,
        )


FrozenState: TypeAlias = State
"""The reference's name for a state that nobody can change, which every ``State`` is here."""


def place(
    assignment: Assignment,
    members: Sequence[Member],
    member: str,
    *,
    iteration: int,
    restarts: int,
    initial_world_size: int,
    fn_exception: Exception | None = None,
) -> tuple[State, str]:
    """The state of a member, and why it was dropped, which is empty if it was not.

    Args:
        assignment: the job's.
        members: the quorum.
        member: whose state.
        iteration, restarts: from the quorum's answer.
        initial_world_size: the world the job was started with.
        fn_exception: what the function raised here in the iteration before.

    Raises:
        RestartAbort: the assignment leads nowhere.
    """
    own = next(one for one in members if one.member == member)
    places = [Place(one.member, one.initial_rank, one.keys) for one in members]
    ranks = assign(assignment, places, initial_world_size)
    rank_of = {one.member: one.rank for one in ranks.places}
    active = len(ranks.places) if ranks.active_world_size is None else ranks.active_world_size
    reason = (ranks.discarded or {}).get(member, "")
    rank = rank_of.get(member, -1)
    mode = Mode.TERMINATED if rank < 0 else Mode.ACTIVE if rank < active else Mode.INACTIVE
    beside = [one for one in members if _host(one) == _host(own) and 0 <= rank_of.get(one.member, -1) < active]
    state = State(
        iteration=iteration,
        restarts=restarts,
        rank=rank,
        world_size=len(ranks.places),
        active_rank=rank if mode is Mode.ACTIVE else None,
        active_world_size=active,
        local_rank=own.local_rank,
        local_world_size=len(beside),
        initial_rank=own.initial_rank,
        initial_world_size=initial_world_size,
        mode=mode,
        fn_exception=fn_exception,
    )
    return state, reason


def _host(member: Member) -> str:
    return member.keys.get(NODE_KEY, member.node)


def export(state: State) -> None:
    """Sets the environment variables that torch and people read, of a rank that takes part."""
    os.environ.update(
        RANK=str(state.active_rank),
        WORLD_SIZE=str(state.active_world_size),
        LOCAL_RANK=str(state.local_rank),
        LOCAL_WORLD_SIZE=str(state.local_world_size),
    )
