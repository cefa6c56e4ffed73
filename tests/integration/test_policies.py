"""The restart policies as runs: several agents of one suite, real workers, real kills. The table is a unit test."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from standalone import Run, wait_for
from suite import Suite, suite

pytestmark = pytest.mark.suite

TOGETHER = Path(__file__).with_name("together.py")
PRELOAD = ("--preload", "numpy,torch,torch.distributed")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    """Four agents with two places each."""
    with suite(tmp_path_factory.mktemp("p"), agents=4, slots=2) as made:
        yield made


class Job:
    """A job of ``together.py``, and what its ranks said."""

    def __init__(self, suite: Suite, home: Path, mode: str, *options: str) -> None:
        self.home = home
        home.mkdir(parents=True)
        script = shutil.copy(TOGETHER, home)
        self.run = Run(home, *PRELOAD, *options, env=suite.env, name=home.name, script=Path(script), arguments=(mode,))

    def said(self, rank: int) -> list[dict[str, Any]]:
        path = self.home / f"said-{rank}"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait(self, what: str, ranks: int, condition: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """The latest of each of these first ranks, once it is as wanted."""

        def latest() -> list[dict[str, Any]] | None:
            self.run.check_alive()
            said = [self.said(rank) for rank in range(ranks)]
            found = [lines[-1] for lines in said if lines]
            return found if len(found) == ranks and condition(found) else None

        try:
            return wait_for(what, latest)
        except AssertionError as error:
            said = "\n".join(str(self.said(rank)) for rank in range(ranks))
            raise AssertionError(f"{error}\n{said}\n{self.run.text()}\n{self.run.logs()}") from None

    def wait_world(self, ranks: int, world: int, iteration: int | None = None) -> list[dict[str, Any]]:
        """All these ranks sum a world of this size, in one iteration."""
        wanted = {world}

        def together(found: list[dict[str, Any]]) -> bool:
            iterations = {one["iteration"] for one in found}
            same = len(iterations) == 1 and (iteration is None or iterations == {iteration})
            return same and {one["world"] for one in found} == wanted

        return self.wait(f"{ranks} ranks in a world of {world}", ranks, together)

    def mark(self, name: str) -> None:
        (self.home / name).touch()

    def finish(self) -> str:
        """Its output, once it has ended well."""
        self.mark("finish")
        assert self.run.finish() == 0, self.run.text() + self.run.logs()
        return self.run.text()


@pytest.fixture
def start(four: Suite, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    started: list[Job] = []
    numbers = itertools.count()

    def make(mode: str, *options: str) -> Job:
        job = Job(four, tmp_path / f"{tmp_path.name}-{next(numbers)}", mode, *options)
        started.append(job)
        return job

    yield make
    for job in started:
        job.run.close()


def kill(*lines: dict[str, Any]) -> None:
    for line in lines:
        # The policy may end a rank because of the one before.
        with contextlib.suppress(ProcessLookupError):
            os.kill(line["pid"], signal.SIGKILL)


def pids(lines: list[dict[str, Any]]) -> list[int]:
    return [line["pid"] for line in lines]


def test_min_healthy_with_restarts_in_process_node_by_node(start: Callable[..., Job]) -> None:
    job = start("nodes", "--nnodes", "1:2", "--nproc-per-node", "2", "--restart-policy", "min-healthy")
    before = job.wait_world(4, 4, iteration=0)
    kill(before[2])
    after = job.wait_world(2, 2, iteration=1)
    assert pids(after) == pids(before[:2]), "the other node goes on in process"
    assert len(job.said(3)) == 1, "the rest of the node has left"
    kill(after[0])
    again = job.wait_world(4, 4, iteration=100)
    assert not set(pids(again)) & set(pids(before)), "below the minimum all are started anew"
    assert "all 4 ranks completed" in job.finish()


def test_min_healthy_with_one_rank_for_each_agent(start: Callable[..., Job]) -> None:
    job = start("wrapped", "--nnodes", "3:4", "--restart-policy", "min-healthy")
    before = job.wait_world(4, 4, iteration=0)
    assert len({line["node"] for line in before}) == 4
    kill(before[3])
    after = job.wait_world(3, 3, iteration=1)
    assert pids(after) == pids(before[:3])
    kill(after[0])
    job.wait_world(4, 4, iteration=100)
    assert "all 4 ranks completed" in job.finish()


def test_min_healthy_by_ranks_goes_on_with_a_rank_of_each_node(start: Callable[..., Job]) -> None:
    group = ("--restart-policy", "min-healthy", "--worker-group", "rank")
    job = start("wrapped", "--nnodes", "1:2", "--nproc-per-node", "2", *group)
    before = job.wait_world(4, 4, iteration=0)
    kill(before[3])
    job.wait_world(3, 3, iteration=1)
    kill(before[1])
    wait_for("two ranks", lambda: [job.said(rank)[-1]["world"] for rank in (0, 2)] == [2, 2])
    assert [job.said(rank)[-1]["pid"] for rank in (0, 2)] == [before[0]["pid"], before[2]["pid"]]
    assert "2 of 4 ranks completed, 2 were lost and had no replacement" in job.finish()


def test_min_healthy_succeeds_with_the_minimum_while_others_fail(start: Callable[..., Job]) -> None:
    job = start("plain", "--nnodes", "1:2", "--nproc-per-node", "2", "--restart-policy", "min-healthy")
    before = job.wait_world(4, 4)
    # Nobody waits in a collective for who has ended: each node's ranks see their own file first.
    job.mark(f"return-{before[0]['node']}")
    job.mark(f"fail-{before[2]['node']}")
    assert job.run.finish() == 0, job.run.text() + job.run.logs()
    assert "2 of 4 ranks completed, 2 were lost and had no replacement" in job.run.text()


def test_any_failed_restarts_all_for_one_and_for_a_whole_node(start: Callable[..., Job]) -> None:
    job = start("plain", "--nnodes", "2", "--nproc-per-node", "2", "--restart-policy", "any-failed")
    first = job.wait_world(4, 4)
    kill(first[1])
    second = job.wait("all anew", 4, lambda found: not set(pids(found)) & set(pids(first)))
    kill(second[2], second[3])
    job.wait("all anew again", 4, lambda found: not set(pids(found)) & set(pids(second)))
    job.finish()


def test_any_failed_starts_who_had_finished_again(start: Callable[..., Job]) -> None:
    job = start("plain", "--nnodes", "2", "--nproc-per-node", "2", "--restart-policy", "any-failed")
    first = job.wait_world(4, 4)
    returned = f"return-{first[0]['node']}"
    job.mark(returned)
    # Left alone in a collective, the others fail.
    wait_for("who returned", lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids(first[:2])))
    (job.home / returned).unlink()
    job.wait("all anew", 4, lambda found: not set(pids(found)) & set(pids(first)))
    assert "all 4 ranks completed" in job.finish()


def test_replace_gives_a_whole_node_new_workers_in_their_places(start: Callable[..., Job]) -> None:
    job = start("wrapped", "--nnodes", "2", "--nproc-per-node", "2")
    before = job.wait_world(4, 4, iteration=0)
    kill(before[2], before[3])
    after = job.wait(
        "the world again",
        4,
        lambda found: {one["world"] for one in found} == {4} and all(one["iteration"] > 0 for one in found),
    )
    assert pids(after[:2]) == pids(before[:2])
    assert [one["node"] for one in after] == [one["node"] for one in before]
    assert "all 4 ranks completed" in job.finish()
