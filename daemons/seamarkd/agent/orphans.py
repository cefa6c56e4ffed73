"""Processes whose keeper was killed: they live on, and their agent looks after them by itself (D9).

Their parent is now whoever takes orphans up on this host. Its agent holds their pidfds, sees their end, and asks the
kernel how it was. It knows nothing of jobs and of what an end means.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import struct
from collections.abc import Callable

from seamark.progress import MEMFD_NAME, PAGE_SIZE
from seamarkd.agent.keeper.processes import stat_fields
from seamarkd.agent.keeper_answers import Held, Process
from seamarkd.agent.workers import runs_since
from seamarkd.exits import UNKNOWN_STATUS

# include/uapi/linux/pidfd.h, since Linux 6.13; the exit status is among it since 6.15, once somebody has reaped it.
_PIDFD_GET_INFO = 3 << 30 | 64 << 16 | 0xFF << 8 | 11
_PIDFD_INFO_EXIT = 1 << 3
_INFO_BYTES = 64
_EXIT_CODE_AT = 60
KILL_PATIENCE = 10.0
"""Seconds until what can't be killed (uninterruptible sleep) is given up."""


class Orphan:
    """One such process, and the end of it.

    Args:
        held: its descriptors; the caller's, open until the end was told.
        on_exited: called in the event loop with its exit status: code, minus the signal, or ``UNKNOWN_STATUS``.
    """

    def __init__(self, held: Held, on_exited: Callable[[int], None]) -> None:
        self.held = held
        self.ended = asyncio.Event()
        self._on_exited = on_exited
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(held.pidfd, self._end)

    def signal(self, signum: int, *, group: bool) -> None:
        """Signals it, or its whole process group."""
        with contextlib.suppress(ProcessLookupError):
            if group and not self.ended.is_set():
                os.killpg(self.held.process.pid, signum)
            elif not group:
                signal.pidfd_send_signal(self.held.pidfd, signum)

    async def stop(self, grace: float) -> None:
        """Ends it: SIGTERM, and SIGKILL ``grace`` seconds later."""
        self.signal(signal.SIGTERM, group=True)
        self.signal(signal.SIGCONT, group=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), grace)
        self.signal(signal.SIGKILL, group=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), KILL_PATIENCE)

    def close(self) -> None:
        """Watches it no longer."""
        if not self.ended.is_set():
            self._loop.remove_reader(self.held.pidfd)

    def _end(self) -> None:
        self._loop.remove_reader(self.held.pidfd)
        # What it leaves has no keeper either that would end it with the job.
        self.signal(signal.SIGKILL, group=True)
        self.ended.set()
        self._on_exited(exit_status(self.held.process.pid, self.held.pidfd))


def exit_status(pid: int, pidfd: int) -> int:
    """How a process ended that is no child of this one: code, or minus the signal.

    Args:
        pid: its process id.
        pidfd: a pidfd of it, which says that it has ended.

    Returns:
        ``UNKNOWN_STATUS`` if it was reaped and the kernel keeps nothing of it (Linux < 6.15).
    """
    # Between the two somebody may reap it: then the pidfd can tell what the process file no longer does.
    for look in (_of_pidfd, _of_zombie, _of_pidfd):
        status = look(pid, pidfd)
        if status is not None:
            return os.waitstatus_to_exitcode(status)
    return UNKNOWN_STATUS


def _of_pidfd(_pid: int, pidfd: int) -> int | None:
    info = bytearray(_INFO_BYTES)
    struct.pack_into("Q", info, 0, _PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except OSError:
        return None
    (known,) = struct.unpack_from("Q", info, 0)
    (status,) = struct.unpack_from("i", info, _EXIT_CODE_AT)
    return int(status) if known & _PIDFD_INFO_EXIT else None


def _of_zombie(pid: int, _pidfd: int) -> int | None:
    """From field 52 of proc_pid_stat(5), for as long as nobody has reaped it: its number is no other's yet."""
    try:
        fields = stat_fields(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[49]) if fields[0] in (b"Z", b"X") else None


def take_up(slot: str, incarnation: str, pid: int, forked_at: float) -> Held | None:
    """The descriptors of a process that an earlier start of this agent had; None if it has ended.

    Args:
        slot, incarnation: who it is.
        pid: its process id, which may be another's by now.
        forked_at: when it was forked, in monotonic seconds.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if not runs_since(pid, forked_at):
        os.close(pidfd)
        return None
    process = Process(
        slot=slot,
        incarnation=incarnation,
        kind="worker",
        pid=pid,
        start_time=0,
        forked=False,
        forked_at=forked_at,
        fork_seconds=0.0,
        why_exec=None,
        port=None,
        status=None,
        core=False,
        at=None,
    )
    return Held(process, pidfd, _page(pid))


def _page(pid: int) -> int:
    """Its progress page; a blank one if it has closed it."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{fd}"
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if os.readlink(path).startswith(f"/memfd:{MEMFD_NAME} "):
                    return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    page = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC)
    os.ftruncate(page, PAGE_SIZE)
    return page
