"""Ranks that sum a number together until they are told to return, and say so at each entry.

Arguments: ``plain`` (no wrapper), ``wrapped``, or ``nodes`` (wrapped, and a node stays only with both of its ranks).
Beside this file's copy, ``finish`` ends the job well; ``fail-NODE`` and ``return-NODE`` end that node's ranks so.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).parent
RANK, NODE = os.environ["RANK"], os.environ["SEAMARK_NODE"]
STEP = 0.01


def say(iteration: int, world: int) -> None:
    line = {"pid": os.getpid(), "node": NODE, "iteration": iteration, "world": world}
    with (HERE / f"said-{RANK}").open("a") as file:
        file.write(json.dumps(line) + "\n")


def run(iteration: int, ping: Callable[[], None]) -> None:
    dist.init_process_group("gloo")
    world = torch.ones(1)
    dist.all_reduce(world)
    say(iteration, int(world))
    finish = torch.zeros(1)
    while not finish:
        for name, end in (("fail", lambda: sys.exit(1)), ("return", lambda: sys.exit(0))):
            if (HERE / f"{name}-{NODE}").exists():
                end()
        # All or none: who returned alone would leave the others in a collective.
        finish.fill_(float((HERE / "finish").exists()))
        dist.all_reduce(finish, dist.ReduceOp.MIN)
        ping()
        time.sleep(STEP)
    dist.destroy_process_group()


def main() -> None:
    if sys.argv[1] == "plain":
        run(-1, lambda: None)
        return
    import seamark
    from seamark.inprocess import Compose
    from seamark.inprocess.rank_assignment import FilterGroupedByKey, ShiftRanks

    whole_nodes = FilterGroupedByKey("SEAMARK_NODE", condition=lambda count: count == 2)
    assignment = Compose(ShiftRanks(), whole_nodes) if sys.argv[1] == "nodes" else ShiftRanks()

    @seamark.Wrapper(rank_assignment=assignment)
    def train(call: seamark.CallWrapper) -> None:
        run(call.iteration, call.ping)

    train()


main()
