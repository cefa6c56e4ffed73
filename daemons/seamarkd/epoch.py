"""How often a daemon has been started: a number on disk that only rises, written before the daemon serves (D3).

Whoever sees a higher epoch knows that the daemon is a new process, and that ids made from it are new ones.
"""

from __future__ import annotations

import os
from pathlib import Path

from seamarkd.errors import StateError


class EpochError(StateError):
    """The file can't be used."""


def next_epoch(path: Path, above: int = 0) -> int:
    """The number of this start: one more than the last, durable when this returns.

    Args:
        path: the file; its directory must exist.
        above: a number that was used before, as another place says.

    Raises:
        EpochError: the file holds no number, or can't be written.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        text = "0"
    except (OSError, UnicodeDecodeError) as error:
        raise EpochError(f"{path}: {error}") from error
    try:
        epoch = max(int(text), above) + 1
    except ValueError:
        raise EpochError(
            f"{path} holds {text[:20]!r} where the number of the last start belongs: write a number there that is "
            "higher than any epoch in the logs, or quorum ids would be used twice"
        ) from None
    try:
        _replace(path, f"{epoch}\n")
    except OSError as error:
        raise EpochError(f"can't write {path}: {error.strerror}") from error
    return epoch


def _replace(path: Path, text: str) -> None:
    # Written, on disk, named, and the name on disk: in any other order a power cut can bring an old number back.
    temporary = path.with_name(path.name + ".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, text.encode())
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
