"""What a rank knows of its place in the job, as the wrapped function sees it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from seamark.protocol.messages import Member


@dataclass(frozen=True, slots=True)
class State:
    """A rank's place in one iteration.

    ``rank`` and ``world_size`` are the active ones that RANK and WORLD_SIZE say; ``initial_rank`` and
    ``initial_world_size`` those the job was started with; ``restarts`` counts restarts of either kind.
    """

    iteration: int
    restarts: int
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    initial_rank: int
    initial_world_size: int

    @property
    def active_rank(self) -> int:
        """The rank among those that take part in this iteration."""
        return self.rank

    @property
    def active_world_size(self) -> int:
        """How many ranks take part in this iteration."""
        return self.world_size


def assign(members: Sequence[Member], member: str, *, iteration: int, restarts: int, initial_world_size: int) -> State:
    """The state of a member: ranks keep their order and close their gaps (NVRx's ``ShiftRanks``).

    Args:
        members: the quorum in the order of initial ranks.
        member: whose state.
        iteration, restarts: from the quorum's answer.
        initial_world_size: the world the job was started with.
    """
    rank, own = next((rank, other) for rank, other in enumerate(members) if other.member == member)
    beside = [other.member for other in members if other.node == own.node]
    return State(
        iteration=iteration,
        restarts=restarts,
        rank=rank,
        world_size=len(members),
        local_rank=beside.index(member),
        local_world_size=len(beside),
        initial_rank=own.initial_rank,
        initial_world_size=initial_world_size,
    )


def export(state: State) -> None:
    """Sets the environment variables that torch and people read."""
    os.environ.update(
        RANK=str(state.rank),
        WORLD_SIZE=str(state.world_size),
        LOCAL_RANK=str(state.local_rank),
        LOCAL_WORLD_SIZE=str(state.local_world_size),
    )
