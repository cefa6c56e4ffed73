"""The files that workers write: one per rank and generation, and none of them larger than its limit.

A worker appends to its file by itself (O_APPEND), so that no reader's death can stop it; nobody can tell it to open
another one. So the file keeps its name, and its oldest half is freed from outside by punching a hole
(``fallocate(2)``): no line is lost between two steps, and offsets stay what they were, for those who follow it. It
looks as large as all that was ever written; ``du`` tells what it takes. Where a file system can't (NFS before 4.2) the
file is copied beside (``.1``) and emptied, as logrotate's ``copytruncate`` does; lines written meanwhile are lost.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import queue
import re
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from msgspec import Struct

from seamark.protocol.messages import JobSpec, Slot

log = logging.getLogger(__name__)

FILE_NAME = re.compile(r"rank_(\d+)(?:\.generation_(\d+))?\.log", re.ASCII)
BLOCK = 4_096
"""Bytes; whole blocks are freed."""
CHECK_INTERVAL = 1.0
"""Seconds between two looks at the sizes: a file may be above its limit by what is written in so long."""
LAST_LOOK = 2.0
TAIL_LINES = 20
TAIL_BYTES = 16_384
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02


class LogLimits(Struct, frozen=True):
    """How much of a rank's output is kept: bytes of each file, and files of so many generations."""

    max_bytes: int = 64 << 20
    generations: int = 4


def log_path(spec: JobSpec, slot: Slot, generation: int) -> Path:
    """The log file of a rank; a replacement appends to it, and each restart of all ranks has another."""
    name = f"rank_{slot.rank}.log" if generation == 0 else f"rank_{slot.rank}.generation_{generation}.log"
    return Path(spec.log_dir) / name


def log_tail(path: Path) -> list[str]:
    """The last lines of a log file; empty if there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return text.splitlines()[-TAIL_LINES:]


def outdated(names: Iterable[str], current: str, generations: int) -> list[str]:
    """Which of these files are the same rank's, and older than its last ``generations``, the current one included."""
    match = FILE_NAME.fullmatch(current)
    assert match is not None
    rank, newest = match[1], int(match[2] or 0)
    found = ((name, FILE_NAME.fullmatch(name)) for name in names)
    return [name for name, one in found if one and one[1] == rank and int(one[2] or 0) <= newest - generations]


def remove_outdated(path: Path, generations: int) -> None:
    """Before a rank writes this file: its oldest ones go."""
    for name in outdated(os.listdir(path.parent), path.name, generations):
        path.with_name(name).unlink(missing_ok=True)


def to_free(size: int, allocated: int, limit: int) -> int:
    """How many bytes to free from the beginning of a file, so that half of the limit stays.

    Args:
        size: where it ends.
        allocated: the bytes it takes on the disk.
        limit: the most it may take.
    """
    return 0 if allocated <= limit else max(0, size - limit // 2) // BLOCK * BLOCK


def bound(path: Path, limit: int) -> None:
    """Frees the oldest part of a file that takes more than ``limit`` bytes of the disk.

    Raises:
        OSError: it can't be opened or shortened.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        status = os.fstat(descriptor)
        if freed := to_free(status.st_size, status.st_blocks * 512, limit):
            punch(descriptor, freed)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        shutil.copyfile(path, path.with_name(f"{path.name}.1"))
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def punch(descriptor: int, length: int) -> None:
    """Frees the first bytes of a file, which keeps its size; they read as zeros.

    Raises:
        OSError: its file system can't (EOPNOTSUPP), or failed.
    """
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(descriptor, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 0, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class LogWatch:
    """Keeps the files of a node's jobs below their limit, on a thread of its own: a slow disk holds up no heartbeat.

    Args:
        limit: the most bytes a file may take.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._files: Mapping[str, frozenset[Path]] = {}
        """By job; replaced whole, so that the thread never sees it half changed."""
        self._left: queue.SimpleQueue[Path] = queue.SimpleQueue()
        """Nobody writes them any more: they are looked at a last time."""
        self._unusable: set[Path] = set()
        self._changed = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def watch(self, job: str, paths: Iterable[Path]) -> None:
        """From now on these are the job's files; none once it has ended."""
        before, now = self._files.get(job, frozenset()), frozenset(paths)
        others = {name: files for name, files in self._files.items() if name != job}
        self._files = {**others, job: now} if now else others
        for path in before - now:
            self._left.put(path)
        if self._thread is None and now:
            self._thread = threading.Thread(target=self._run, name="seamark-logs", daemon=True)
            self._thread.start()
        self._changed.set()

    def close(self) -> None:
        """Looks a last time, and no more; gives up on a disk that does not answer."""
        self._closed = True
        self._changed.set()
        if self._thread is not None:
            self._thread.join(LAST_LOOK)

    def _run(self) -> None:
        while not self._closed:
            self._changed.wait(CHECK_INTERVAL if self._files else None)
            self._changed.clear()
            while not self._left.empty():
                self._look(self._left.get())
            for paths in self._files.values():
                for path in paths:
                    self._look(path)

    def _look(self, path: Path) -> None:
        try:
            bound(path, self._limit)
        except OSError as error:
            if path not in self._unusable:
                self._unusable.add(path)
                log.error("%s can't be kept below %d bytes: %s", path, self._limit, error)
