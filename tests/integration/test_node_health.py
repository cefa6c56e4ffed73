"""A node whose health checks fail: no job gets places there, what runs goes on, and it is back as soon as they pass."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from standalone import wait_for
from suite import Suite, suite

pytestmark = pytest.mark.suite

CHECK = f"""#!{sys.executable}
import pathlib, sys
here = pathlib.Path(__file__).parent
with open(here / "rounds", "a") as file:
    print("looked", file=file)
if (here / "sick").exists():
    sys.exit("link 3 of the fabric is down")
"""
WAITS = """
import pathlib, time
while not pathlib.Path(__file__).with_name("finish").exists():
    time.sleep(0.01)
"""
PLAIN = ("--preload", "none")


@pytest.fixture
def sick(tmp_path: Path) -> Path:
    """There is something wrong with the node as long as this file is there."""
    return tmp_path / "sick"


@pytest.fixture
def one(tmp_path: Path, sick: Path) -> Iterator[Suite]:
    (tmp_path / "fabric").write_text(CHECK)
    (tmp_path / "fabric").chmod(0o700)
    sick.touch()
    settings = {"SEAMARK_AGENT_HEALTH_CHECKS": f"disk,{tmp_path}/fabric", "SEAMARK_AGENT_HEALTH_INTERVAL": "1"}
    with suite(tmp_path / "s", agents=1, slots=4, env=settings) as made:
        yield made


def test_a_node_takes_no_jobs_while_a_check_fails(one: Suite, tmp_path: Path, sick: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WAITS)
    wait_for(
        "its reason", lambda: "node host takes no more jobs: fabric: link 3 of the fabric is down" in one.problems()
    )
    doctor = one.command("doctor", code=1)
    assert "health check disk: passes" in doctor
    assert f"health check {tmp_path}/fabric: link 3 of the fabric is down" in doctor
    first = one.run(tmp_path / "first", *PLAIN, name="first", script=script)
    second = None
    try:
        wait_for("it to wait", lambda: "waits for 1 nodes" in first.text())
        rounds = tmp_path / "rounds"
        looked = len(rounds.read_text().splitlines())
        wait_for("two more rounds", lambda: len(rounds.read_text().splitlines()) > looked + 2)
        assert "rank 0 pid" not in first.text()
        sick.unlink()
        wait_for("its start", lambda: first.check_alive() or "rank 0 pid" in first.text())
        one.wait_healthy()
        sick.touch()
        wait_for("its reason", lambda: "takes no more jobs" in one.problems())
        second = one.run(tmp_path / "second", *PLAIN, name="second", script=script)
        wait_for("the second to wait", lambda: "waits for 1 nodes" in second.text())
        script.with_name("finish").touch()
        assert first.finish() == 0, "what ran there went on"
        assert second.process.poll() is None
        one.command("drain", "host")
        one.command("undrain", "host")
        sick.unlink()
        assert second.finish() == 0
    finally:
        for run in (first, second):
            if run is not None:
                run.close()


def test_a_node_that_serves_again_is_checked_first(one: Suite, tmp_path: Path, sick: Path) -> None:
    sick.unlink()
    one.wait_healthy()
    one.command("drain", "host")
    wait_for("it to drain", lambda: "drains" in one.command("status", code=None))
    sick.touch()
    one.command("undrain", "host")
    wait_for("what it found", lambda: "link 3" in one.problems())
    log = (one.state / "log" / "agent-0.log").read_text()
    assert log.count("this node takes no more jobs: fabric: link 3 of the fabric is down") >= 1
    sick.unlink()
    one.wait_healthy()
    assert "this node's health checks pass" in (one.state / "log" / "agent-0.log").read_text()
