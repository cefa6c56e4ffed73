"""What the integration tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from standalone import PACE, standalone


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short, because sockets are in it: the path of a Unix socket has 107 bytes at most."""
    return tmp_path_factory.mktemp("t")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of a run on four ranks that nothing happened to."""
    with standalone(tmp_path_factory.mktemp("undisturbed"), "--nproc-per-node", "4", arguments=PACE) as run:
        assert run.finish() == 0, run.text() + run.logs()
        (digest,) = run.digests()
        assert run.incidents() == []
        began = {report["sha256"] for rank in range(4) for report in run.reports(rank) if report["event"] == "resumed"}
    assert len(began) == 1, "all ranks begin equal"
    assert digest not in began, "a digest tells what was learned"
    return digest
