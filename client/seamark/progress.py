"""The progress page: one page of shared memory through which a worker tells its agent how far it is.

A worker writes, its agent reads; nobody waits for anybody. The page is a memfd that the keeper made, sealed
against resizing, and handed to the worker as the descriptor named in ``SEAMARK_PROGRESS_FD``. Every field is
one aligned 8-byte word in the machine's own byte order: a reader sees an old value or a new one, and never
half of each.

This module knows the layout and nothing about what a value means: which counter is late, or whether a dead
canary is a dead worker, is for the agent to judge. Every worker loads it, so it imports the standard library
alone.
"""

from __future__ import annotations

import atexit
import ctypes
import enum
import fcntl
import functools
import hashlib
import mmap
import os
import signal
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

PAGE_SIZE = 4096
PROGRESS_FD = "SEAMARK_PROGRESS_FD"
MEMFD_NAME = "seamark-progress"
MAX_CANARIES = 4

_MAGIC = int.from_bytes(b"SEAMARK", "big")
_VERSION = 1
_SIGNATURE = _MAGIC << 8 | _VERSION

# The word of each field. A new field takes a new word; a changed meaning takes a new _VERSION.
_SIGNED, _OWNER, _INCARNATION, _PINGS, _ITERATION, _STEP, _CHECKPOINT, _WRAPPED, _GOODBYE = range(9)
_CANARIES = range(9, 9 + MAX_CANARIES)
_DISCARDED, _PHASE, _SIGNS, _SOFT, _HARD, _GRACE, _INITIAL, _OUTSIDE, _PINGS_BEFORE, _SAFETY = range(13, 23)
_TIMEOUTS = (_SOFT, _HARD, _GRACE, _INITIAL, _OUTSIDE, _SAFETY)
# Each open section: its number among all openings (0: closed), its timeout in ms (0: none), its name.
_SECTION_WORDS, _NAME_WORDS, MAX_SECTIONS = 8, 6, 16
_SECTIONS = range(32, 32 + _SECTION_WORDS * MAX_SECTIONS, _SECTION_WORDS)

# Room for the thread-local storage of the libraries that torch brings; only what is touched becomes resident.
_CANARY_STACK_BYTES = 128 * 1024


def incarnation_hash(incarnation: str) -> int:
    """The 64 bits by which the page names an incarnation; 0 stands for none."""
    if not incarnation:
        return 0
    return int.from_bytes(hashlib.blake2b(incarnation.encode(), digest_size=8).digest(), "big")


def name_words(name: str) -> memoryview[int]:
    """A section's name as the page holds it, cut to 48 bytes."""
    return memoryview(name.encode()[: 8 * _NAME_WORDS].ljust(8 * _NAME_WORDS, b"\0")).cast("Q")


def _ms(seconds: float) -> int:
    # Not down to 0, which stands for none.
    return max(1, round(seconds * 1_000)) if seconds > 0 else 0


def create() -> int:
    """A new blank page, which can't be resized: a reader of a truncated mapping would die of SIGBUS.

    Returns:
        its file descriptor, which the caller closes. The memory lives as long as anybody holds or maps it.

    Raises:
        OSError: no memory or no file descriptor is left.
    """
    fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE_SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


class Phase(enum.IntEnum):
    """What a worker's wrapper does, as far as its agent has to know."""

    OUTSIDE = 0
    """Not in a wrapped function, or it asked not to be watched."""
    WAITING = 1
    """It waits for others."""
    WORKING = 2
    """Whatever has to go on by itself: the function, and what is called between two iterations."""


_PHASES = tuple(Phase)


class Timeouts(NamedTuple):
    """How long a worker may give no sign of life, in seconds; 0.0 stands for "for ever"."""

    soft: float = 0.0
    """Then it is interrupted in place."""
    hard: float = 0.0
    """Then it is ended."""
    grace: float = 0.0
    """Between SIGTERM and SIGKILL."""
    initial: float = 0.0
    """Until the first ``ping()`` of an iteration."""
    outside: float = 0.0
    """Between two sections, once there was one."""
    safety: float = 0.0
    """Times what was observed: a limit that is calculated, where that is below the one given; 0.0: none is."""


class OpenSection(NamedTuple):
    """A section that a worker is in."""

    number: int
    """Among all openings of this worker; never used twice."""
    timeout: float
    """Seconds; 0.0: none of its own."""
    name: str


class ProgressPage:
    """One progress page: ``ProgressPage(fd)`` to read it, ``ProgressPage.from_env()`` to be its writer.

    Writing through a reader raises TypeError.
    """

    def __init__(self, fd: int) -> None:
        """Map the page behind ``fd`` for reading; the caller may close ``fd`` afterwards.

        Raises:
            ValueError: the page was written by another version, or the file is no progress page.
            OSError: the file can't be mapped.
        """
        size = os.fstat(fd).st_size
        if size != PAGE_SIZE:
            raise ValueError(f"a progress page has {PAGE_SIZE} bytes, this file has {size}")
        self._words = memoryview(mmap.mmap(fd, PAGE_SIZE, prot=mmap.PROT_READ)).cast("Q")
        self._check_signature()

    @classmethod
    def from_env(cls, incarnation: str = "", environ: Mapping[str, str] = os.environ) -> ProgressPage:
        """The page of this worker, for writing.

        Without an agent, in a child process of a worker, and where the descriptor isn't a progress page, the
        answer is a private page that nobody reads (`shared` is False), so that callers need no second path.
        A normal end of the interpreter is announced in the page, whatever the exit code.

        Args:
            incarnation: the id of this start of the process; the page carries its hash.
            environ: where ``SEAMARK_PROGRESS_FD`` is looked up.
        """
        page = cls.__new__(cls)
        page._words = _writable_words(environ)
        page._words[_SIGNED] = _SIGNATURE
        page._words[_OWNER] = os.getpid()
        page._words[_INCARNATION] = incarnation_hash(incarnation)
        page._words[_GOODBYE] = 0
        _written_here.add(page)
        # Exit handlers run last in, first out: registered at the start of the worker, this is among the last.
        atexit.register(page.say_goodbye)
        return page

    at_ping: Callable[[], None] | None = None
    """Called once, by the next ``ping``: between two steps of the training."""

    def close(self) -> None:
        """Unmap a reader's page; any later use raises ValueError."""
        mapping = self._words.obj
        self._words.release()
        if isinstance(mapping, mmap.mmap):
            mapping.close()

    # -- what the worker writes ------------------------------------------------------------------------------

    def ping(self) -> None:
        """Say that the training loop is alive: one memory write, under a microsecond.

        Raises:
            RuntimeError: this is a child that the worker has forked.
        """
        self._words[_PINGS] += 1
        if self.at_ping is not None:
            at_ping, self.at_ping = self.at_ping, None
            at_ping()

    def _refuse(self) -> NoReturn:
        self.at_ping = self._refuse
        raise RuntimeError(
            f"ping() in process {os.getpid()}, a child of the worker: it would count for nobody; call it in the worker"
        )

    def enter(self, phase: Phase) -> None:
        """Say what comes now; sections that an interrupt left open are closed by it."""
        for section in _SECTIONS:
            self._words[section] = 0
        self._words[_PINGS_BEFORE] = self._words[_PINGS]
        self._words[_PHASE] = phase
        self.sign()

    def sign(self) -> None:
        """A sign of life of the main thread that is no progress of the training."""
        self._words[_SIGNS] += 1

    def cell_of_signs(self) -> ctypes.c_uint64:
        """Where the signs are counted, for a C function that counts one."""
        mapping = self._words.obj
        assert isinstance(mapping, mmap.mmap | bytearray)
        return ctypes.c_uint64.from_buffer(mapping, 8 * _SIGNS)

    def open_section(self, slot: int, number: int, timeout: float, name: memoryview[int]) -> None:
        """Say that a section begins. ``name``: as ``name_words`` gives it."""
        section = _SECTIONS[slot]
        self._words[section + 2 : section + 2 + _NAME_WORDS] = name
        self._words[section + 1] = _ms(timeout)
        self._words[section] = number

    def close_section(self, slot: int) -> None:
        """Say that a section has ended."""
        self._words[_SECTIONS[slot]] = 0

    def say_goodbye(self) -> None:
        """Announce the normal end of this process, so that its ending threads aren't taken for a crash."""
        self._words[_GOODBYE] = 1

    def set_canaries(self, thread_ids: list[int]) -> None:
        """Name the native ids of the canary threads.

        Raises:
            ValueError: there are more than `MAX_CANARIES`.
        """
        if len(thread_ids) > MAX_CANARIES:
            raise ValueError(f"the progress page has room for {MAX_CANARIES} canaries, not {len(thread_ids)}")
        for word, thread_id in zip(_CANARIES, thread_ids + [0] * MAX_CANARIES, strict=False):
            self._words[word] = thread_id

    @property
    def iteration(self) -> int:
        """The restart iteration that the worker is in."""
        return self._words[_ITERATION]

    @iteration.setter
    def iteration(self, value: int) -> None:
        self._words[_ITERATION] = value

    @property
    def step(self) -> int:
        """The last training step that the worker completed."""
        return self._words[_STEP]

    @step.setter
    def step(self, value: int) -> None:
        self._words[_STEP] = value

    @property
    def checkpoint(self) -> int:
        """The step of the last durable checkpoint."""
        return self._words[_CHECKPOINT]

    @checkpoint.setter
    def checkpoint(self, value: int) -> None:
        self._words[_CHECKPOINT] = value

    @property
    def wrapped(self) -> bool:
        """Whether a restart wrapper runs in the worker."""
        return self._words[_WRAPPED] != 0

    @wrapped.setter
    def wrapped(self, value: bool) -> None:
        self._words[_WRAPPED] = value

    @property
    def timeouts(self) -> Timeouts:
        """How long this worker may give no sign of life."""
        return Timeouts(*(self._words[word] / 1_000 for word in _TIMEOUTS))

    @timeouts.setter
    def timeouts(self, value: Timeouts) -> None:
        for word, number in zip(_TIMEOUTS, value, strict=True):
            self._words[word] = _ms(number)

    @property
    def discarded(self) -> bool:
        """Whether the job's rank assignment dropped this worker: its end is nobody's failure."""
        return self._words[_DISCARDED] != 0

    @discarded.setter
    def discarded(self, value: bool) -> None:
        self._words[_DISCARDED] = value

    # -- what the agent reads --------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Whether a worker has signed the page; until then every field is 0.

        Raises:
            ValueError: the signature isn't this version's.
        """
        return self._check_signature()

    @property
    def shared(self) -> bool:
        """Whether somebody else can read what is written here."""
        return isinstance(self._words.obj, mmap.mmap)

    @property
    def owner(self) -> int:
        """The process id of the worker that signed the page."""
        return self._words[_OWNER]

    @property
    def incarnation(self) -> int:
        """The `incarnation_hash` of the worker that signed the page."""
        return self._words[_INCARNATION]

    @property
    def pings(self) -> int:
        """How often `ping` was called."""
        return self._words[_PINGS]

    @property
    def phase(self) -> Phase:
        """What the worker's wrapper does."""
        return _PHASES[min(self._words[_PHASE], len(_PHASES) - 1)]

    @property
    def signs(self) -> int:
        """The main thread's signs of life."""
        return self._words[_SIGNS]

    @property
    def pings_before(self) -> int:
        """How often `ping` had been called when the present phase began."""
        return self._words[_PINGS_BEFORE]

    @property
    def sections(self) -> tuple[OpenSection, ...]:
        """The open sections; one that is opened or closed just now may be missing."""
        found = []
        for section in _SECTIONS:
            number = self._words[section]
            if number:
                name = bytes(self._words[section + 2 : section + 2 + _NAME_WORDS])
                opened = OpenSection(
                    number, self._words[section + 1] / 1_000, name.rstrip(b"\0").decode(errors="replace")
                )
                if self._words[section] == number:
                    found.append(opened)
        return tuple(found)

    @property
    def goodbye(self) -> bool:
        """Whether the worker's interpreter is ending normally."""
        return self._words[_GOODBYE] != 0

    @property
    def canaries(self) -> tuple[int, ...]:
        """The native thread ids of the canaries."""
        return tuple(self._words[word] for word in _CANARIES if self._words[word])

    def _check_signature(self) -> bool:
        signature = self._words[_SIGNED]
        if signature not in (0, _SIGNATURE):
            raise ValueError(
                f"this progress page has magic {signature >> 8:#x} and version {signature & 0xFF}, expected "
                f"are {_MAGIC:#x} and {_VERSION}: install the same seamark for the job and the agent"
            )
        return signature == _SIGNATURE


class Canaries:
    """Threads of a worker that do nothing but die with it.

    The kernel reports the death of a thread before it frees the memory of the process, and the death of the
    process after: 50 ms later for one gigabyte. Whoever watches the threads named in the page knows as soon.
    """

    def __init__(self, page: ProgressPage, count: int = 3) -> None:
        """Start the threads and name them in the page.

        Args:
            page: this worker's page.
            count: how many. One alone is often the last thread to die, which frees the memory first; on two
                processors three were seen earlier than two, and four no earlier than three.

        Raises:
            RuntimeError: no thread can be started.
            ValueError: more than `MAX_CANARIES`.
        """
        self._silence = os.eventfd(0, os.EFD_CLOEXEC)
        threads = [threading.Thread(target=self._wait, name=f"seamark-canary-{n}", daemon=True) for n in range(count)]
        usual_bytes = threading.stack_size(_CANARY_STACK_BYTES)
        try:
            for thread in threads:
                thread.start()
        finally:
            threading.stack_size(usual_bytes)
        page.set_canaries([thread.native_id for thread in threads if thread.native_id])

    def _wait(self) -> None:
        # A signal meant for the main thread must never be spent on waking a canary.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        os.read(self._silence, 8)


def worker_page(incarnation: str) -> ProgressPage:
    """This process's progress page with its canaries: one, however many wrapped functions or managers it has."""
    return _worker_page(incarnation, os.getpid())


@functools.cache
def _worker_page(incarnation: str, pid: int) -> ProgressPage:
    page = ProgressPage.from_env(incarnation)
    _canaries.append(Canaries(page))
    return page


_canaries: list[Canaries] = []

_written_here: weakref.WeakSet[ProgressPage] = weakref.WeakSet()


def _private_words() -> memoryview[int]:
    return memoryview(bytearray(PAGE_SIZE)).cast("Q")


def _writable_words(environ: Mapping[str, str]) -> memoryview[int]:
    number = environ.get(PROGRESS_FD, "")
    if not number.isdecimal():
        return _private_words()
    fd = int(number)
    try:
        target = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return _private_words()
    # The variable reaches programs that the worker starts, where the number may belong to some other file.
    if not target.startswith(f"/memfd:{MEMFD_NAME} "):
        return _private_words()
    words = memoryview(mmap.mmap(fd, PAGE_SIZE)).cast("Q")
    if words[_OWNER] not in (0, os.getpid()):
        return _private_words()
    return words


def _let_go_after_fork() -> None:
    # A data loader's process must neither ping nor say goodbye in its parent's name.
    for page in _written_here:
        page._words = _private_words()
        # Nor save its parent's checkpoint.
        page.at_ping = page._refuse


os.register_at_fork(after_in_child=_let_go_after_fork)
