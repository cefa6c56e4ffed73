"""A disk that is full, or refuses every write, under the coordinator.

New jobs are refused and new shards held back, the running job goes on, nothing that was acknowledged is lost, and
everything recovers by itself.
"""

from __future__ import annotations

import errno
import json
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from standalone import EVERY, STEPS, Run, wait_for
from suite import Suite, small_disk, suite

pytestmark = pytest.mark.suite

SIZE = "12m"
"""Room for the database, its write-ahead log and the ballast."""
SHARDS = 400
LEASE_MANY = Path(__file__).with_name("lease_many.py")


def fill(path: Path) -> None:
    """Writes until not one block is left."""
    with path.open("wb", buffering=0) as file:
        for block in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(bytes(block))
            except OSError as error:
                assert error.errno == errno.ENOSPC


def test_a_full_disk_refuses_new_jobs_and_harms_no_running_one(
    tmp_path_factory: pytest.TempPathFactory, undisturbed: str
) -> None:
    home = tmp_path_factory.mktemp("s")
    script = home / "ok.py"
    script.write_text("print('ran')")
    logs = ("--log-dir", str(home / "logs"))
    with (
        small_disk(home / "state", SIZE) as (holder, prefix),
        suite(home, agents=1, slots=5, prefix=prefix) as cluster,
    ):
        disk = Path(f"/proc/{holder}/root{home}/state")
        arguments = ("--steps", str(STEPS), "--every", str(EVERY), "--pause", "0.1")
        run = cluster.run(home / "job", "--nproc-per-node", "4", *logs, name="training", arguments=arguments)
        try:
            run.wait_step(0, STEPS // 5, 0)
            fill(disk / "filling")
            wait_for("the coordinator to say so", lambda: "free some space" in cluster.problems())
            said = cluster.command("run", "--name", "refused", "--preload", "none", *logs, str(script), code=78)
            assert "free some space" in said
            # Ended in the middle of it: what the coordinator has to write about that waits for room.
            run.kill(1)
            run.wait_step(0, 0, 1)
            (disk / "filling").unlink()
            cluster.wait_healthy()
            cluster.command("run", "--name", "taken", "--preload", "none", *logs, str(script))
            assert run.finish() == 0, run.text() + run.logs()
            assert run.digests() == {undisturbed}
            assert [one["failures"][0]["rank"] for one in run.incidents()] == [1]
        finally:
            run.close()


class Leasing:
    """A job on two ranks that does shards, as far as it is let."""

    def __init__(self, cluster: Suite, home: Path) -> None:
        self._cluster = cluster
        self.home = home
        self.out = home / "out"
        self.out.mkdir()
        self._quota = home / "quota"
        self.let(SHARDS // 4)
        arguments = ("--out", str(self.out), "--shards", str(SHARDS), "--quota", str(self._quota), "--per-byte", "1")
        options = ("--nproc-per-node", "2", "--preload", "none", "--max-restarts", "0", "--log-dir", str(home / "logs"))
        self.run: Run = cluster.run(home / "job", *options, name="many", script=LEASE_MANY, arguments=arguments)

    def let(self, shards: int) -> None:
        """The first so many may be done."""
        self._quota.write_bytes(bytes(shards))

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What the workers have written down."""
        lines = [line for path in self.out.glob("*.jsonl") for line in path.read_text().splitlines(keepends=True)]
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [one for one in found if one["event"] == kind]

    def completed(self) -> dict[int, int]:
        """Shards whose completion was acknowledged, and under which lease."""
        return {one["shard"]: one["lease_id"] for one in self.events("completed")}

    def manifest(self, state: str) -> dict[int, int]:
        """What ``seamark manifest`` says of the shards that stand there."""
        (dataset,) = json.loads(self._cluster.command("manifest", "many"))["datasets"]
        return {one["shard"]: one["lease_id"] for one in dataset["shards"] if one["state"] == state}

    def wait_said(self, sentence: str) -> None:
        """Until both workers have logged why they wait."""
        logs = [self.home / "logs" / f"rank_{rank}.log" for rank in range(2)]
        wait_for(f"workers to say {sentence!r}", lambda: all(sentence in path.read_text() for path in logs))

    def check_held(self) -> None:
        """Nothing new is leased or acknowledged, and the coordinator still answers."""
        leased = len(self.events("leased"))
        completed = self.completed()
        assert completed.items() <= self.manifest("DONE").items()
        assert len(completed) < SHARDS
        assert self._cluster.status()["coordinator"]["pid"] == self._cluster.programs()["coordinator"].pid
        assert (len(self.events("leased")), self.completed()) == (leased, completed)

    def check_end(self) -> None:
        """The job succeeds, with the same processes, and everything was done once."""
        assert self.run.finish() == 0, self.run.text() + self.run.logs() + self._cluster.logs()
        assert len(self.events("started")) == len(self.events("ended")) == 2
        assert self.completed() == self.manifest("DONE")
        assert len(self.events("completed")) == len(self.completed()) == SHARDS


def test_a_full_disk_gives_no_new_lease_and_loses_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("s")
    with small_disk(home / "state", SIZE) as (holder, prefix), suite(home, agents=1, slots=2, prefix=prefix) as cluster:
        disk = Path(f"/proc/{holder}/root{home}/state")
        job = Leasing(cluster, home)
        try:
            wait_for("shards to be done", lambda: len(job.completed()) > SHARDS // 8)
            fill(disk / "filling")
            wait_for("the coordinator to say so", lambda: "free some space" in cluster.problems())
            job.let(SHARDS)
            job.wait_said("free some space")
            job.check_held()
            # Killed, it begins with the room that was kept for that; without it, as soon as there is some.
            cluster.kill("coordinator")
            wait_for("it to serve", lambda: "free some space" in cluster.problems())
            job.check_held()
            fill(disk / "rest")
            cluster.kill("coordinator")
            # Its log has no room to say so either.
            tried = {0, cluster.programs()["coordinator"].pid}
            wait_for("it to try again", lambda: cluster.programs()["coordinator"].pid not in tried)
            for name in ("filling", "rest"):
                (disk / name).unlink()
            job.check_end()
        finally:
            job.run.close()


def test_a_disk_that_refuses_every_write_loses_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    """As a file system does that was remounted read-only: no name can be changed, and no open file be written.

    The kernel remounts none by force that has files open for writing, other than after an error of its own: here a
    read-only mount lies over the directory, and the daemon's open files have no room by its resource limits.
    """
    home = tmp_path_factory.mktemp("s")
    state = home / "state"
    with small_disk(state, SIZE) as (_, prefix), suite(home, agents=1, slots=2, prefix=prefix) as cluster:
        job = Leasing(cluster, home)
        job.let(SHARDS)
        try:
            wait_for("shards to be done", lambda: len(job.completed()) > SHARDS // 8)
            coordinator = psutil.Process(cluster.programs()["coordinator"].pid)
            inside(prefix, f"mount --bind '{state}' '{state}' && mount -o remount,bind,ro '{state}'")
            _, most = coordinator.rlimit(psutil.RLIMIT_FSIZE)
            coordinator.rlimit(psutil.RLIMIT_FSIZE, (0, most))
            wait_for("the coordinator to say so", lambda: "is read-only" in cluster.problems())
            job.wait_said("is read-only")
            job.check_held()
            inside(prefix, f"umount --lazy '{state}'")
            coordinator.rlimit(psutil.RLIMIT_FSIZE, (most, most))
            job.check_end()
        finally:
            job.run.close()


def inside(prefix: tuple[str, ...], command: str) -> None:
    subprocess.run([*prefix, "sh", "-c", command], check=True)
