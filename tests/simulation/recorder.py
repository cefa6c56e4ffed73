"""The order in which this process writes and syncs the files of one directory, as it happens.

SQLite is watched from inside: a VFS that passes every call on to the one of the system and notes writes, truncations,
syncs and removals, made the default by SQLite's own ``sqlite3_vfs_register``. It is the very library that the daemon
uses, with no other package, tracer or privilege; strace would see as much, but isn't on every machine, and another
binding would bring another SQLite. What Python does to files itself, it does through ``os.fsync``, ``os.rename``
and ``os.unlink``, which are watched, too; what it wrote is taken from the file at the next of these calls.

The directory's sync that the system's VFS makes with the first sync of a log that it created can't be seen from here,
and is noted where it is made (``unixSync`` in SQLite's os_unix.c).
"""

from __future__ import annotations

import _sqlite3
import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from power_cut import Create, Event, Note, Remove, Rename, Sync, SyncDirectory, Truncate, Write

_POINTER = ctypes.c_void_p
_INT = ctypes.c_int
_OPEN = ctypes.CFUNCTYPE(_INT, _POINTER, _POINTER, _POINTER, _INT, _POINTER)
_DELETE = ctypes.CFUNCTYPE(_INT, _POINTER, ctypes.c_char_p, _INT)
_CLOSE = ctypes.CFUNCTYPE(_INT, _POINTER)
_WRITE = ctypes.CFUNCTYPE(_INT, _POINTER, _POINTER, _INT, ctypes.c_int64)
_TRUNCATE = ctypes.CFUNCTYPE(_INT, _POINTER, ctypes.c_int64)
_SYNC = ctypes.CFUNCTYPE(_INT, _POINTER, _INT)
LOGS = 0x800 | 0x4000 | 0x80000
"""SQLITE_OPEN_MAIN_JOURNAL, SQLITE_OPEN_SUPER_JOURNAL, SQLITE_OPEN_WAL."""
WITHOUT_MAPPING = 2
"""The version of sqlite3_io_methods that knows no memory-mapped writes, which nobody would see."""


class _File(ctypes.Structure):
    """sqlite3_file."""

    _fields_ = (("methods", _POINTER),)


class _Methods(ctypes.Structure):
    """sqlite3_io_methods."""

    _fields_ = (
        ("version", _INT),
        *((name, _POINTER) for name in ("close", "read", "write", "truncate", "sync")),
        ("others", _POINTER * 13),
    )


class _Vfs(ctypes.Structure):
    """sqlite3_vfs."""

    _fields_ = (
        *((name, _INT) for name in ("version", "file_size", "longest")),
        *((name, _POINTER) for name in ("following", "name", "data", "open", "delete")),
        ("others", _POINTER * 14),
    )


def library() -> ctypes.CDLL | None:
    """The SQLite of Python's own ``sqlite3``; None where its functions can't be reached."""
    found = ctypes.CDLL(getattr(_sqlite3, "__file__", None))
    if not hasattr(found, "sqlite3_vfs_register"):
        return None
    found.sqlite3_vfs_find.restype = _POINTER
    found.sqlite3_vfs_find.argtypes = [ctypes.c_char_p]
    found.sqlite3_vfs_register.argtypes = [_POINTER, _INT]
    found.sqlite3_vfs_unregister.argtypes = [_POINTER]
    return found


class Recorder:
    """What happens in a directory, from now on.

    Args:
        directory: what is in it already is taken to be on disk.
    """

    def __init__(self, directory: Path) -> None:
        self.events: list[Event] = []
        self._directory = directory.resolve()
        self._names: dict[str, int] = {}
        self._count = 0
        self._plain: dict[int, bytes] = {}
        """What is known to be in the files that Python writes."""
        self.look()
        self.events += [Sync(file) for file in self._names.values()]
        self.events.append(SyncDirectory())

    def note(self, what: str, number: int) -> None:
        """From here on this was acknowledged."""
        self.events.append(Note(what, number))

    def file(self, path: str, *, plain: bool = False) -> tuple[int, bool] | None:
        """The file of this name, and whether it is a new one; None if it is none of the directory's."""
        parent, name = os.path.split(os.path.realpath(path))
        if parent != str(self._directory):
            return None
        fresh = name not in self._names
        if fresh:
            self._count += 1
            self._names[name] = self._count
            self.events.append(Create(name, self._count))
            if plain:
                self._plain[self._count] = b""
        return self._names[name], fresh

    def leave_to_sqlite(self, number: int) -> None:
        """Whatever is written to this file from now on is seen when it is written."""
        self._plain.pop(number, None)

    def look(self) -> None:
        """Takes what Python has written meanwhile."""
        for path in sorted(self._directory.iterdir()):
            found = self.file(str(path), plain=True)
            assert found is not None
            number, _ = found
            if number in self._plain and (data := path.read_bytes()) != self._plain[number]:
                self._plain[number] = data
                self.events += [Truncate(number, 0), Write(number, 0, data)]

    def synced(self, path: str) -> None:
        """A file, or the directory itself."""
        self.look()
        if os.path.realpath(path) == str(self._directory):
            self.events.append(SyncDirectory())
        elif found := self.file(path):
            self.events.append(Sync(found[0]))

    def renamed(self, old: str, new: str) -> None:
        """Within the directory."""
        source, target = os.path.basename(old), os.path.basename(new)
        self._names[target] = self._names.pop(source)
        self.events.append(Rename(source, target))

    def removed(self, path: str) -> None:
        """A name."""
        name = os.path.basename(path)
        if os.path.dirname(os.path.realpath(path)) == str(self._directory) and name in self._names:
            del self._names[name]
            self.events.append(Remove(name))


class _Watching:
    """A VFS before the system's own."""

    def __init__(self, sqlite: ctypes.CDLL, recorder: Recorder) -> None:
        self._recorder = recorder
        self._system = sqlite.sqlite3_vfs_find(None)
        self._original = _Vfs.from_address(self._system)
        self._files: dict[int, tuple[_Methods, int]] = {}
        """By address: the system's methods of an open file, and its number."""
        self._unsynced_logs: set[int] = set()
        self._calls = {
            "close": _CLOSE(self._close),
            "write": _WRITE(self._write),
            "truncate": _TRUNCATE(self._truncate),
            "sync": _SYNC(self._sync),
        }
        self._opening = (_OPEN(self._open), _DELETE(self._delete))
        self._kept: list[Any] = [ctypes.create_string_buffer(b"watching")]
        self.vfs = _Vfs.from_buffer_copy(self._original)
        self.vfs.name = ctypes.addressof(self._kept[0])
        self.vfs.open, self.vfs.delete = (ctypes.cast(one, _POINTER).value for one in self._opening)

    def _open(self, vfs: int, name: int, file: int, flags: int, out: int) -> int:
        code = int(_OPEN(self._original.open)(self._system, name, file, flags, out))
        found = self._recorder.file(os.fsdecode(ctypes.string_at(name))) if code == 0 and name else None
        if found is None:
            return code
        number, fresh = found
        self._recorder.leave_to_sqlite(number)
        handle = _File.from_address(file)
        methods = _Methods.from_address(handle.methods)
        watched = _Methods.from_buffer_copy(methods)
        watched.version = min(methods.version, WITHOUT_MAPPING)
        for call, function in self._calls.items():
            setattr(watched, call, ctypes.cast(function, _POINTER).value)
        self._kept.append(watched)
        self._files[file] = methods, number
        handle.methods = ctypes.addressof(watched)
        if fresh and flags & LOGS:
            self._unsynced_logs.add(number)
        return code

    def _delete(self, vfs: int, name: bytes, sync_directory: int) -> int:
        code = int(_DELETE(self._original.delete)(self._system, name, sync_directory))
        if code == 0:
            self._recorder.removed(os.fsdecode(name))
            if sync_directory:
                self._recorder.events.append(SyncDirectory())
        return code

    def _close(self, file: int) -> int:
        methods, _ = self._files.pop(file)
        return int(_CLOSE(methods.close)(file))

    def _write(self, file: int, data: int, size: int, offset: int) -> int:
        methods, number = self._files[file]
        code = int(_WRITE(methods.write)(file, data, size, offset))
        if code == 0:
            self._recorder.events.append(Write(number, offset, ctypes.string_at(data, size)))
        return code

    def _truncate(self, file: int, size: int) -> int:
        methods, number = self._files[file]
        code = int(_TRUNCATE(methods.truncate)(file, size))
        if code == 0:
            self._recorder.events.append(Truncate(number, size))
        return code

    def _sync(self, file: int, flags: int) -> int:
        methods, number = self._files[file]
        code = int(_SYNC(methods.sync)(file, flags))
        if code == 0:
            self._recorder.events.append(Sync(number))
            if number in self._unsynced_logs:
                self._unsynced_logs.remove(number)
                self._recorder.events.append(SyncDirectory())
        return code


@contextmanager
def recording(directory: Path) -> Iterator[Recorder]:
    """Records what happens in a directory; what SQLite has open there is to be closed before the block ends."""
    sqlite = library()
    assert sqlite is not None
    recorder = Recorder(directory)
    watching = _Watching(sqlite, recorder)
    system = sqlite.sqlite3_vfs_find(None)
    sqlite.sqlite3_vfs_register(ctypes.addressof(watching.vfs), 1)
    try:
        with _python_watched(recorder):
            yield recorder
    finally:
        sqlite.sqlite3_vfs_unregister(ctypes.addressof(watching.vfs))
        sqlite.sqlite3_vfs_register(system, 1)


@contextmanager
def _python_watched(recorder: Recorder) -> Iterator[None]:
    fsync, rename, unlink = os.fsync, os.rename, os.unlink

    def watched_fsync(fd: int) -> None:
        fsync(fd)
        recorder.synced(os.readlink(f"/proc/self/fd/{fd}"))

    def watched_rename(old: Any, new: Any) -> None:
        recorder.look()
        rename(old, new)
        recorder.renamed(os.fspath(old), os.fspath(new))

    def watched_unlink(path: Any) -> None:
        unlink(path)
        recorder.removed(os.fspath(path))

    replaced: list[tuple[str, Callable[..., None], Callable[..., None]]] = [
        ("fsync", fsync, watched_fsync),
        ("rename", rename, watched_rename),
        ("unlink", unlink, watched_unlink),
    ]
    for name, _, watched in replaced:
        setattr(os, name, watched)
    try:
        yield
    finally:
        for name, original, _ in replaced:
            setattr(os, name, original)
