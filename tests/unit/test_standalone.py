"""What is true of a standalone job whose command was killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from seamark.protocol.messages import JobSpec, StoreAddress
from seamarkd.coordinator.job import ENDED, JobRecord
from seamarkd.standalone import KILLED, over, run_directory_of

SPEC = JobSpec("job", ["t.py"], False, "python", "/", {}, 1, 1, 1, "replace", 0, "", "/tmp")
RECORD = JobRecord(SPEC, "RUNNING", 0, 3, 3, 1, "", [], StoreAddress("h", 1, "i"), "h", 2, [])


@pytest.mark.parametrize("state", ["PENDING", "STARTING", "RUNNING", "RESTARTING", "STOPPING"])
def test_a_job_that_nobody_serves_is_over(state: str) -> None:
    left = replace(RECORD, state=state)  # type: ignore[arg-type]
    assert over(left, 7.0) == replace(left, state="FAILED", result=KILLED, ended_at=7.0)


@pytest.mark.parametrize("state", sorted(ENDED))
def test_one_that_has_ended_did_so_as_it_says(state: str) -> None:
    ended = replace(RECORD, state=state, result="so it was", ended_at=3.0)  # type: ignore[arg-type]
    assert over(ended, 7.0) == ended


@pytest.mark.parametrize(
    ("text", "directory"),
    [
        ("ipc:///run/seamark/ab12/coordinator", Path("/run/seamark/ab12")),
        ("ipc:///run/seamark/ab", None),
        ("", None),
        (None, None),
    ],
)
def test_where_its_sockets_were(tmp_path: Path, text: str | None, directory: Path | None) -> None:
    address = tmp_path / "coordinator.address"
    if text is not None:
        address.write_text(text)
    assert run_directory_of(address) == directory
