"""Seeing a worker die, as early as the kernel lets anybody see it.

An exit is reported only after the memory of the process was freed. Its threads end before that, so a
`DeathWatch` waits for the canary threads named in the worker's progress page as well as for the process. A
dead thread alone proves nothing (an exec ends threads, too): the kernel's own marks on the process decide,
and without them the watch relies on the process.

This module knows nothing about what a death means for the job, and it never reaps: the exit status is the
keeper's to tell.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import time
from collections.abc import Callable
from typing import Literal

from seamark.progress import ProgressPage
from seamarkd.agent.keeper.processes import stat_fields

log = logging.getLogger(__name__)

How = Literal["canary", "pidfd"]

# pidfd_open(2): PIDFD_THREAD is O_EXCL, known to Linux >= 6.9; older kernels answer EINVAL.
_PIDFD_THREAD = os.O_EXCL
# include/linux/sched.h
_PF_EXITING = 0x4
_SIGKILL_PENDING = 1 << (9 - 1)
# Enough of proc_pid_stat(5) for its third field: a number, a name of at most 64 bytes in parentheses, the state.
_STATE_BYTES = 128
# The main thread can be between taking its SIGKILL off the queue and being marked as exiting: microseconds,
# or the scheduler's turns of a busy host. After the last pause the canary is held to have died alone.
_CONFIRM_PAUSES = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032)

_thread_pidfds_missing = False


def is_dying(pid: int, pidfd: int) -> bool:
    """Whether the process is on its way out or already gone, by the kernel's own marks.

    Args:
        pid: the process id that `pidfd` was opened for.
        pidfd: guards against a reused `pid`: it is readable once the process is gone.
    """
    if _readable(pidfd):
        return True
    try:
        flags = int(stat_fields(pid)[6])  # field 9
        with open(f"/proc/{pid}/status", "rb") as status:
            masks = [line.split()[1] for line in status if line.startswith((b"SigPnd:", b"ShdPnd:"))]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return bool(flags & _PF_EXITING) or any(int(mask, 16) & _SIGKILL_PENDING for mask in masks)


class DeathWatch:
    """Calls back once, at the first sure sign that a worker is dying."""

    def __init__(
        self,
        pid: int,
        pidfd: int,
        page: ProgressPage,
        on_death: Callable[[How, float], None],
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Watch the process from now on; its canaries from `arm` on.

        Args:
            pid: the worker's process id.
            pidfd: its pidfd; the watch keeps a duplicate.
            page: the worker's progress page, open until `close`.
            on_death: called in the event loop with what was seen first and when (`time.monotonic`, seconds).
            loop: the running loop by default.

        Raises:
            OSError: no file descriptor is left.
        """
        self._pid = pid
        self._page = page
        self._on_death = on_death
        self._loop = loop or asyncio.get_running_loop()
        self._canaries: dict[int, int] = {}  # thread id -> its pidfd, -1 once it is no longer watched
        self._timer: asyncio.TimerHandle | None = None
        self._warned = False
        self._over = False
        self._process = os.dup(pidfd)
        try:
            # Kept open, for it is read four times a second: opening it costs twice as much as reading it.
            self._stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError):
            self._stat = -1
        self._loop.add_reader(self._process, self._die, "pidfd")

    @property
    def stopped(self) -> bool:
        """Whether a signal stopped the process; one that a debugger holds is not."""
        if self._stat < 0:
            return False
        try:
            return os.pread(self._stat, _STATE_BYTES, 0).rpartition(b")")[2].split(maxsplit=1)[0] == b"T"
        except ProcessLookupError:
            return False

    def arm(self) -> bool:
        """Start to watch the canaries that the page names by now.

        Cheap, to be called at every look at the page: a worker names its canaries some time after its start,
        and new ones when it executes itself anew.

        Returns:
            whether at least one canary is being watched.
        """
        if self._over:
            return False
        for thread_id in self._page.canaries:
            if thread_id not in self._canaries:
                self._watch(thread_id)
        return any(fd >= 0 for fd in self._canaries.values())

    def close(self) -> None:
        """Stop watching, without a call."""
        if self._over:
            return
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        for thread_id in self._canaries:
            self._unwatch(thread_id)
        self._loop.remove_reader(self._process)
        os.close(self._process)
        if self._stat >= 0:
            os.close(self._stat)
            self._stat = -1

    def _watch(self, thread_id: int) -> None:
        global _thread_pidfds_missing
        if _thread_pidfds_missing:
            return
        try:
            fd = os.pidfd_open(thread_id, _PIDFD_THREAD)
        except ProcessLookupError:
            return
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            _thread_pidfds_missing = True
            log.warning(
                "this kernel has no pidfd for a thread (Linux 6.9 has): "
                "the death of a worker is seen only after its memory was freed"
            )
            return
        # Asked after the pidfd was opened: a thread id reused later can't change whom the pidfd stands for.
        if _thread_group(thread_id) != self._pid:
            os.close(fd)
            return
        self._canaries[thread_id] = fd
        self._loop.add_reader(fd, self._canary_ended, thread_id)

    def _unwatch(self, thread_id: int) -> None:
        fd = self._canaries[thread_id]
        if fd >= 0:
            self._loop.remove_reader(fd)
            os.close(fd)
            self._canaries[thread_id] = -1

    def _canary_ended(self, thread_id: int) -> None:
        at = time.monotonic()
        self._unwatch(thread_id)
        if not self._page.goodbye:
            self._confirm(at, 0)

    def _confirm(self, at: float, attempt: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if is_dying(self._pid, self._process):
            self._die("canary", at)
        elif attempt < len(_CONFIRM_PAUSES):
            self._timer = self._loop.call_later(_CONFIRM_PAUSES[attempt], self._confirm, at, attempt + 1)
        elif not self._warned:
            self._warned = True
            log.warning("a canary thread of process %d ended and the process lives on", self._pid)

    def _die(self, how: How, at: float | None = None) -> None:
        self.close()
        self._on_death(how, time.monotonic() if at is None else at)


def _readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _thread_group(thread_id: int) -> int | None:
    try:
        with open(f"/proc/{thread_id}/status", "rb") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(b"Tgid:"))
    except (FileNotFoundError, ProcessLookupError):
        return None
