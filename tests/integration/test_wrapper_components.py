"""The wrapper's components and rank assignments in real jobs of four ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from standalone import Run, standalone, wait_for
from suite import suite

pytestmark = pytest.mark.inprocess

HEAD = """
import json, os, pathlib, signal, sys, time
import seamark, seamark.inprocess as inprocess
import torch, torch.distributed as dist
from seamark.inprocess.finalize import ThreadedFinalize
from seamark.inprocess.health_check import FaultCounter
from seamark.inprocess.initialize import RetryController
from seamark.inprocess.rank_assignment import *

INITIAL = int(os.environ["RANK"])

def say(what, state, **more):
    line = {"what": what, "iteration": state.iteration, "mode": state.mode.name, "pid": os.getpid(), **more}
    line |= {"rank": state.rank, "active_rank": state.active_rank, "world": state.active_world_size}
    line |= {"RANK": os.environ["RANK"], "WORLD_SIZE": os.environ["WORLD_SIZE"]}
    line |= {"raised": type(state.fn_exception).__name__}
    with open(pathlib.Path(__file__).with_name(f"said-{INITIAL}"), "a") as file:
        file.write(json.dumps(line) + "\\n")

def saying(what):
    return lambda state: say(what, state)

def together(call):
    dist.init_process_group("gloo")
    everybody = torch.ones(1)
    dist.all_reduce(everybody)
    assert everybody.item() == call.state.active_world_size == dist.get_world_size()
    call.ping()
"""


def script(directory: Path, text: str) -> Path:
    path = directory / "script.py"
    path.write_text(HEAD + text)
    return path


def said(directory: Path, rank: int) -> list[dict[str, Any]]:
    path = directory / f"said-{rank}"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def course(directory: Path, rank: int) -> list[str]:
    return [f"{one['what']} {one['iteration']}" for one in said(directory, rank)]


FOUR = ("--nproc-per-node", "4", "--preload", "numpy,torch,torch.distributed")
COMPONENTS = """
@inprocess.Wrapper(
    initialize=inprocess.Compose(saying("initialize"), RetryController(max_iterations=9)),
    abort=inprocess.Compose(saying("abort"), inprocess.abort.AbortTorchDistributed()),
    finalize=inprocess.Compose(saying("finalize"), ThreadedFinalize(10.0, print, ("finalize",))),
    health_check=inprocess.Compose(saying("health_check"), FaultCounter(max_rank_faults=1)),
    completion=saying("completion"),
    terminate=saying("terminate"),
)
def train(call: inprocess.CallWrapper):
    together(call)
    if call.state.rank == 1 and call.iteration == 0:
        raise ValueError("one")
    dist.barrier()

train()
"""


def test_components_are_called_in_their_order(tmp_path: Path) -> None:
    with standalone(tmp_path, *FOUR, script=script(tmp_path, COMPONENTS)) as run:
        assert run.finish() == 0, run.text() + run.logs()
        (incident,) = run.incidents()
    for rank in range(4):
        assert course(tmp_path, rank) == [
            "initialize 0",
            "abort 0",
            "finalize 0",
            "health_check 0",
            "initialize 1",
            "completion 1",
        ]
        cleaning = said(tmp_path, rank)[2:4]
        assert [one["raised"] for one in cleaning] == ["ValueError" if rank == 1 else "NoneType"] * 2
    assert "one" in json.dumps(incident)


RETRIES = """
@inprocess.Wrapper(initialize=RetryController(max_iterations=3), terminate=saying("terminate"))
def train(call: inprocess.CallWrapper):
    say("entered", call.state)
    together(call)
    if call.state.rank == 2:
        raise ValueError("again and again")
    dist.barrier()

try:
    train()
except BaseException as error:
    say(f"ended by {type(error).__name__} {getattr(error, 'code', None)}", inprocess.State.from_env())
    raise
"""


def test_a_retry_controller_ends_the_job_after_exactly_so_many_entries(tmp_path: Path) -> None:
    with standalone(tmp_path, *FOUR, script=script(tmp_path, RETRIES)) as run:
        assert run.finish() == 3, run.text() + run.logs()
        assert "max_iterations=3" in run.text()
    for rank in range(4):
        *entered, terminated, ended = course(tmp_path, rank)
        assert entered == ["entered 0", "entered 1", "entered 2"]
        # Who is told of the end before it has heard of the iteration is in the one before.
        assert terminated in ("terminate 2", "terminate 3")
        assert ended == "ended by RestartAbort 130 -1"


UNFIT = """
def check(state):
    if state.fn_exception is not None:
        raise OSError("the device does not answer")

@inprocess.Wrapper(health_check=check, terminate=saying("terminate"))
def train(call: inprocess.CallWrapper):
    say("entered", call.state)
    together(call)
    if call.state.rank == 3 and call.iteration == 0:
        raise ValueError("one")
    dist.barrier()

train()
"""


def test_a_rank_that_is_not_fit_leaves_and_is_replaced(tmp_path: Path) -> None:
    with standalone(tmp_path, *FOUR, script=script(tmp_path, UNFIT)) as run:
        assert run.finish() == 0, run.text() + run.logs()
        assert "HealthCheckError: rank 3 is not fit to go on: the device does not answer" in run.logs()
    unfit, *others = said(tmp_path, 3)
    assert [others[0]["what"], others[0]["pid"]] == ["terminate", unfit["pid"]]
    assert others[-1]["pid"] != unfit["pid"]
    assert {one["pid"] for one in said(tmp_path, 0)} == {said(tmp_path, 0)[0]["pid"]}


SPARES = """
three = inprocess.Compose(MaxActiveWorldSize(3), ShiftRanks())

@inprocess.Wrapper(rank_assignment=three, completion=saying("completion"))
def train(call: inprocess.CallWrapper):
    say("entered", call.state)
    together(call)
    if call.state.rank == 0 and call.iteration == 0:
        raise ValueError("one")
    dist.barrier()
    return "done"

say(f"returned {train()}", inprocess.State.from_env())
"""


def test_spares_wait_and_complete_with_the_others(tmp_path: Path) -> None:
    with standalone(tmp_path, *FOUR, script=script(tmp_path, SPARES)) as run:
        assert run.finish() == 0, run.text() + run.logs()
    for rank in range(3):
        assert course(tmp_path, rank) == ["entered 0", "entered 1", "completion 1", "returned done -1"]
        assert said(tmp_path, rank)[0]["WORLD_SIZE"] == "3"
    assert course(tmp_path, 3) == ["completion 1", "returned None -1"]
    (completion, _) = said(tmp_path, 3)
    assert (completion["mode"], completion["rank"], completion["active_rank"]) == ("INACTIVE", 3, None)


DISCARDED = """
by_host = FilterGroupedByKey(lambda rank, world: "odd" if rank == 1 else "even", condition=lambda count: count > 1)

@inprocess.Wrapper(
    rank_assignment=(inprocess.Compose(MaxActiveWorldSize(2), ShiftRanks(), by_host),), terminate=saying("terminate")
)
def train(call: inprocess.CallWrapper):
    say("entered", call.state)
    together(call)
    gone = pathlib.Path(__file__).with_name("gone")
    while not gone.exists():
        time.sleep(0.01)
    if call.state.rank == 0 and call.iteration == 0:
        raise ValueError("after rank 1 was gone")
    dist.barrier()

train()
"""


def test_a_rank_that_the_assignment_drops_is_nobodys_failure(tmp_path: Path) -> None:
    with suite(tmp_path / "s") as two:
        run: Run = two.run(
            tmp_path,
            "--nnodes",
            "1:2",
            *FOUR[2:],
            "--nproc-per-node",
            "2",
            script=script(tmp_path, DISCARDED),
            name="drops",
        )
        try:
            wait_for("rank 1 to be dropped", lambda: "terminate 0" in course(tmp_path, 1))
            pid = said(tmp_path, 1)[0]["pid"]
            wait_for("its end", lambda: not Path(f"/proc/{pid}").exists())
            (tmp_path / "gone").touch()
            assert run.finish() == 0, run.text() + run.logs()
            assert "3 of 4 ranks completed, 1 were discarded by its rank assignment" in run.text()
            (incident,) = run.incidents()
            assert "after rank 1 was gone" in json.dumps(incident)
            assert "RankDiscarded: rank 1 leaves the job: its group 'odd' has 1 ranks" in run.logs()
        finally:
            run.close()
    assert course(tmp_path, 0) == ["entered 0", "entered 1"]
    assert course(tmp_path, 2) == ["entered 0", "entered 1"]
    assert [one["RANK"] for one in said(tmp_path, 2)] == ["1", "1"]
    assert course(tmp_path, 3) == []
    assert os.path.exists(tmp_path / "gone")


LIGHT = """
import json, pathlib, sys
before = set(sys.modules)
import seamark

HERE = pathlib.Path(__file__).parent
kept_open = open(HERE / "kept-open", "w")

@seamark.Wrapper()
def train(call: seamark.CallWrapper):
    new = sorted(name for name in set(sys.modules) - before)
    (HERE / "imported").write_text(json.dumps(new))
    call.ping()

kept_open.write("written, and never closed")
train()
"""


def test_a_worker_of_a_keeper_imports_nothing_before_its_function_and_loses_no_file(tmp_path: Path) -> None:
    """Each replacement would pay for an import anew: the wrapper's own took longer than all the rest of a restart."""
    path = tmp_path / "light.py"
    path.write_text(LIGHT)
    with standalone(tmp_path, script=path) as run:
        assert run.finish() == 0, run.text() + run.logs()
    assert json.loads((tmp_path / "imported").read_text()) == []
    assert (tmp_path / "kept-open").read_text() == "written, and never closed"
