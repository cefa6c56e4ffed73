"""The coordinator's database: what was committed is there, and what can't be used is named."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from seamark.protocol.messages import Incident, JobSpec, StoreAddress
from seamarkd.coordinator.jobs import JobRecord, Persist
from seamarkd.coordinator.manifest import Manifest, ManifestError, read


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
    assert read(tmp_path / "m.db", "job")[0] == record("SUCCEEDED")


def test_a_new_job_of_a_name_does_not_inherit_incidents(tmp_path: Path) -> None:
    with Manifest(tmp_path / "m.db") as manifest:
        manifest.commit([Persist(record(), (incident(1),))])
        manifest.commit([Persist(record(), (), fresh=True)])
        assert manifest.incidents("job") == []


def test_a_file_that_is_no_database_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    path.write_text("these are not the bytes of a database, far from it" * 50)
    with pytest.raises(ManifestError, match="m.db is not a usable database"):
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
