"""Replica groups of one rank that train together under some system; kill one after the other, and time the rest.

A sample begins right before SIGKILL is sent, by the clock of this process. It ends by the clock of each survivor: when
``should_commit()`` returned True in the first step whose allreduce did not have the killed process in it. The
collective itself tells who was in it (``training/replica_loop.py``), so neither system is asked.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from harness.peers import Peer
from harness.processes import (
    FOREIGN_PREFIXES,
    FOREIGN_VARIABLES,
    Command,
    Job,
    SystemFailed,
    descendants,
    end_descendants,
)
from harness.provenance import REPOSITORY
from harness.restarts import MISSES_BEFORE_GIVING_UP
from harness.run_directory import make_run_directory
from harness.systems import MAX_RESTARTS, TRAINING
from lighthouses.servers import free_port
from seamark.listener import FailureListener
from seamark.protocol.messages import FailureEvent

REPLICAS = 3
START_DEADLINE = 120.0
STOP_DEADLINE = 20.0
SETTLE = (0.1, 0.4)
"""Seconds that all train together before the next kill: many steps, so that it falls anywhere in one."""
POLL = 0.01

T = TypeVar("T")
Line = dict[str, Any]


class DeadlineMissed(Exception):
    """It did not come in time."""


# --- what the replica groups report ------------------------------------------------------------------------


class Reports:
    """All that the replica groups of one fleet have reported so far, by process id."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._offsets: dict[Path, int] = {}
        self.commits: dict[int, list[Line]] = {}
        self.managers: dict[int, Line] = {}
        """The line of each process that has its manager; in the order in which they were read."""

    def read(self) -> None:
        """Take in the complete lines that were written since the last call."""
        for path in self._directory.iterdir():
            offset = self._offsets.get(path, 0)
            if path.stat().st_size == offset:
                continue
            with path.open("rb") as file:
                file.seek(offset)
                complete, _, _ = file.read().rpartition(b"\n")
            for line in complete.splitlines():
                self._add(json.loads(line))
            self._offsets[path] = offset + len(complete) + (1 if complete else 0)

    def _add(self, line: Line) -> None:
        if line["event"] == "manager":
            self.managers[line["pid"]] = line
        if line["event"] != "commit":
            return
        # Fewer than it says may be in it: at step 0 those that take the first one's state add nothing.
        if sum(pid > 0 for pid in line["pids"]) > line["participants"]:
            raise SystemFailed(f"a commit of {line['participants']} replica groups had {line['pids']} in its allreduce")
        self.commits.setdefault(line["pid"], []).append(line)

    def processes(self) -> dict[int, int]:
        """The newest process of each replica group that has its manager."""
        return {line["replica"]: pid for pid, line in self.managers.items()}

    def first(self, pid: int, after: float, condition: Callable[[Line], bool] = lambda _: True) -> Line | None:
        """This process's first commit after that time under this condition."""
        lines = self.commits.get(pid, [])
        return next((line for line in lines if line["at"] > after and condition(line)), None)


# --- the systems -------------------------------------------------------------------------------------------


class Program(Job):
    """One process that can be asked to end without the others."""

    def request_end(self) -> None:
        """SIGTERM."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    @property
    def ended(self) -> bool:
        """Whether it has."""
        return all(process.poll() is not None for process in self._processes)


class Fleet:
    """A lighthouse and three replica groups under one system, in a directory of its own.

    Attributes:
        failures: what the lighthouse published, where there is a way to listen.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        self.directory = directory
        self.reports_directory = directory / "reports"
        self.reports_directory.mkdir()
        self.failures: list[FailureEvent] = []
        self._programs: dict[str, Program] = {}
        self._starts = 0
        self._listener: FailureListener | None = None

    def start(self) -> None:
        """Start the lighthouse and all replica groups."""
        raise NotImplementedError

    def revive(self, replica: int, killed_at: float) -> float:
        """Start a replica group again. When that began, which is when it was killed if the system does it."""
        raise NotImplementedError

    def check_alive(self) -> None:
        """Raise SystemFailed when a process that should run has ended."""
        for program in self._programs.values():
            program.check_alive()

    def last_words(self) -> str:
        """The last line of each log."""
        return "; ".join(f"{name}: {program.last_words()}" for name, program in self._programs.items())

    def stop(self) -> None:
        """End all of it."""
        if self._listener is not None:
            self._listener.close()
        end_descendants()

    def run(self, name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start a process under a name; one under the same name before has ended."""
        self._starts += 1
        command = Command(arguments, {"BENCHMARK_REPORTS": str(self.reports_directory), **environment})
        self._programs[name] = Program([command], self.directory / f"{self._starts:03d}-{name}")

    def end_programs(self, patience: float) -> None:
        """Ask what `run` started to end (SIGTERM), and wait up to `patience` seconds."""
        for program in self._programs.values():
            program.request_end()
        until = time.monotonic() + patience
        while time.monotonic() < until and not all(program.ended for program in self._programs.values()):
            time.sleep(POLL)

    def listen(self, address: str, events: str) -> None:
        """Take down the failures that a lighthouse of Seamark publishes."""
        self._listener = FailureListener(address, events, group="replicas", on_failure=self._heard)

    def _heard(self, delivery: object) -> None:
        if isinstance(delivery, FailureEvent):
            self.failures.append(delivery)

    def wait_served(self, port: int) -> None:
        """Wait until somebody listens on a port of this host."""
        until = time.monotonic() + START_DEADLINE
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
                return
            except OSError:
                self.check_alive()
                if time.monotonic() > until:
                    raise SystemFailed(f"nobody listens on port {port}: {self.last_words()}") from None
                time.sleep(POLL)


class PlainFleet(Fleet):
    """Replica groups that nobody starts again but the benchmark."""

    def __init__(self, directory: Path, python: str, script: str) -> None:
        super().__init__(directory)
        self._python = python
        self._script = str(TRAINING / script)
        self._environment: dict[str, str] = {}

    def start_replicas(self, environment: dict[str, str]) -> None:
        """Start all of them."""
        self._environment = environment
        for replica in range(REPLICAS):
            self._start_replica(replica)

    def _start_replica(self, replica: int) -> None:
        self.run(f"replica{replica}", [self._python, "-W", "ignore", self._script, str(replica)], self._environment)

    def revive(self, replica: int, killed_at: float) -> float:
        """Start it, now."""
        began = time.monotonic()
        self._start_replica(replica)
        return began


def seamark_sources() -> dict[str, str]:
    """The variable that makes this checkout's sources be run."""
    sources = [str(REPOSITORY / "client"), str(REPOSITORY / "daemons")]
    return {"PYTHONPATH": os.pathsep.join(sources + [path for path in [os.environ.get("PYTHONPATH")] if path])}


class SeamarkFleet(PlainFleet):
    """Seamark's Manager in plain processes, and its lighthouse as a daemon: no agent."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, sys.executable, "train_replica_seamark.py")

    def start(self) -> None:
        """Start the lighthouse and all replica groups."""
        port, events = free_port(), f"tcp://127.0.0.1:{free_port()}"
        address = f"tcp://127.0.0.1:{port}"
        lighthouse = str(Path(sys.executable).with_name("seamark-lighthouse"))
        self.run("lighthouse", [lighthouse, "--address", address, "--events", events], seamark_sources())
        self.wait_served(port)
        self.listen(address, events)
        self.start_replicas({"SEAMARK_LIGHTHOUSE_ADDRESS": address, **seamark_sources()})


class SuiteFleet(Fleet):
    """Each replica group is a job of its own on a suite of one agent."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._up = False
        self.lighthouse, self.events, coordinator = (f"tcp://127.0.0.1:{free_port()}" for _ in range(3))
        make_run_directory(directory / "run")
        (directory / "tmp").mkdir()
        self._environment = {
            **seamark_sources(),
            "XDG_RUNTIME_DIR": str(directory / "run"),
            "XDG_STATE_HOME": str(directory / "state"),
            "TMPDIR": str(directory / "tmp"),
            "SEAMARK_LIGHTHOUSE_ADDRESS": self.lighthouse,
            "SEAMARK_LIGHTHOUSE_EVENTS": self.events,
            "SEAMARK_COORDINATOR_ADDRESS": coordinator,
            "SEAMARK_AGENT_NODE": "host",
            "SEAMARK_AGENT_SLOTS": str(REPLICAS),
        }

    def start(self) -> None:
        """`seamark up`, and a `seamark run` for each replica group."""
        self.bring_up()
        self.listen(self.lighthouse, self.events)
        for replica in range(REPLICAS):
            arguments = [sys.executable, "-m", "seamarkd.cli", "run", "--name", f"replica{replica}"]
            arguments += ["--restart-policy", "any-failed", "--max-restarts", str(MAX_RESTARTS)]
            arguments += [str(TRAINING / "train_replica_seamark.py"), str(replica)]
            self.run(f"replica{replica}", arguments, self._environment)

    def bring_up(self) -> None:
        """`seamark up`."""
        self._up = True
        code, said = self._seamark("up")
        if code:
            raise SystemFailed(f"seamark up: {said}")

    def revive(self, replica: int, killed_at: float) -> float:
        """The suite does it, from the kill on."""
        return killed_at

    def stop(self) -> None:
        """The jobs first, then `seamark down`, and whatever is left after it."""
        if self._up:
            self.end_programs(STOP_DEADLINE)
            self._seamark("down")
        super().stop()

    def _seamark(self, *arguments: str) -> tuple[int, str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in FOREIGN_VARIABLES and not name.startswith(FOREIGN_PREFIXES)
        }
        log = self.directory / f"seamark-{arguments[0]}.log"
        with log.open("wb") as output:
            command = subprocess.Popen(
                [sys.executable, "-m", "seamarkd.cli", *arguments],
                env=inherited | {"OMP_NUM_THREADS": "1"} | self._environment,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        while (code := command.poll()) is None:
            # Reaped on the way: the dead supervisord is this process's child, and `seamark down` waits for its pid.
            descendants()
            time.sleep(POLL)
        return code, (log.read_text().strip() or "no message").splitlines()[-1]


class TorchftFleet(PlainFleet):
    """torchft's Manager in plain processes, and its lighthouse as a daemon."""

    def __init__(self, directory: Path, peer: Peer, options: Sequence[str]) -> None:
        super().__init__(directory, str(peer.python), "train_replica_torchft.py")
        self._command = [peer.script("torchft_lighthouse"), "--min_replicas", "2", *options]

    def start(self) -> None:
        """Start the lighthouse and all replica groups."""
        port = free_port()
        self.run("lighthouse", [*self._command, "--bind", f"127.0.0.1:{port}"], {})
        self.wait_served(port)
        self.start_replicas({"TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}"})


# --- rows --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One kill; seconds. What never came is infinite, and what depends on it missing.

    Attributes:
        seconds: from the kill to the last survivor's first commit without the killed process.
        victim, victim_pid: who was killed.
        survivor_seconds: of each survivor.
        any_commit_seconds: from the kill to the last survivor's first commit at all, that of a step which the killed
            process had still finished included.
        back_seconds: from the start of the replacement to its first commit together with both survivors.
        joining_seconds: the same from the construction of its Manager on.
        phases: of the slowest survivor, seconds since the kill.
        detector: who told the lighthouse.
    """

    seconds: float
    victim: int
    victim_pid: int
    survivor_seconds: dict[int, float] = field(default_factory=dict)
    any_commit_seconds: float = math.inf
    back_seconds: float = math.inf
    joining_seconds: float = math.inf
    phases: dict[str, float] = field(default_factory=dict)
    detector: str = ""


@dataclass
class Row:
    """One system: what starts it, how many kills, and what was measured."""

    system: str
    version: str
    fleet: Callable[[Path], Fleet]
    kills: int
    samples: list[Sample] = field(default_factory=list)
    torch: str = ""
    error: str = ""

    @property
    def missed(self) -> int:
        """Kills after which something did not come before the deadline."""
        return sum(math.isinf(sample.seconds + sample.back_seconds) for sample in self.samples)


class Measurement:
    """The kills in one fleet."""

    def __init__(self, fleet: Fleet, deadline: float) -> None:
        self._fleet = fleet
        self._deadline = deadline
        self._reports = Reports(fleet.reports_directory)

    def start(self) -> str:
        """Wait until all train together; the version of torch that they run."""
        try:
            self._wait_for(lambda: self._together(0.0), START_DEADLINE)
        except DeadlineMissed:
            late = f"not trained together within {START_DEADLINE:.0f} s"
            raise SystemFailed(f"{late}: {self._fleet.last_words()}") from None
        return str(next(iter(self._reports.managers.values()))["torch"])

    def settle(self, seconds: float) -> None:
        """All train together, for so long."""
        time.sleep(seconds)
        since = time.monotonic()
        try:
            self._wait_for(lambda: self._together(since), self._deadline)
        except DeadlineMissed:
            raise SystemFailed(f"they stopped training together, unprovoked: {self._fleet.last_words()}") from None

    def kill(self, victim: int) -> Sample:
        """Kill a replica group, and wait until the others commit without it and then with it again."""
        pids = self._reports.processes()
        victim_pid = pids.pop(victim)
        heard = len(self._fleet.failures)
        at = time.monotonic()
        os.kill(victim_pid, signal.SIGKILL)

        def without() -> dict[int, Line] | None:
            found = {
                replica: self._reports.first(pid, at, lambda line: victim_pid not in line["pids"])
                for replica, pid in pids.items()
            }
            return {replica: line for replica, line in found.items() if line} if all(found.values()) else None

        try:
            commits = self._wait_for(without, self._deadline)
        except DeadlineMissed:
            return Sample(math.inf, victim, victim_pid)
        seconds = {replica: line["at"] - at for replica, line in commits.items()}
        any_commit = [self._reports.first(pid, at) for pid in pids.values()]
        slowest = commits[max(seconds, key=lambda replica: seconds[replica])]
        phases, detector = self._phases(slowest, at, self._fleet.failures[heard:])
        sample = Sample(
            seconds=max(seconds.values()),
            victim=victim,
            victim_pid=victim_pid,
            survivor_seconds=seconds,
            any_commit_seconds=max(line["at"] - at for line in any_commit if line),
            phases=phases,
            detector=detector,
        )
        began = self._fleet.revive(victim, at)
        try:
            back = self._wait_for(lambda: self._back(victim, victim_pid, pids), self._deadline)
        except DeadlineMissed:
            return sample
        constructing = self._reports.managers[back["pid"]]["constructing"]
        times = {"back_seconds": back["at"] - began, "joining_seconds": back["at"] - constructing}
        return Sample(**(vars(sample) | times))

    def _together(self, after: float) -> bool | None:
        """Whether each of all three has committed with the other two after that time."""
        pids = self._reports.processes()
        if len(pids) < REPLICAS:
            return None
        everybody = sorted(pids.values())
        found = (self._reports.first(pid, after, lambda line: sorted(line["pids"]) == everybody) for pid in everybody)
        return all(found) or None

    def _back(self, victim: int, dead: int, survivors: Mapping[int, int]) -> Line | None:
        pid = self._reports.processes()[victim]
        everybody = sorted([pid, *survivors.values()])
        return None if pid == dead else self._reports.first(pid, 0.0, lambda line: sorted(line["pids"]) == everybody)

    @staticmethod
    def _phases(commit: Line, at: float, failures: Sequence[FailureEvent]) -> tuple[dict[str, float], str]:
        phases = {}
        if failures:
            phases["published"] = failures[0].failure.published_at - at
        phases["asked"] = commit["asked"] - at
        if commit["groups"]:
            phases["answered"], phases["group"] = (moment - at for moment in commit["groups"][-1])
        phases["reduced"], phases["commit"] = commit["reduced"] - at, commit["at"] - at
        return phases, failures[0].failure.detector if failures else ""

    def _wait_for(self, condition: Callable[[], T | None], deadline: float) -> T:
        until = time.monotonic() + deadline
        while True:
            self._reports.read()
            if (found := condition()) is not None:
                return found
            if time.monotonic() > until:
                raise DeadlineMissed
            time.sleep(POLL)


@contextmanager
def _running(fleet: Fleet) -> Iterator[None]:
    try:
        fleet.start()
        yield
    finally:
        fleet.stop()


def measure(row: Row, work: Path, seed: int, deadline: float, on_sample: Callable[[Sample], None]) -> None:
    """Fill `row`, in new directories below `work`. What goes wrong with the system becomes the row's error.

    Victims and pauses follow from `seed` and the row alone, whatever other rows are run. After a miss the replica
    groups are started afresh.
    """
    rng = random.Random(f"{seed} {row.system}")
    fleets = 0
    try:
        while len(row.samples) < row.kills:
            if row.missed >= MISSES_BEFORE_GIVING_UP:
                row.error = f"given up after {row.missed} kills that took longer than {deadline:.0f} s"
                return
            fleet = row.fleet(work / f"{fleets:02d}")
            fleets += 1
            with _running(fleet):
                measurement = Measurement(fleet, deadline)
                row.torch = measurement.start()
                while len(row.samples) < row.kills:
                    measurement.settle(rng.uniform(*SETTLE))
                    sample = measurement.kill(rng.randrange(REPLICAS))
                    row.samples.append(sample)
                    on_sample(sample)
                    if math.isinf(sample.seconds + sample.back_seconds):
                        break
    except SystemFailed as error:
        row.error = str(error)
