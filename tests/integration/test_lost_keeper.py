"""A keeper is killed: its workers live on, and how each of them ends is told, as far as anybody can know it."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from standalone import Run, wait_for
from suite import Suite, suite, watches

pytestmark = pytest.mark.suite

SCRIPT = """
import os, pathlib, sys, time

here = pathlib.Path(__file__).parent
life = os.environ["TORCHELASTIC_RESTART_COUNT"]
(here / f"{life}.new").write_text(str(os.getpid()))
(here / f"{life}.new").rename(here / f"pid-{life}")
end = here / f"end-{life}"
while not end.exists() or not end.read_text():
    time.sleep(0.01)
sys.exit(int(end.read_text()))
"""
KEEPS_EXITS = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2]) >= (6, 15)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    with suite(tmp_path_factory.mktemp("k"), agents=1, slots=1) as made:
        yield made


@pytest.fixture
def run(cluster: Suite, tmp_path: Path) -> Iterator[Run]:
    """One rank whose restarts begin anew, in a directory of its own."""
    (tmp_path / "script.py").write_text(SCRIPT)
    options = ("--preload", "none", "--max-restarts", "1", "--log-dir", str(tmp_path / "logs"))
    made = cluster.run(tmp_path, *options, name=tmp_path.name, script=tmp_path / "script.py")
    yield made
    made.close()


def life(run: Run, number: int) -> int:
    """The process of the rank after so many restarts."""
    path = run.home / f"pid-{number}"
    return int(wait_for(f"life {number} of the rank", lambda: path.exists() and path.read_text()))


def lose_keeper(cluster: Suite, run: Run) -> None:
    (keeper,) = cluster.keepers(run.name)
    keeper.kill()


def end(run: Run, number: int, code: int) -> None:
    (run.home / f"end-{number}").write_text(str(code))


def stores(cluster: Suite) -> list[psutil.Process]:
    """The TCPStore services of this suite's jobs that serve."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            own = process.environ().get("XDG_STATE_HOME") == cluster.env["XDG_STATE_HOME"]
            if own and "torch.distributed.TCPStore" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def told(run: Run, sentence: str) -> None:
    """Waits until that is how the rank has ended."""

    def is_told() -> bool:
        return sentence in {one["failures"][0]["cause"]["text"] for one in run.incidents()}

    try:
        wait_for(repr(sentence), is_told)
    except AssertionError as error:
        raise AssertionError(f"{error}: {run.incidents()}") from None


def test_the_agent_tells_how_a_worker_without_a_keeper_ends(cluster: Suite, run: Run) -> None:
    life(run, 0)
    lose_keeper(cluster, run)
    end(run, 0, 43)
    life(run, 1)
    if KEEPS_EXITS:
        told(run, "exited with code 43")
    lose_keeper(cluster, run)
    end(run, 1, 0)
    assert run.finish() == (0 if KEEPS_EXITS else 1), run.text()


def test_an_agent_started_anew_takes_up_a_worker_without_a_keeper(cluster: Suite, run: Run) -> None:
    pid = life(run, 0)
    with cluster.without("agent-0"):
        lose_keeper(cluster, run)
    (worker,) = wait_for("the rank", lambda: cluster.status()["coordinator"]["members"].get(run.name))
    assert (worker["pid"], worker["alive"]) == (pid, True)
    wait_for("the agent to watch it", lambda: watches(cluster.programs()["agent-0"].pid, pid))
    end(run, 0, 44)
    if KEEPS_EXITS:
        told(run, "exited with code 44")
    life(run, 1)
    end(run, 1, 0)
    assert run.finish() == 0, run.text()


def test_a_keeper_that_does_not_answer_keeps_no_agent_from_serving(cluster: Suite, run: Run) -> None:
    pid = life(run, 0)
    (keeper,) = cluster.keepers(run.name)
    keeper.suspend()
    cluster.kill("agent-0")
    cluster.wait_healthy()
    (worker,) = cluster.status()["coordinator"]["members"][run.name]
    assert (worker["pid"], worker["alive"]) == (pid, True)
    wait_for("the end of that keeper", lambda: keeper not in cluster.keepers(run.name))
    assert psutil.pid_exists(pid), "its worker lives on"
    wait_for("the agent to watch it", lambda: watches(cluster.programs()["agent-0"].pid, pid))
    end(run, 0, 46)
    life(run, 1)
    if KEEPS_EXITS:
        told(run, "exited with code 46")
    end(run, 1, 0)
    assert run.finish() == 0, run.text()


def test_an_agent_without_descriptors_ends_a_job_and_can_run_another_of_its_name(cluster: Suite, run: Run) -> None:
    pid = life(run, 0)
    agent = cluster.programs()["agent-0"].pid
    usual = resource.prlimit(agent, resource.RLIMIT_NOFILE)
    used = {int(fd) for fd in os.listdir(f"/proc/{agent}/fd")}
    resource.prlimit(agent, resource.RLIMIT_NOFILE, (min(set(range(len(used) + 1)) - used), usual[1]))
    try:
        run.process.terminate()
        run.finish()
        wait_for("the rank's end", lambda: not psutil.pid_exists(pid))
        wait_for("the keeper's end", lambda: not cluster.keepers(run.name))
    finally:
        resource.prlimit(agent, resource.RLIMIT_NOFILE, usual)
    (run.home / "pid-0").unlink()
    again = cluster.run(
        run.home, "--preload", "none", "--log-dir", str(run.home / "logs"), name=run.name, script=run.home / "script.py"
    )
    life(again, 0)
    end(again, 0, 0)
    assert again.finish() == 0, again.text()
    again.close()


def test_a_keeper_that_is_killed_while_it_imports_is_started_again(cluster: Suite, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "waits.py").write_text(
        "import os, pathlib, signal\n"
        "here = pathlib.Path(__file__).parent\n"
        "if not (here / 'first').exists():\n"
        "    (here / 'new').write_text(str(os.getpid()))\n"
        "    (here / 'new').rename(here / 'first')\n"
        "    signal.pause()\n"
    )
    options = ("--preload", "waits", "--max-restarts", "1", "--log-dir", str(tmp_path / "logs"))
    name = tmp_path.name
    run = Run(
        tmp_path, *options, env=cluster.env | {"PYTHONPATH": str(tmp_path)}, name=name, script=tmp_path / "script.py"
    )
    try:
        first = tmp_path / "first"
        os.kill(int(wait_for("the keeper to import", lambda: first.exists() and first.read_text())), signal.SIGKILL)
        life(run, 0)
        end(run, 0, 0)
        assert run.finish() == 0, run.text()
        assert "1 processes started anew" in run.text(), "it is charged"
    finally:
        run.close()


def test_what_nobody_saw_is_said_to_be_unknown(cluster: Suite, run: Run) -> None:
    pid = life(run, 0)
    with cluster.without("agent-0"):
        lose_keeper(cluster, run)
        end(run, 0, 45)
        wait_for("the rank's end", lambda: not Path(f"/proc/{pid}").exists())
    told(run, "exit status unknown: its keeper was killed before it")
    life(run, 1)
    end(run, 1, 0)
    assert run.finish() == 0, run.text()


def test_the_store_of_a_lost_keeper_is_started_again_on_its_port(cluster: Suite, run: Run) -> None:
    life(run, 0)
    first = wait_for("the store", lambda: stores(cluster))
    lose_keeper(cluster, run)
    assert wait_for("another keeper", lambda: cluster.keepers(run.name))
    assert stores(cluster) == first, "it lives on"
    first[0].kill()
    second = wait_for("another store", lambda: [one for one in stores(cluster) if one.pid != first[0].pid])
    assert len(second) == 1
    end(run, 0, 0)
    assert run.finish() == 0, run.text()
    wait_for("the store's end", lambda: not stores(cluster))


def test_a_worker_that_cannot_be_started_is_one_that_has_ended(cluster: Suite, run: Run) -> None:
    """Its place is no phantom: the restart is charged, and the job ends when none is left."""
    life(run, 0)
    logs = run.home / "logs"
    logs.rename(run.home / "moved")
    logs.write_text("no directory")
    end(run, 0, 1)
    assert run.finish() == 1, run.text()
    assert "rank 0 could not be started, and the 1 restarts of --max-restarts are used up" in run.text()
    assert f"can't open the log file {logs}/rank_0." in run.text()
