"""Checkpoints that are whole, or are not there.

The checkpoint of step 42 is two files: ``step_00000042.pt``, written by `torch.save`, and
``step_00000042.done``, a marker with the size and the SHA-256 of the first. `save` does, in this order:

1. write ``.pt.tmp``, fsync it, rename it to ``.pt``, fsync the directory;
2. write ``.done.tmp``, fsync it, rename it to ``.done``, fsync the directory;
3. remove the ``.done`` of what is too old, fsync the directory, remove the ``.pt`` of it.

So after a SIGKILL or a power cut at any moment each ``.done`` vouches for a whole ``.pt``, and everything
that `save` returned for is still there. One process at a time writes a directory; any number may read it.

This module refuses to know what a payload means, who saves and when. Only calls that need torch import it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["Checkpoint", "CheckpointError", "clean", "latest", "list_valid", "load", "save", "verify"]

FORMAT = 1  # of the marker; raised when an older Seamark could misread a newer one
MARKER_LIMIT = 512  # bytes; a marker has about 110
DIGESTS_REMEMBERED = 64
STEP = "step_([0-9]{8}|[1-9][0-9]{8,})"

_log = logging.getLogger(__name__)

# Digests of the files that this process wrote or read, by `_identity`: a restart in place hashes none again.
_digests: dict[tuple[int, ...], str] = {}


class CheckpointError(Exception):
    """A checkpoint cannot be written, trusted or read: which file, why, and what to do."""


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
            or the step has a valid checkpoint with other content. Earlier checkpoints are untouched.
        ValueError: `step` is negative or `keep` is less than 1.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step must be 0 or more and keep 1 or more, not step={step} and keep={keep}")
    folder = Path(directory)
    path = _path_of(folder, step)
    try:
        _make_directory(folder)
        with _published(path) as content:
            _torch_save(payload, content)
            _refuse_other_content(path, content)
        with _published(path.with_suffix(".done")) as marker:
            fields = {"format": FORMAT, "size": content.size, "sha256": content.sha256}
            marker.write(json.dumps(fields).encode() + b"\n")
        _remember(_identity(os.stat(path)), content.sha256)
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
    """Tidy up after a writer that was killed; no valid checkpoint is touched.

    Unfinished ``.tmp`` files and a ``.done`` whose ``.pt`` is missing are removed; a ``.pt`` that has no
    ``.done`` is renamed to ``.pt.quarantined``. A save under way looks just like one that was killed, so the
    caller promises that nobody saves to this directory until this returns.

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
            path.unlink()
            report.append(f"Removed {path.name}: the save that wrote it did not finish.")
    marked, written = _steps(folder, ".done"), _steps(folder, ".pt")
    for step in sorted(marked - written):
        path = _path_of(folder, step).with_suffix(".done")
        path.unlink()
        report.append(f"Removed {path.name}: the checkpoint that it vouches for is missing.")
    for step in sorted(written - marked):
        path = _path_of(folder, step)
        aside = path.with_suffix(".pt.quarantined")
        path.replace(aside)
        report.append(f"Renamed {path.name} to {aside.name}: it has no marker, so its save did not finish.")
    if report:
        _fsync_directory(folder)
    return report


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
def _published(path: Path) -> Iterator[_Content]:
    """A stream whose content is called `path` once it is on the disk; of a failed one nothing is left."""
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        with open(unfinished, "wb") as file:
            yield _Content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _fsync_directory(path.parent)


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
        for path in doomed:
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


def _examine(path: Path, *, reread: bool = False) -> Checkpoint:
    """Compare a ``.pt`` file with its marker, hashing it if this process has not yet, or on `reread`."""
    step = _step_of(path)
    size, sha256 = _read_marker(path)
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            digest = None if reread else _digests.get(_identity(status))
            if status.st_size == size and digest is None:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                _remember(_identity(status), digest)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Use an earlier one.") from error
    if status.st_size != size:
        raise CheckpointError(
            f"{path} is {status.st_size} bytes and was saved with {size}. Use an earlier one and check the disk."
        )
    if digest != sha256:
        raise CheckpointError(
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


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _remember(identity: tuple[int, ...], digest: str) -> None:
    _digests[identity] = digest
    while len(_digests) > DIGESTS_REMEMBERED:
        _digests.pop(next(iter(_digests)))
