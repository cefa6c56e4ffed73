"""Managers over real sockets and Gloo: the reference's test plan, and training that outlives kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from standalone import wait_for

import seamark
import seamarkd.lighthouse
from seamark.manager import Manager, Quorum, QuorumTimeout
from seamark.protocol.codec import decode, encode
from seamark.protocol.messages import LighthouseStatus, StatusRequest

pytestmark = pytest.mark.replicas

TRAINING = Path(__file__).parents[2] / "examples" / "train_replicas.py"
HEARTBEAT_TIMEOUT = 2.0
FAILURE_TICK = 0.1
SLOW_MACHINE = 10.0
"""Seconds a process group may take to be made; a caller's own time is 60."""
KILLS = int(os.environ.get("SEAMARK_REPLICA_KILLS", "1"))
"""The proof is 50: ``SEAMARK_REPLICA_KILLS=50 scripts/test.sh --timeout 3600 -k replicas_outlive``."""


@contextmanager
def lighthouse(**options: Any) -> Iterator[seamarkd.lighthouse.Served]:
    with seamarkd.lighthouse.serve(
        **{"heartbeat_timeout": HEARTBEAT_TIMEOUT, "failure_tick": FAILURE_TICK} | options
    ) as served:
        yield served


class Pair:
    """Two managers of a replica group each, with a TCPStore each, and threads to call them from."""

    def __init__(self, served: seamarkd.lighthouse.Served, **options: Any) -> None:
        self.threads = ThreadPoolExecutor(4)
        self.stores = {name: dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for name in "AB"}
        self.managers = {
            name: seamark.Manager(
                replica_id=name,
                rank=0,
                world_size=1,
                store_addr="127.0.0.1",
                store_port=self.stores[name].port,
                lighthouse_addr=served.address,
                **{"use_async_quorum": False, "timeout": 20.0} | options,
            )
            for name in "AB"
        }

    def __getitem__(self, name: str) -> Manager:
        return self.managers[name]

    def start(self, name: str, **options: Any) -> Future[Quorum | None]:
        return self.threads.submit(self[name].start_quorum, **options)

    def both(self, what: Callable[[str], Any]) -> list[Any]:
        return list(self.threads.map(what, "AB"))

    def close(self) -> None:
        for manager in self.managers.values():
            manager.shutdown()
        self.threads.shutdown()


@contextmanager
def pair(served: seamarkd.lighthouse.Served, **options: Any) -> Iterator[Pair]:
    made = Pair(served, **options)
    try:
        yield made
    finally:
        made.close()


def names(quorum: Quorum | None) -> list[str]:
    assert quorum is not None
    return [replica.replica_id for replica in quorum.participants]


def status(served: seamarkd.lighthouse.Served) -> LighthouseStatus:
    import zmq

    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(served.address)
        socket.send_multipart(encode(StatusRequest(1)))
        assert socket.poll(5_000)
        answer = decode(socket.recv_multipart())
    assert isinstance(answer, LighthouseStatus)
    return answer


def joined(served: seamarkd.lighthouse.Served) -> set[str]:
    """Who waits for a quorum, as ``seamark status`` would show it."""
    return {member.member for group in status(served).groups for member in group.members if member.joined}


def silence(manager: Manager) -> None:
    """The manager's heartbeats stop, as those of a process do that is frozen or gone; its sockets stay open."""
    control = manager._control
    assert control is not None
    control._core.tick = lambda now: []  # type: ignore[method-assign]
    control._core.wake_at = lambda: time.monotonic() + 0.05  # type: ignore[method-assign]


@pytest.mark.parametrize("together", [True, False], ids=["at-once", "one-after-the-other"])
@pytest.mark.parametrize("ending", ["leave", "silence"])
def test_two_managers_form_a_quorum_and_the_one_that_is_left_goes_on_alone(together: bool, ending: str) -> None:
    before = threading.active_count()
    with lighthouse() as served, pair(served) as managers:
        first = managers.start("A", target_world_size=2)
        if not together:
            wait_for("A to wait", lambda: joined(served) == {"A"})
        second = managers.start("B", target_world_size=2)
        quorum = first.result()
        assert names(quorum) == names(second.result()) == ["A", "B"]
        assert quorum is not None
        managers.both(lambda name: managers[name].should_commit())

        if ending == "leave":
            managers["A"].shutdown()
        else:
            silence(managers["A"])
        began = time.monotonic()
        alone = managers["B"].start_quorum()
        waited = time.monotonic() - began
        assert names(alone) == ["B"]
        assert alone is not None
        assert alone.quorum_id > quorum.quorum_id
        assert waited < HEARTBEAT_TIMEOUT + 2 * FAILURE_TICK + SLOW_MACHINE
    wait_for("threads to end", lambda: threading.active_count() <= before, 10.0)


def test_a_call_that_waits_when_the_other_dies_returns_the_new_quorum() -> None:
    with lighthouse() as served, pair(served, min_replica_size=1, quorum_timeout=60.0) as managers:
        managers.both(lambda name: names(managers[name].start_quorum(target_world_size=2)))
        managers.both(lambda name: managers[name].should_commit())
        pending = managers.start("B")
        wait_for("B to wait", lambda: joined(served) == {"B"})
        managers["A"].shutdown()
        assert names(pending.result(timeout=10.0)) == ["B"]


def test_the_average_is_over_who_takes_part_and_a_newcomer_takes_the_state() -> None:
    states = {"A": torch.full((3,), 1.0), "B": torch.full((3,), 2.0)}

    with lighthouse() as served, ExitStack() as stack:
        managers = {}
        for name in "AB":

            def load(state: Any, name: str = name) -> None:
                states[name].copy_(state["weights"])

            managers[name] = stack.enter_context(
                seamark.Manager(
                    replica_id=name,
                    rank=0,
                    world_size=1,
                    lighthouse_addr=served.address,
                    use_async_quorum=False,
                    timeout=20.0,
                    state_dict=lambda name=name: {"weights": states[name]},
                    load_state_dict=load,
                )
            )
        threads = stack.enter_context(ThreadPoolExecutor(2))

        def step(name: str) -> tuple[list[float], bool]:
            managers[name].start_quorum(target_world_size=2)
            gradient = torch.full((2,), 1.0 if name == "A" else 3.0)
            managers[name].allreduce(gradient).wait()
            return gradient.tolist(), managers[name].should_commit()

        assert list(threads.map(step, "AB")) == [([2.0, 2.0], True)] * 2
        assert torch.equal(states["A"], states["B"]), "at step 0 all take the state of one"
        assert [managers[name].current_step() for name in "AB"] == [1, 1]
        assert {managers[name].participating_rank() for name in "AB"} == {0, 1}
        assert [managers[name].num_participants() for name in "AB"] == [2, 2]


def test_two_processes_under_one_name_and_a_quorum_that_nobody_can_form() -> None:
    with lighthouse() as served, pair(served, quorum_timeout=2.0, min_replica_size=1) as managers:
        managers.both(lambda name: managers[name].start_quorum(target_world_size=2))
        with (
            seamark.Manager(
                replica_id="A", rank=0, world_size=1, lighthouse_addr=served.address, use_async_quorum=False
            ) as impostor,
            pytest.raises(RuntimeError, match="replica_id A of job default is in use"),
        ):
            impostor.start_quorum()
        with pytest.raises(QuorumTimeout, match="no quorum was reached"):
            managers["A"].start_quorum(target_min_world_size=5)
        assert joined(served) == set(), "a caller that gave up is withdrawn"


def test_shutting_down_ends_a_call_that_waits() -> None:
    with lighthouse() as served, pair(served) as managers:
        pending = managers.start("A", target_world_size=2)
        wait_for("A to wait", lambda: joined(served) == {"A"})
        managers["A"].shutdown()
        with pytest.raises(RuntimeError, match="closed|shut down"):
            pending.result(timeout=5.0)


def test_a_member_that_is_lost_while_the_group_is_made_holds_up_nobody() -> None:
    """B never comes to the creation of the group: A is in it until the lighthouse says that B is gone."""
    with lighthouse() as served, pair(served, timeout=60.0) as managers:
        entered = threading.Event()
        release = threading.Event()
        make = managers["B"]._group._make

        def never_comes(*arguments: Any) -> Any:
            entered.set()
            release.wait(60.0)
            return make(*arguments)

        managers["B"]._group._make = never_comes  # type: ignore[method-assign]
        first = managers.start("A", target_world_size=2)
        second = managers.start("B", target_world_size=2)
        assert entered.wait(30.0)
        wait_for("A to make the group", lambda: managers["A"]._group._under_way is not None)
        silence(managers["B"])
        try:
            first.result(timeout=HEARTBEAT_TIMEOUT + 2 * FAILURE_TICK + 10.0)
            assert "lost while the process group was made" in str(managers["A"].errored())
            assert managers["A"].should_commit() is False
            assert names(managers["A"].start_quorum()) == ["A"]
        finally:
            managers["B"]._group.cut()
            release.set()
            second.exception(timeout=90.0)


def test_without_a_lighthouse_the_caller_is_told_so() -> None:
    with lighthouse() as served:
        address = served.address
    with (
        seamark.Manager(
            replica_id="A", rank=0, world_size=1, lighthouse_addr=address, use_async_quorum=False, quorum_timeout=3.0
        ) as manager,
        pytest.raises(QuorumTimeout, match=f"lighthouse at {address} has not answered"),
    ):
        manager.start_quorum()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"min_replica_size": 0}, "min_replica_size is 0"),
        ({"rank": 2}, "rank 2 is not in a replica group of world_size 1"),
        ({"lighthouse_heartbeat_interval_seconds": 30.0}, "lighthouse_heartbeat_interval_seconds is 30"),
        ({"lighthouse_join_timeout_seconds": 9.0, "quorum_timeout": 5.0}, "longer than quorum_timeout=5"),
        ({"state_dict": dict}, "come together"),
        ({"lighthouse_join_timeout_seconds": -5.0}, "lighthouse_join_timeout_seconds is -5"),
        ({"timeout": 0}, "timeout is 0"),
        ({"quorum_timeout": float("nan")}, "quorum_timeout is nan"),
        ({"world_size_mode": "FIXED"}, "DYNAMIC, FIXED_WITH_SPARES"),
        ({"max_retries": -1}, "max_retries is -1"),
        ({"job": ""}, "job has 0 characters"),
        ({"replica_id": "x" * 201}, "replica_id has 201 characters"),
        ({"lighthouse_addr": None}, "no lighthouse"),
    ],
)
def test_arguments_that_can_not_work(arguments: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEAMARK_LIGHTHOUSE_ADDRESS", raising=False)
    with pytest.raises(ValueError, match=sentence):
        seamark.Manager(**{"lighthouse_addr": "tcp://127.0.0.1:1", "rank": 0, "world_size": 1} | arguments)


# --- training ----------------------------------------------------------------------------------------------


class Training:
    """Three replica groups of examples/train_replicas.py, a process each."""

    def __init__(self, home: Path, served: seamarkd.lighthouse.Served) -> None:
        self.home = home
        self._env = {name: value for name, value in os.environ.items() if not name.startswith(("SEAMARK", "MASTER"))}
        self._env["SEAMARK_LIGHTHOUSE_ADDRESS"] = served.address
        self.processes = {name: self._start(name) for name in "abc"}

    def _start(self, name: str) -> psutil.Popen:
        command = [sys.executable, str(TRAINING), "--replica-id", name, "--pause", "0.05"]
        command += ["--report", str(self.home / f"{name}.jsonl"), "--until", str(self.home / "last")]
        with (self.home / f"{name}.out").open("a") as output:
            return psutil.Popen(command, env=self._env, stdout=output, stderr=subprocess.STDOUT)

    def reports(self, name: str, event: str) -> list[dict[str, Any]]:
        path = self.home / f"{name}.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [report for report in map(json.loads, lines) if report["event"] == event]

    def commits(self, name: str, participants: int, after: float) -> list[dict[str, Any]]:
        return [
            report
            for report in self.reports(name, "commit")
            if report["participants"] == participants and report["at"] > after
        ]

    def wait_commits(self, names: str, participants: int, after: float) -> None:
        wait_for(
            f"commits of {names} with {participants} participants",
            lambda: all(self.commits(name, participants, after) for name in names) or self._ended(names),
        )
        assert not self._ended(names), self.output()

    def _ended(self, names: str) -> bool:
        return any(self.processes[name].poll() is not None for name in names)

    def kill(self, name: str) -> float:
        process = self.processes[name]
        process.send_signal(signal.SIGKILL)
        at = time.monotonic()
        process.wait()
        return at

    def restart(self, name: str) -> None:
        self.processes[name] = self._start(name)

    def finish(self, further: int) -> None:
        last = max(report["step"] for name in "abc" for report in self.reports(name, "commit")) + further
        (self.home / "last.tmp").write_text(str(last))
        (self.home / "last.tmp").rename(self.home / "last")
        for process in self.processes.values():
            assert process.wait(60.0) == 0, self.output()

    def output(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in self.home.glob("*.out"))

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()


def test_replicas_outlive_kill_and_end_with_equal_parameters(tmp_path: Path) -> None:
    # Nobody waits for it: a test that did would not end in time.
    with lighthouse(heartbeat_timeout=600.0) as served:
        training = Training(tmp_path, served)
        try:
            training.wait_commits("abc", 3, 0.0)
            for number in range(KILLS):
                victim = "abc"[number % 3]
                others = "abc".replace(victim, "")
                killed_at = training.kill(victim)
                training.wait_commits(others, 2, killed_at)
                training.restart(victim)
                training.wait_commits("abc", 3, time.monotonic())
            training.finish(further=30)
        finally:
            training.close()
        digests: dict[int, set[str]] = {}
        for name in "abc":
            for report in training.reports(name, "quorum"):
                digests.setdefault(report["step"], set()).add(report["digest"])
        assert [step for step, found in digests.items() if len(found) > 1] == []
        assert len({report["digest"] for name in "abc" for report in training.reports(name, "done")}) == 1
