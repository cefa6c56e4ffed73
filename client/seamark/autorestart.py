"""Restarts of a training process by itself: ``fork_and_monitor``, under torchrun, srun or by hand, without an agent.

    from seamark.autorestart import fork_and_monitor
    fork_and_monitor()          # the first statement: before torch is imported

The process that calls it becomes a monitor that never imports torch. It forks, and only the child goes on with the
script; a child that fails is forked anew and enters the living job again. The monitor is one thread and the standard
library; what needs sockets and torch are processes that it starts: each has a companion, which is the worker's agent,
and rank 0's also has the TCPStore's service, with the lighthouse in its companion where none is named.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from seamark import environment as names
from seamark import progress
from seamark.launched import MonitorError, Place

CLEAN_EXIT_CODES = frozenset({130})
RESTART_DELAY = 5.0
MAX_RESTART_DELAY = 60.0
SHORT_LIFE = 60.0
"""Seconds; a child that ends before makes the next delay twice as long."""
MAX_SHORT_LIVES = 10
"""So many in a row, and the monitor gives up."""
JOIN_MARGIN = 60.0
"""Seconds beyond the longest delay that the other ranks wait for a child that is forked anew."""
CONFIGURATION_EXIT_CODE = 78
NAME_TIMEOUT = 1.0
"""Seconds that a child's companion has to name its successor, whom the other ranks then expect."""
IDLE = 0.5
STORES_TRIED = 10
"""Services of the TCPStore that may end before they serve."""
END_GRACE = 10.0
PARTING = 3.0
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1
_PACKET = 65_536


class Lives(NamedTuple):
    """How a monitor's children lived so far, for its patience."""

    short: int = 0

    def after(self, seconds: float) -> Lives:
        """And one more, which lived so long."""
        return Lives(self.short + 1 if seconds < SHORT_LIFE else 0)

    @property
    def too_many(self) -> bool:
        """True if the next one would do no better."""
        return self.short >= MAX_SHORT_LIVES

    def delay(self, first: float) -> float:
        """Seconds until the next one: doubled by each short life after the first."""
        return min(first * 2.0 ** max(0, self.short - 1), max(first, MAX_RESTART_DELAY))


def fork_and_monitor(
    restart_delay: float = RESTART_DELAY,
    clean_exit_codes: Collection[int] = CLEAN_EXIT_CODES,
    *,
    max_restarts: int | None = None,
    insecure: bool = False,
) -> None:
    """Returns in a child process that goes on with the script; the caller becomes its monitor, and never returns.

    A child that ends with 0 or a code in ``clean_exit_codes`` ends its monitor with the same code, so that 130 after a
    ``RestartAbort`` is not taken for success. After any other end the child is forked anew, ``restart_delay`` seconds
    later: twice as long after each that lived for less than a minute, up to a minute, and after ten of those the
    monitor ends with the last one's code (128 and the number of the signal that ended it). SIGTERM, SIGINT and SIGUSR1
    are forwarded; after one of the first two the child's end is the last. A monitor's death ends its child.

    Under ``seamark run`` it returns at once: the agent is the monitor.

    Args:
        restart_delay: seconds.
        clean_exit_codes: those besides 0 after which nothing is started again.
        max_restarts: how often it is at most, however long it lived; None: as long as its lives aren't too short. After
            the last one the other ranks go on without it.
        insecure: accept that ranks and services talk in the clear off loopback, on a network that you trust;
            ``SEAMARK_INSECURE=1`` says the same.

    Environment:
        RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, or Slurm's SLURM_PROCID and so on; MASTER_ADDR and MASTER_PORT,
        where rank 0 has the TCPStore on MASTER_PORT+2 and a lighthouse on the two ports after it.
        SEAMARK_LIGHTHOUSE_ADDRESS, SEAMARK_LIGHTHOUSE_EVENTS and SEAMARK_JOB name a lighthouse that runs elsewhere.

    Raises:
        MonitorError: torch is imported or a thread runs already; the environment says too little.
        ValueError: ``restart_delay`` or ``max_restarts`` is negative.
    """
    if names.ADDRESS in os.environ:
        return
    if not 0.0 <= restart_delay < float("inf"):
        raise ValueError(f"restart_delay must be 0 or more seconds, not {restart_delay}")
    if max_restarts is not None and max_restarts < 0:
        raise ValueError(f"max_restarts must be 0 or more, not {max_restarts}")
    _check_fresh()
    insecure = insecure or os.environ.get("SEAMARK_INSECURE") == "1"
    place = Place.read(os.environ, insecure=insecure)
    clean = frozenset(clean_exit_codes) | {0}
    _Monitor(place, restart_delay, max_restarts, clean).run()


def _check_fresh() -> None:
    if "torch" in sys.modules:
        raise MonitorError(
            "torch is imported already, and a process that has it must not fork: make fork_and_monitor() "
            "the first statement of the script, before `import torch`"
        )
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise MonitorError(
            f"{threads} threads run already, and a fork keeps only one: make fork_and_monitor() the first "
            "statement of the script, before anything that starts a thread (numpy does, unless "
            "OPENBLAS_NUM_THREADS=1)"
        )


# --- the monitor -------------------------------------------------------------------------------------------


class _Service:
    """A process beside the monitor's child, started again when it ends."""

    def __init__(self, command: list[str], *, inherit: tuple[int, ...] = (), report: bool = False) -> None:
        self.process = subprocess.Popen(
            # -P: what lies in the working directory is the script's, and none of ours.
            [sys.executable, "-P", "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if report else subprocess.DEVNULL,
            pass_fds=inherit,
            start_new_session=True,
            # The store looks no names up, and would say so at every connection.
            env=os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR"},
        )
        self.pidfd = os.pidfd_open(self.process.pid)

    def end(self, patience: float) -> None:
        """Waits for it to end, and makes it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        self.process.kill()
        self.process.wait()
        self.close()

    def close(self) -> None:
        """Lets go of what the monitor holds of it."""
        os.close(self.pidfd)
        if self.process.stdout is not None:
            self.process.stdout.close()


class _Child(NamedTuple):
    incarnation: str
    pid: int
    pidfd: int
    page: int
    born: float


class _Monitor:
    """The monitor of one rank."""

    def __init__(self, place: Place, restart_delay: float, max_restarts: int | None, clean: frozenset[int]) -> None:
        self._place = place
        self._delay = restart_delay
        self._left = max_restarts
        self._clean = clean
        self._lives = Lives()
        self._next = secrets.token_hex(8)
        self._child: _Child | None = None
        self._fork_at: float | None = None
        self._code = 0
        """Of the last child, and so of this process."""
        self._final = False
        """Nothing is started again, whatever the child's end."""
        self._completed = False
        """The wrapped call that the child was in has completed on all ranks: however it ends, it has done its work."""
        self._stopped_with: int | None = None
        """The code that the end of the whole job asks for."""
        self._departing = False
        self._door = ""
        self._directory = ""
        self._socket: socket.socket | None = None
        self._companion: _Service | None = None
        self._companions = 0
        self._store: _Service | None = None
        self._stores = 0
        self._store_untold = False
        self._store_serves = place.rank != 0
        self._ended: dict[str, Any] = {}
        """The end of the last child, until the next one is there."""
        self._handlers: dict[int, Any] = {}
        self._signals: list[int] = []
        self._woken_by = -1
        self._woken, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll = select.poll()
        self._on: dict[int, Callable[[], None]] = {}

    def run(self) -> None:
        """Returns in each child; in the monitor it never does."""
        for signum in FORWARDED:
            self._handlers[signum] = signal.signal(signum, self._note)
        self._woken_by = signal.set_wakeup_fd(self._wake)
        self._watch(self._woken, self._forward)
        if self._place.rank == 0:
            self._start_store()
        self._start_companion()
        while True:
            self._wait()
            if self._may_fork(time.monotonic()) and self._fork():
                return

    def _may_fork(self, now: float) -> bool:
        if self._fork_at is None or now < self._fork_at or not self._door or self._stopped_with is not None:
            return False
        if not self._next and now >= self._fork_at + NAME_TIMEOUT:
            self._next = secrets.token_hex(8)
        return bool(self._next)

    def _wait(self) -> None:
        due = IDLE if self._fork_at is None else max(0.0, self._fork_at - time.monotonic())
        timeout = (due if due > 0 else IDLE) * 1_000 + 1
        for fd, _ in self._poll.poll(timeout):
            handler = self._on.get(fd)
            if handler is not None:
                handler()

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._on[fd] = handler
        self._poll.register(fd, select.POLLIN)

    def _ignore(self, fd: int) -> None:
        if self._on.pop(fd, None) is not None:
            self._poll.unregister(fd)

    # --- signals -------------------------------------------------------------------------------------------

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        self._signals.append(signum)

    def _forward(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._woken, 4_096)
        while self._signals:
            signum = self._signals.pop(0)
            if signum in (signal.SIGTERM, signal.SIGINT):
                self._last_life()
                if self._child is None:
                    self._leave(128 + signum)
            self._kill(signum)

    def _kill(self, signum: int) -> None:
        """SIGKILL with all that it started; any other alone, for it may need them to save what it has."""
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if signum == signal.SIGKILL else os.kill)(self._child.pid, signum)

    def _last_life(self) -> None:
        self._final = True
        self._tell("last")

    # --- services ------------------------------------------------------------------------------------------

    def _start_store(self) -> None:
        place = self._place
        port = str(place.master_port + names.STORE_OFFSET)
        command = ["seamarkd.agent.store_service", place.master_addr, port, str(os.getpid())]
        store = self._store = _Service(command, report=True)
        self._stores += 1
        assert store.process.stdout is not None
        self._watch(store.process.stdout.fileno(), self._store_speaks)

    def _store_speaks(self) -> None:
        store = self._store
        assert store is not None
        assert store.process.stdout is not None
        fd = store.process.stdout.fileno()
        if os.read(fd, 4_096):
            self._ignore(fd)
            self._watch(store.pidfd, self._store_ended)
            self._store_serves = True
            self._store_untold = self._stores > 1
            self._tell_store()
            return
        # It ended before it served.
        self._ignore(fd)
        store.end(PARTING)
        self._store = None
        if store.process.returncode == CONFIGURATION_EXIT_CODE or self._stores >= STORES_TRIED:
            # What is wrong it has said.
            self._end_now(CONFIGURATION_EXIT_CODE)
        self._start_store()

    def _tell_store(self) -> None:
        if self._store_serves and self._stores and self._door:
            self._tell("store_again" if self._store_untold else "store")
            self._store_untold = False

    def _store_ended(self) -> None:
        store = self._store
        assert store is not None
        self._ignore(store.pidfd)
        store.end(0.0)
        self._say("the TCPStore's service was lost: starting another")
        self._start_store()

    def _start_companion(self) -> None:
        place = self._place
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._companions += 1
        self._door = ""
        self._next = self._next or secrets.token_hex(8)
        # One that has ended is told of below: whom its successor would have been, its new companion says.
        incarnation = self._child.incarnation if self._child else self._ended.get("incarnation", self._next)
        settings = {
            "launch": {
                "job": place.job,
                "rank": place.rank,
                "world_size": place.world_size,
                "generation": place.generation,
                "master_addr": place.master_addr,
                "master_port": place.master_port,
                "store_port": place.master_port + names.STORE_OFFSET,
                "join_timeout": max(self._delay, MAX_RESTART_DELAY) + JOIN_MARGIN,
                "incarnation": incarnation,
            },
            "host": place.host,
            "hosted": place.hosted,
            "lighthouse": place.lighthouse,
            "events": place.events,
            "serves": self._companions if place.serves else 0,
            "store_ready": self._store_serves,
            "again": self._companions > 1,
            "directory": self._directory,
        }
        command = ["seamarkd.agent.companion", str(theirs.fileno()), json.dumps(settings)]
        self._companion = _Service(command, inherit=(theirs.fileno(),))
        theirs.close()
        self._socket = ours
        self._watch(ours.fileno(), self._hear)
        if self._companions == 1:
            self._fork_at = time.monotonic()

    def _tell(self, what: str, fds: tuple[int, ...] = (), **fields: object) -> None:
        if self._socket is None or not self._door:
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._socket, [json.dumps({"is": what} | fields).encode()], fds)

    def _hear(self) -> None:
        assert self._socket is not None
        try:
            packet = self._socket.recv(_PACKET)
        except ConnectionResetError:
            packet = b""
        if not packet:
            self._companion_ended()
            return
        word = json.loads(packet)
        match word["is"]:
            case "door":
                self._door, self._directory = word["address"], word["directory"]
                self._introduce()
            case "start":
                self._next = word["incarnation"]
            case "completed":
                self._completed = word["yes"]
            case "stopped":
                self._stopped_with = word["code"]
                if self._child is None:
                    self._depart()
            case "over":
                if self._departing:
                    self._leave(self._code)
            case "alone":
                self._say(word["why"])
                self._end_now(1)

    def _introduce(self) -> None:
        """What a companion that has just begun can't know."""
        self._tell_store()
        if self._child is not None:
            self._tell_started(self._child)
        if self._final:
            self._tell("last")
        if self._ended:
            self._tell("ended", **self._ended)
        if self._departing:
            self._tell("gone")

    def _companion_ended(self) -> None:
        assert self._socket is not None
        assert self._companion is not None
        self._ignore(self._socket.fileno())
        self._socket.close()
        self._socket = None
        self._companion.end(PARTING)
        code = self._companion.process.returncode
        self._companion = None
        if not self._door:
            # It ended before it served: what is wrong it has said.
            self._end_now(code if code > 0 else 1)
            return
        self._say(f"the companion was lost ({_verdict_text(code)}): starting another")
        self._start_companion()

    # --- the child -----------------------------------------------------------------------------------------

    def _fork(self) -> bool:
        """True in the child."""
        self._fork_at = None
        self._completed = False
        self._ended = {}
        incarnation, self._next = self._next, ""
        if self._left is not None and self._left <= 0:
            self._last_life()
        page = progress.create()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        born = time.monotonic()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        pid = os.fork()
        if pid == 0:
            self._become_child(parent, incarnation, page)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if pid == 0:
            return True
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)
        child = self._child = _Child(incarnation, pid, os.pidfd_open(pid), page, born)
        self._watch(child.pidfd, self._child_ended)
        self._tell_started(child)
        return False

    def _tell_started(self, child: _Child) -> None:
        fds = (child.page, child.pidfd)
        self._tell("started", fds, incarnation=child.incarnation, pid=child.pid, at=child.born)

    def _become_child(self, parent: int, incarnation: str, page: int) -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        signal.set_wakeup_fd(self._woken_by)
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        with contextlib.suppress(PermissionError):
            os.setpgid(0, 0)
        for fd in (self._woken, self._wake):
            os.close(fd)
        if self._socket is not None:
            self._socket.close()
        for service in (self._companion, self._store):
            if service is not None:
                service.close()
                # It is the monitor's: nothing in the child may wait for it.
                service.process.returncode = 0
        place = self._place
        place.export()
        os.environ |= {
            names.ADDRESS: self._door,
            names.JOB: place.job,
            names.MEMBER: place.member,
            names.INCARNATION: incarnation,
            names.GENERATION: str(place.generation),
            names.NODE: socket.gethostname(),
            names.ALONE: "1",
            names.LIGHTHOUSE_ADDRESS: place.lighthouse,
            names.LIGHTHOUSE_EVENTS: place.events,
            progress.PROGRESS_FD: str(page),
        }

    def _child_ended(self) -> None:
        child = self._child
        assert child is not None
        self._ignore(child.pidfd)
        # What it started goes with it; while it isn't reaped, no other group can have its number.
        self._kill(signal.SIGKILL)
        _, waited = os.waitpid(child.pid, 0)
        status = os.waitstatus_to_exitcode(waited)
        self._code = _verdict(status)
        discarded = _discarded(child.page)
        self._child = None
        lived = time.monotonic() - child.born
        self._lives = self._lives.after(lived)
        asked = self._final or self._completed or self._stopped_with is not None
        over = asked or discarded or status in self._clean or self._lives.too_many
        if over:
            self._last_life()
        self._ended = {"incarnation": child.incarnation, "status": status, "discarded": discarded}
        self._ended["at"] = time.monotonic()
        self._tell("ended", **self._ended)
        os.close(child.pidfd)
        os.close(child.page)
        if over:
            if self._lives.too_many and status not in self._clean:
                self._say(f"{_verdict_text(status)}; gives up after {MAX_SHORT_LIVES} short lives")
            self._depart()
            return
        if self._left is not None:
            self._left -= 1
        delay = self._lives.delay(self._delay)
        self._fork_at = time.monotonic() + delay
        self._say(f"{_verdict_text(status)} after {lived:.1f} s: starting again in {delay:g} s")

    # --- the end -------------------------------------------------------------------------------------------

    def _depart(self) -> None:
        """The last child has ended; where the others' lighthouse and store are its own, they end with the job."""
        if self._stopped_with is not None:
            self._code = self._stopped_with
        if not self._place.serves:
            self._leave(self._code)
        self._departing = True
        self._fork_at = None
        self._tell("gone")

    def _end_now(self, code: int) -> None:
        """Nothing can go on: the child is ended, and the monitor with this code."""
        self._final = True
        if self._child is not None:
            self._kill(signal.SIGTERM)
            end = select.poll()
            end.register(self._child.pidfd, select.POLLIN)
            end.poll(END_GRACE * 1_000)
            self._kill(signal.SIGKILL)
            os.waitpid(self._child.pid, 0)
        self._leave(code)

    def _leave(self, code: int) -> NoReturn:
        if self._socket is not None:
            self._socket.close()
        if self._companion is not None:
            self._companion.end(PARTING)
        if self._directory:
            # It is gone already, unless its companion was killed.
            shutil.rmtree(self._directory, ignore_errors=True)
        if self._store is not None:
            self._store.end(0.0)
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by an exception: what the script does at its end is its child's.
        os._exit(code)

    def _say(self, sentence: str) -> None:
        place = self._place
        sys.stderr.write(f"seamark: job {place.job}, rank {place.rank}: {sentence}\n")
        sys.stderr.flush()


def _discarded(page: int) -> bool:
    reader = progress.ProgressPage(page)
    try:
        return reader.discarded
    finally:
        reader.close()


def _verdict(status: int) -> int:
    return status if status >= 0 else 128 - status


def _verdict_text(status: int) -> str:
    return f"exit code {status}" if status >= 0 else f"ended by signal {-status} ({signal.strsignal(-status)})"
