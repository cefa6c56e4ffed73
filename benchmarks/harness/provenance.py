"""Where a figure comes from: the commit, the machine, the versions. A figure without them stands nowhere."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]


def now() -> str:
    """The present, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git(*arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(REPOSITORY), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def commit() -> dict[str, object]:
    """The commit that is measured, None outside a repository, and whether the tree differs from it."""
    status = _git("status", "--porcelain")
    dirty = None if status is None else bool(status)
    return {"commit": _git("rev-parse", "--verify", "HEAD"), "dirty": dirty}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def slowest_reverse_lookup() -> float:
    """Seconds of the slowest of 40 look-ups of this host's own name, four at a time.

    torch's TCPStore makes one at each connection, on both sides, for the mapped form of the address. Where
    a name server drops some of them, restarts of every system stall for its timeout, often 5 s.
    """

    def look_up(_number: int) -> float:
        begun = time.monotonic()
        with contextlib.suppress(OSError):
            socket.getnameinfo(("::ffff:127.0.0.1", 1, 0, 0), 0)
        return time.monotonic() - begun

    with ThreadPoolExecutor(4) as pool:
        return max(pool.map(look_up, range(40)))


def machine() -> dict[str, object]:
    """Cores this process may use, processor, memory in bytes, kernel, and the load of the last minute."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "memory": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "load_1min": round(os.getloadavg()[0], 2),
    }
