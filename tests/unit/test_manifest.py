"""The coordinator's database: what was committed is there, and what can't be used is named."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from seamark.protocol.messages import Dataset, Incident, JobSpec, ShardAnswer, StoreAddress
from seamarkd.coordinator import backups
from seamarkd.coordinator import manifest as manifests
from seamarkd.coordinator.backlog import coalesced
from seamarkd.coordinator.books import reading
from seamarkd.coordinator.effects import Forget, Persist
from seamarkd.coordinator.incidents import KEPT
from seamarkd.coordinator.job import JobRecord
from seamarkd.coordinator.ledger import Row, State
from seamarkd.coordinator.manifest import Manifest
from seamarkd.coordinator.schema import SCHEMA_VERSION
from seamarkd.coordinator.shards import Record, Reply
from seamarkd.errors import ManifestError


def record(state: str = "RUNNING") -> JobRecord:
    spec = JobSpec(
        name="job",
        argv=["t.py"],
        module=False,
        python="python",
        cwd="/",
        env={"A": "b"},
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        policy="replace",
        max_restarts=2,
        checkpoint_dir="",
        log_dir="/tmp",
    )
    return JobRecord(spec, state, 0, 3, 3, 1, "", [], StoreAddress("h", 1, "i"), "h", 2, [])


def incident(number: int) -> Incident:
    return Incident(number, "ranks", 0, [], [], 1, 1.0, [], {}, {}, [])


def test_the_latest_record_and_all_incidents_come_back(tmp_path: Path) -> None:
    with Manifest(tmp_path / "m.db") as manifest:
        manifest.commit([Persist(record(), (incident(1),)), Persist(record(), (incident(2),))])
        manifest.commit([Persist(record("SUCCEEDED"), (incident(2),))])
    with Manifest(tmp_path / "m.db") as manifest:
        assert manifest.jobs() == [record("SUCCEEDED")]
        assert [one.number for one in manifest.incidents("job")] == [1, 2]
    with reading(tmp_path / "m.db") as books:
        assert books.job("job") == record("SUCCEEDED")


def test_of_many_incidents_the_latest_come_back(tmp_path: Path) -> None:
    with Manifest(tmp_path / "m.db") as manifest:
        manifest.commit([Persist(record(), tuple(incident(number) for number in range(1, KEPT + 4)))])
        assert [one.number for one in manifest.incidents("job")] == list(range(4, KEPT + 4))


def test_a_new_job_of_a_name_does_not_inherit_incidents(tmp_path: Path) -> None:
    with Manifest(tmp_path / "m.db") as manifest:
        manifest.commit([Persist(record(), (incident(1),))])
        manifest.commit([Persist(record(), (), fresh=True)])
        assert manifest.incidents("job") == []


def test_a_file_that_is_no_database_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    path.write_text("these are not the bytes of a database, far from it" * 50)
    with pytest.raises(ManifestError, match=r"m.db is not a usable database.*no whole copy"):
        Manifest(path)
    assert path.read_text().startswith("these are")


def test_a_second_daemon_on_the_same_database_is_refused(tmp_path: Path) -> None:
    with Manifest(tmp_path / "m.db") as manifest:
        manifest.commit([Persist(record(), ())])
        with pytest.raises(ManifestError, match="another coordinator"):
            Manifest(tmp_path / "m.db")


def test_a_database_of_another_version_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "m.db")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ManifestError, match="version 99"):
        Manifest(tmp_path / "m.db")


def test_every_start_is_a_new_epoch(tmp_path: Path) -> None:
    epochs = []
    for _ in range(3):
        with Manifest(tmp_path / "m.db") as manifest:
            epochs.append(manifest.epoch)
    assert epochs == [1, 2, 3]


def test_a_forgotten_job_is_gone(tmp_path: Path) -> None:
    with Manifest(tmp_path / "m.db") as manifest:
        manifest.commit([Persist(record(), (incident(1),)), Forget("job")])
        assert (manifest.jobs(), manifest.incidents("job")) == ([], [])


def test_a_disk_that_fills_up_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Manifest(tmp_path / "m.db") as manifest:
        assert manifest.trouble() == ""
        monkeypatch.setattr(manifests, "FREE_BYTES", 1 << 60)
        assert f"the disk of {tmp_path}" in manifest.trouble()
        assert "free some space" in manifest.trouble()


def test_what_waits_for_a_full_disk_is_one_record_per_job(tmp_path: Path) -> None:
    changes = [
        Persist(record("PENDING"), (), fresh=True),
        Persist(record("STARTING"), (incident(1),)),
        Persist(record("RUNNING"), (incident(1), incident(2))),
    ]
    (one,), _ = coalesced(changes)
    assert one == Persist(record("RUNNING"), (incident(1), incident(2)), fresh=True)
    assert coalesced([*changes, Forget("job")]) == ([Forget("job")], [])
    assert coalesced([Forget("job"), changes[0]]) == ([changes[0]], [])
    with Manifest(tmp_path / "together.db") as together, Manifest(tmp_path / "apart.db") as apart:
        together.commit(*coalesced(changes))
        apart.commit(changes)
        assert together.jobs() == apart.jobs()
        assert together.incidents("job") == apart.incidents("job")


# --- shards ------------------------------------------------------------------------------------------------


def row(shard: int, state: State, lease_id: int, *, account: bytes = b"") -> Row:
    return Row(
        shard, state, lease_id, f"i{lease_id}#d/0", "job/0", "n0", "digest" if state == State.DONE else "", account
    )


def rows(*found: Row) -> Record:
    return Record("job", {}, {(7, one.shard): one for one in found}, {}, {})


DATASET = Record("job", {7: Dataset("d", 100, 10)}, {}, {}, {})


def test_shards_come_back_as_they_were_written(tmp_path: Path) -> None:
    answer = ShardAnswer(3, "job", "i5#d/0", "recorded")
    replies = Record("job", {}, {}, {"i5#d/0": Reply("i5#d/0", 3, answer)}, {})
    leased, done = row(1, State.LEASED, 5), row(0, State.DONE, 4)
    failed = row(2, State.FAILED, 6, account=b'{"attempts":4}')
    with Manifest(tmp_path / "m.db") as manifest:
        manifest.commit([Persist(record(), ())], [DATASET, rows(leased, done, failed), replies])
    with Manifest(tmp_path / "m.db") as manifest:
        saved = manifest.shards("job")
        (dataset,) = saved.datasets
        assert (dataset.number, dataset.spec, dataset.smooth) == (7, Dataset("d", 100, 10), [(0, 4)])
        assert [(one.shard, one.state, one.consumer) for one in dataset.rows] == [(1, 1, "i5#d/0"), (2, 4, "")]
        assert saved.replies == [Reply("i5#d/0", 3, answer)]
        entries = manifest.page(7, 1, 1)
        assert [(one.shard, one.state, one.lease_id) for one in entries] == [(1, "LEASED", 5)]
        (over,) = manifest.page(7, 1, 1, living=False)
        assert (over.state, over.lease_id) == ("PENDING", 5), "of a job that has ended nobody has a lease"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (row(0, State.DONE, 4), row(0, State.DONE, 5)),
        (row(0, State.QUARANTINED, 4), row(0, State.PENDING, 4)),
        (row(0, State.LEASED, 9), row(0, State.DONE, 8)),
    ],
)
def test_the_fence_is_in_the_row(tmp_path: Path, first: Row, second: Row) -> None:
    with Manifest(tmp_path / "m.db") as manifest:
        manifest.commit([Persist(record(), ())], [DATASET, rows(first)])
        with pytest.raises(ManifestError, match="further on"):
            manifest.commit([Persist(record("FAILED"), ())], [rows(second, row(1, State.LEASED, 10))])
        # Nothing of that batch was written.
        assert manifest.jobs() == [record()]
        assert [one.shard for one in manifest.page(7, 0, 10)] == [0]


def test_a_new_job_of_a_name_inherits_no_shards(tmp_path: Path) -> None:
    with Manifest(tmp_path / "m.db") as manifest:
        manifest.commit([Persist(record(), ())], [DATASET, rows(row(0, State.DONE, 4))])
        manifest.commit(*coalesced([rows(row(1, State.LEASED, 5)), Persist(record(), (), fresh=True)]))
        assert manifest.datasets("job") == []
        assert manifest.page(7, 0, 10) == []


def test_a_file_of_version_1_is_brought_up_to_date(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "m.db")
    connection.executescript(
        "CREATE TABLE starts (epoch INTEGER PRIMARY KEY) STRICT; INSERT INTO starts VALUES (41);"
        "CREATE TABLE jobs (name TEXT PRIMARY KEY, record BLOB NOT NULL) STRICT;"
        "CREATE TABLE incidents (job TEXT NOT NULL, number INTEGER NOT NULL, record BLOB NOT NULL,"
        " PRIMARY KEY (job, number)) STRICT, WITHOUT ROWID; PRAGMA user_version = 1;"
    )
    connection.close()
    with reading(tmp_path / "m.db") as books:
        assert books.datasets("job") == []
    with Manifest(tmp_path / "m.db") as manifest:
        assert manifest.epoch == 42
        manifest.commit([], [DATASET])
        assert manifest.datasets("job") == [(7, Dataset("d", 100, 10))]
    with sqlite3.connect(tmp_path / "m.db") as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


# --- damage ------------------------------------------------------------------------------------------------


def written(path: Path) -> int:
    """A manifest with a copy, and something after it; its epoch."""
    with Manifest(path) as manifest:
        manifest.commit([Persist(record(), ())], [DATASET, *(rows(row(n, State.DONE, n + 1)) for n in range(10))])
        manifest.back_up()
        manifest.commit([Persist(record("SUCCEEDED"), ())])
        return manifest.epoch


@pytest.mark.parametrize("damage", ["truncated", "torn", "gone", "overwritten"])
def test_a_damaged_database_is_moved_aside_and_its_copy_takes_its_place(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.db"
    epoch = written(path)
    data = path.read_bytes()
    match damage:
        case "truncated":
            path.write_bytes(data[: len(data) // 2])
        case "torn":
            path.write_bytes(data[:4096] + bytes(len(data) - 4096))
        case "gone":
            path.unlink()
        case "overwritten":
            path.write_bytes(b"a log that was sent to the wrong place\n" * 1000)
    damaged = path.read_bytes() if path.exists() else None
    with Manifest(path) as manifest:
        assert manifest.jobs() == [record()]
        assert len(manifest.page(7, 0, 100)) == 10
        # Ids are made of it: the copy knows only older ones.
        assert manifest.epoch == epoch + 1
    assert "what happened after it was made is lost" in caplog.text
    aside = tmp_path / "m.db.damaged-1"
    assert (aside.read_bytes() if aside.exists() else None) == damaged


def test_of_damaged_copies_none_is_used(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    written(path)
    (newest, *_) = backups.copies(path)
    with Manifest(path) as manifest:
        manifest.commit([Persist(record("FAILED"), ())])
        manifest.back_up()
    newest.write_bytes(newest.read_bytes()[:5000])
    path.write_bytes(b"no database" * 100)
    with Manifest(path) as manifest:
        assert manifest.jobs() == [record()]
    for copy in backups.copies(path):
        copy.write_bytes(b"none either")
    path.write_bytes(b"no database" * 100)
    with pytest.raises(ManifestError, match="no whole copy"):
        Manifest(path)
    assert path.read_bytes() == b"no database" * 100


def test_no_copy_takes_the_room_that_running_jobs_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.db"
    written(path)
    before = {copy: copy.read_bytes() for copy in backups.copies(path) if copy.exists()}
    with Manifest(path) as manifest:
        manifest.commit([Persist(record("FAILED"), ())])
        monkeypatch.setattr(manifests, "FREE_BYTES", 1 << 60)
        with pytest.raises(ManifestError, match="no copy of .* was made: the disk has no room for another"):
            manifest.back_up()
    assert {copy: copy.read_bytes() for copy in backups.copies(path) if copy.exists()} == before


def test_a_copy_that_can_t_take_the_place_of_a_damaged_database_is_named_and_does_so_later(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    written(path)
    path.write_bytes(b"no database" * 100)
    (tmp_path / "m.db.restored").mkdir()
    for _ in range(2):
        with pytest.raises(ManifestError, match="m.db is .*, and no copy could take its place: .*Is a directory"):
            Manifest(path)
    (tmp_path / "m.db.restored").rmdir()
    with Manifest(path) as manifest:
        assert manifest.jobs() == [record()]


def test_a_torn_end_of_the_log_costs_what_was_not_acknowledged_alone(tmp_path: Path) -> None:
    path, image = tmp_path / "m.db", tmp_path / "image.db"
    with Manifest(path) as manifest:
        manifest.commit([Persist(record(), ())])
        whole = path.with_name("m.db-wal").read_bytes()
        manifest.commit([Persist(record("SUCCEEDED"), ())])
        log = path.with_name("m.db-wal").read_bytes()
        assert len(log) > len(whole)
        image.write_bytes(path.read_bytes())
        image.with_name("image.db-wal").write_bytes(log[:-10])
    with Manifest(image) as manifest:
        assert manifest.jobs() == [record()]


@pytest.mark.parametrize(
    ("pragma", "says"),
    [
        ("query_only = ON", "readonly database: make it and its directory writable"),
        ("max_page_count = 1", "disk is full: the disk is full, free some space"),
    ],
)
def test_a_commit_that_sqlite_refuses_says_what_to_do_and_is_taken_later(
    tmp_path: Path, pragma: str, says: str
) -> None:
    """Refused by SQLite itself, in the middle of the transaction and of one that it has rolled back already."""
    many = [incident(number) for number in range(200)]
    with Manifest(tmp_path / "m.db") as manifest:
        manifest.commit([Persist(record(), ())])
        manifest._connection.execute(f"PRAGMA {pragma}")
        for _ in range(2):
            with pytest.raises(ManifestError, match=says):
                manifest.commit([Persist(record("SUCCEEDED"), tuple(many))])
            assert manifest.jobs() == [record()]
        manifest._connection.execute("PRAGMA query_only = OFF")
        manifest._connection.execute("PRAGMA max_page_count = 1000000")
        manifest.commit([Persist(record("SUCCEEDED"), tuple(many))])
        assert (manifest.jobs(), manifest.incidents("job")) == ([record("SUCCEEDED")], many)


def test_a_path_that_can_t_be_opened_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=f"{tmp_path}: .*: look at the directory's permissions"):
        Manifest(tmp_path)


NO_NAMESPACE = 77
READ_ONLY = f"""
import resource, subprocess, sys
from pathlib import Path
from seamarkd.coordinator.effects import Forget
from seamarkd.coordinator.manifest import Manifest
from seamarkd.errors import StateError

path = Path(sys.argv[1])
manifest = Manifest(path)
manifest.trouble()
place = str(path.parent)
for how in (["--bind", place, place], ["-o", "remount,bind,ro", place]):
    if subprocess.run(["mount", *how]).returncode:
        sys.exit({NO_NAMESPACE})
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))
for action in (lambda: manifest.commit([Forget("job")]), manifest.close, lambda: Manifest(path)):
    try:
        action()
    except StateError as error:
        print(error)
"""


def test_a_read_only_file_system_is_named_with_what_to_do(tmp_path: Path) -> None:
    """In use, where the ballast can't be removed either, and at a start.

    A read-only mount over the directory, in a mount namespace of the test's own, and no room in files that are open
    already: chmod refuses root nothing.
    """
    written(tmp_path / "m.db")
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    command = ["unshare", "--mount", *user, sys.executable, "-c", READ_ONLY, str(tmp_path / "m.db")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == NO_NAMESPACE or "unshare failed" in done.stderr:
        pytest.skip(f"this host allows no mount namespace: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"the file system of {tmp_path} is read-only: look at the kernel's log") == 2
    with Manifest(tmp_path / "m.db") as manifest:
        assert manifest.jobs() == [record("SUCCEEDED")]


def test_networked_file_systems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        manifests, "NETWORKED", frozenset(one.fstype for one in manifests.psutil.disk_partitions(all=True))
    )
    with pytest.raises(ManifestError, match="put the state directory on a local disk"):
        Manifest(tmp_path / "m.db")
