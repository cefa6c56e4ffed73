"""The daemons can be killed, together and one by one, and training neither stops nor restarts."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from standalone import DEADLINE, EVERY, Run, standalone, wait_for
from suite import Suite, suite

pytestmark = pytest.mark.suite

TWO_BY_TWO = ("--nnodes", "2", "--nproc-per-node", "2")
ROUNDS = int(os.environ.get("SEAMARK_DAEMON_KILLS", "1"))
"""The proof is 20: ``SEAMARK_DAEMON_KILLS=20 scripts/test.sh --timeout 3600 -k outlives_its_daemons``."""
COORDINATOR_KILLS = int(os.environ.get("SEAMARK_COORDINATOR_KILLS", "5"))
"""The proof is 100: ``SEAMARK_COORDINATOR_KILLS=100 scripts/test.sh -k random_moments``."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    # Short: the path of a Unix socket has 107 bytes at most.
    with suite(tmp_path_factory.mktemp("s")) as made:
        yield made


def pids(run: Run) -> list[set[int]]:
    return [{report["pid"] for report in run.reports(rank)} for rank in range(4)]


def moves_on(run: Run, steps: int = 5) -> None:
    """Waits until every rank has done so many further steps, in the iteration it was in."""
    before = [run.reports(rank)[-1] for rank in range(4)]
    for rank, report in enumerate(before):
        run.wait_step(rank, report["step"] + steps, report["iteration"])


def job_of(cluster: Suite, name: str) -> dict[str, Any]:
    (job,) = [job for job in cluster.status()["coordinator"]["jobs"] if job["job"] == name]
    return dict(job)


AWAY = (
    (["agent-0"], "node host: agent down"),
    (["coordinator"], "the coordinator is unreachable"),
    (["agent-1", "lighthouse"], "the lighthouse is unreachable"),
)
"""Daemons, and what ``seamark status`` says while they are away."""


def test_training_outlives_its_daemons_and_ends_the_same(
    cluster: Suite, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whichever of them is away: no worker is touched, a rank that dies is replaced, and nothing of the job is lost."""
    until = tmp_path / "until"
    arguments = ("--steps", "1000000", "--until", str(until), "--every", str(EVERY), "--pause", "0.08")
    run = cluster.run(tmp_path, *TWO_BY_TWO, "--max-restarts", "1000", name="killed", arguments=arguments)
    culprits: list[int] = []
    iteration = 0
    with contextlib.ExitStack() as ending:
        ending.callback(run.close)
        for rank in range(4):
            run.wait_step(rank, 5, 0)
        events = cluster.follow("events", "killed", "--follow", "--json")
        ending.callback(events.close)
        for _ in range(ROUNDS):
            for names, sentence in AWAY:
                before = pids(run)
                with cluster.without(*names):
                    wait_for(sentence, lambda sentence=sentence: sentence in cluster.problems())
                    moves_on(run)
                assert pids(run) == before, names
                job = job_of(cluster, "killed")
                assert (job["iteration"], job["restarts"], job["alive"]) == (iteration, iteration, 4), names
            for names in (["coordinator", "agent-1"], ["lighthouse"]):
                victim = 3 - len(culprits) % 2
                os.kill(run.pid(victim), signal.SIGKILL)
                cluster.kill(*names)
                culprits.append(victim)
                iteration = wait_for("a later iteration", lambda before=iteration: _later_iteration(run, before))
                cluster.wait_healthy()
            before = pids(run)
            cluster.kill_everything()
            moves_on(run, steps=40)
            cluster.up()
            cluster.wait_healthy()
            assert pids(run) == before
        culprits.append(0)
        run.kill(0)
        wait_for("a later iteration", lambda: _later_iteration(run, iteration))
        end = max(run.reports(rank)[-1]["step"] for rank in range(4)) + 20
        (tmp_path / "end").write_text(str(end))
        (tmp_path / "end").rename(until)
        assert run.finish() == 0, run.text() + run.logs() + cluster.logs()
        incidents = run.incidents()
        # Gloo may forget to wake a survivor (docs/operations.md): then that is replaced, too.
        stuck = [one for incident in incidents for one in incident["consequences"] if one["cause"]["kind"] == "stuck"]
        job = job_of(cluster, "killed")
        assert (job["state"], job["process_restarts"]) == ("SUCCEEDED", len(culprits) + len(stuck))
        failures = [failure for incident in incidents for failure in incident["failures"]]
        assert [failure["rank"] for failure in failures if failure["kind"] == "lost"] == culprits
        # While its agent is away, or an answer was lost with the lighthouse, the others' broken connections tell.
        assert all(failure["cause"]["communication"] for failure in failures if failure["kind"] == "faulted")
    quorums = [(one["quorum_id"], one["iteration"]) for one in events.printed() if "quorum_id" in one]
    assert len(quorums) > len(culprits)
    assert quorums == sorted(set(quorums)), "quorum ids and iterations only grow"
    resumed = [report for report in run.reports(1) if report["event"] == "resumed"]
    assert all(report["step"] > 0 for report in resumed[1:])
    arguments = ("--steps", str(end), "--every", str(EVERY))
    with standalone(tmp_path_factory.mktemp("u"), "--nproc-per-node", "4", arguments=arguments) as undisturbed:
        assert undisturbed.finish(DEADLINE * ROUNDS) == 0, undisturbed.text()
        assert undisturbed.incidents() == []
    assert run.digests() == undisturbed.digests()


def _later_iteration(run: Run, before: int) -> int | None:
    """The iteration after this one in which all ranks are, each with a step done.

    It is not always the next: an answer that was lost with its lighthouse is skipped, never used again.
    """
    iterations = {run.reports(rank)[-1]["iteration"] for rank in range(4)}
    latest = max(iterations)
    if len(iterations) > 1 or latest <= before:
        return None
    return latest if all(run.latest(rank, "step", iteration=latest) for rank in range(4)) else None


def test_a_fault_in_one_job_is_invisible_in_the_other(cluster: Suite, tmp_path: Path) -> None:
    arguments = ("--steps", "1000000", "--every", str(EVERY), "--pause", "0.005")
    runs = {
        name: cluster.run(
            tmp_path / name, "--nproc-per-node", "2", "--max-restarts", "100", name=name, arguments=arguments
        )
        for name in ("left", "right")
    }
    left, right = runs.values()
    try:
        for run in (left, right):
            for rank in range(2):
                run.wait_step(rank, 5, 0)
        before = [{report["pid"] for report in right.reports(rank)} for rank in range(2)]
        for iteration in range(3):
            left.kill(iteration % 2)
            for rank in range(2):
                left.wait_step(rank, 0, iteration + 1)
        latest = right.reports(0)[-1]
        assert latest["iteration"] == 0
        right.wait_step(0, latest["step"] + 10, 0)
        assert [{report["pid"] for report in right.reports(rank)} for rank in range(2)] == before
        assert right.incidents() == []
        assert len(left.incidents()) == 3
        # A third job finds no free slot, says so, and runs when there is one.
        waiting = cluster.run(
            tmp_path / "third", "--nnodes", "2", "--preload", "none", name="third", script=_touch(tmp_path)
        )
        wait_for("the third to wait", lambda: "free slots" in waiting.text())
        taken = cluster.command("run", "--name", "left", str(_touch(tmp_path)), code=78)
        assert "a job named left is running" in taken
    finally:
        for run in (left, right):
            run.close()
    try:
        assert waiting.finish() == 0, waiting.text()
    finally:
        waiting.close()


def _touch(home: Path) -> Path:
    script = home / "touch.py"
    script.write_text(
        "import os\nopen(os.path.join(os.environ['OUT'], 'ran-' + os.environ['TORCHELASTIC_RUN_ID']), 'a').write('x')\n"
    )
    return script


@pytest.fixture(autouse=True)
def _out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: Suite) -> None:
    cluster.env["OUT"] = str(tmp_path)


def test_the_coordinator_is_killed_at_random_moments(cluster: Suite, tmp_path: Path) -> None:
    """Every job that was submitted runs, and none runs twice."""
    chance = random.Random(COORDINATOR_KILLS)
    script = _touch(tmp_path)
    runs = []
    try:
        for number in range(COORDINATOR_KILLS):
            name = f"short-{number}-{secrets.token_hex(2)}"
            run = cluster.run(tmp_path / name, "--max-restarts", "0", "--preload", "none", name=name, script=script)
            runs.append(run)
            moment = chance.random()
            if 0.3 <= moment < 0.6:
                wait_for("the job", lambda run=run: "logs in" in run.text() or run.process.poll() is not None)
            elif moment >= 0.6:
                wait_for("the script", lambda name=name: (tmp_path / f"ran-{name}").is_file())
            cluster.kill("coordinator")
        for run in runs:
            assert run.finish() == 0, run.text() + cluster.logs()
    finally:
        for run in runs:
            run.close()
    assert [(tmp_path / f"ran-{run.name}").read_text() for run in runs] == ["x"] * COORDINATOR_KILLS


@pytest.mark.parametrize("killed", [0, 1])
def test_agents_killed_while_their_keepers_import_torch(cluster: Suite, tmp_path: Path, killed: int) -> None:
    """One keeper goes with its agent; the job starts all the same, and once."""
    name = f"early-{secrets.token_hex(2)}"
    script = _touch(tmp_path)
    with contextlib.closing(
        cluster.run(tmp_path / "r", *TWO_BY_TWO, "--max-restarts", "0", name=name, script=script)
    ) as run:
        wait_for("the keepers of both nodes", lambda: len(cluster.keepers(name)) == 2)
        with cluster.without("agent-0", "agent-1"):
            cluster.keepers(name)[killed].kill()
            assert not (tmp_path / f"ran-{name}").is_file(), "the keepers had imported torch already"
        assert run.finish() == 0, run.text() + cluster.logs()
    assert (tmp_path / f"ran-{name}").read_text() == "xxxx"


# --- bad input ---------------------------------------------------------------------------------------------


def test_more_ranks_than_slots_is_refused(cluster: Suite, tmp_path: Path) -> None:
    said = cluster.command("run", "--nproc-per-node", "3", str(_touch(tmp_path)), code=78)
    assert "host 2" in said
    assert "agent.slots" in said


def test_an_agent_with_another_host_s_address_says_so(tmp_path: Path) -> None:
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
    env |= {"SEAMARK_AGENT_HOST": "nobody.invalid", "SEAMARK_SECURITY_INSECURE": "true"}
    agent = [str(Path(sys.executable).with_name("seamark-agent"))]
    done = subprocess.run(agent, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 78
    assert "agent.host: nobody.invalid is no address of this host" in done.stderr


def test_a_second_lighthouse_on_the_port_is_refused_and_not_restarted(cluster: Suite) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from seamarkd.lighthouse.main import main; main()"],
        env=cluster.env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 78
    assert "is another lighthouse running?" in done.stderr
    assert cluster.healthy()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[lighthouse]\naddres = 'tcp://127.0.0.1:1'\n", "did you mean address"),
        ("[agent]\nslots = 'two'\n", "agent.slots"),
        ("[lighthouse\n", "line 1"),
    ],
)
def test_a_bad_configuration_is_refused_before_anything_starts(tmp_path: Path, content: str, sentence: str) -> None:
    bad = Suite(tmp_path / "b")
    path = tmp_path / "seamark.toml"
    path.write_text(content)
    del bad.env["SEAMARK_AGENT_SLOTS"], bad.env["SEAMARK_LIGHTHOUSE_ADDRESS"]
    said = bad.command("up", "--config", str(path), code=78)
    assert str(path) in said
    assert sentence in said
    assert not (tmp_path / "b" / "run" / "seamark" / "supervisor.sock").exists()


def test_a_state_file_that_is_no_database_is_named_and_nothing_is_left_running(tmp_path: Path) -> None:
    bad = Suite(tmp_path / "b")
    bad.state.mkdir(parents=True, mode=0o700)
    (bad.state / "coordinator.db").write_text("this is no database, " * 100)
    said = bad.command("up", code=78)
    assert "coordinator.db is not a usable database" in said
    assert not (tmp_path / "b" / "run" / "seamark" / "supervisor.sock").exists()


def test_an_agents_host_may_be_a_name(tmp_path: Path) -> None:
    """The job's store is told to all by address: the agent looks its own name up."""
    script = tmp_path / "script.py"
    script.write_text("import seamark\n\nseamark.Wrapper()(lambda: None)()\n")
    with suite(tmp_path / "s", agents=1, env={"SEAMARK_AGENT_HOST": "localhost"}) as made:
        run = made.run(tmp_path / "r", "--nproc-per-node", "1", script=script)
        assert run.finish() == 0, run.text()
        run.close()
