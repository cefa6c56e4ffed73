"""The progress page of a worker, as seamark.progress lays it out; the keeper only makes it."""

from __future__ import annotations

import fcntl
import os

PROGRESS_FD = "SEAMARK_PROGRESS_FD"
PROGRESS_DISCARDED = 8 * 13  # bytes from its beginning
PROGRESS_NAME = "seamark-progress"
PROGRESS_BYTES = 4096


def blank_page() -> int:
    fd = os.memfd_create(PROGRESS_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PROGRESS_BYTES)
    # A worker that truncated it would kill the agent, which has it mapped, by SIGBUS.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def says_discarded(page: int) -> bool:
    """Whether the worker said that the job's rank assignment dropped it."""
    return any(os.pread(page, 8, PROGRESS_DISCARDED))
