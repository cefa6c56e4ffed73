"""Checkpoints that are whole, or are not there.

The checkpoint of step 42 is two files: ``step_00000042.pt``, written by `torch.save`, and
``step_00000042.done``, a marker with the size and the SHA-256 of the first. `save` does, in this order:

1. write ``.pt.tmp``, fsync it, rename it to ``.pt``, fsync the directory;
2. write ``.done.tmp``, fsync it, rename it to ``.done``, fsync the directory;
3. remove the ``.done`` of what is too old, fsync the directory, remove the ``.pt`` of it.

So after a SIGKILL or a power cut at any moment each ``.done`` vouches for a whole ``.pt``, and everything
that `save` returned for is still there. One process at a time writes a directory; any number may read it.

Each file is locked (flock) by the save that writes it, until that is over; the kernel lets go of the lock of a process
that was killed. That is how `clean` tells what a killed save left from what another process, also on another host of a
file system whose locks hold there, is writing just now. Where a file system has no locks nothing is removed.

This module refuses to know what a payload means, who saves and when. Only calls that need torch import it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import pickle
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from seamark.environment import CHECKPOINT_DIGESTS

__all__ = ["Checkpoint", "CheckpointError", "clean", "latest", "list_valid", "load", "prepare", "save", "verify"]

FORMAT = 1  # of the marker; raised when an older Seamark could misread a newer one
MARKER_LIMIT = 512  # bytes; a marker has about 110
DIGESTS_REMEMBERED = 64
DIGESTS_FILE_BYTES = 1 << 16
QUARANTINED_KEPT = 2
WRITER_PATIENCE = 5.0
"""Seconds a save waits for another one of the same step: a killed process still frees its memory for a while."""
LOCK_PAUSE = 0.01
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
STEP = "step_([0-9]{8}|[1-9][0-9]{8,})"

_log = logging.getLogger(__name__)

# Digests of the files that this process wrote or read, by `_identity`: a restart in place hashes none again.
_digests: dict[tuple[int, ...], str] = {}


class CheckpointError(Exception):
    """A checkpoint cannot be written, trusted or read: which file, why, and what to do."""


class _CorruptError(CheckpointError):
    """The bytes are there, and are not those that were saved."""


class _OutOfTimeError(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose file was found to be what its marker says.

    Attributes:
        path: the ``.pt`` file.
        step: the step it was saved at.
        size: bytes of the file.
        sha256: digest of the file, in lower-case hexadecimal.
    """

    path: Path
    step: int
    size: int
    sha256: str


def save(directory: str | os.PathLike[str], step: int, payload: object, *, keep: int = 2) -> Path:
    """Write the checkpoint of a step; once this returned, it survives a power cut.

    Args:
        directory: where one writer's checkpoints live; made if missing.
        step: number of the step, 0 or more.
        payload: tensors, numbers, strings and containers of them: what `load` reads without running code.
        keep: how many checkpoints stay, this one included; older ones beyond that are removed.

    Returns:
        The path of the ``.pt`` file.

    Raises:
        CheckpointError: it could not be written (disk full, no permission), `load` would refuse the payload,
            the step has a valid checkpoint with other content, or another process is saving it. Earlier
            checkpoints are untouched.
        ValueError: `step` is negative or `keep` is less than 1.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step must be 0 or more and keep 1 or more, not step={step} and keep={keep}")
    folder = Path(directory)
    path = _path_of(folder, step)
    try:
        _make_directory(folder)
        with ExitStack() as locked:
            with _published(path, locked) as content:
                _torch_save(payload, content)
                _refuse_other_content(path, content)
            with _published(path.with_suffix(".done"), locked) as marker:
                fields = {"format": FORMAT, "size": content.size, "sha256": content.sha256}
                marker.write(json.dumps(fields).encode() + b"\n")
        identity = _identity(os.stat(path))
        _remember(identity, content.sha256)
        _tell_digest(identity, content.sha256)
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written: {error}. Earlier checkpoints are untouched; free space or correct "
            "the permissions of the directory, then save again."
        ) from error
    _remove_older(folder, step, keep - 1)
    return path


def latest(directory: str | os.PathLike[str]) -> Checkpoint | None:
    """The newest valid checkpoint, or None. A newer one that had to be refused is logged as a warning.

    Raises:
        OSError: the directory is there and cannot be listed.
    """
    found: Checkpoint | None = None
    refused: list[CheckpointError] = []
    for finding in _survey(Path(directory)):
        if isinstance(finding, Checkpoint):
            found = finding
            break
        refused.append(finding)
    instead = f"Using {found.path.name} instead." if found else f"{directory} holds no valid checkpoint."
    for error in refused:
        _log.warning("%s %s", error, instead)
    return found


def list_valid(directory: str | os.PathLike[str]) -> list[Checkpoint]:
    """Every valid checkpoint, newest first. One that had to be refused is logged as a warning.

    Raises:
        OSError: the directory is there and cannot be listed.
    """
    valid: list[Checkpoint] = []
    for finding in _survey(Path(directory)):
        if isinstance(finding, Checkpoint):
            valid.append(finding)
        else:
            _log.warning("%s", finding)
    return sorted(valid, key=lambda checkpoint: checkpoint.step, reverse=True)


def verify(path: str | os.PathLike[str]) -> None:
    """Read a ``.pt`` file whole and compare it with its marker.

    Raises:
        CheckpointError: it is not what its marker says, or has none.
    """
    _examine(Path(path), reread=True)


def load(checkpoint: Checkpoint, map_location: Any = "cpu") -> Any:
    """The payload of a checkpoint that `latest` or `list_valid` returned, in this process or another.

    It is read with ``weights_only=True``: nothing in the file is run. Content is not hashed again.

    Args:
        checkpoint: what to read.
        map_location: the device that tensors go to, as `torch.load` takes it.

    Raises:
        CheckpointError: the file is gone, has another size, or torch refuses it.
    """
    import torch

    advice = "Resume from what `latest` returns now."
    try:
        size = os.stat(checkpoint.path).st_size
        if size != checkpoint.size:
            raise CheckpointError(f"{checkpoint.path} is {size} bytes, not {checkpoint.size}. {advice}")
        return torch.load(checkpoint.path, map_location=map_location, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{checkpoint.path} cannot be read: {error.strerror}. {advice}") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # Torch's own message advises to switch weights_only off.
        raise CheckpointError(f"{checkpoint.path} is nothing that torch loads without running it. {advice}") from error


def clean(directory: str | os.PathLike[str]) -> list[str]:
    """Tidy up after a writer that was killed; no valid checkpoint is touched, and no save that is under way.

    Unfinished ``.tmp`` files and a ``.done`` whose ``.pt`` is missing are removed; a ``.pt`` that has no
    ``.done`` is renamed to ``.pt.quarantined``, of which the two newest stay. Several processes may do it at once.

    Returns:
        A sentence for each file that was removed or renamed.

    Raises:
        OSError: a file could not be removed or renamed.
    """
    folder = Path(directory)
    report: list[str] = []
    for suffix in (".pt.tmp", ".done.tmp"):
        for step in sorted(_steps(folder, suffix)):
            path = _path_of(folder, step).with_suffix(suffix)
            with _alone(path) as abandoned:
                if abandoned:
                    path.unlink()
                    report.append(f"Removed {path.name}: the save that wrote it did not finish.")
    # In this order: a marker that is seen had its file before.
    marked, written = _steps(folder, ".done"), _steps(folder, ".pt")
    for step in sorted(marked - written):
        path = _path_of(folder, step).with_suffix(".done")
        with _alone(path) as abandoned:
            if abandoned and not path.with_suffix(".pt").exists():
                path.unlink()
                report.append(f"Removed {path.name}: the checkpoint that it vouches for is missing.")
    for step in sorted(written - marked):
        path = _path_of(folder, step)
        with _alone(path) as abandoned:
            if abandoned and not path.with_suffix(".done").exists():
                report.append(_quarantine(path, "it has no marker, so its save did not finish."))
    for step in sorted(_steps(folder, ".pt.quarantined"))[:-QUARANTINED_KEPT]:
        path = _path_of(folder, step).with_suffix(".pt.quarantined")
        path.unlink(missing_ok=True)
        report.append(f"Removed {path.name}: {QUARANTINED_KEPT} newer ones are there.")
    if report:
        _fsync_directory(folder)
    return report


def prepare(directory: str | os.PathLike[str], *, seconds: float | None = None) -> list[str]:
    """Put a directory in order before somebody resumes from it: `clean`, and set a corrupt newest checkpoint aside.

    The newest checkpoint is read whole, unless a process of this host has read or written it already; one whose bytes
    are not those that were saved loses its marker and is renamed to ``.pt.quarantined``, and the next older one is
    judged. An agent has this done before it starts a worker of a job with ``--checkpoint-dir``. Of several processes of
    a host one reads, the others wait for it.

    Args:
        directory: where one writer's checkpoints live; it may be missing.
        seconds: after so many it ends, whatever is left to read; None for no limit.

    Returns:
        A sentence for each file that was removed or renamed or can't be judged.

    Raises:
        OSError: the directory could not be listed, or a file not be removed or renamed.
    """
    folder = Path(directory)
    deadline = None if seconds is None else time.monotonic() + seconds
    report = clean(folder)
    try:
        with _turn(deadline):
            report += _set_corrupt_aside(folder, deadline)
    except _OutOfTimeError:
        report.append(f"Left {folder} unread after {seconds:g} s: who resumes from it reads its checkpoints itself.")
    return report


def _set_corrupt_aside(folder: Path, deadline: float | None) -> list[str]:
    """Down to the first checkpoint that is valid."""
    report: list[str] = []
    for step in sorted(_steps(folder, ".done"), reverse=True):
        path = _path_of(folder, step)
        try:
            found = os.stat(path)
            checkpoint = _examine(path, deadline=deadline)
        except FileNotFoundError:
            continue
        except _CorruptError as error:
            with _alone(path) as abandoned:
                if abandoned and _identity(os.stat(path)) == _identity(found):
                    path.with_suffix(".done").unlink(missing_ok=True)
                    _fsync_directory(folder)
                    report.append(_quarantine(path, str(error)))
                    _fsync_directory(folder)
        except CheckpointError as error:
            if path.with_suffix(".done").exists():
                report.append(str(error))
        else:
            if report:
                report.append(f"The newest valid checkpoint is {checkpoint.path.name}.")
            return report
    if report:
        report.append(f"{folder} holds no valid checkpoint.")
    return report


def _quarantine(path: Path, why: str) -> str:
    aside = path.with_suffix(".pt.quarantined")
    path.replace(aside)
    return f"Renamed {path.name} to {aside.name}: {why}"


# --- writing


class _Content:
    """The stream of a file being written: counts and digests what goes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self.path = Path(file.name)
        self.size = 0
        self._file = file
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, data: bytes | memoryview) -> int:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


@contextmanager
def _published(path: Path, locked: ExitStack) -> Iterator[_Content]:
    """A stream whose content is called `path` once it is on the disk; of a failed one nothing is left.

    Its file stays open, and with that locked, until `locked` is closed.
    """
    unfinished = path.with_name(f"{path.name}.tmp")
    file = _open_alone(unfinished)
    locked.callback(file.close)
    try:
        yield _Content(file)
        file.flush()
        os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _fsync_directory(path.parent)


def _open_alone(path: Path) -> BinaryIO:
    """A new, empty file, locked as long as it is open; what a killed save left of it is overwritten."""
    until = time.monotonic() + WRITER_PATIENCE
    while True:
        # Not emptied before it is locked: another process may be writing it.
        file = open(path, "ab")  # noqa: SIM115 - it stays open
        try:
            if _lock(file.fileno()) != "held":
                if _is_called(file.fileno(), path):
                    file.truncate(0)
                    return file
            elif time.monotonic() > until:
                raise CheckpointError(f"{path} is being written by another process. Give each writer a directory.")
            else:
                time.sleep(LOCK_PAUSE)
        except BaseException:
            file.close()
            raise
        file.close()


def _torch_save(payload: object, content: _Content) -> None:
    import torch

    handled = sys.exception()
    try:
        torch.save(payload, content)
    except RuntimeError as error:
        # Torch's zip writer buries what stopped a write (disk full, an interrupt) under an "unexpected pos".
        cause: BaseException = error
        while cause.__context__ is not None and cause.__context__ is not handled:
            cause = cause.__context__
        raise cause from None
    content.flush()
    if refused := torch.serialization.get_unsafe_globals_in_checkpoint(content.path):
        raise CheckpointError(
            f"The payload holds {', '.join(sorted(refused))}, which `load` refuses: unpickling can run code. "
            "Convert it to tensors, numbers, strings, lists or dicts."
        )


def _refuse_other_content(path: Path, content: _Content) -> None:
    """Replacing a valid checkpoint by other bytes would leave neither valid between the two renames."""
    if not path.with_suffix(".done").exists():
        return
    try:
        existing = _examine(path)
    except CheckpointError:
        return  # `latest` refuses it too: the new one takes its place
    if existing.sha256 != content.sha256:
        raise CheckpointError(
            f"{path} is a valid checkpoint of this step with other content. Resume from it, or give each run "
            "a directory of its own."
        )


def _remove_older(folder: Path, step: int, keep: int) -> None:
    """Remove all below the `keep` newest whole checkpoints that are older than `step`.

    The marker goes first, durably: a ``.pt`` without ``.done`` is merely unfinished, and the next save or
    `clean` sees to it, while a ``.done`` without ``.pt`` would vouch for nothing.
    """
    doomed: list[Path] = []
    for older in sorted(_steps(folder, ".pt") | _steps(folder, ".done"), reverse=True):
        path = _path_of(folder, older)
        if older >= step:
            continue
        if keep == 0:
            doomed.append(path)
        elif _looks_whole(path):
            keep -= 1
    if not doomed:
        return
    try:
        with ExitStack() as locked:
            for path in doomed:
                # While it has no marker any more, it would look like the work of a save that was killed.
                locked.enter_context(_alone(path))
                path.with_suffix(".done").unlink(missing_ok=True)
            _fsync_directory(folder)
            for path in doomed:
                path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("Old checkpoints in %s stay: %s. That of step %d is saved.", folder, error, step)


def _make_directory(folder: Path) -> None:
    """Make a directory and its missing parents, each name durable before anything is put below it."""
    if folder.is_dir():
        return
    _make_directory(folder.parent)
    folder.mkdir(exist_ok=True)
    _fsync_directory(folder.parent)


def _fsync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- locks


def _lock(descriptor: int) -> str:
    """Locks the file as long as it is open: "locked", "held" by another process, or "unknown" without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError as error:
        if error.errno in NO_LOCKS:
            return "unknown"
        raise
    return "locked"


def _is_called(descriptor: int, path: Path) -> bool:
    """Whether this is still the file of that name: it may have been renamed or removed while it was being locked."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Within the block nobody saves to this file; False where somebody does, it is gone, or nobody can tell."""
    try:
        # For writing: network file systems lock nothing else exclusively.
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        yield False
        return
    try:
        yield _lock(descriptor) == "locked" and _is_called(descriptor, path)
    finally:
        os.close(descriptor)


# --- reading


def _survey(folder: Path) -> Iterator[Checkpoint | CheckpointError]:
    """Judge every checkpoint that has a marker, newest first.

    What a writer removes meanwhile is passed over, and what it adds is judged too, so that a reader slower
    than the writer does not end with nothing.
    """
    judged: set[int] = set()
    while fresh := _steps(folder, ".done") - judged:
        judged |= fresh
        for step in sorted(fresh, reverse=True):
            path = _path_of(folder, step)
            try:
                yield _examine(path)
            except CheckpointError as error:
                if path.with_suffix(".done").exists():
                    yield error


def _examine(path: Path, *, reread: bool = False, deadline: float | None = None) -> Checkpoint:
    """Compare a ``.pt`` file with its marker, hashing it if this process has not yet, or on `reread`.

    Raises:
        CheckpointError: it is not what its marker says, or can't be read.
        _OutOfTimeError: it could not be hashed before the deadline.
    """
    step = _step_of(path)
    size, sha256 = _read_marker(path)
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            digest = None if reread else _known_digest(_identity(status))
            if status.st_size == size and digest is None:
                digest = hashlib.file_digest(_Timed(file, deadline) if deadline else file, "sha256").hexdigest()
                _remember(_identity(status), digest)
                _tell_digest(_identity(status), digest)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Use an earlier one.") from error
    if status.st_size != size:
        raise _CorruptError(
            f"{path} is {status.st_size} bytes and was saved with {size}. Use an earlier one and check the disk."
        )
    if digest != sha256:
        raise _CorruptError(
            f"{path} is not what was saved: its SHA-256 differs from that in its marker. Use an earlier one "
            "and check the disk."
        )
    return Checkpoint(path=path, step=step, size=size, sha256=sha256)


def _looks_whole(path: Path) -> bool:
    """As `_examine`, without reading the content."""
    try:
        return _read_marker(path)[0] == path.stat().st_size
    except (CheckpointError, OSError):
        return False


def _read_marker(path: Path) -> tuple[int, str]:
    """The size in bytes and the SHA-256 that the marker of a ``.pt`` file vouches for."""
    marker = path.with_suffix(".done")
    try:
        with open(marker, "rb") as file:
            return _parse_marker(file.read(MARKER_LIMIT + 1))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} has no marker {marker.name}: its save did not finish. Use an earlier one."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{marker} cannot be read: {error.strerror}. Use an earlier one.") from error
    except ValueError as error:
        raise CheckpointError(f"{marker} is no valid marker: {error}. Use an earlier one.") from error


def _parse_marker(data: bytes) -> tuple[int, str]:
    if not data:
        raise ValueError("it is empty")
    if len(data) > MARKER_LIMIT:
        raise ValueError(f"it is longer than {MARKER_LIMIT} bytes")
    fields = json.loads(data)
    if not isinstance(fields, dict):
        raise ValueError("it holds no JSON object")
    version, size, sha256 = fields.get("format"), fields.get("size"), fields.get("sha256")
    if type(version) is not int or version != FORMAT:
        raise ValueError(f"its format is {version!r}, and this version of Seamark reads format {FORMAT}")
    if type(size) is not int or size < 0:
        raise ValueError(f"its size is {size!r}, not a number of bytes")
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"its sha256 is {sha256!r}, not 64 hexadecimal digits")
    return size, sha256


def _path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.pt"


def _step_of(path: Path) -> int:
    match = re.fullmatch(STEP + r"\.pt", path.name)
    if match is None:
        raise CheckpointError(f"{path} is no checkpoint of Seamark: those are named step_00000042.pt.")
    return int(match[1])


def _steps(folder: Path, suffix: str) -> set[int]:
    """The steps that have a file with this suffix; files of any other name are none of ours."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return set()
    pattern = re.compile(STEP + re.escape(suffix))
    return {int(match[1]) for name in names if (match := pattern.fullmatch(name))}


class _Timed(io.RawIOBase):
    """A file that can be read until a deadline, in seconds of `time.monotonic`."""

    def __init__(self, file: BinaryIO, deadline: float) -> None:
        self.name = file.name
        self._file = file
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if time.monotonic() > self._deadline:
            raise _OutOfTimeError
        return int(self._file.readinto(buffer))  # type: ignore[attr-defined]


# --- what was hashed already


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _remember(identity: tuple[int, ...], digest: str) -> None:
    _digests[identity] = digest
    while len(_digests) > DIGESTS_REMEMBERED:
        _digests.pop(next(iter(_digests)))


def _known_digest(identity: tuple[int, ...]) -> str | None:
    """As this process or, with an agent, another one of this host found it."""
    shared = os.environ.get(CHECKPOINT_DIGESTS)
    if identity not in _digests and shared:
        for known, digest in _read_digests(Path(shared)):
            _remember(known, digest)
    return _digests.get(identity)


def _tell_digest(identity: tuple[int, ...], digest: str) -> None:
    """Add it to the file that the processes of this host share. Its loss costs a reading, so nothing fails for it."""
    shared = os.environ.get(CHECKPOINT_DIGESTS)
    if not shared:
        return
    try:
        with open(shared, "a", encoding="ascii") as file:
            file.write(json.dumps([*identity, digest]) + "\n")
    except OSError as error:
        _log.warning("%s can't be written (%s): checkpoints will be read more than once.", shared, error)


def _read_digests(path: Path) -> Iterator[tuple[tuple[int, ...], str]]:
    """What the file holds, oldest first; lines that are none of ours are passed over."""
    try:
        lines = path.read_bytes()[-DIGESTS_FILE_BYTES:].splitlines()
    except OSError:
        return
    for line in lines:
        try:
            *identity, digest = json.loads(line)
        except (ValueError, TypeError):
            continue
        if len(identity) == 5 and all(type(number) is int for number in identity) and isinstance(digest, str):
            yield tuple(identity), digest


@contextmanager
def _turn(deadline: float | None) -> Iterator[None]:
    """One process of this host at a time, so that the others find what it has hashed.

    Raises:
        _OutOfTimeError: the turn did not come before the deadline.
    """
    shared = os.environ.get(CHECKPOINT_DIGESTS)
    if not shared:
        yield
        return
    descriptor = os.open(shared, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while _lock(descriptor) == "held":
            if deadline is not None and time.monotonic() > deadline:
                raise _OutOfTimeError
            time.sleep(LOCK_PAUSE)
        if os.fstat(descriptor).st_size > DIGESTS_FILE_BYTES:
            # What is told at this moment is lost, and read once more.
            kept = list(_read_digests(Path(shared)))[-DIGESTS_REMEMBERED:]
            os.ftruncate(descriptor, 0)
            os.write(descriptor, "".join(json.dumps([*one, digest]) + "\n" for one, digest in kept).encode())
        yield
    finally:
        os.close(descriptor)
