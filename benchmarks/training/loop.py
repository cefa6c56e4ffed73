"""The training loop that every system under test runs, and what it reports about itself.

It knows nothing of the system that restarts it: the scripts beside it connect the two. Every process writes
JSON lines to a file of its own, timed by CLOCK_MONOTONIC, which all processes of one host share.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

MATRIX = 256  # one product of this size keeps one core busy for 1-2 ms
GRADIENT = 4096  # float32 elements all-reduced in each step


class InjectedFault(RuntimeError):
    """The error that a rank raises because the benchmark asked it to."""


class Probe:
    """The reports of this process, and the switch by which the benchmark makes it raise.

    Make one before the function that restarts: it lives as long as the process does.
    """

    def __init__(self) -> None:
        name = f"{os.getpid()}-{time.monotonic_ns()}.jsonl"
        path = os.path.join(os.environ["BENCHMARK_REPORTS"], name)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._fault_requested = False
        signal.signal(signal.SIGUSR1, self._request_fault)

    def report(self, event: str, monotonic: float, attempt: int) -> None:
        """Append one line. `monotonic` is in seconds."""
        line = {
            "event": event,
            "monotonic": monotonic,
            "attempt": attempt,
            "rank": dist.get_rank(),
            "world_size": dist.get_world_size(),
            "pid": os.getpid(),
        }
        os.write(self._file, json.dumps(line).encode() + b"\n")

    def raise_if_requested(self, attempt: int) -> None:
        """Raise InjectedFault if the benchmark asked for it since the last call."""
        if not self._fault_requested:
            return
        self._fault_requested = False
        self.report("fault", time.monotonic(), attempt)
        raise InjectedFault("injected by the benchmark")

    def _request_fault(self, _signal: int, _frame: object) -> None:
        self._fault_requested = True


def train(probe: Probe, attempt: int, ping: Callable[[], None] = lambda: None) -> None:
    """Report the first collective of the current process group, then take steps until a fault ends them.

    `attempt` is the system's own count of restarts. `ping` is called once a step.
    """
    torch.set_num_threads(1)
    ones = torch.ones(1)
    dist.all_reduce(ones)
    reached = time.monotonic()
    if int(ones.item()) != dist.get_world_size():
        raise RuntimeError(f"the first all_reduce summed to {ones.item()} on {dist.get_world_size()} ranks")
    probe.report("first_collective", reached, attempt)

    weights = torch.rand(MATRIX, MATRIX)
    gradient = torch.rand(GRADIENT)
    while True:
        torch.mm(weights, weights)
        dist.all_reduce(gradient, op=dist.ReduceOp.MAX)
        ping()
        probe.raise_if_requested(attempt)
