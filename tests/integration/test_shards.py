"""Inference over files in shards: whatever is killed, the output is the undisturbed run's, and it is known why."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from standalone import Run, wait_for
from suite import Suite, suite

from seamark.protocol.messages import CoordinatorStatus, MemberStatus
from seamarkd.cli.status import ask_one

pytestmark = pytest.mark.suite

EXAMPLE = Path(__file__).parents[2] / "examples" / "infer_shards.py"
FILES, SHARD, BATCH = 64, 4, 2
POISON = "p_poison.py"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    with suite(tmp_path_factory.mktemp("s"), agents=2, slots=2) as made:
        yield made


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of the standard library, and one that is none."""
    directory = tmp_path_factory.mktemp("inputs")
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: path.stat().st_size)
    for path in [path for path in library if path.stat().st_size > 500][: FILES - 1]:
        shutil.copy(path, directory)
    (directory / POISON).write_bytes(b"x = '\xff\xfe is no text'\n")
    return directory


class Inference(Run):
    """One run of the example."""

    def __init__(self, made: Suite, home: Path, name: str, inputs: Path, *arguments: str) -> None:
        self.suite = made
        self.results = home / "results"
        sizes = ("--shard-size", str(SHARD), "--batch-size", str(BATCH))
        super().__init__(
            home,
            *("--independent", "--nnodes", "2", "--nproc-per-node", "2"),
            env=made.env,
            name=name,
            script=EXAMPLE,
            arguments=("--inputs", str(inputs), "--out", str(self.results), *sizes, *arguments),
        )

    def shards(self) -> list[dict[str, Any]]:
        """The books, as ``seamark manifest`` prints them."""
        datasets = json.loads(self.suite.command("manifest", self.name))["datasets"]
        return list(datasets[0]["shards"]) if datasets else []

    def status(self) -> CoordinatorStatus | None:
        """The coordinator's; None while there is none."""
        answer = ask_one(self.env["SEAMARK_COORDINATOR_ADDRESS"], CoordinatorStatus)
        return None if isinstance(answer, str) else answer

    def done(self, count: int) -> None:
        """Waits until so many shards are done."""

        def reached() -> bool:
            self.check_alive()
            status = self.status()
            jobs = [job for job in status.jobs if job.job == self.name] if status else []
            return any(dataset.done >= count for job in jobs for dataset in job.datasets)

        wait_for(f"{count} shards to be done", reached, 60.0)

    def ranks(self) -> dict[int, MemberStatus]:
        """The living ranks."""
        status = self.status()
        return {one.rank: one for one in status.members.get(self.name, []) if one.alive} if status else {}

    def kill(self, rank: int, signum: int = signal.SIGKILL) -> None:
        """A signal, to a rank that is there."""
        pid = wait_for(f"rank {rank}", lambda: self.ranks().get(rank)).pid
        os.kill(pid, signum)

    def merged(self) -> dict[str, Any]:
        """What it found out about each file."""
        return dict(json.loads((self.results / "all.json").read_text()))


@pytest.fixture(scope="module")
def undisturbed(two: Suite, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = Inference(two, tmp_path_factory.mktemp("quiet"), "quiet", inputs)
    try:
        assert run.finish() == 0, run.text()
        return run.merged()
    finally:
        run.close()


def test_the_undisturbed_run_leaves_out_the_poisoned_batch_alone(undisturbed: dict[str, Any], inputs: Path) -> None:
    names = sorted(path.name for path in inputs.iterdir())
    place = names.index(POISON)
    batch = names[place - place % BATCH : place - place % BATCH + BATCH]
    assert sorted(undisturbed) == [name for name in names if name not in batch], "each file, by its own name"


def test_kills_poison_oom_a_drained_node_and_a_coordinator_change_nothing_in_the_output(
    two: Suite, inputs: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    run = Inference(two, tmp_path, "hurt", inputs, "--pause", "0.5", "--drill-oom", "2")
    try:
        run.done(1)
        run.kill(1)
        run.done(3)
        run.kill(0)
        run.done(4)
        two.kill("coordinator")
        run.done(6)
        node = run.ranks()[3].node
        two.command("drain", node, "--reason", "a drill")
        run.done(8)
        assert node not in {one.node for one in run.ranks().values()}
        two.command("undrain", node)
        assert run.finish() == 0, run.text() + two.logs()
        assert run.merged() == undisturbed
        shards = run.shards()
        assert [one["state"] for one in shards] == ["DONE"] * (FILES // SHARD)
        assert len({one["lease_id"] for one in shards}) == len(shards)
        (poisoned,) = [one for one in shards if one["skip"]]
        assert f"batches left out: shard {poisoned['shard']} batch {poisoned['skip'][0]}" in run.text()
        story = " ".join(two.command("why", "hurt").split())
        for told in ("oom 1 of 3", "poison_input: attempt 2 of 2", "transient 1 of 3", "was killed by SIGKILL"):
            assert told in story, story
        one = " ".join(two.command("why", f"hurt/files/{poisoned['shard']}").split())
        assert "quarantined" in one
        assert "oom" not in one
    finally:
        run.close()


def test_a_coordinator_whose_host_goes_away_leaves_the_rest_for_its_next_start(
    two: Suite, inputs: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    run = Inference(two, tmp_path, "moved", inputs, "--pause", "0.5")
    try:
        run.done(2)
        pids = [one.pid for one in run.ranks().values()]
        coordinator = psutil.Process(two.programs()["coordinator"].pid)
        coordinator.send_signal(signal.SIGTERM)
        wait_for("its end", lambda: not coordinator.is_running(), 45.0)
        log = two.state / "log" / "supervisord.log"
        wait_for("its exit code", lambda: "exited: coordinator (exit status 143; expected)" in log.read_text())
        assert not any(psutil.pid_exists(pid) for pid in pids), "nobody works for a coordinator that is gone"
        two.command("up", "--agents", "2")
        assert run.finish() == 0, run.text() + two.logs()
        assert run.merged() == undisturbed
        # Each shard's output was made once, but for those that were being worked on.
        made = [path.name.split(".")[0] for path in run.results.glob("*.*.json")]
        assert len(made) - len(set(made)) <= 4
    finally:
        run.close()
