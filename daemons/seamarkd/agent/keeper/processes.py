"""Processes of this host, as /proc shows them, and signals to them."""

from __future__ import annotations

import contextlib
import os


def stat_fields(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the third on: index 0 is field 3 of proc_pid_stat(5)."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()


def start_time(pid: int) -> int:
    """In clock ticks since boot; with the pid it names a process for ever."""
    return int(stat_fields(pid)[19])


class Look:
    """A look at all processes, also with a full descriptor table: one is kept back for it, and given up meanwhile."""

    def __init__(self) -> None:
        self._spare: int | None = None
        self._keep_back()

    def below(self, root: int) -> dict[int, int]:
        """As `descendants`."""
        self.close()
        try:
            return descendants(root)
        finally:
            self._keep_back()

    def close(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def _keep_back(self) -> None:
        # Where somebody else was sooner, it is tried again after the next look.
        with contextlib.suppress(OSError):
            self._spare = os.open("/proc", os.O_RDONLY | os.O_CLOEXEC)


def descendants(root: int) -> dict[int, int]:
    """Every live process below `root`: pid → process group."""
    parents: dict[int, tuple[int, int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                state, parent, group = stat_fields(int(name))[:3]
                if state not in (b"Z", b"X"):
                    parents[int(name)] = int(parent), int(group)
    found: dict[int, int] = {}
    generation = {root}
    while generation:
        children = {pid: group for pid, (parent, group) in parents.items() if parent in generation}
        found |= children
        generation = set(children)
    return found


def kill(pid: int, number: int) -> bool:
    """Whether the process was there to be signalled."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def kill_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
