"""Under a real Slurm: its daemons are started here, on loopback, with two nodes (``slurm.py``)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm import Cluster, cluster, why_not
from standalone import HERE, wait_for
from suite import free_ports

pytestmark = [pytest.mark.inprocess, pytest.mark.skipif(bool(why_not()), reason=f"no Slurm: {why_not()}")]

FLAGS = ("--nodes=2", "--ntasks=4", "--kill-on-bad-exit=0", "--wait=0")
"""As docs/slurm.md has them."""
EXAMPLES = HERE.parents[1] / "examples"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("s")) as made:
        yield made


class Step:
    """A job of four ranks that srun started, and what they say."""

    def __init__(self, slurm: Cluster, home: Path, *flags: str) -> None:
        self.slurm = slurm
        self.home = home
        self.script = home / "train.py"
        shutil.copy(HERE / "train_monitored.py", self.script)
        command = ("srun", *FLAGS, *flags, sys.executable, str(self.script))
        self.process = slurm.start(*command, output=home / "output")
        self.job = wait_for("the job", slurm.running)

    def said(self, slot: int, what: str = "entered") -> list[dict[str, Any]]:
        return said(self.home, slot, what)

    def wait_entered(self, iteration: int, slots: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        def all_entered() -> bool:
            assert self.process.poll() is None, self.text()
            latest = [self.said(slot)[-1:] for slot in slots]
            return all(one and one[0]["iteration"] >= iteration for one in latest)

        try:
            wait_for(f"iteration {iteration}", all_entered)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()}\n{self.slurm.logs()}") from None

    def text(self) -> str:
        return (self.home / "output").read_text()

    def finish(self) -> int:
        """srun's exit code, once nothing of the job is left on the nodes."""
        code = self.process.wait(90.0)
        wait_for("the nodes to be idle", self.slurm.all_idle)
        assert self.slurm.left("train.py") == []
        return code


def said(home: Path, slot: int, what: str) -> list[dict[str, Any]]:
    path = home / f"said-{slot}"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in map(json.loads, (one for one in lines if one.endswith("\n"))) if line["what"] == what]


def test_under_srun_ranks_find_each_other_and_outlive_an_exception_and_a_kill(slurm: Cluster, tmp_path: Path) -> None:
    step = Step(slurm, tmp_path)
    step.wait_entered(0)
    first = [step.said(slot)[0] for slot in range(4)]
    on = {host: [one["local"] for one in first if one["host"] == host] for host in ("n1", "n2")}
    assert first[0]["host"] == "n1"
    assert sum(map(len, on.values())) == 4
    for places in on.values():
        assert places == [[local, len(places)] for local in range(len(places))], on
    assert len({one["master"] for one in first}) == 1, "MASTER_ADDR and MASTER_PORT are from Slurm's variables"
    (tmp_path / "raise-1").touch()
    step.wait_entered(1)
    os.kill(first[3]["pid"], signal.SIGKILL)
    step.wait_entered(2)
    (tmp_path / "finish").touch()
    assert step.finish() == 0, step.text()
    for slot in range(4):
        assert [one["iteration"] for one in step.said(slot)] == [0, 1, 2]
        pids = [one["pid"] for one in step.said(slot)]
        assert pids[0] == pids[1]
        assert (pids[1] == pids[2]) == (slot != 3)
        assert [one["world"] for one in step.said(slot)] == [4, 4, 4]


def test_sigterm_of_scancel_has_all_ranks_save_and_end_with_143(slurm: Cluster, tmp_path: Path) -> None:
    step = Step(slurm, tmp_path)
    step.wait_entered(0)
    slurm.command("scancel", "--signal=TERM", step.job)
    assert step.finish() == 143, step.text()
    assert [(len(step.said(slot)), len(step.said(slot, "saved"))) for slot in range(4)] == [(1, 1)] * 4, step.text()


def test_a_cancelled_job_saves_and_leaves_nothing(slurm: Cluster, tmp_path: Path) -> None:
    step = Step(slurm, tmp_path)
    step.wait_entered(0)
    slurm.command("scancel", step.job)
    assert step.finish() != 0
    assert [len(step.said(slot, "saved")) for slot in range(4)] == [1] * 4, step.text()


def test_a_lost_monitor_costs_its_rank_alone(slurm: Cluster, tmp_path: Path) -> None:
    step = Step(slurm, tmp_path)
    step.wait_entered(0)
    os.kill(step.said(2)[0]["monitor"], signal.SIGKILL)
    step.wait_entered(1, (0, 1, 3))
    (tmp_path / "finish").touch()
    assert step.finish() == 137, step.text()
    assert [step.said(slot)[-1]["world"] for slot in (0, 1, 3)] == [3] * 3


def test_with_kill_on_bad_exit_it_ends_the_step(slurm: Cluster, tmp_path: Path) -> None:
    step = Step(slurm, tmp_path, "--kill-on-bad-exit=1")
    step.wait_entered(0)
    os.kill(step.said(2)[0]["monitor"], signal.SIGKILL)
    assert step.finish() != 0


def test_the_example_saves_when_it_is_asked_and_is_queued_again(slurm: Cluster, tmp_path: Path) -> None:
    shutil.copy(HERE / "train_monitored.py", tmp_path / "train.py")
    options = ("--ntasks-per-node=2", f"--chdir={tmp_path}", f"--output={tmp_path}/output")
    job = slurm.submit(*options, str(EXAMPLES / "slurm.sbatch"), "train.py", PYTHON=sys.executable)

    def all_said(what: str, generation: str) -> bool:
        return all(any(one["generation"] == generation for one in said(tmp_path, slot, what)) for slot in range(4))

    wait_for("the first iteration", lambda: all_said("entered", "0"))
    slurm.command("scancel", "--signal=TERM", str(job))
    wait_for("all to save", lambda: all_said("saved", "0"))
    wait_for("the job to begin anew", lambda: all_said("entered", "1"))
    assert said(tmp_path, 0, "entered")[-1]["iteration"] == 0, "it has another lighthouse"
    assert slurm.job(job)["Restarts"] == "1"
    (tmp_path / "finish").touch()
    wait_for("its end", lambda: slurm.job(job)["JobState"] == "COMPLETED")
    assert slurm.job(job)["ExitCode"] == "0:0", (tmp_path / "output").read_text()


class Allocation:
    """The example with the daemons, on two nodes with two ranks each."""

    def __init__(self, slurm: Cluster, home: Path) -> None:
        self.slurm = slurm
        self.home = home
        shutil.copy(HERE / "together.py", home / "train.py")
        options = (f"--chdir={home}", f"--output={home}/output", str(EXAMPLES / "slurm_suite.sbatch"))
        more = ("--nproc-per-node", "2", "--log-dir", str(home / "logs"), "train.py", "wrapped")
        (port,) = free_ports(1)
        env = {"SEAMARK_PORT": str(port), "TMPDIR": str(home)}
        env["PATH"] = f"{Path(sys.executable).parent}:{slurm.env['PATH']}"
        self.job = slurm.submit(*options, *more, **env)

    def lines(self, rank: int) -> list[dict[str, Any]]:
        file = self.home / f"said-{rank}"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait_entered(self, times: int) -> None:
        def entered() -> bool:
            assert self.slurm.job(self.job)["JobState"] in ("PENDING", "RUNNING"), self.text()
            return all(len(self.lines(rank)) >= times for rank in range(4))

        wait_for(f"iteration {times - 1}", entered)

    def text(self) -> str:
        return (self.home / "output").read_text()

    def finish(self) -> dict[str, str]:
        """What the controller says of its end, once nothing is left of it."""
        wait_for("its end", lambda: self.slurm.job(self.job)["JobState"] not in ("RUNNING", "COMPLETING"))
        wait_for("the daemons to be gone", lambda: not self.slurm.left("seamark"))
        assert not list(self.home.glob("seamark.*")), "its directories go with it"
        return self.slurm.job(self.job)


def test_seamark_run_in_an_allocation(slurm: Cluster, tmp_path: Path) -> None:
    """A rank is killed and replaced; the nodes have Slurm's names, and the end is the job's."""
    run = Allocation(slurm, tmp_path)
    run.wait_entered(1)
    assert {run.lines(rank)[0]["node"] for rank in range(4)} == {"n1", "n2"}
    os.kill(run.lines(3)[0]["pid"], signal.SIGKILL)
    run.wait_entered(2)
    assert run.lines(3)[-1]["pid"] != run.lines(3)[0]["pid"]
    (tmp_path / "finish").touch()
    assert run.finish()["ExitCode"] == "0:0", run.text()


@pytest.mark.parametrize("flags", [("--batch", "--signal=TERM"), ()], ids=["asked", "cancelled"])
def test_an_allocation_that_is_to_end_leaves_no_daemon(slurm: Cluster, tmp_path: Path, flags: tuple[str, ...]) -> None:
    run = Allocation(slurm, tmp_path)
    run.wait_entered(1)
    slurm.command("scancel", *flags, str(run.job))
    assert run.finish()["ExitCode"] == "143:0", run.text()


def test_a_lost_node_costs_its_ranks_alone(slurm: Cluster, tmp_path: Path) -> None:
    step = Step(slurm, tmp_path, "--no-kill")
    step.wait_entered(0)
    on = {slot: step.said(slot)[0]["host"] for slot in range(4)}
    stay = tuple(slot for slot in range(4) if on[slot] == "n1")
    slurm.lose_node("n2")
    try:
        step.wait_entered(1, stay)
        assert {step.said(slot)[-1]["world"] for slot in stay} == {len(stay)}
        wait_for("Slurm to know", lambda: "down" in slurm.command("sinfo", "--noheader", "--format=%T"))
        (tmp_path / "finish").touch()
        assert step.process.wait(90.0) == 0, "Slurm does not count what it lost itself"
    finally:
        slurm.start_node("n2")
    step.finish()
    assert [len(step.said(slot)) for slot in stay] == [2] * len(stay), step.text()
