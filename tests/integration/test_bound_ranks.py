"""Processors and GPUs of the ranks of a real job."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from standalone import standalone

from seamarkd.agent.binding import cpu_sets, read_topology

pytestmark = pytest.mark.integration

SCRIPT = """
import json, os, pathlib
found = {"cpus": sorted(os.sched_getaffinity(0)), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
pathlib.Path(__file__).with_name(f"found-{os.environ['LOCAL_RANK']}").write_text(json.dumps(found))
"""


def found(home: Path, *options: str) -> list[dict[str, object]]:
    home.mkdir()
    (home / "script.py").write_text(SCRIPT)
    options = ("--preload", "none", "--nproc-per-node", "2", "--env", "CUDA_VISIBLE_DEVICES=5,7", *options)
    with standalone(home, *options, script=home / "script.py") as run:
        assert run.finish() == 0, run.text() + run.logs()
    return [json.loads((home / f"found-{rank}").read_text()) for rank in range(2)]


def test_nothing_is_bound_unless_it_is_asked_for(tmp_path: Path) -> None:
    all_of_them = sorted(os.sched_getaffinity(0))
    assert found(tmp_path / "h") == [{"cpus": all_of_them, "gpu": "5,7"}] * 2


def test_each_rank_has_its_own_processors_and_its_own_gpu(tmp_path: Path) -> None:
    ranks = found(tmp_path / "h", "--cpu-binding", "exclusive", "--gpu-binding", "single")
    assert [rank["gpu"] for rank in ranks] == ["5", "7"]
    assert [rank["cpus"] for rank in ranks] == [sorted(one) for one in cpu_sets(read_topology(), 2, "exclusive")]
