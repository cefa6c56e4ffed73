"""Processes that are their own monitors (``seamark.autorestart``): by hand, under torchrun, without an agent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq
from keyring import keyring
from standalone import wait_for

from seamark.environment import STORE_OFFSET
from seamark.launched import LIGHTHOUSE_OFFSET
from seamark.protocol.codec import decode, encode
from seamark.protocol.keys import own
from seamark.protocol.messages import Beat, LighthouseStatus, Refused, StatusRequest
from seamark.protocol.sockets import connect, make_socket
from seamarkd.agent.ports import candidates
from seamarkd.cli.status import ask_one

pytestmark = pytest.mark.inprocess

FORK = """
from seamark.autorestart import fork_and_monitor
fork_and_monitor(restart_delay={delay}, max_restarts={most})
import os, pathlib, signal, sys, time
HERE = pathlib.Path(__file__).parent
RANK = os.environ["RANK"]
(HERE / f"pids-{{RANK}}").open("a").write(f"{{os.getpid()}}\\n")
LIFE = len((HERE / f"pids-{{RANK}}").read_text().split())
"""

TRAIN = """
import json
import torch, torch.distributed as dist
import seamark

def say(call):
    client = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 2, is_master=False)
    keys = ("global_iteration_counter", "job_restart_counter", f"iteration_{call.iteration}_ranks_restart_counter")
    line = {"iteration": call.iteration, "restarts": call.state.restarts, "pid": os.getpid()}
    line["store"] = [int(client.get(key)) for key in keys]
    line["clock"] = time.time()
    line["shared"] = len(call.state_dict)
    call.state_dict[f"{call.iteration}-{call.state.rank}"] = os.getpid()
    line["local"] = [call.state.local_rank, call.state.local_world_size]
    with open(HERE / f"said-{call.state.rank}", "a") as file:
        file.write(json.dumps(line) + "\\n")
"""

BOTH_KINDS = """
def die_together(call):
    # In an atomic block, so that nobody is interrupted by another one's death before its own.
    with call.atomic():
        (HERE / f"ready-{call.iteration}-{call.state.rank}").touch()
        while len(list(HERE.glob(f"ready-{call.iteration}-*"))) < call.state.world_size:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

@seamark.Wrapper()
def train(call: seamark.CallWrapper):
    dist.init_process_group("gloo")
    dist.barrier()
    say(call)
    dist.barrier()
    if call.iteration in (0, 100) and call.state.rank == 1:
        raise ValueError("one")
    if call.iteration in (1, 101):
        die_together(call)
    dist.barrier()

train()
"""

UNTIL_TOLD = """
@seamark.Wrapper(soft_timeout=1.5, hard_timeout=5.0, termination_grace_time=0.2)
def train(call: seamark.CallWrapper):
    dist.init_process_group("gloo")
    say(call)
    one = torch.ones(1)
    while True:
        dist.all_reduce(one)
        one.fill_(1.0)
        call.ping()
        if (HERE / f"hang-{RANK}").exists():
            (HERE / f"hang-{RANK}").unlink()
            time.sleep(60)
        if (HERE / f"raise-{RANK}").exists():
            (HERE / f"raise-{RANK}").unlink()
            raise ValueError("asked for")
        if (HERE / "abort").exists() and RANK == "1":
            raise seamark.RestartAbort("enough")

train()
"""


AHEAD = """
import time

_time = time.time
time.time = lambda: _time() + 60.0
"""


class Launched:
    """A script under monitors of its own, as a launcher starts them; and what its ranks say."""

    def __init__(
        self,
        home: Path,
        text: str,
        ranks: int,
        delay: float,
        most: int | None,
        runs_under: tuple[str, ...],
        ahead: tuple[int, ...],
    ) -> None:
        self.home = home
        self.script = home / "script.py"
        self.script.write_text(FORK.format(delay=delay, most=most) + text)
        run, state = home / "run", home / "state"
        run.mkdir(mode=0o700)
        env = os.environ | {"XDG_RUNTIME_DIR": str(run), "XDG_STATE_HOME": str(state)}
        self.output = (home / "output").open("w+")
        (port,) = _ports(1)
        self.monitors = []
        clock = home / "clock"
        clock.mkdir()
        (clock / "sitecustomize.py").write_text(AHEAD)
        if runs_under:
            self._start([*(word.format(port=port) for word in runs_under), str(self.script)], env)
            return
        for rank in range(ranks):
            place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            if rank in ahead:
                place["PYTHONPATH"] = str(clock)
            place |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            self._start([sys.executable, str(self.script)], env | place)

    def _start(self, command: list[str], env: dict[str, str]) -> None:
        started = subprocess.Popen(command, env=env, stdout=self.output, stderr=subprocess.STDOUT)
        self.monitors.append(started)

    def text(self) -> str:
        """What everybody has written so far."""
        return (self.home / "output").read_text()

    def finish(self) -> list[int]:
        """The exit codes of the monitors."""
        return [monitor.wait(90.0) for monitor in self.monitors]

    def pids(self, rank: int) -> list[int]:
        """The process of each life of a rank."""
        path = self.home / f"pids-{rank}"
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def said(self, rank: int) -> list[dict[str, Any]]:
        """What the rank said at the beginning of each iteration."""
        path = self.home / f"said-{rank}"
        return (
            [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            if path.exists()
            else []
        )

    def heard(self) -> int:
        """How many agents a lighthouse that was started anew has heard of."""
        port = int(psutil.Process(self.pids(0)[0]).environ()["MASTER_PORT"])
        status = ask_one(f"tcp://127.0.0.1:{port + LIGHTHOUSE_OFFSET}", LighthouseStatus)
        return len(status.nodes) if isinstance(status, LighthouseStatus) and status.epoch > 1 else 0

    def beside(self, monitor: int, module: str) -> psutil.Process:
        """The process of a service that this monitor has started."""

        def find() -> psutil.Process | None:
            for child in psutil.Process(self.monitors[monitor].pid).children():
                # One that was killed just now is not reaped yet.
                with contextlib.suppress(psutil.NoSuchProcess):
                    if f"seamarkd.agent.{module}" in child.cmdline():
                        return child
            return None

        return wait_for(module, find)


def _ports(count: int) -> Iterator[int]:
    found = candidates("127.0.0.1", 0)
    for _ in range(count):
        for port in found:
            if all(_free(port + offset) for offset in (STORE_OFFSET + 1, STORE_OFFSET + 2)):
                yield port
                break


def _free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@contextlib.contextmanager
def launched(
    home: Path,
    text: str,
    *,
    ranks: int = 1,
    delay: float = 0.1,
    most: int | None = None,
    runs_under: tuple[str, ...] = (),
    ahead: tuple[int, ...] = (),
) -> Iterator[Launched]:
    """Starts it, and sees to it that nothing of it is left. ``ahead``: ranks whose hosts' clocks are a minute fast."""
    made = Launched(home, text, ranks, delay, most, runs_under, ahead)
    try:
        yield made
    finally:
        for monitor in made.monitors:
            monitor.kill()
            monitor.wait()
        made.output.close()
    mark = str(home)
    wait_for("what was started to be gone", lambda: not _of(mark), 20.0)


def _of(mark: str) -> list[psutil.Process]:
    """Its living processes; any of them may end while they are looked for."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            own = process.pid != os.getpid() and process.environ().get("XDG_RUNTIME_DIR", "").startswith(mark)
            if own and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _name(process: psutil.Process) -> str:
    """Empty if it has ended meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


@pytest.mark.parametrize(
    ("text", "code", "lives"),
    [
        ("sys.exit(0)", 0, 1),
        ("sys.exit(130)", 130, 1),
        ("sys.exit(3 if LIFE < 3 else 0)", 0, 3),
        ("LIFE < 2 and os.abort()", 0, 2),
        ("os._exit(7)", 7, 10),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, 10),
    ],
)
def test_the_end_of_a_child(tmp_path: Path, text: str, code: int, lives: int) -> None:
    delay = 0.001 if lives == 10 else 0.05
    with launched(tmp_path, text, delay=delay) as job:
        assert job.finish() == [code], job.text()
        assert len(job.pids(0)) == lives, job.text()
        assert list((tmp_path / "run" / "seamark").iterdir()) == []
    if lives > 1:
        assert "rank 0: " in job.text()
    assert ("gives up after 10 short lives" in job.text()) == (lives == 10)


def test_signals_are_forwarded_and_after_sigterm_nothing_is_started_again(tmp_path: Path) -> None:
    text = (
        "import subprocess\n"
        "helper = subprocess.Popen(['sleep', '60'])\n"
        "def end(*_):\n"
        "    (HERE / 'helper').write_text('ended' if helper.poll() else 'lives')\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGUSR1, lambda *_: (HERE / 'usr1').touch())\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "(HERE / 'up').touch()\n"
        "time.sleep(60)\n"
    )
    with launched(tmp_path, text) as job:
        wait_for("the child", lambda: (tmp_path / "up").exists())
        job.monitors[0].send_signal(signal.SIGUSR1)
        wait_for("the signal", lambda: (tmp_path / "usr1").exists())
        job.monitors[0].terminate()
        assert job.finish() == [143]
        assert len(job.pids(0)) == 1
        assert (tmp_path / "helper").read_text() == "lives", "it is asked alone, and killed with all that it started"


def test_a_monitors_death_ends_all_that_it_started(tmp_path: Path) -> None:
    child = "import subprocess\nsubprocess.Popen(['sleep', '60'])\n(HERE / 'up').touch()\ntime.sleep(60)"
    with launched(tmp_path, child) as job:
        wait_for("the child", lambda: (tmp_path / "up").exists())
        job.monitors[0].kill()
        (pid,) = job.pids(0)
        wait_for("the child to end", lambda: not psutil.pid_exists(pid))
        wait_for("the others to end", lambda: {_name(one) for one in _of(str(tmp_path))} <= {"sleep"})
        # What a script starts is its own; here, the test's.
        for left in _of(str(tmp_path)):
            left.kill()


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with launched(tmp_path, "time.sleep(60)") as first:
        first.beside(0, "store_service")
        wait_for("the child", lambda: first.pids(0))
        port = int(psutil.Process(first.pids(0)[0]).environ()["MASTER_PORT"])
        second = subprocess.run(
            [sys.executable, str(first.script)],
            env=os.environ | psutil.Process(first.monitors[0].pid).environ(),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert second.returncode == 78, second.stderr
        assert f"{port + STORE_OFFSET}" in second.stderr or f"{port + STORE_OFFSET + 1}" in second.stderr
        assert "choose another MASTER_PORT" in second.stderr


def test_restarts_of_both_kinds_number_iterations_as_the_diagrams_do_whatever_the_clocks_say(tmp_path: Path) -> None:
    with launched(tmp_path, TRAIN + BOTH_KINDS, ranks=2, ahead=(1,)) as job:
        assert job.finish() == [0, 0], job.text()
        for rank in range(2):
            said = job.said(rank)
            assert [(one["iteration"], one["restarts"]) for one in said] == [
                (0, 0),
                (1, 1),
                (100, 2),
                (101, 3),
                (200, 4),
            ]
            assert [one["store"] for one in said] == [[one["iteration"], one["restarts"], 2] for one in said]
            assert all(one["local"] == [rank, 2] for one in said)
            assert [one["shared"] // 2 for one in said] == [0, 1, 2, 3, 4]
            pids = [one["pid"] for one in said]
            assert pids == [pid for pid, times in zip(job.pids(rank), (2, 2, 1), strict=True) for _ in range(times)]
        for one, other in zip(job.said(0), job.said(1), strict=True):
            assert other["clock"] - one["clock"] > 50.0, "a minute ahead"


def test_a_job_goes_on_through_the_loss_of_every_part_and_ends_as_asked(tmp_path: Path) -> None:
    with launched(tmp_path, TRAIN + UNTIL_TOLD, ranks=2) as job:

        def entered(iteration: int) -> bool:
            return all(one and one[-1]["iteration"] >= iteration for one in map(job.said, range(2)))

        def at() -> int:
            return int(job.said(0)[-1]["iteration"])

        wait_for("the first iteration", lambda: entered(0))
        pids = [job.pids(rank)[-1] for rank in range(2)]
        # Companions, with the lighthouse in one: nobody is interrupted.
        for rank in range(2):
            lost = job.beside(rank, "companion")
            lost.kill()
            wait_for("another companion", lambda: job.beside(rank, "companion").pid != lost.pid)  # noqa: B023
        wait_for("both of them at the new lighthouse", lambda: job.heard() == 2)
        assert at() == 0
        # An exception, of which the new companions have to tell the other.
        (tmp_path / "raise-0").touch()
        wait_for("the next iteration", lambda: entered(1))
        assert [job.pids(rank) for rank in range(2)] == [[pid] for pid in pids]
        # A rank.
        os.kill(pids[1], signal.SIGKILL)
        wait_for("the iteration after the kill", lambda: entered(2))
        assert job.pids(0) == pids[:1]
        assert len(job.pids(1)) == 2
        # The store.
        job.beside(0, "store_service").kill()
        wait_for("the iteration after the store", lambda: entered(3))
        assert [len(job.pids(rank)) for rank in range(2)] == [1, 2]
        # A rank that hangs.
        (tmp_path / "hang-0").touch()
        wait_for("the iteration after the hang", lambda: entered(4))
        (tmp_path / "abort").touch()
        assert job.finish() == [130, 130], job.text()
        assert job.said(0)[-1]["restarts"] == job.said(1)[-1]["restarts"] == 4


def test_the_others_go_on_without_a_rank_that_is_not_started_again_and_rank_0_leaves_them_what_they_need(
    tmp_path: Path,
) -> None:
    text = TRAIN + (
        "@seamark.Wrapper()\n"
        "def train(call: seamark.CallWrapper):\n"
        "    dist.init_process_group('gloo')\n"
        "    say(call)\n"
        "    dist.barrier()\n"
        "    if call.iteration == 0 and RANK == '0':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    dist.barrier()\n"
        "    while call.iteration == 1 and not (HERE / 'go-on').exists():\n"
        "        time.sleep(0.01)\n"
        "    if call.iteration == 1:\n"
        "        raise ValueError('once more')\n"
        "train()\n"
    )
    with launched(tmp_path, text, ranks=2, most=0) as job:
        wait_for("the next iteration", lambda: len(job.said(0)) == 2)
        (tmp_path / "go-on").touch()
        assert job.finish() == [137, 0], job.text()
        assert [(one["iteration"], one["local"][1]) for one in job.said(1)] == [(0, 2)]
        assert [one["iteration"] for one in job.said(0)] == [0, 1, 2], "the survivor is rank 0 from then on"
        assert len({one["pid"] for one in job.said(0)[1:]} | {job.said(1)[0]["pid"]}) == 1


def test_under_torchrun(tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "0")
    text = TRAIN + (
        "@seamark.Wrapper()\n"
        "def train(call: seamark.CallWrapper):\n"
        "    dist.init_process_group('gloo')\n"
        "    say(call)\n"
        "    dist.barrier()\n"
        "    if call.iteration == 0 and RANK == '0':\n"
        "        os.abort()\n"
        "    dist.barrier()\n"
        "train()\n"
    )
    with launched(tmp_path, text, runs_under=(*torchrun, "--master-port", "{port}")) as job:
        assert job.finish() == [0], job.text()
        for rank in range(2):
            assert [one["iteration"] for one in job.said(rank)] == [0, 1]
            assert len(job.pids(rank)) == 2 - rank


WITH_KEYS = """
@seamark.Wrapper()
def train(call: seamark.CallWrapper):
    dist.init_process_group("gloo")
    say(call)
    dist.barrier()
    while not (HERE / "go").exists():
        time.sleep(0.01)
    if call.iteration == 0 and call.state.rank == 1:
        raise ValueError("one")
    dist.barrier()

train()
"""


def test_with_keys_the_ranks_lighthouse_hears_them_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = keyring(tmp_path / "keys", client="client", a="node")
    monkeypatch.setenv("SEAMARK_SECURITY_KEYS", str(keys))
    client, node = own(keys, "client"), own(keys, "node", "a")
    with launched(tmp_path, TRAIN + WITH_KEYS, ranks=2) as run, zmq.Context() as context:
        wait_for("both ranks", lambda: run.said(0) and run.said(1))
        port = int(psutil.Process(run.pids(0)[0]).environ()["MASTER_PORT"])
        with make_socket(context, zmq.DEALER) as clear, make_socket(context, zmq.DEALER) as impostor:
            address = f"tcp://127.0.0.1:{port + LIGHTHOUSE_OFFSET}"
            connect(clear, address)
            clear.send_multipart(encode(StatusRequest(1)))
            # The ranks' lighthouse has no other key than the ranks.
            connect(impostor, address, node, client.public)
            member = f"127.0.0.1:{port}/0"
            impostor.send_multipart(encode(Beat(member, "i", 1)))
            assert impostor.poll(20_000)
            refused = decode(impostor.recv_multipart())
            assert isinstance(refused, Refused)
            assert refused.reason == f"the key of node a may not speak for node {member} (Beat)"
            assert not clear.poll(0)
        (tmp_path / "go").touch()
        assert run.finish() == [0, 0], run.text()
        assert [line["iteration"] for line in run.said(1)] == [0, 1]
