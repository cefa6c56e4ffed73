"""A tiny DDP training whose end is comparable bit by bit, and which says on the way what it does.

Each rank appends a JSON line per event to ``<out>/rank_<initial rank>.jsonl``: entered, step, done. Faults are asked
for by the test from outside (kill, SIGUSR1 for an exception, SIGUSR2 for a hang, SIGRTMIN for exit code 43) or by
``--raise-at RANK:STEP`` (an exception, in one iteration only).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import seamark
from seamark import checkpoints

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--every", type=int, default=10)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--pause", type=float, default=0.0, help="seconds each step takes at least")
parser.add_argument("--raise-at", default="", help="RANK:STEP")
parser.add_argument("--raise-during", type=int, default=0, help="the iteration in which --raise-at is obeyed")
parser.add_argument("--init-pause", type=int, default=0, help="iterations in which rank 3 never joins the group")
parser.add_argument("--raise-in", type=int, nargs=2, default=(0, 0), help="iterations in which rank 1 raises soon")
parser.add_argument("--counts", action="store_true", help="report threads and descriptors at each step")
parser.add_argument("--until", type=Path, help="once this file is there, the last step is the number in it")
parser.add_argument("--timeout", type=float, default=1800.0, help="of the process group, in seconds")
parser.add_argument("--soft-timeout", type=float, default=60.0)
parser.add_argument("--hard-timeout", type=float, default=90.0)
options = parser.parse_args()
options.out.mkdir(parents=True, exist_ok=True)
log = (options.out / f"rank_{os.environ['RANK']}.jsonl").open("a", buffering=1)


def say(**fields: Any) -> None:
    log.write(json.dumps({"at": time.monotonic(), "pid": os.getpid(), **fields}) + "\n")


def last_step() -> int:
    if options.until is not None and options.until.exists():
        return int(options.until.read_text())
    return int(options.steps)


def digest(model: nn.Module) -> str:
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        sha.update(name.encode() + parameter.detach().numpy().tobytes())
    return sha.hexdigest()


asked: set[int] = set()
signal.signal(signal.SIGUSR1, lambda signum, frame: asked.add(signum))
signal.signal(signal.SIGUSR2, lambda signum, frame: asked.add(signum))
signal.signal(signal.SIGRTMIN, lambda signum, frame: os._exit(43))


def obey() -> None:
    """SIGUSR1 asks for an exception, SIGUSR2 for a hang, at the next step."""
    for signum in tuple(asked):
        asked.discard(signum)
        if signum == signal.SIGUSR1:
            raise ValueError("asked to fail by a signal")
        time.sleep(3_600.0)


@seamark.Wrapper(soft_timeout=options.soft_timeout, hard_timeout=options.hard_timeout)
def train(call: seamark.CallWrapper) -> str:
    rank = call.state.rank
    say(event="entered", iteration=call.iteration, rank=rank, restarts=call.state.restarts)
    if rank == 3 and call.iteration < options.init_pause:
        time.sleep(3_600.0)
    dist.init_process_group("gloo", timeout=timedelta(seconds=options.timeout))
    say(event="initialised", iteration=call.iteration, rank=rank)
    torch.manual_seed(options.seed)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    choice = [checkpoints.latest(options.out / "checkpoints") if rank == 0 else None]
    dist.broadcast_object_list(choice)
    resumed = choice[0].step if choice[0] else 0
    if choice[0]:
        state = checkpoints.load(choice[0])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    say(event="resumed", iteration=call.iteration, rank=rank, step=resumed, sha256=digest(model))
    for step in itertools.count(resumed + 1):
        if step > last_step():
            break
        until = time.monotonic() + options.pause
        obey()
        if options.raise_at == f"{rank}:{step}" and call.iteration == options.raise_during:
            raise ValueError("asked to fail")
        if rank == 1 and step == resumed + 10 and options.raise_in[0] <= call.iteration < options.raise_in[1]:
            raise ValueError("asked to fail soon")
        data = torch.randn(16, 32, generator=torch.Generator().manual_seed(options.seed << 40 | step << 8 | rank))
        loss = ddp(data).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        call.ping()
        counts = {}
        if options.counts and step >= resumed + 5:
            counts = {"threads": len(os.listdir("/proc/self/task")), "fds": len(os.listdir("/proc/self/fd"))}
        say(event="step", iteration=call.iteration, rank=rank, step=step, **counts)
        if rank == 0 and step % options.every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoints.save(options.out / "checkpoints", step, state)
        while time.monotonic() < until:
            time.sleep(0.001)
    return digest(model)


if __name__ == "__main__":
    sha256 = train()
    say(event="done", sha256=sha256, leftover_threads=sorted(os.listdir("/proc/self/task")))
    print("final parameters sha256", sha256)
