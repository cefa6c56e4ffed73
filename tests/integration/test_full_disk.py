"""A full disk under the coordinator: new jobs are refused, the running one goes on, and it recovers by itself."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from standalone import EVERY, STEPS, wait_for
from suite import small_disk, suite

pytestmark = pytest.mark.suite

SIZE = "12m"
"""Room for the database, its write-ahead log and the ballast."""


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
