"""The durable state of the coordinator: one SQLite database behind a narrow interface.

WAL with synchronous=FULL and exactly one connection that holds the lock for good (FIELD-NOTES 10). A batch of
records is one transaction: what ``commit`` returned from survives kill -9 and a power cut. Knows records, not rules.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import psutil

from seamarkd.coordinator import backups
from seamarkd.coordinator.books import Books
from seamarkd.coordinator.effects import Forget, Persist
from seamarkd.coordinator.ledger import Row, State
from seamarkd.coordinator.schema import SCHEMA_VERSION, migrate
from seamarkd.coordinator.shards import Record
from seamarkd.epoch import next_epoch
from seamarkd.errors import ManifestError

log = logging.getLogger(__name__)

FREE_BYTES = 4 << 20
"""No job is accepted with less than this left on the disk: those that run go on writing."""
BALLAST_BYTES = 1 << 20
"""Held in a file beside the database, and given up when the disk is full, so that running jobs can end."""
NETWORKED = frozenset({"nfs", "nfs4", "lustre", "cifs", "smb3", "smbfs", "9p", "glusterfs", "ceph", "beegfs", "gpfs"})
"""File systems whose locks and write-ahead log SQLite can't rely on (sqlite.org/wal.html)."""
DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_PUT_SHARD = """
INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (dataset, shard) DO UPDATE SET
    state = excluded.state, lease_id = excluded.lease_id, consumer = excluded.consumer, member = excluded.member,
    node = excluded.node, digest = excluded.digest, account = excluded.account
WHERE shards.state < 2 AND excluded.lease_id >= shards.lease_id
"""


class Manifest(Books):
    """The open database. Its ``epoch`` is one more than at the last opening.

    Args:
        path: the database file; its directory must exist.

    Raises:
        ManifestError: the file is no database, is damaged, of another version, or locked by another daemon.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path.with_suffix(".ballast")
        self._backed_up = 0
        self._refuse_networked()
        if trouble(path.parent):
            # A start has to write, too.
            self._give_up_ballast()
        try:
            if not path.exists():
                self._fall_back("is missing")
            self._open()
        except sqlite3.DatabaseError as error:
            if not (_is_damage(error) and self._fall_back(f"is damaged ({error})")):
                raise self._unusable(error) from error
            try:
                self._open()
            except sqlite3.DatabaseError as again:
                raise self._unusable(again) from again

    def _unusable(self, error: sqlite3.DatabaseError) -> ManifestError:
        if not _is_damage(error):
            return ManifestError(f"{self.path}: {error}: {self._hint(error)}")
        return ManifestError(
            f"{self.path} is not a usable database ({error}), and there is no whole copy of it: move it away to start "
            "with an empty one"
        )

    def _fall_back(self, why: str) -> bool:
        try:
            done = backups.restore(self.path, why)
        except OSError as error:
            raise ManifestError(f"{self.path} {why}, and no copy could take its place: {error}") from error
        if done:
            log.error("%s", done)
        return bool(done)

    def _refuse_networked(self) -> None:
        mounts = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
        place = self.path.parent.resolve()
        kind = next((mounts[one] for one in (place, *place.parents) if one in mounts), "")
        if kind in NETWORKED:
            raise ManifestError(
                f"{self.path} is on {kind}, where a database can be damaged: put the state directory on a local disk"
            )

    def _open(self) -> None:
        # The shell commits from one worker thread at a time, never from two at once.
        super().__init__(sqlite3.connect(self.path, isolation_level=None, check_same_thread=False))
        try:
            self._set_up()
        except BaseException:
            self._connection.close()
            raise

    def _set_up(self) -> None:
        run = self._connection.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        (verdict,) = run("PRAGMA quick_check").fetchone()
        if verdict != "ok":
            damage = sqlite3.DatabaseError(str(verdict))
            damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise damage
        found = migrate(self._connection)
        if found > SCHEMA_VERSION:
            raise ManifestError(
                f"{self.path} has schema version {found}, this Seamark writes {SCHEMA_VERSION}: "
                "start the Seamark that wrote it"
            )
        self.epoch = self._begin_epoch()

    def _begin_epoch(self) -> int:
        run = self._connection.execute
        (last,) = run("SELECT coalesce(max(epoch), 0) FROM starts").fetchone()
        # Also beside it: a copy that takes the database's place knows only older starts, and ids are made of epochs.
        epoch = next_epoch(self.path.with_suffix(".epoch"), above=int(last))
        run("BEGIN IMMEDIATE")
        run("DELETE FROM starts")
        run("INSERT INTO starts VALUES (?)", (epoch,))
        run("COMMIT")
        return epoch

    def commit(self, batch: Iterable[Persist | Forget], records: Iterable[Record] = ()) -> None:
        """Makes these changes durable in one transaction.

        Raises:
            ManifestError: nothing of the batch was written.
        """
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                for item in batch:
                    if isinstance(item, Forget):
                        self._forget(item.job)
                    else:
                        self._put_job(item)
                for record in records:
                    self._put_record(record)
            except BaseException:
                # A full disk has rolled it back already.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._give_up_ballast()
            raise ManifestError(f"{self.path}: {error}: {self._hint(error)}") from error

    def _hint(self, error: sqlite3.Error) -> str:
        # SQLite calls a read-only file system an I/O error as soon as the database is open.
        hints = {
            sqlite3.SQLITE_BUSY: "another coordinator is using it",
            sqlite3.SQLITE_READONLY: "make it and its directory writable",
            sqlite3.SQLITE_CANTOPEN: "look at the directory's permissions",
            sqlite3.SQLITE_FULL: "the disk is full, free some space",
        }
        known = hints.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
        return known or trouble(self.path.parent) or "is the disk well?"

    def _give_up_ballast(self) -> None:
        """Room for what running jobs have to write: the next try finds it."""
        # On a disk that is read-only by now nothing can be removed either.
        with suppress(OSError):
            self._ballast.unlink(missing_ok=True)

    def _forget(self, job: str) -> None:
        self._connection.execute("DELETE FROM jobs WHERE name = ?", (job,))
        self._forget_past(job)

    def _forget_past(self, job: str) -> None:
        run = self._connection.execute
        run("DELETE FROM shards WHERE dataset IN (SELECT number FROM datasets WHERE job = ?)", (job,))
        for table in ("incidents", "datasets", "replies", "decisions"):
            run(f"DELETE FROM {table} WHERE job = ?", (job,))

    def _put_job(self, item: Persist) -> None:
        name = item.record.spec.name
        if item.fresh:
            self._forget_past(name)
        self._connection.execute("INSERT OR REPLACE INTO jobs VALUES (?, ?)", (name, msgspec.json.encode(item.record)))
        self._connection.executemany(
            "INSERT OR REPLACE INTO incidents VALUES (?, ?, ?)",
            [(name, one.number, msgspec.json.encode(one)) for one in item.incidents],
        )

    def _put_record(self, record: Record) -> None:
        many = self._connection.executemany
        many(
            "INSERT OR REPLACE INTO datasets VALUES (?, ?, ?)",
            [(number, record.job, msgspec.json.encode(spec)) for number, spec in record.datasets.items()],
        )
        before = self._connection.total_changes
        many(_PUT_SHARD, [_shard_values(dataset, row) for (dataset, _), row in record.rows.items()])
        if self._connection.total_changes - before != len(record.rows):
            # The fence: what is terminal stays so, and no older lease writes over a newer one.
            raise ManifestError(f"{self.path}: job {record.job}: a shard in it is further on than this daemon knows")
        kept = [reply for reply in record.replies.values() if reply is not None]
        many(
            "INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)",
            [(record.job, one.consumer, one.request, _pack(one.answer)) for one in kept],
        )
        gone = [(record.job, consumer) for consumer, reply in record.replies.items() if reply is None]
        many("DELETE FROM replies WHERE job = ? AND consumer = ?", gone)
        many(
            "INSERT OR REPLACE INTO decisions VALUES (?, ?, ?)",
            [(number, record.job, msgspec.json.encode(one)) for number, one in record.decisions.items()],
        )

    def back_up(self) -> None:
        """Makes a copy to fall back to, unless nothing was written since the last one.

        Raises:
            ManifestError: there is none; the older ones are as they were.
        """
        changes = self._connection.total_changes
        if changes == self._backed_up:
            return
        size, disk = self.path.stat().st_size, os.statvfs(self.path.parent)
        if disk.f_bavail * disk.f_frsize < size + 2 * FREE_BYTES:
            raise ManifestError(f"no copy of {self.path} was made: the disk has no room for another {size >> 20} MiB")
        try:
            backups.make(self._connection, self.path)
        except (sqlite3.Error, OSError) as error:
            raise ManifestError(f"no copy of {self.path} could be made: {error}") from error
        self._backed_up = changes

    def trouble(self) -> str:
        """Why the next commit is likely to fail, and what to do; empty if nothing is known against it."""
        found = trouble(self.path.parent)
        if not found:
            self._take_ballast()
        return found

    def _take_ballast(self) -> None:
        if self._ballast.exists():
            return
        with suppress(OSError), self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, BALLAST_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def trouble(directory: Path) -> str:
    """Why nothing should be begun that has to be written down there, and what to do; empty if nothing is against it."""
    disk = os.statvfs(directory)
    if disk.f_flag & os.ST_RDONLY:
        return f"the file system of {directory} is read-only: look at the kernel's log, and make it writable"
    free = disk.f_bavail * disk.f_frsize
    if free >= FREE_BYTES:
        return ""
    return (
        f"the disk of {directory} has {free >> 10} KiB left, and {FREE_BYTES >> 20} MiB are kept free for "
        "the jobs that run: free some space"
    )


_pack = msgspec.msgpack.Encoder().encode


def _shard_values(dataset: int, row: Row) -> tuple[int, int, int, int, str, str, str, str, bytes]:
    # Who leased it matters while it does.
    consumer = row.consumer if row.state == State.LEASED else ""
    return (dataset, row.shard, row.state, row.lease_id, consumer, row.member, row.node, row.digest, row.account)


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", 0)
    return (code & 0xFF) in DAMAGED or code == sqlite3.SQLITE_IOERR_SHORT_READ
