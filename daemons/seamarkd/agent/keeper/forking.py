"""A new process by fork, and what the fork has to shed to be a worker."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

from .gate import wait_for_release
from .store import Store
from .worker import Worker

Task = Worker | Store


def fork() -> int:
    """Fork with all signals blocked, in the child until its own handling of them is in place."""
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    try:
        pid = os.fork()
    except OSError:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        raise
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        # The child does the same: whoever comes first, a signal to the group reaches it from now on.
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)
    return pid


@dataclass
class Forked:
    """The new process right after its fork: signals are blocked and the keeper is still all around it."""

    task: Task
    env: dict[str, str]
    log: int
    page: int
    gate: int | None

    def become(self, close_keeper: Callable[[], None]) -> Task:
        """Shed the keeper, and wait at the gate if there is one."""
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        close_keeper()
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(self.log, 1)
        os.dup2(self.log, 2)
        os.close(null)
        os.close(self.log)
        # A script that executes itself again keeps its page.
        os.set_inheritable(self.page, True)
        os.environ.clear()
        os.environ.update(self.env)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if self.gate is not None:
            wait_for_release(self.gate)
        reseed()
        return self.task


def reseed() -> None:
    """Draw anew what a fresh interpreter draws at random and a fork shares; `random` does so by itself."""
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        # Not torch.seed(), which seeds GPUs as well: theirs is a constant until the script sets it.
        sys.modules["torch"].default_generator.seed()
    if "multiprocessing" in sys.modules:
        sys.modules["multiprocessing"].current_process().authkey = os.urandom(32)
