"""What a worker process is given: its environment, its share of the cores."""

from __future__ import annotations

import os
import time
from pathlib import Path

from seamark import environment as names
from seamark.protocol.messages import JobSpec, Roster, Slot
from seamark.store.state_dict import ENVIRONMENT as SHARED_STATE
from seamarkd.agent.binding import VISIBLE_DEVICES, cpu_sets, host_topology, single_gpu, visible
from seamarkd.agent.keeper.processes import start_time

START_TOLERANCE = 1.0
"""Seconds that may lie between the order to fork and the fork, on a busy host."""


def environment(roster: Roster, slot: Slot, incarnation: str, address: str, digests: Path) -> dict[str, str]:
    """The variables of one worker: the job's, torchrun's, and ours.

    Args:
        roster, slot, incarnation: which worker.
        address: the agent's door.
        digests: where this node's processes write down which checkpoints they have hashed.
    """
    spec = roster.spec
    local_world_size = sum(other.node == slot.node for other in roster.slots)
    env = dict(spec.env)
    env |= {
        "RANK": str(slot.rank),
        "LOCAL_RANK": str(slot.local_rank),
        "WORLD_SIZE": str(len(roster.slots)),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "GROUP_RANK": str(slot.group_rank),
        "GROUP_WORLD_SIZE": str(len({other.node for other in roster.slots})),
        "ROLE_RANK": str(slot.rank),
        "ROLE_WORLD_SIZE": str(len(roster.slots)),
        "MASTER_ADDR": roster.master_addr,
        "MASTER_PORT": str(roster.master_port),
        "TORCHELASTIC_RUN_ID": spec.name,
        "TORCHELASTIC_RESTART_COUNT": str(roster.generation),
        "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
        names.ADDRESS: address,
        names.JOB: spec.name,
        names.MEMBER: slot.member,
        names.INCARNATION: incarnation,
        names.GENERATION: str(roster.generation),
        names.NODE: slot.node,
        names.MIN_WORLD_SIZE: str(roster.min_members),
    }
    if spec.gpu_binding == "single":
        env[VISIBLE_DEVICES] = single_gpu(spec.env, slot.local_rank)
    if roster.state:
        env[SHARED_STATE] = roster.state
    if spec.checkpoint_dir:
        env[names.CHECKPOINT_DIR] = spec.checkpoint_dir
        env[names.CHECKPOINT_DIGESTS] = str(digests)
        # The other half is for the script's own start.
        env[names.CHECKPOINT_SECONDS] = str(roster.join_timeout / 2)
    return env


def threads_per_worker(spec: JobSpec) -> int:
    """Threads each worker computes with: what the job's environment says, else its share of the cores."""
    asked = spec.env.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return max(1, (os.cpu_count() or 1) // spec.nproc_per_node)


def cpus(roster: Roster, slot: Slot) -> list[int]:
    """The processors that a worker is bound to; none where it is not."""
    spec = roster.spec
    if spec.cpu_binding == "none":
        return []
    local_ranks = [other.local_rank for other in roster.slots if other.node == slot.node]
    topology = visible(host_topology(), spec.env)
    return sorted(cpu_sets(topology, max(local_ranks) + 1, spec.cpu_binding)[slot.local_rank])


def runs_since(pid: int, started_at: float) -> bool:
    """True if this process id is that of a process started then (monotonic seconds), and not of a later one."""
    try:
        ticks = start_time(pid)
    except (FileNotFoundError, ProcessLookupError):
        return False
    slept = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    return began_then(ticks / os.sysconf("SC_CLK_TCK"), started_at, slept)


def began_then(since_boot: float, started_at: float, slept: float) -> bool:
    """Whether a process is the one that was started then.

    The kernel counts what the host slept before the start, the monotonic clock does not; how much of its sleep that was
    nobody has written down. So a process that began later by less than the host has slept is taken for it, too.

    Args:
        since_boot: when the process began, in seconds since the boot (CLOCK_BOOTTIME).
        started_at: when it is said to have been, in monotonic seconds.
        slept: seconds for which the host was suspended since its boot, up to now.
    """
    return -START_TOLERANCE < since_boot - started_at < slept + START_TOLERANCE
