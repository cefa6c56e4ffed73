"""Which rank runs on which node: a pure function of the nodes and the job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    return [slot for group_rank, node in enumerate(nodes) for slot in _on_node(spec, group_rank, node, 0)]


def fill(spec: JobSpec, slots: Sequence[Slot], free_slots: Mapping[str, int], placement: int) -> list[Slot]:
    """Slots for the ranks that have no place, up to MAX nodes: with their worker group, or on a node that has none yet.

    Args:
        spec: the job.
        slots: those that have one; they stay where they are.
        free_slots: free worker places by node name, in order of preference.
        placement: the number of this change.

    Returns:
        The new ones; fewer than are missing where nodes have no room.
    """
    home = {slot.group_rank: slot.node for slot in slots}
    have = {slot.rank for slot in slots}
    empty = [node for node, free in free_slots.items() if free >= spec.nproc_per_node and node not in home.values()]
    found: list[Slot] = []
    for group_rank in range(spec.max_nodes):
        node = home.get(group_rank) or (empty.pop(0) if empty else "")
        if node in free_slots:
            found += [slot for slot in _on_node(spec, group_rank, node, placement) if slot.rank not in have]
    return found


def _on_node(spec: JobSpec, group_rank: int, node: str, placement: int) -> list[Slot]:
    first = group_rank * spec.nproc_per_node
    return [
        Slot(f"{spec.name}/{first + local_rank}", first + local_rank, local_rank, node, group_rank, placement)
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
    return None
