"""The run directory of a system under test: in memory, as /run is wherever systemd or a container runtime made it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

IN_MEMORY = Path("/dev/shm")


def make_run_directory(path: Path) -> None:
    """Makes ``path``, which is named "run", a link to a new private directory in memory."""
    path.symlink_to(tempfile.mkdtemp(prefix="seamark-bench-", dir=IN_MEMORY))


def remove_run_directories(below: Path) -> None:
    """Removes all that were made below this directory."""
    for link in [path for path in below.rglob("run") if path.is_symlink()]:
        shutil.rmtree(link.resolve())
        link.unlink()
