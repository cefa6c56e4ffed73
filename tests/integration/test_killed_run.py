"""``seamark run --standalone`` is killed: its books tell the truth, and its name is free for the next one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from standalone import Standalone, standalone, wait_for

pytestmark = [pytest.mark.integration]

SHARDS = 4
SCRIPT = """
import os, pathlib, signal, sys, time
import seamark

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so that its keeper has to take its time with it
go_on, out = map(pathlib.Path, sys.argv[1:])
for shard in seamark.shards("d", size=4, shard_size=1):
    before = [int(path.name) for path in out.iterdir() if path.name != str(os.getpid())]
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in before), "an earlier run's worker still lives"
    (out / str(os.getpid())).touch()
    while shard.number == 1 and not go_on.exists():
        time.sleep(0.01)
    shard.complete()
"""


def seamark(run: Standalone, *arguments: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "seamarkd.cli", *arguments]
    # A suite that runs on this host is none of ours.
    ports = enumerate(("LIGHTHOUSE", "COORDINATOR"), 1)
    nowhere = {f"SEAMARK_{role}_ADDRESS": f"tcp://127.0.0.1:{port}" for port, role in ports}
    done = subprocess.run(command, env=run.env | nowhere, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def states(run: Standalone) -> list[str]:
    books = json.loads(seamark(run, "manifest", run.name))
    return [shard["state"] for dataset in books["datasets"] for shard in dataset["shards"]]


def test_the_books_tell_the_truth_and_the_name_is_free(tmp_path: Path) -> None:
    script, out, go_on = tmp_path / "script.py", tmp_path / "workers", tmp_path / "go-on"
    script.write_text(SCRIPT)
    out.mkdir()
    more: dict[str, Any] = {"script": script, "arguments": (str(go_on), str(out))}
    options = ("--independent", "--preload", "none")
    with standalone(tmp_path, *options, **more) as killed:
        wait_for(
            "a shard to be done and another to be leased",
            lambda: any(out.iterdir()) and states(killed) == ["DONE", "LEASED"],
        )
        assert "standalone job job" in seamark(killed, "status"), "no suite runs, and all is well"
        killed.process.kill()
        killed.process.wait()
        assert states(killed) == ["DONE", "PENDING"], "a lease ends with who gave it"
        assert "failed: the seamark run that had it was killed" in " ".join(seamark(killed, "why", "job").split())
        assert "no suite runs on this host, nor a standalone job" in seamark(killed, "status", code=2)
        go_on.touch()
        with standalone(tmp_path, *options, **more) as again:
            assert again.finish() == 0, again.text() + again.logs()
            assert states(again) == ["DONE"] * SHARDS
            assert len(list(out.iterdir())) == 2
