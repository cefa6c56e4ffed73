"""What Slurm's variables say of a task of srun that torchrun's would say; pure, standard library only.

Sources: srun(1), OUTPUT ENVIRONMENT VARIABLES, for the variables; scontrol(1), ``show hostnames``, for node lists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

LOWEST_PORT, SPAN, SLOTS = 20_000, 8, 1_500
"""Ports of steps: SPAN for each, from LOWEST_PORT on, all below 32,768, where Linux begins to give out ports itself."""
STRIDE = 31
"""Jobs that begin one after the other, with so many steps each, have different ports."""


def is_task(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process; in a batch script itself Slurm's variables name no rank."""
    return "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ


def tasks_here(environ: Mapping[str, str]) -> int:
    """How many tasks of the step are on this node; 0 where Slurm says nothing of it.

    Raises:
        ValueError: a variable is not as Slurm writes it; the sentence names it.
    """
    name = "SLURM_STEP_TASKS_PER_NODE" if "SLURM_STEP_TASKS_PER_NODE" in environ else "SLURM_TASKS_PER_NODE"
    text, node = environ.get(name, ""), environ.get("SLURM_NODEID", "0")
    if not text:
        return 0
    # "4(x2),3": four tasks on each of two nodes and three on another.
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", text) or not node.isdecimal():
        raise ValueError(f"{name}={text!r}, SLURM_NODEID={node!r}: not as Slurm writes them")
    past = 0
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        past += int(times or 1)
        if int(node) < past:
            return int(tasks)
    raise ValueError(f"{name}={text!r} says nothing of node {node} (SLURM_NODEID)")


def first_host(nodes: str) -> str:
    """The first name of a node list: ``gpu-07`` of ``gpu-[07-10,12],head``; empty for an empty list."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None
    return re.sub(r"\[([^],-]*)[^\]]*\]", r"\1", first.group())


def master_port(job: int, step: int) -> int:
    """A port for MASTER_PORT that all tasks of a step find alike, and other steps on the same hosts hardly ever."""
    return LOWEST_PORT + SPAN * ((STRIDE * job + step) % SLOTS)
