"""A full disk under the coordinator: new jobs are refused, the running one goes on, and it recovers by itself."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from standalone import EVERY, STEPS, wait_for
from suite import suite

pytestmark = pytest.mark.suite

SIZE = "12m"
"""Room for the database, its write-ahead log and the ballast."""


@contextmanager
def small_disk(place: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """A file system of ``SIZE`` at this place, in a mount namespace of its own.

    Yields:
        The process that holds the namespace, and what a command has to be run by to be in it.
    """
    place.mkdir(parents=True)
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    mount = f"mount -t tmpfs -o size={SIZE} tmpfs '{place}' && echo mounted && exec sleep infinity"
    holder = subprocess.Popen(["unshare", "--mount", *user, "sh", "-c", mount], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != "mounted\n":
            pytest.skip("this host allows no mount namespace")
        join = ["--user", "--preserve-credentials"] if user else []
        yield holder.pid, ("nsenter", "--target", str(holder.pid), "--mount", *join)
    finally:
        holder.kill()
        holder.wait()


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
        small_disk(home / "state") as (holder, prefix),
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
