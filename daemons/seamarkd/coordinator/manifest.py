"""The durable state of the coordinator: one SQLite database behind a narrow interface.

WAL with synchronous=FULL and exactly one connection that holds the lock for good (FIELD-NOTES 10). A batch of
records is one transaction: what ``commit`` returned from survives kill -9 and a power cut. Knows records, not rules.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from seamark.protocol.messages import Incident
from seamarkd.coordinator.effects import Forget, Persist
from seamarkd.coordinator.job import JobRecord
from seamarkd.errors import StateError

SCHEMA_VERSION = 1
FREE_BYTES = 4 << 20
"""No job is accepted with less than this left on the disk: those that run go on writing."""
BALLAST_BYTES = 1 << 20
"""Held in a file beside the database, and given up when the disk is full, so that running jobs can end."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS starts (epoch INTEGER PRIMARY KEY) STRICT;
CREATE TABLE IF NOT EXISTS jobs (name TEXT PRIMARY KEY, record BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS incidents (
    job TEXT NOT NULL, number INTEGER NOT NULL, record BLOB NOT NULL, PRIMARY KEY (job, number)
) STRICT, WITHOUT ROWID;
"""


class ManifestError(StateError):
    """The database can't be used."""


class Manifest:
    """The open database. Its ``epoch`` is one more than at the last opening.

    Args:
        path: the database file; its directory must exist.

    Raises:
        ManifestError: the file is no database, is damaged, of another version, or locked by another daemon.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path.with_suffix(".ballast")
        try:
            # The shell commits from one worker thread at a time, never from two at once.
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._open()
        except sqlite3.OperationalError as error:
            raise ManifestError(f"{path}: {error}: is another coordinator using it?") from error
        except sqlite3.DatabaseError as error:
            raise ManifestError(
                f"{path} is not a usable database ({error}): move it away to start with an empty one"
            ) from error

    def _open(self) -> None:
        run = self._connection.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        (verdict,) = run("PRAGMA quick_check").fetchone()
        if verdict != "ok":
            raise ManifestError(f"{self.path} is damaged: {verdict}")
        (version,) = run("PRAGMA user_version").fetchone()
        if version not in (0, SCHEMA_VERSION):
            raise ManifestError(
                f"{self.path} has schema version {version}, this Seamark writes {SCHEMA_VERSION}: "
                "start the Seamark that wrote it"
            )
        self._connection.executescript(_SCHEMA)
        run(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self.epoch = self._begin_epoch()

    def _begin_epoch(self) -> int:
        run = self._connection.execute
        run("BEGIN IMMEDIATE")
        (last,) = run("SELECT coalesce(max(epoch), 0) FROM starts").fetchone()
        run("DELETE FROM starts")
        run("INSERT INTO starts VALUES (?)", (last + 1,))
        run("COMMIT")
        return int(last) + 1

    def commit(self, batch: Iterable[Persist | Forget]) -> None:
        """Makes these changes durable in one transaction.

        Raises:
            ManifestError: nothing of the batch was written.
        """
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                for item in batch:
                    if isinstance(item, Forget):
                        self._connection.execute("DELETE FROM incidents WHERE job = ?", (item.job,))
                        self._connection.execute("DELETE FROM jobs WHERE name = ?", (item.job,))
                        continue
                    name = item.record.spec.name
                    if item.fresh:
                        self._connection.execute("DELETE FROM incidents WHERE job = ?", (name,))
                    self._connection.execute(
                        "INSERT OR REPLACE INTO jobs VALUES (?, ?)", (name, msgspec.json.encode(item.record))
                    )
                    self._connection.executemany(
                        "INSERT OR REPLACE INTO incidents VALUES (?, ?, ?)",
                        [(name, one.number, msgspec.json.encode(one)) for one in item.incidents],
                    )
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            # Room for what running jobs have to write: the next try finds it.
            self._ballast.unlink(missing_ok=True)
            raise ManifestError(f"{self.path}: {error}") from error

    def trouble(self) -> str:
        """Why the next commit is likely to fail, and what to do; empty if nothing is known against it."""
        disk = os.statvfs(self.path.parent)
        free = disk.f_bavail * disk.f_frsize
        if free >= FREE_BYTES:
            self._take_ballast()
            return ""
        return (
            f"the disk of {self.path.parent} has {free >> 10} KiB left, and {FREE_BYTES >> 20} MiB are kept free for "
            "the jobs that run: free some space"
        )

    def _take_ballast(self) -> None:
        if self._ballast.exists():
            return
        with suppress(OSError), self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, BALLAST_BYTES)

    def jobs(self) -> list[JobRecord]:
        """All job records."""
        rows = self._connection.execute("SELECT record FROM jobs ORDER BY name").fetchall()
        return [msgspec.json.decode(record, type=JobRecord) for (record,) in rows]

    def incidents(self, job: str) -> list[Incident]:
        """The incidents of a job, oldest first."""
        rows = self._connection.execute("SELECT record FROM incidents WHERE job = ? ORDER BY number", (job,))
        return [msgspec.json.decode(record, type=Incident) for (record,) in rows.fetchall()]

    def close(self) -> None:
        """Closes the database and gives up its lock."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(path: Path, job: str) -> tuple[JobRecord | None, list[Incident]]:
    """What a database that no daemon holds says of a job.

    Raises:
        ManifestError: the file is no database, or a daemon holds it.
    """
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            row = connection.execute("SELECT record FROM jobs WHERE name = ?", (job,)).fetchone()
            rows = connection.execute("SELECT record FROM incidents WHERE job = ? ORDER BY number", (job,)).fetchall()
    except sqlite3.Error as error:
        raise ManifestError(f"{path}: {error}") from error
    record = msgspec.json.decode(row[0], type=JobRecord) if row else None
    return record, [msgspec.json.decode(one, type=Incident) for (one,) in rows]
