"""A host that is taken away: emergency checkpoints, ranks that move, and an agent that goes in good order."""

from __future__ import annotations

import itertools
import json
import math
import os
import select
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from standalone import Run, wait_for
from suite import Suite, suite

pytestmark = pytest.mark.suite

SCRIPT = """
import json, os, pathlib, signal, sys, time
import torch, torch.distributed as dist
import seamark
from seamark import checkpoints

HERE = pathlib.Path(__file__).parent
RANK = os.environ["RANK"]
state = {"step": 0}

def say(what, **more):
    line = {"what": what, "pid": os.getpid(), "node": os.environ["SEAMARK_NODE"], "at": time.monotonic(), **more}
    with open(HERE / f"said-{RANK}", "a") as file:
        file.write(json.dumps(line) + "\\n")

def save():
    say("saves", step=state["step"])
    checkpoints.save(HERE / f"checkpoints-{RANK}", state["step"], dict(state))
    say("saved", step=state["step"])

@seamark.Wrapper()
def train(call: seamark.CallWrapper):
    seamark.on_preemption(save)
    dist.init_process_group("gloo")
    found = [checkpoints.latest(path) for path in HERE.glob("checkpoints-*")]
    best = max((one.step for one in found if one), default=0)
    start = torch.tensor([best])
    dist.all_reduce(start, dist.ReduceOp.MAX)
    state["step"] = int(start)
    say("enters", iteration=call.iteration, world=dist.get_world_size(), step=state["step"])
    one = torch.ones(1)
    while not (finish := torch.tensor([float((HERE / "finish").exists())])):
        dist.all_reduce(one)
        dist.all_reduce(finish, dist.ReduceOp.MIN)
        state["step"] += 1
        call.ping()
        if finish:
            break
        time.sleep(0.01)
    dist.barrier()

train()
"""
DEAF = """
import json, os, pathlib, signal, time

HERE = pathlib.Path(__file__).parent

def hear(signum, frame):
    say("heard")

def say(what):
    line = {"what": what, "pid": os.getpid(), "node": os.environ["SEAMARK_NODE"], "at": time.monotonic()}
    with open(HERE / f"said-{os.environ['RANK']}", "a") as file:
        file.write(json.dumps(line) + "\\n")

signal.signal(signal.SIGTERM, hear)
say("deaf")
while True:
    time.sleep(1)
"""
PRELOAD = ("--preload", "numpy,torch,torch.distributed")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    """Two agents with three places each."""
    with suite(tmp_path_factory.mktemp("d"), agents=2, slots=3) as made:
        yield made


class Job(Run):
    """A job that says what it does."""

    def __init__(self, two: Suite, home: Path, text: str, *options: str) -> None:
        home.mkdir(parents=True)
        (home / "script.py").write_text(text)
        super().__init__(home, *options, env=two.env, name=home.name, script=home / "script.py")

    def said(self, rank: int, what: str) -> list[dict[str, Any]]:
        path = self.home / f"said-{rank}"
        text = path.read_text() if path.exists() else ""
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in lines if line["what"] == what]

    def wait_world(self, ranks: int, world: int) -> list[dict[str, Any]]:
        def together() -> list[dict[str, Any]] | None:
            self.check_alive()
            last = [self.said(rank, "enters")[-1:] for rank in range(ranks)]
            found = [one for lines in last for one in lines]
            same = len({one["iteration"] for one in found}) == 1 and {one["world"] for one in found} == {world}
            return found if len(found) == ranks and same else None

        return wait_for(f"{ranks} ranks in a world of {world}", together)


@pytest.fixture
def start(two: Suite, tmp_path: Path) -> Iterator[Any]:
    jobs: list[Job] = []
    numbers = itertools.count()

    def make(text: str, *options: str) -> Job:
        job = Job(two, tmp_path / f"{tmp_path.name}-{next(numbers)}", text, *options)
        jobs.append(job)
        return job

    yield make
    for job in jobs:
        job.close()


def test_drain_and_undrain_by_hand(two: Suite, start: Any) -> None:
    job = start(SCRIPT, *PRELOAD, "--nnodes", "1:2")
    before = job.wait_world(2, 2)
    node = before[1]["node"]
    assert f"{node} drains" in two.command("drain", node, "--reason", "a new driver")
    (saved,) = wait_for("its checkpoint", lambda: job.said(1, "saved"))
    alone = wait_for("the other one", lambda: [one for one in job.said(0, "enters") if one["world"] == 1])
    assert alone[0]["step"] >= saved["step"], "it goes on from the checkpoint"
    assert alone[0]["pid"] == before[0]["pid"]
    status = wait_for("its places", lambda: two.status()["coordinator"])
    (places,) = [one for one in status["nodes"] if one["node"] == node]
    assert (places["used"], places["draining"]) == (0, "a new driver")
    assert not two.problems(), "a node that drains is nothing that is wrong"
    two.command("undrain", node)
    after = job.wait_world(2, 2)
    assert after[0]["pid"] == before[0]["pid"]
    assert after[1]["node"] == node
    assert "there is no node nowhere here" in two.command("drain", "nowhere", code=64)
    (job.home / "finish").touch()
    assert job.finish() == 0, job.text() + job.logs()


def moment_of_death(pid: int, timeout: float) -> float:
    """When this process ended, as its pidfd tells; at most so many seconds are waited for it."""
    pidfd = os.pidfd_open(pid)
    try:
        ended, _, _ = select.select([pidfd], [], [], timeout)
        return time.monotonic() if ended else math.inf
    finally:
        os.close(pidfd)


@pytest.mark.alone
def test_an_agent_that_is_told_to_end_gives_its_workers_half_a_minute(two: Suite, start: Any) -> None:
    """The two times are the contract of a preemption (D12), which gives a host its half minute and no more."""
    job = start(SCRIPT, *PRELOAD, "--nnodes", "1:2")
    before = job.wait_world(2, 2)
    node = before[1]["node"]
    name = "agent-1" if node.endswith("-1") else "agent-0"
    two_each = ("--nnodes", "2", "--nproc-per-node", "2")
    deaf = start(DEAF, "--preload", "none", *two_each, "--max-restarts", "0")
    everyone = range(4)
    wait_for("the deaf ones", lambda: all(deaf.said(rank, "deaf") for rank in everyone))
    ranks = [rank for rank in everyone if deaf.said(rank, "deaf")[0]["node"] == node]
    assert len(ranks) == 2
    agent = psutil.Process(two.programs()[name].pid)
    with ThreadPoolExecutor(len(ranks)) as watching:
        ends = [watching.submit(moment_of_death, deaf.said(rank, "deaf")[0]["pid"], 60.0) for rank in ranks]
        began = time.monotonic()
        agent.send_signal(signal.SIGTERM)
        wait_for("its checkpoint", lambda: job.said(1, "saved"))
        alone = wait_for("the other one", lambda: [one for one in job.said(0, "enters") if one["at"] > began])
        assert alone[0]["step"] >= job.said(1, "saved")[-1]["step"]
        assert alone[0]["at"] - began < 25.0, "nobody waits for the deaf ones"
        agent.send_signal(signal.SIGTERM)
        died = [end.result() - began for end in ends]
    heard = [[one["at"] - began for one in deaf.said(rank, "heard")] for rank in ranks]
    assert all(times[0] <= 0.1 for times in heard), f"workers are asked within 100 ms, not {heard}"
    assert all(at >= 30.0 for times in heard for at in times[1:]), f"they are asked once, not {heard}"
    assert min(died) >= 30.0, f"they have 30 s, not {died}"
    assert max(died) <= 31.0, f"who ignores SIGTERM is killed after 30 s, not {died}"
    assert wait_for("its end", lambda: agent if not agent.is_running() else None)
    log = two.state / "log" / "supervisord.log"
    wait_for("its exit code", lambda: f"exited: {name} (exit status 143; expected)" in log.read_text())
    assert two.programs()[name].pid == 0, "143 is an end that is meant"
    two.command("up", "--agents", "2")
    job.wait_world(2, 2)
    (job.home / "finish").touch()
    assert job.finish() == 0, job.text() + job.logs()
