"""What a manifest's database says, to who serves it and to who only reads it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec.structs import replace

from seamark.protocol.messages import Dataset, Incident, ShardAnswer, ShardDecision, ShardEntry
from seamarkd.coordinator.incidents import KEPT
from seamarkd.coordinator.job import JobRecord
from seamarkd.coordinator.ledger import Account, Row, State
from seamarkd.coordinator.shards import DECISIONS_KEPT, Reply, Saved, SavedDataset
from seamarkd.errors import ManifestError


class Books:
    """The records of a database.

    Args:
        connection: to it; this object's from now on.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def close(self) -> None:
        """Closes the database, and gives up the lock if it had one."""
        self._connection.close()

    def job(self, name: str) -> JobRecord | None:
        """The record of a job."""
        row = self._connection.execute("SELECT record FROM jobs WHERE name = ?", (name,)).fetchone()
        return msgspec.json.decode(row[0], type=JobRecord) if row else None

    def jobs(self) -> list[JobRecord]:
        """All job records."""
        rows = self._connection.execute("SELECT record FROM jobs ORDER BY name").fetchall()
        return [msgspec.json.decode(record, type=JobRecord) for (record,) in rows]

    def incidents(self, job: str) -> list[Incident]:
        """The latest incidents of a job, as many as a coordinator keeps in memory, oldest first."""
        rows = self._connection.execute(
            "SELECT record FROM incidents WHERE job = ? ORDER BY number DESC LIMIT ?", (job, KEPT)
        ).fetchall()
        return [msgspec.json.decode(record, type=Incident) for (record,) in reversed(rows)]

    def datasets(self, job: str) -> list[tuple[int, Dataset]]:
        """The data sets of a job, by number."""
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version < 2:
            return []  # of a Seamark that knew none, and opened to be read only
        rows = self._connection.execute("SELECT number, spec FROM datasets WHERE job = ? ORDER BY number", (job,))
        return [(number, msgspec.json.decode(spec, type=Dataset)) for number, spec in rows.fetchall()]

    def shards(self, job: str) -> Saved:
        """All that is known of a job's shards."""
        return Saved(
            datasets=[
                SavedDataset(number, spec, self._smooth(number), self._rows(number))
                for number, spec in self.datasets(job)
            ],
            replies=self._replies(job),
            decisions=self.decisions(job),
        )

    def _smooth(self, dataset: int) -> list[tuple[int, int]]:
        return self._connection.execute(
            "SELECT shard, lease_id FROM shards WHERE dataset = ? AND state = ? AND account = x''",
            (dataset, State.DONE),
        ).fetchall()

    def _rows(self, dataset: int) -> list[Row]:
        found = self._connection.execute(
            "SELECT shard, state, lease_id, consumer, member, node, digest, account FROM shards "
            "WHERE dataset = ? AND NOT (state = ? AND account = x'')",
            (dataset, State.DONE),
        )
        return [Row(*values) for values in found.fetchall()]

    def page(self, dataset: int, first: int, limit: int, *, living: bool = True) -> list[ShardEntry]:
        """Shards of a data set that were ever leased, from this one on; of a job that has ended none still is."""
        found = self._connection.execute(
            "SELECT shard, state, lease_id, member, node, digest, account FROM shards "
            "WHERE dataset = ? AND shard >= ? ORDER BY shard LIMIT ?",
            (dataset, first, limit),
        )
        entries = [_entry(*values) for values in found.fetchall()]
        if living:
            return entries
        return [replace(one, state="PENDING") if one.state == "LEASED" else one for one in entries]

    def _replies(self, job: str) -> list[Reply]:
        rows = self._connection.execute("SELECT consumer, request, answer FROM replies WHERE job = ?", (job,))
        return [Reply(one, request, _unpack(answer)) for one, request, answer in rows.fetchall()]

    def decisions(self, job: str) -> list[ShardDecision]:
        """The latest decisions about a job's shards, oldest first."""
        rows = self._connection.execute(
            "SELECT record FROM decisions WHERE job = ? ORDER BY number DESC LIMIT ?", (job, DECISIONS_KEPT)
        ).fetchall()
        return [msgspec.json.decode(record, type=ShardDecision) for (record,) in reversed(rows)]


@contextmanager
def reading(path: Path) -> Iterator[Books]:
    """A database that no daemon holds, to be read.

    Raises:
        ManifestError: the file is no database, or a daemon holds it.
    """
    try:
        books = Books(sqlite3.connect(f"file:{path}?mode=ro", uri=True))
        try:
            yield books
        finally:
            books.close()
    except sqlite3.Error as error:
        raise ManifestError(f"{path}: {error}") from error


_unpack = msgspec.msgpack.Decoder(ShardAnswer).decode


def _entry(shard: int, state: int, lease_id: int, member: str, node: str, digest: str, account: bytes) -> ShardEntry:
    known = msgspec.json.decode(account, type=Account) if account else Account()
    return ShardEntry(shard, State(state).name, lease_id, member, node, known.progress, known.skip, digest)  # type: ignore[arg-type]
