"""The tables of the coordinator's database, version by version.

A file of an older version is brought up to date at the opening, in one transaction; of a newer one it is left alone.
"""

from __future__ import annotations

import sqlite3

_VERSION_1 = """
CREATE TABLE starts (epoch INTEGER PRIMARY KEY) STRICT;
CREATE TABLE jobs (name TEXT PRIMARY KEY, record BLOB NOT NULL) STRICT;
CREATE TABLE incidents (
    job TEXT NOT NULL, number INTEGER NOT NULL, record BLOB NOT NULL, PRIMARY KEY (job, number)
) STRICT, WITHOUT ROWID;
"""
_VERSION_2 = """
CREATE TABLE datasets (number INTEGER PRIMARY KEY, job TEXT NOT NULL, spec BLOB NOT NULL) STRICT;
CREATE INDEX datasets_of_job ON datasets (job);
CREATE TABLE shards (
    dataset INTEGER NOT NULL, shard INTEGER NOT NULL, state INTEGER NOT NULL, lease_id INTEGER NOT NULL,
    consumer TEXT NOT NULL, member TEXT NOT NULL, node TEXT NOT NULL, digest TEXT NOT NULL, account BLOB NOT NULL,
    PRIMARY KEY (dataset, shard)
) STRICT, WITHOUT ROWID;
CREATE TABLE replies (
    job TEXT NOT NULL, consumer TEXT NOT NULL, request INTEGER NOT NULL, answer BLOB NOT NULL,
    PRIMARY KEY (job, consumer)
) STRICT, WITHOUT ROWID;
CREATE TABLE decisions (number INTEGER PRIMARY KEY, job TEXT NOT NULL, record BLOB NOT NULL) STRICT;
CREATE INDEX decisions_of_job ON decisions (job);
"""
_STEPS = (_VERSION_1, _VERSION_2)
SCHEMA_VERSION = len(_STEPS)


def migrate(connection: sqlite3.Connection) -> int:
    """Brings an empty database, or one of an older version, up to date.

    Returns:
        The version that the file had; it is left as it was if that is newer than ``SCHEMA_VERSION``.

    Raises:
        sqlite3.Error: it can't be written; nothing was changed.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version < SCHEMA_VERSION:
        steps = "".join(_STEPS[version:])
        try:
            connection.executescript(f"BEGIN IMMEDIATE;{steps}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    return int(version)
