"""Faults of every kind, one after the other, in one job that survives them all; each costs one iteration."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from standalone import standalone

pytestmark = pytest.mark.inprocess

SCRIPT = """
import ctypes, json, os, pathlib, signal, sys, threading, time
import seamark, seamark.inprocess as inprocess
import torch, torch.distributed as dist

HERE = pathlib.Path(__file__).parent

def fail(text="one"):
    raise ValueError(text)

def fail_while_others_are_in_a_barrier():
    time.sleep(0.2)
    fail()

def fail_once_the_others_have_completed():
    # What they do after this word is to return; the wrapper waits there for this rank.
    while len(list(HERE.glob("returns-*"))) < 3:
        time.sleep(0.001)
    fail()

def kill_myself(signum):
    os.kill(os.getpid(), signum)
    time.sleep(3600)

def kill_rank_0_and_myself():
    other = json.loads((HERE / "said-0").read_text().splitlines()[-1])
    os.kill(other["pid"], signal.SIGKILL)
    kill_myself(signal.SIGKILL)

# What happens, on whom, and who has another process afterwards.
FAULTS = [
    (fail, (1,), ()),
    (fail, (0, 1, 2, 3), ()),
    (fail_while_others_are_in_a_barrier, (2,), ()),
    (lambda: fail("in abort"), (1,), ()),
    (lambda: fail("in finalize"), (2,), (2,)),
    (lambda: fail("in health check"), (3,), (3,)),
    (lambda: fail("in initialize"), (1,), ()),
    (lambda: sys.exit(3), (1,), (1,)),
    (lambda: sys.exit(0), (2,), (2,)),
    (lambda: kill_myself(signal.SIGKILL), (0,), (0,)),
    (lambda: kill_myself(signal.SIGTERM), (3,), (3,)),
    (lambda: ctypes.string_at(0), (1,), (1,)),
    (os.abort, (2,), (2,)),
    (kill_rank_0_and_myself, (1,), (0, 1)),
    (lambda: os._exit(130 - 1), (3,), (3,)),
    (fail_once_the_others_have_completed, (2,), ()),
]

def failing_where(phase):
    def component(state):
        if state.fn_exception is not None and phase in str(state.fn_exception):
            raise RuntimeError(f"also {phase}")
    return component

failed_in_initialize = set()

def initialize(state):
    if state.fn_exception is not None and "in initialize" in str(state.fn_exception) and not failed_in_initialize:
        failed_in_initialize.add(state.iteration)
        raise RuntimeError("also in initialize")

@inprocess.Wrapper(
    initialize=initialize,
    abort=failing_where("in abort"),
    finalize=failing_where("in finalize"),
    health_check=failing_where("in health check"),
)
def train(call: inprocess.CallWrapper, first, *, second):
    # Tried faults are counted in a file, since one in initialize costs two iterations.
    number = len(list(HERE.glob("tried-*"))) if call.state.rank == 0 else 0
    dist.init_process_group("gloo", store=call.store, rank=call.state.active_rank, world_size=call.state.world_size)
    shared = torch.tensor([number])
    dist.broadcast(shared, 0)
    number = int(shared)
    with open(HERE / f"said-{call.state.rank}", "a") as file:
        file.write(json.dumps({"pid": os.getpid(), "iteration": call.iteration, "fault": number}) + "\\n")
    dist.all_reduce(torch.ones(1))
    if number < len(FAULTS):
        fault, ranks, _ = FAULTS[number]
        dist.barrier()
        if call.state.rank == ranks[0]:
            (HERE / f"tried-{number}").touch()
        if call.state.rank in ranks:
            while not (HERE / f"tried-{number}").exists():
                time.sleep(0.001)
            fault()
        elif fault is fail_once_the_others_have_completed:
            (HERE / f"returns-{call.state.rank}").touch()
            return "too early"
    dist.barrier()
    return first + second

def threads_and_sockets():
    # The canaries stay: they tell the agent of the end of this process.
    threads = len(os.listdir("/proc/self/task")) - sum("canary" in one.name for one in threading.enumerate())
    descriptors = pathlib.Path("/proc/self/fd")
    return threads, sum(os.readlink(one).startswith("socket:") for one in descriptors.iterdir() if one.is_symlink())

before = threads_and_sockets()
result = train(40, second=2)
# A thread that was joined is the kernel's for another moment.
until = time.monotonic() + 5.0
while threads_and_sockets() != before and time.monotonic() < until:
    time.sleep(0.001)
(HERE / f"result-{os.environ['SEAMARK_MEMBER'].rpartition('/')[2]}").write_text(json.dumps(
    {"result": result, "RANK": os.environ["RANK"], "group": dist.is_initialized(),
     "left": [after - former for former, after in zip(before, threads_and_sockets())]}
))
"""


def said(directory: Path, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / f"said-{rank}").read_text().splitlines()]


def in_short(incident: dict[str, Any]) -> str:
    failures = [(one["kind"], one["rank"], one["cause"]["text"].splitlines()[0]) for one in incident["failures"]]
    return f"{incident['iteration']}: {failures}"


def test_faults_of_every_kind_cost_an_iteration_each(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    options = ("--nproc-per-node", "4", "--preload", "numpy,torch,torch.distributed", "--max-restarts", "30")
    with standalone(tmp_path, *options, script=path) as run:
        assert run.finish() == 0, run.text() + run.logs()
        incidents = run.incidents()
    tried = len(list(tmp_path.glob("tried-*")))
    assert tried == 16
    # One in initialize is a fault of the iteration after the one that it was planned in.
    assert len(incidents) == tried + 1, "\n".join(map(in_short, incidents))
    replaced: dict[int, set[int]] = {number: set() for number in range(tried)}
    for rank in range(4):
        lines = said(tmp_path, rank)
        iterations = [one["iteration"] for one in lines]
        assert iterations == sorted(set(iterations)), "no iteration is entered twice"
        for before, after in itertools.pairwise(lines):
            if before["pid"] != after["pid"]:
                replaced[before["fault"]].add(rank)
    expected = {4: {2}, 5: {3}, 7: {1}, 8: {2}, 9: {0}, 10: {3}, 11: {1}, 12: {2}, 13: {0, 1}, 14: {3}}
    assert replaced == {number: expected.get(number, set()) for number in range(tried)}
    for rank in range(4):
        result = json.loads((tmp_path / f"result-{rank}").read_text())
        assert result == {"result": 42, "RANK": str(rank), "group": False, "left": [0, 0]}
