"""Which rank runs on which node: a pure function of the nodes and the job."""

from __future__ import annotations

from collections.abc import Mapping

from seamark.protocol.messages import JobSpec, Slot


def place(spec: JobSpec, free_slots: Mapping[str, int]) -> list[Slot] | None:
    """The slots of a job, ranks in the order of the nodes given, or None if too few nodes have room.

    Args:
        spec: the job.
        free_slots: free worker places by node name, in order of preference.
    """
    nodes = [node for node, free in free_slots.items() if free >= spec.nproc_per_node][: spec.max_nodes]
    if len(nodes) < spec.min_nodes:
        return None
    return [
        Slot(
            member=f"{spec.name}/{group_rank * spec.nproc_per_node + local_rank}",
            rank=group_rank * spec.nproc_per_node + local_rank,
            local_rank=local_rank,
            node=node,
            group_rank=group_rank,
        )
        for group_rank, node in enumerate(nodes)
        for local_rank in range(spec.nproc_per_node)
    ]


def larger_than(spec: JobSpec, slots: Mapping[str, int]) -> str:
    """Why this job would wait for ever on these nodes, even if nothing else ran on them; empty if it would not.

    Args:
        spec: the job.
        slots: all worker places by node name.
    """
    if len(slots) < spec.min_nodes:
        return ""  # more nodes may come
    if sum(count >= spec.nproc_per_node for count in slots.values()) >= spec.min_nodes:
        return ""
    return (
        f"--nproc-per-node {spec.nproc_per_node} on {spec.min_nodes} nodes is more than there is: the nodes have "
        f"{', '.join(f'{node} {count}' for node, count in slots.items())} slots (agent.slots in seamark.toml)"
    )


def refusal(spec: JobSpec) -> str | None:
    """Why this job can't be accepted whatever nodes there are, in a sentence that says what to do; else None."""
    if spec.max_nodes < spec.min_nodes:
        return f"--nnodes {spec.min_nodes}:{spec.max_nodes}: the maximum is below the minimum; write MIN:MAX"
    if spec.policy == "min-healthy":
        return "--restart-policy min-healthy does not work yet: use replace or any-failed"
    return None
