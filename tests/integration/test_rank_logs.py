"""The workers' logs, by job, generation and rank: bounded while they are written, and readable all the time."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from standalone import wait_for
from suite import Suite, suite

pytestmark = pytest.mark.suite

LIMIT = 4 << 20
FLOOD = """
import os, pathlib, time
HERE = pathlib.Path(__file__).parent
number = 0
while os.environ["RANK"] == "0" and not (HERE / "stop").exists():
    until = time.monotonic() + 0.1
    for number in range(number, number + 1_000):
        print(f"line {number:09d} {'.' * 80}", flush=True)
    number += 1
    time.sleep(max(0.0, until - time.monotonic()))
print("the end", number)
"""
FAILS = """
import os, pathlib, sys, time
HERE = pathlib.Path(__file__).parent
generation, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
print("begins", generation, flush=True)
if (generation, rank) in (("0", "1"), ("1", "0")):
    sys.exit(f"fails in {generation}")
while generation != "2" or not (HERE / "stop").exists():
    time.sleep(0.01)
"""
PLAIN = ("--preload", "none", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    """A suite whose workers' logs may take little, of two generations."""
    settings = {"SEAMARK_LOG_WORKER_MAX_BYTES": str(LIMIT), "SEAMARK_LOG_WORKER_GENERATIONS": "2"}
    with suite(tmp_path_factory.mktemp("l"), agents=1, slots=4, env=settings) as made:
        yield made


def numbers(text: str) -> list[int]:
    return [int(line.split()[3]) for line in text.splitlines() if line.startswith("[rank 0] line ")]


def test_ten_thousand_lines_a_second_stay_below_the_limit_and_can_be_followed(one: Suite, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(FLOOD)
    run = one.run(tmp_path, *PLAIN, name="flood", script=tmp_path / "script.py")
    path = one.state / "jobs/flood/logs/rank_0.log"
    command = [sys.executable, "-m", "seamarkd.cli", "logs", "flood", "--rank", "0", "-f"]
    followed = (tmp_path / "followed").open("w+b")
    following: subprocess.Popen[bytes] | None = None
    try:
        wait_for("its log", lambda: path.exists() and path.stat().st_size)
        following = subprocess.Popen(command, env=one.env, stdout=followed)
        wait_for("four times the limit", lambda: run.check_alive() or path.stat().st_size > 4 * LIMIT)
        # Above it by what is written between two looks: at this rate a megabyte and a half.
        assert path.stat().st_blocks * 512 < 2 * LIMIT
        last = numbers(one.command("logs", "flood", "--rank", "0", "-n", "100"))
        assert last == list(range(last[0], last[0] + 100))
        (tmp_path / "stop").touch()
        assert run.finish() == 0, run.text() + run.logs()
        wait_for("the last line", lambda: "[rank 0] the end" in (tmp_path / "followed").read_text())
        wait_for("a last look", lambda: path.stat().st_blocks * 512 <= LIMIT)
    finally:
        run.close()
        if following is not None:
            following.terminate()
            following.wait(30.0)
        followed.close()
    written = int(one.command("logs", "flood", "--rank", "0", "-n", "1").split()[-1])
    kept = numbers(one.command("logs", "flood"))
    assert kept == list(range(written - len(kept), written)), "the newest lines, and all of them"
    assert len(kept) * 90 > LIMIT // 4
    seen = numbers((tmp_path / "followed").read_text())
    assert all(later > earlier for earlier, later in itertools.pairwise(seen)), "no line twice, none half"
    assert seen[-1] == written - 1
    assert one.command("logs", "flood", "--rank", "1") == "[rank 1] the end 0\n"


def test_each_generation_has_its_files_and_those_who_failed_are_found(one: Suite, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(FAILS)
    options = ("--restart-policy", "any-failed", "--max-restarts", "2", *PLAIN)
    run = one.run(tmp_path, *options, name="fails", script=tmp_path / "script.py")
    logs = one.state / "jobs/fails/logs"
    followed = (tmp_path / "followed").open("w+b")
    following: subprocess.Popen[bytes] | None = None
    try:
        wait_for("the first", (logs / "rank_1.log").exists)
        command = [sys.executable, "-m", "seamarkd.cli", "logs", "fails", "--rank", "0", "--failed", "-f"]
        following = subprocess.Popen(command, env=one.env, stdout=followed)
        wait_for("the third", (logs / "rank_1.generation_2.log").exists)
        (tmp_path / "stop").touch()
        assert run.finish() == 0, run.text() + run.logs()
        wait_for("who failed", lambda: "[rank 0] fails in 1" in (tmp_path / "followed").read_text())
    finally:
        run.close()
        if following is not None:
            following.terminate()
            following.wait(30.0)
        followed.close()
    ranks = [f"rank_{rank}.generation_{generation}.log" for rank in (0, 1) for generation in (1, 2)]
    assert sorted(path.name for path in logs.glob("rank_*")) == ranks, "those of the first are outdated"
    assert (
        one.command("logs", "fails", "--generation", "1", "--rank", "0") == "[rank 0] begins 1\n[rank 0] fails in 1\n"
    )
    assert one.command("logs", "fails", "--failed", "--rank", "0") == (
        "[rank 0] begins 1\n[rank 0] fails in 1\n[rank 0] begins 2\n"
    )
    assert one.command("logs", "fails", "--failed", "-n", "1") == "[rank 0] begins 2\n[rank 1] begins 2\n"
    assert "generations here: 1, 2" in one.command("logs", "fails", "--generation", "0", code=64)
