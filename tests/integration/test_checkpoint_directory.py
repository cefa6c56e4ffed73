"""The directory of checkpoints before each start of a rank: in order, without a retry, and never a living writer's."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from standalone import Standalone, standalone, wait_for

from seamark import checkpoints

pytestmark = pytest.mark.integration

SCRIPT = """
import json, os, pathlib, time
import torch, torch.distributed as dist
import seamark
from seamark import checkpoints

HERE = pathlib.Path(__file__).parent
DIRECTORY = os.environ["SEAMARK_CHECKPOINT_DIR"]
RANK = int(os.environ["RANK"])

def say(what, **more):
    with open(HERE / f"said-{RANK}", "a") as file:
        file.write(json.dumps({"what": what, "pid": os.getpid(), **more}) + "\\n")

write = checkpoints._Content.write
def slow(content, data):
    while (HERE / "slow").exists():
        time.sleep(0.01)
    return write(content, data)
checkpoints._Content.write = slow

@seamark.Wrapper()
def train(call: seamark.CallWrapper):
    dist.init_process_group("gloo")
    newest = sorted(pathlib.Path(DIRECTORY).glob("*.done"))[-1:]
    found = checkpoints.latest(DIRECTORY)
    start = found.step if found else 0
    say("enters", iteration=call.iteration, start=start, newest=[path.name for path in newest])
    while True:
        if RANK == 0 and (HERE / "save").exists():
            (HERE / "save").unlink()
            start += 1
            with call.atomic():
                checkpoints.save(DIRECTORY, start, {"step": start})
        finish = torch.tensor([float((HERE / "finish").exists())])
        dist.all_reduce(finish, dist.ReduceOp.MIN)
        if finish:
            break
        time.sleep(0.01)

train()
"""
PRELOAD = ("--preload", "numpy,torch,torch.distributed")


def said(run: Standalone, rank: int, what: str) -> list[dict[str, object]]:
    path = run.home / f"said-{rank}"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in map(json.loads, filter(lambda text: text.endswith("\n"), lines)) if line["what"] == what]


def log(run: Standalone, rank: int) -> str:
    return (run.home / "logs" / f"rank_{rank}.log").read_text()


def options(home: Path, *more: str) -> tuple[str, ...]:
    return (*PRELOAD, "--checkpoint-dir", str(home / "ckpt"), "--log-dir", str(home / "logs"), *more)


def prepared(home: Path, *steps: int) -> Path:
    home.mkdir(parents=True, exist_ok=True)
    (home / "script.py").write_text(SCRIPT)
    for step in steps:
        checkpoints.save(home / "ckpt", step, {"step": step}, keep=10)
    return home / "ckpt"


@pytest.mark.parametrize("how", ["forked", "exec'ed"])
def test_disorder_is_named_in_the_log_and_costs_no_retry(tmp_path: Path, how: str) -> None:
    home = tmp_path / "home"
    directory = prepared(home, 10, 20, 30)
    corrupt = bytearray((directory / "step_00000030.pt").read_bytes())
    corrupt[-1] ^= 1
    (directory / "step_00000030.pt").write_bytes(corrupt)
    (directory / "step_00000020.pt").unlink()
    (directory / "step_00000040.pt").write_text("its save was killed between the two renames")
    (directory / "step_00000050.pt.tmp").write_text("so was this")
    (home / "finish").touch()
    # Read when a program starts: a worker that asks for another value than its keeper has is exec'ed.
    ways = ("--env", "PYTHONNOUSERSITE=1", "--preload", "no_such_module") if how == "exec'ed" else ()
    with standalone(
        home, *options(home, "--nproc-per-node", "2", "--max-restarts", "0", *ways), script=home / "script.py"
    ) as run:
        assert run.finish() == 0, run.text() + run.logs()
        logs = log(run, 0) + log(run, 1)
    for sentence in (
        "Removed step_00000050.pt.tmp: the save that wrote it did not finish.",
        "Removed step_00000020.done: the checkpoint that it vouches for is missing.",
        "Renamed step_00000040.pt to step_00000040.pt.quarantined: it has no marker",
        "Renamed step_00000030.pt to step_00000030.pt.quarantined:",
        "The newest valid checkpoint is step_00000010.pt.",
    ):
        assert logs.count(f"seamark: {sentence}") == 1, f"{sentence}\n{logs}"
    assert {(one["start"], str(one["newest"])) for rank in (0, 1) for one in said(run, rank, "enters")} == {
        (10, "['step_00000010.done']")
    }
    assert checkpoints.prepare(directory) == []


def test_a_replacement_leaves_the_save_of_a_living_rank_alone_and_clears_up_after_a_dead_one(tmp_path: Path) -> None:
    home = tmp_path / "home"
    directory = prepared(home, 10)
    first, second = directory / "step_00000011.pt.tmp", directory / "step_00000012.pt.tmp"

    def entered(rank: int, times: int) -> dict[str, object]:
        return wait_for(f"rank {rank} to enter", lambda: said(run, rank, "enters")[times - 1 :])[0]

    with standalone(home, *options(home, "--nproc-per-node", "2"), script=home / "script.py") as run:
        entered(0, 1)
        (home / "slow").touch()
        (home / "save").touch()
        wait_for("rank 0 to save", first.exists)
        (directory / "step_00000009.pt.tmp").write_text("orphaned")
        os.kill(int(str(entered(1, 1)["pid"])), signal.SIGKILL)
        wait_for("the replacement's look", lambda: "Removed step_00000009.pt.tmp" in log(run, 1))
        assert first.exists()
        (home / "slow").unlink()
        assert entered(1, 2)["start"] == entered(0, 2)["start"] == 11
        (home / "slow").touch()
        (home / "save").touch()
        wait_for("rank 0 to save again", second.exists)
        os.kill(int(str(entered(0, 1)["pid"])), signal.SIGKILL)
        assert entered(0, 3)["start"] == 11
        assert f"seamark: Removed {second.name}: the save that wrote it did not finish." in log(run, 0)
        (home / "finish").touch()
        assert run.finish() == 0, run.text() + run.logs()
