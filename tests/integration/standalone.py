"""Runs ``seamark run`` as a user does, and reads what the ranks say; standalone in directories of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")
HERE = Path(__file__).parent
TRAINING = HERE / "train_small.py"
DEADLINE = 90.0
STEPS = 120
EVERY = 10
PACE = ("--steps", str(STEPS), "--every", str(EVERY), "--pause", "0.01")
"""A run long enough to be hit between 20 and 80 % of it, and short enough for many."""


def wait_for(what: str, condition: Callable[[], T | None], deadline: float = DEADLINE) -> T:
    """The first true value of the condition."""
    until = time.monotonic() + deadline
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.002)
    raise AssertionError(f"{what}: not within {deadline:g} s")


class Run:
    """One job, the process of its ``seamark run``, and its ranks' reports."""

    def __init__(
        self,
        home: Path,
        *options: str,
        env: dict[str, str],
        name: str = "job",
        script: Path = TRAINING,
        arguments: tuple[str, ...] = (),
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.home = home
        self.out = home / "out"
        self.name = name
        self.env = env
        home.mkdir(parents=True, exist_ok=True)
        command = [*prefix, sys.executable, "-m", "seamarkd.cli", "run", "--name", self.name, *options, str(script)]
        if script == TRAINING:
            command += ["--out", str(self.out)]
        self._read: dict[int, tuple[int, list[dict[str, Any]]]] = {}
        self.output = (home / "output").open("w+")
        self.process = subprocess.Popen(
            [*command, *arguments], env=self.env, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def reports(self, rank: int) -> list[dict[str, Any]]:
        """What the rank has said so far; read on from where the last call ended, for it is asked often."""
        path = self.out / f"rank_{rank}.jsonl"
        if not path.exists():
            return []
        position, reports = self._read.get(rank, (0, []))
        with path.open("rb") as file:
            file.seek(position)
            whole, _, _ = file.read().rpartition(b"\n")
        if whole:
            reports += [json.loads(line) for line in whole.splitlines()]
            position += len(whole) + 1
        self._read[rank] = position, reports
        return reports

    def latest(self, rank: int, event: str, **fields: Any) -> dict[str, Any] | None:
        for report in reversed(self.reports(rank)):
            if report["event"] == event and all(report.get(name) == value for name, value in fields.items()):
                return report
        return None

    def wait_step(self, rank: int, step: int, iteration: int) -> dict[str, Any]:
        """Waits until the rank has done this step (or a later one) in this iteration."""

        def reached() -> dict[str, Any] | None:
            self.check_alive()
            report = self.latest(rank, "step", iteration=iteration)
            return report if report and report["step"] >= step else None

        return wait_for(f"rank {rank} at step {step} of iteration {iteration}", reached)

    def wait_entered(self, rank: int, iteration: int, event: str = "entered") -> dict[str, Any]:
        def entered() -> dict[str, Any] | None:
            self.check_alive()
            return self.latest(rank, event, iteration=iteration)

        return wait_for(f"rank {rank} {event} iteration {iteration}", entered)

    def check_alive(self) -> None:
        if self.process.poll() is not None:
            raise AssertionError(f"the run ended with {self.process.returncode}:\n{self.text()}\n{self.logs()}")

    def pid(self, rank: int) -> int:
        return int(self.reports(rank)[-1]["pid"])

    def kill(self, *ranks: int, gap: float = 0.0) -> None:
        pids = [self.pid(rank) for rank in ranks]
        for number, pid in enumerate(pids):
            if number:
                time.sleep(gap)
            os.kill(pid, signal.SIGKILL)

    def finish(self, timeout: float = DEADLINE) -> int:
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run did not end:\n{self.text()}\n{self.logs()}") from None
        return code

    def text(self) -> str:
        self.output.flush()
        return (self.home / "output").read_text()

    def logs(self) -> str:
        state = Path(self.env["XDG_STATE_HOME"])
        logs = sorted(state.glob(f"seamark/*/{self.name}/logs/*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in logs)

    def incidents(self) -> list[dict[str, Any]]:
        return self.why()["incidents"]

    def why(self) -> dict[str, list[dict[str, Any]]]:
        """Incidents, and decisions about shards."""
        done = subprocess.run(
            [sys.executable, "-m", "seamarkd.cli", "why", self.name, "--json"],
            env=self.env,
            capture_output=True,
            text=True,
            check=True,
        )
        return dict(json.loads(done.stdout))

    def digests(self) -> set[str]:
        return {report["sha256"] for rank in range(4) for report in self.reports(rank) if report["event"] == "done"}

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.output.close()


class Standalone(Run):
    """A job with a suite of its own."""

    def __init__(self, home: Path, *options: str, **more: Any) -> None:
        env = {**os.environ, "XDG_RUNTIME_DIR": str(home / "run"), "XDG_STATE_HOME": str(home / "state")}
        super().__init__(home, "--standalone", *options, env=env, **more)

    def keeper(self) -> psutil.Process:
        (keeper,) = psutil.Process(self.process.pid).children()
        return keeper


def descendants_of(marker: str) -> list[psutil.Process]:
    """Living processes whose environment or arguments name this directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and (
                marker in " ".join(process.cmdline()) or marker in process.environ().get("XDG_STATE_HOME", "")
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


@contextmanager
def standalone(home: Path, *options: str, **more: Any) -> Iterator[Standalone]:
    """A run that leaves nothing behind."""
    run = Standalone(home, *options, **more)
    try:
        yield run
    finally:
        run.close()
    wait_for("processes of the run to end", lambda: not descendants_of(str(home)), 20.0)
    left = list((home / "run" / "seamark").glob("*")) if (home / "run" / "seamark").exists() else []
    assert not left, f"left behind: {left}"
