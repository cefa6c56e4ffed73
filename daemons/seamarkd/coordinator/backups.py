"""Rolling copies of the coordinator's database, and the return to one when the database is damaged.

A copy is made beside the running database by its own connection (``VACUUM INTO``), is on disk before it has its name,
and takes the older one's place only then. A damaged database is never written over and never thrown away: it is moved
aside, and the newest copy that is whole takes its place.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from itertools import pairwise
from pathlib import Path

KEPT = 2
COMPANIONS = ("", "-wal", "-shm")


def copies(path: Path) -> list[Path]:
    """Where the copies of a database are, the newest first, whether they exist or not."""
    return [path.with_name(f"{path.name}.backup-{number}") for number in range(1, KEPT + 1)]


def make(connection: sqlite3.Connection, path: Path) -> None:
    """Makes a new copy of the database that this connection has open.

    Args:
        connection: outside of a transaction.
        path: of the database.

    Raises:
        sqlite3.Error, OSError: there is none; the older copies are as they were.
    """
    fresh = path.with_name(f"{path.name}.backup-new")
    fresh.unlink(missing_ok=True)
    try:
        connection.execute("VACUUM INTO ?", (str(fresh),))
        _sync(fresh)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    found = copies(path)
    for newer, older in reversed(list(pairwise(found))):
        if newer.exists():
            newer.rename(older)
    fresh.rename(found[0])
    _sync(path.parent)


def restore(path: Path, why: str) -> str:
    """Puts the newest whole copy in the place of a database that is damaged or missing.

    Returns:
        What was done, for people; empty if there is no whole copy, and then nothing was touched.

    Raises:
        OSError: a file can't be moved or written.
    """
    whole = next((copy for copy in copies(path) if _is_whole(copy)), None)
    if whole is None:
        return ""
    aside = _aside(path)
    for companion in COMPANIONS:
        part = path.with_name(path.name + companion)
        if part.exists():
            part.rename(aside.with_name(aside.name + companion))
    fresh = path.with_name(f"{path.name}.restored")
    fresh.write_bytes(whole.read_bytes())
    _sync(fresh)
    fresh.rename(path)
    _sync(path.parent)
    kept = f", and was moved to {aside.name}" if aside.exists() else ""
    return f"{path} {why}{kept}; the copy {whole.name} takes its place: what happened after it was made is lost"


def _aside(path: Path) -> Path:
    number = 1
    while path.with_name(f"{path.name}.damaged-{number}").exists():
        number += 1
    return path.with_name(f"{path.name}.damaged-{number}")


def _is_whole(copy: Path) -> bool:
    if not copy.exists():
        return False
    try:
        with closing(sqlite3.connect(f"file:{copy}?mode=ro&immutable=1", uri=True)) as connection:
            return bool(connection.execute("PRAGMA integrity_check").fetchone() == ("ok",))
    except sqlite3.Error:
        return False


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
