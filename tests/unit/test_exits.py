"""What an exit status means."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from seamarkd.agent.orphans import exit_status
from seamarkd.agent.workers import began_then, runs_since
from seamarkd.exits import NOT_STARTED, UNKNOWN_STATUS, exit_cause


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (3, "exit", "exited with code 3"),
        (-9, "signal", "killed by SIGKILL"),
        (UNKNOWN_STATUS, "exit", "exit status unknown: its keeper was killed before it"),
        (NOT_STARTED, "exit", "could not be started"),
    ],
)
def test_causes(status: int, kind: str, text: str) -> None:
    cause = exit_cause(status)
    assert (cause.kind, cause.text) == (kind, text)


@pytest.mark.parametrize(
    ("ends", "status"), [("import sys; sys.exit(43)", 43), ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM)]
)
def test_the_status_of_a_process_that_nobody_has_reaped(ends: str, status: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", ends])
    pidfd = os.pidfd_open(process.pid)
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
        assert exit_status(process.pid, pidfd) == status
        process.wait()
        # Of one that was reaped only Linux >= 6.15 keeps it.
        assert exit_status(process.pid, pidfd) in (status, UNKNOWN_STATUS)
    finally:
        os.close(pidfd)


def test_a_process_is_known_again_by_its_start() -> None:
    began = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert runs_since(process.pid, began)
        assert not runs_since(process.pid, began - 2.0)
        assert not runs_since(process.pid, began + 2.0)
    assert not runs_since(process.pid, began)


@pytest.mark.parametrize(
    ("since_boot", "slept", "same"),
    [
        (100.0, 0.0, True),
        (102.0, 0.0, False),
        (98.0, 0.0, False),
        (150.0, 50.0, True),
        (100.0, 50.0, True),
        (120.0, 50.0, True),
        (152.0, 50.0, False),
        (98.0, 50.0, False),
    ],
    ids=["", "later", "earlier", "slept before", "slept after", "both", "slept before, later", "slept after, earlier"],
)
def test_a_host_that_was_suspended_knows_its_processes_again(since_boot: float, slept: float, same: bool) -> None:
    assert began_then(since_boot, 100.0, slept) is same
