"""The iterations and counters of a job through restarts of both kinds (D4), as every rank and the store tell them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from standalone import standalone

pytestmark = pytest.mark.inprocess

HEAD = """
import json, os, pathlib, signal, time
import seamark
import torch, torch.distributed as dist

HERE = pathlib.Path(__file__).parent

def say(call):
    client = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 2, is_master=False)
    iteration = call.iteration
    keys = ("global_iteration_counter", "job_restart_counter", f"iteration_{iteration}_ranks_restart_counter")
    line = {"iteration": iteration, "restarts": call.state.restarts, "pid": os.getpid()}
    line["store"] = [int(client.get(key)) for key in keys]
    line["shared"] = len(call.state_dict)
    call.state_dict[f"{iteration}-{call.state.rank}"] = os.getpid()
    with open(HERE / f"said-{call.state.rank}", "a") as file:
        file.write(json.dumps(line) + "\\n")

def die_together(call):
    # In an atomic block, so that nobody is interrupted by another one's death before its own.
    with call.atomic():
        mark = f"{call.iteration}-{call.state.rank}"
        (HERE / f"ready-{mark}").touch()
        while len(list(HERE.glob(f"ready-{call.iteration}-*"))) < 4:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)
"""

BOTH_KINDS = """
@seamark.Wrapper()
def train(call: seamark.CallWrapper):
    dist.init_process_group("gloo")
    dist.barrier()
    say(call)
    dist.barrier()
    if call.iteration in (0, 100) and call.state.rank == 2:
        raise ValueError("one")
    if call.iteration in (1, 101):
        die_together(call)
    dist.barrier()

train()
"""

MANY = """
@seamark.Wrapper()
def train(call: seamark.CallWrapper):
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    say(call)
    if call.iteration < 105:
        if call.state.rank == call.iteration % 2:
            raise ValueError("again")
    dist.barrier()

train()
"""


def said(directory: Path, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / f"said-{rank}").read_text().splitlines()]


def script(directory: Path, text: str) -> Path:
    path = directory / "script.py"
    path.write_text(HEAD + text)
    return path


TORCH = ("--preload", "numpy,torch,torch.distributed", "--max-restarts", "20")


def test_restarts_in_process_count_by_one_and_those_across_processes_by_the_next_hundred(tmp_path: Path) -> None:
    with standalone(tmp_path, *TORCH, "--nproc-per-node", "4", script=script(tmp_path, BOTH_KINDS)) as run:
        assert run.finish() == 0, run.text() + run.logs()
    for rank in range(4):
        lines = said(tmp_path, rank)
        assert [one["iteration"] for one in lines] == [0, 1, 100, 101, 200]
        assert [one["restarts"] for one in lines] == [0, 1, 2, 3, 4]
        assert [one["store"] for one in lines] == [[one["iteration"], one["restarts"], 4] for one in lines]
        assert [one["shared"] // 4 for one in lines] == [0, 1, 2, 3, 4], (
            "what ranks put outlives restarts of both kinds"
        )
        assert len({one["pid"] for one in lines}) == 3


def test_more_than_a_hundred_restarts_in_one_process_run_on_into_the_next_hundred(tmp_path: Path) -> None:
    with standalone(tmp_path, *TORCH, "--nproc-per-node", "2", script=script(tmp_path, MANY)) as run:
        assert run.finish() == 0, run.text() + run.logs()
    for rank in range(2):
        lines = said(tmp_path, rank)
        assert lines[-1]["iteration"] == lines[-1]["restarts"] == 105
        assert len({one["pid"] for one in lines}) == 1
        assert [one["iteration"] for one in lines] == sorted({one["iteration"] for one in lines})


TWO_CALLS = """
@seamark.Wrapper()
def first(call: seamark.CallWrapper):
    dist.init_process_group("gloo")
    dist.barrier()
    say(call)
    dist.barrier()
    if call.iteration == 0 and call.state.rank == 1:
        raise ValueError("one")
    dist.barrier()
    return call.iteration

@seamark.Wrapper()
def second(call: seamark.CallWrapper, before):
    dist.init_process_group("gloo")
    dist.barrier()
    say(call)
    dist.barrier()
    if call.state.restarts == 1 and call.state.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return before

(HERE / f"result-{os.environ['RANK']}").write_text(json.dumps(second(first())))
"""


def test_two_wrapped_calls_one_after_the_other(tmp_path: Path) -> None:
    with standalone(tmp_path, *TORCH, "--nproc-per-node", "4", script=script(tmp_path, TWO_CALLS)) as run:
        assert run.finish() == 0, run.text() + run.logs()
        assert len(run.incidents()) == 2
    for rank in range(4):
        lines = said(tmp_path, rank)
        assert [one["iteration"] for one in lines] == [0, 1, 2, 3]
        assert [one["restarts"] for one in lines] == [0, 1, 1, 2], "a new call is no restart"
        result = json.loads((tmp_path / f"result-{rank}").read_text())
        assert result == (None if rank == 2 else 1), "who was replaced has not seen the first call's end"
