"""Run one system under test at a time, and leave none of its processes behind.

The benchmark makes itself the subreaper of all it starts: whatever forks twice or opens a session of its own
stays a descendant, so everything can be found and ended by pid without a name being searched for.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from harness.run_directory import make_run_directory

PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>

# What a system would take for its own setting if the benchmark itself ran under a launcher.
FOREIGN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FOREIGN_PREFIXES = ("TORCHELASTIC_", "TORCH_", "SEAMARK_", "GROUP_", "ROLE_", "XDG_")


class SystemFailed(Exception):
    """A system under test ended, or said nothing in time; the text is what the table shows."""


@dataclass(frozen=True)
class Command:
    """One process to start: its arguments and what it adds to the environment."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def become_subreaper() -> None:
    """Make orphaned descendants children of this process. Call once, before anything is started.

    Raises OSError where the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def interrupt_once() -> None:
    """Have the first Ctrl-C, SIGTERM or SIGHUP raise KeyboardInterrupt with its name; later ones do nothing.

    So a second Ctrl-C cannot cut short the cleaning up after the first. SIGHUP stays ignored under nohup.
    """
    endings = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        endings.append(signal.SIGHUP)

    def interrupt(received: int, _frame: object) -> None:
        for ending in endings:
            signal.signal(ending, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(received).name)

    for ending in endings:
        signal.signal(ending, interrupt)


def descendants() -> list[psutil.Process]:
    """All living processes below this one; the dead among its children are reaped on the way."""
    living = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
            elif process.ppid() == os.getpid():
                os.waitpid(process.pid, os.WNOHANG)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue
    return living


def end_descendants() -> None:
    """Kill every process below this one, and return when none is left."""
    while remaining := descendants():
        for process in remaining:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.01)


class Job:
    """The processes of one system under test, started together, in a directory of their own."""

    def __init__(self, commands: Sequence[Command], directory: Path) -> None:
        """Start `commands`. Reports go to `directory`/reports, everything they print to `directory`/log."""
        self.directory = directory
        self.reports = directory / "reports"
        for path in (directory, self.reports, directory / "tmp", directory / "state"):
            path.mkdir(mode=0o700)
        make_run_directory(directory / "run")
        self._log_path = directory / "log"
        with self._log_path.open("wb") as log:
            self._processes = [
                subprocess.Popen(
                    command.arguments,
                    env=self._environment(command),
                    cwd=directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for command in commands
            ]

    def _environment(self, command: Command) -> dict[str, str]:
        own = {
            "BENCHMARK_REPORTS": str(self.reports),
            "TMPDIR": str(self.directory / "tmp"),
            "XDG_RUNTIME_DIR": str(self.directory / "run"),
            "XDG_STATE_HOME": str(self.directory / "state"),
            "OMP_NUM_THREADS": "1",  # torchrun's default for workers, given to all
        }
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in FOREIGN_VARIABLES and not name.startswith(FOREIGN_PREFIXES)
        }
        return inherited | own | dict(command.environment)

    def check_alive(self) -> None:
        """Raise SystemFailed, with the last line of the log, when all started processes have ended."""
        codes = [process.poll() for process in self._processes]
        if all(code is not None for code in codes):
            raise SystemFailed(f"ended with exit code {codes[0]}: {self.last_words()}")

    def wait(self, timeout: float) -> None:
        """Wait until all started processes have ended well.

        Raises SystemFailed when one of them has not, or not in time.
        """
        until = time.monotonic() + timeout
        for process in self._processes:
            try:
                code = process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise SystemFailed(f"goes on after {timeout:g} s: {self.last_words()}") from None
            if code:
                raise SystemFailed(f"ended with exit code {code}: {self.last_words()}")

    def last_words(self) -> str:
        """The last line with words in it that the system printed."""
        lines = self._log_path.read_text(errors="replace").splitlines()
        spoken = (line.strip() for line in reversed(lines) if any(map(str.isalpha, line)))
        return next(spoken, "it printed nothing")

    def stop(self, grace: float) -> None:
        """Ask the started processes to end (SIGTERM), and kill what is left of them after `grace` seconds."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + grace
        while descendants() and time.monotonic() < deadline:
            time.sleep(0.05)
        end_descendants()
        for process in self._processes:
            process.wait()
