"""The recovery plan: after a quorum, who heals from whom, and who takes part in the step.

Pure functions over plain data. Each rank of each replica group computes the plan for itself from the same quorum, so
that all plans agree and no message is needed. The rules are those of torchft's manager, so that its vectors
pass unchanged; `Replica` and `Plan` have the field names of the vectors:

    >>> from seamark.protocol.messages import Replica
    >>> from seamark.replicas.plan import compute_plan, participation
    >>> def replica(name, step):
    ...     return Replica(name, "incarnation", f"{name}:1", f"{name}:2", step=step, world_size=1)
    >>> quorum = [replica("a", 7), replica("b", 0), replica("c", 7)]
    >>> plan = compute_plan(1, quorum, replica_id="b", group_rank=0, init_sync=True)
    >>> plan.heal, plan.recover_src_replica_rank, plan.recover_src_manager_address, plan.store_address
    (True, 0, 'a:1', 'a:2')
    >>> participation(plan, use_async_quorum=True, mode="DYNAMIC", min_replica_size=1)
    (None, 2)

This module refuses to know how a quorum is reached, how a state travels, and what a process is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from seamark.protocol.messages import Replica

__all__ = ["Mode", "Plan", "compute_plan", "participation"]

Mode = Literal["DYNAMIC", "FIXED_WITH_SPARES"]
"""Whether all replica groups of the quorum take part, or the first ``min_replica_size`` with the others as spares."""


class Plan(Struct, frozen=True):
    """What one rank of one replica group does after a quorum.

    A replica rank is the place of a replica group in the quorum, sorted by id.

    Attributes:
        quorum_id: of the quorum that the plan follows from.
        replica_rank: the replica rank of the own group.
        replica_world_size: replica groups in the quorum.
        recover_src_manager_address: ``address`` of the group to heal from; empty unless `heal`.
        recover_src_replica_rank: the replica rank of that group; None unless `heal`.
        recover_dst_replica_ranks: the replica ranks that heal from the own group.
        store_address: where this group rank meets its peers of the other groups: the store of the primary.
        max_step: the step to take part in: the highest of the quorum.
        max_replica_rank: the own place among those at `max_step`; None if the own group is behind.
        max_world_size: how many replica groups are at `max_step`.
        heal: whether the own group has to fetch a state before it may take part.
        commit_failures: the most failed commits in a row that any group reports.
    """

    quorum_id: int
    replica_rank: int
    replica_world_size: int
    recover_src_manager_address: str
    recover_src_replica_rank: int | None
    recover_dst_replica_ranks: list[int]
    store_address: str
    max_step: int
    max_replica_rank: int | None
    max_world_size: int
    heal: bool
    commit_failures: int


def compute_plan(
    quorum_id: int, participants: Sequence[Replica], *, replica_id: str, group_rank: int, init_sync: bool
) -> Plan:
    """The plan of one rank.

    The group ranks start at different replicas, so that stores and transfers spread over those at the highest step.

    Args:
        quorum_id: of the answered quorum.
        participants: the replica groups of the quorum, in any order.
        replica_id: the own replica group.
        group_rank: the own rank within the replica group, 0 or more.
        init_sync: whether at step 0 all others heal from the primary, so that they begin with equal parameters.

    Raises:
        ValueError: `replica_id` is not among the participants.
    """
    replicas = sorted(participants, key=lambda replica: replica.replica_id)
    ids = [replica.replica_id for replica in replicas]
    if replica_id not in ids:
        raise ValueError(
            f"replica {replica_id} is not in quorum {quorum_id} of {', '.join(ids) or 'nobody'}: it has to join "
            "before it can have a plan"
        )
    own = ids.index(replica_id)

    max_step = max(replica.step for replica in replicas)
    at_max = [rank for rank, replica in enumerate(replicas) if replica.step == max_step]
    primary = at_max[group_rank % len(at_max)]

    everybody = init_sync and max_step == 0
    recovering = [
        rank for rank, replica in enumerate(replicas) if replica.step != max_step or (everybody and rank != primary)
    ]
    sources = [rank for rank in range(len(replicas)) if rank not in recovering]
    source_of = {rank: sources[(index + group_rank) % len(sources)] for index, rank in enumerate(recovering)}
    source = source_of.get(own)

    return Plan(
        quorum_id=quorum_id,
        replica_rank=own,
        replica_world_size=len(replicas),
        recover_src_manager_address="" if source is None else replicas[source].address,
        recover_src_replica_rank=source,
        recover_dst_replica_ranks=[rank for rank in recovering if source_of[rank] == own],
        store_address=replicas[primary].store_address,
        max_step=max_step,
        max_replica_rank=at_max.index(own) if own in at_max else None,
        max_world_size=len(at_max),
        heal=source is not None,
        commit_failures=max(replica.commit_failures for replica in replicas),
    )


def participation(plan: Plan, *, use_async_quorum: bool, mode: Mode, min_replica_size: int) -> tuple[int | None, int]:
    """The place of the own replica group in the step after the quorum, and how many take part.

    Args:
        plan: the own plan.
        use_async_quorum: whether the quorum was asked for beside the forward pass: a group that heals meanwhile
            misses this step. Otherwise it healed before the step and takes part.
        mode: what becomes of groups beyond `min_replica_size`.
        min_replica_size: how many replica groups the job needs, 1 or more.

    Returns:
        The rank, or None for a group that contributes zeros, and the number of groups that take part.
    """
    if use_async_quorum:
        rank, world_size = plan.max_replica_rank, plan.max_world_size
    else:
        rank, world_size = plan.replica_rank, plan.replica_world_size
    if mode == "FIXED_WITH_SPARES":
        world_size = min(world_size, min_replica_size)
    return (rank if rank is not None and rank < world_size else None), world_size
