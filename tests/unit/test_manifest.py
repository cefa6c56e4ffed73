"""The coordinator's database: what was committed is there, and what can't be used is named."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from seamark.protocol.messages import Incident, JobSpec, StoreAddress
from seamarkd.coordinator import manifest as manifests
from seamarkd.coordinator.effects import Forget, Persist
from seamarkd.coordinator.job import JobRecord
from seamarkd.coordinator.manifest import Manifest, ManifestError, read
from seamarkd.coordinator.shell import coalesced


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
    (one,) = coalesced(changes)
    assert one == Persist(record("RUNNING"), (incident(1), incident(2)), fresh=True)
    assert coalesced([*changes, Forget("job")]) == [Forget("job")]
    assert coalesced([Forget("job"), changes[0]]) == [changes[0]]
    with Manifest(tmp_path / "together.db") as together, Manifest(tmp_path / "apart.db") as apart:
        together.commit(coalesced(changes))
        apart.commit(changes)
        assert together.jobs() == apart.jobs()
        assert together.incidents("job") == apart.incidents("job")
