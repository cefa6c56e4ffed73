"""Ranks, each its own monitor's, that say where they are, and sum together until they are told to end.

Beside this file's copy: ``finish`` ends the job well, ``raise-RANK`` has that rank raise. After SIGTERM to any of them
all save, and those that got it exit with 143.
"""

from seamark.autorestart import fork_and_monitor

fork_and_monitor(restart_delay=0.1)

import json  # noqa: E402  (the fork comes before all imports)
import os  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import seamark  # noqa: E402

HERE = Path(__file__).parent
SLOT = os.environ["SEAMARK_MEMBER"].rpartition("/")[2]


def say(call: seamark.CallWrapper, what: str) -> None:
    line = {
        "what": what,
        "pid": os.getpid(),
        "monitor": os.getppid(),
        "iteration": call.iteration,
        "restarts": call.state.restarts,
        "generation": os.environ["SEAMARK_GENERATION"],
        "world": dist.get_world_size(),
        "local": [call.state.local_rank, call.state.local_world_size],
        "host": socket.gethostname(),
        "master": f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
    }
    with (HERE / f"said-{SLOT}").open("a") as file:
        file.write(json.dumps(line) + "\n")


@seamark.Wrapper()
def train(call: seamark.CallWrapper) -> None:
    seamark.preempted()
    dist.init_process_group("gloo")
    dist.barrier()
    say(call, "entered")
    told = torch.zeros(2)
    while not told[0]:
        told[0], told[1] = float((HERE / "finish").exists()), float(seamark.preempted())
        dist.all_reduce(told, dist.ReduceOp.MAX)
        call.ping()
        if told[1]:
            save(call)
        asked = HERE / f"raise-{SLOT}"
        if asked.exists():
            asked.unlink()
            raise ValueError("asked for")
        time.sleep(0.02)


def save(call: seamark.CallWrapper) -> None:
    with call.atomic():
        for moment in range(20):
            # The job's TCPStore serves until the last rank has saved.
            call.state_dict[f"saved-{SLOT}"] = moment
            time.sleep(0.05)
        say(call, "saved")
        if seamark.preempted():
            sys.exit(143)


train()
