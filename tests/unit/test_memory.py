"""What an agent writes down of its jobs."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest

from seamark.protocol.messages import JobSpec
from seamarkd.agent.job import Job
from seamarkd.agent.memory import Memory, Remembered

SPEC = JobSpec(
    name="a/b",
    argv=["t.py"],
    module=False,
    python="python",
    cwd="/",
    env={},
    min_nodes=1,
    max_nodes=1,
    nproc_per_node=1,
    policy="replace",
    max_restarts=2,
    checkpoint_dir="",
    log_dir="/tmp",
)
REMEMBERED = Remembered(Job("a/b", SPEC, allowance=3), "/run/keeper", (7, 1.5))


def test_what_was_written_is_read_until_it_is_forgotten(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "jobs")
    memory.write(REMEMBERED)
    assert Memory(tmp_path / "jobs").read() == [REMEMBERED]
    memory.forget("a/b")
    assert memory.read() == []


def test_a_full_disk_is_said_and_stops_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory(tmp_path / "jobs")
    memory.write(REMEMBERED)
    (tmp_path / "jobs" / "a%2Fb.tmp").symlink_to("/dev/full")
    with caplog.at_level(logging.ERROR):
        memory.write(Remembered(Job("a/b", SPEC, allowance=2), "/run/keeper"))
    assert f"[Errno {errno.ENOSPC}]" in caplog.text
    assert memory.read() == [REMEMBERED], "what was written before stands whole"
