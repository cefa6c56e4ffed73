"""Where things are kept on a host (D17)."""

from __future__ import annotations

import os
from pathlib import Path

from seamarkd.errors import StateError

MAX_JOB_NAME = 180
"""Bytes: a directory has its name (NAME_MAX is 255), and with a rank's number behind it 200 characters on the wire."""


def run_directory() -> Path:
    """Sockets: ``$XDG_RUNTIME_DIR/seamark``, else ``/run/seamark`` for root, else one per user below ``/tmp``."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        return private(Path(base) / "seamark")
    return private(Path("/run/seamark") if os.geteuid() == 0 else Path(f"/tmp/seamark-{os.geteuid()}"))


def state_directory() -> Path:
    """State and logs: ``$XDG_STATE_HOME/seamark``, else ``/var/lib/seamark`` (root) or ``~/.local/state/seamark``."""
    base = os.environ.get("XDG_STATE_HOME")
    if base:
        return private(Path(base) / "seamark")
    return private(Path("/var/lib/seamark") if os.geteuid() == 0 else Path.home() / ".local/state/seamark")


def private(path: Path) -> Path:
    """This directory, made with mode 0700 if it does not exist.

    Raises:
        PermissionError: it belongs to somebody else, who could put sockets and files there in our name.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = path.stat().st_uid
    if owner != os.geteuid():
        raise PermissionError(
            f"{path} belongs to user {owner}: set XDG_RUNTIME_DIR and XDG_STATE_HOME to directories of your own"
        )
    return path


def job_directory(job: str) -> Path:
    """Where a standalone job keeps its manifest and logs.

    Raises:
        StateError: no job can have this name.
    """
    size = len(os.fsencode(job))
    if size > MAX_JOB_NAME:
        raise StateError(f"the name of a job has {MAX_JOB_NAME} bytes at most, this one {size}: {job[:40]}...")
    return state_directory() / "standalone" / job
