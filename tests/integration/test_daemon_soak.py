"""Agents, keepers, supervisord and ranks are killed at random moments, and nothing of what they know is lost.

No process is left over, no rank has two processes at a time, and of each rank that dies it is told how.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from standalone import DEADLINE, TRAINING, Run, standalone, wait_for
from suite import Suite, suite, watches

from harness import results
from seamarkd.exits import NOT_STARTED, UNKNOWN_STATUS

pytestmark = pytest.mark.suite

LONG = "SEAMARK_SOAK" in os.environ
SECONDS = float(os.environ.get("SEAMARK_SOAK", "6"))
"""The proof is two minutes: ``SEAMARK_SOAK=120 SEAMARK_SEED=1 pytest tests/integration/test_daemon_soak.py``."""
SEED = int(os.environ.get("SEAMARK_SEED", "0"))
RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "daemon_soak.json"
PAUSE = (0.3, 2.5)
SETTLED = 60.0
KINDS = ("agent", "agent", "keeper", "keeper", "supervisord", "rank", "rank", "rank")
ENDS = {signal.SIGKILL: -9, signal.SIGTERM: -15, signal.SIGSEGV: -11, signal.SIGRTMIN: 43}
"""What a rank is sent, and the exit status that it has to have then."""
NODES = ("agent-0", "agent-1")
KEEPS_EXITS = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2]) >= (6, 15)
PF_EXITING = 0x4
SIGKILL_PENDING = 1 << (signal.SIGKILL - 1)


class Census:
    """Which workers of a run live, looked at forty times a second; those that are about to be gone don't count."""

    def __init__(self, run: Run) -> None:
        self._words = {os.fsencode(TRAINING), os.fsencode(run.out)}
        self._launcher = run.process.pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.found: set[frozenset[int]] = set()
        self.looks = 0

    def __enter__(self) -> Census:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.025):
            pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
            self.found.add(frozenset(pid for pid in pids if self._is_worker(pid) and lives(pid)))
            self.looks += 1

    def _is_worker(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0 ").split(b"\0")
            return pid != self._launcher and self._words <= set(words) and b"seamarkd.cli" not in words
        return False


def lives(pid: int) -> bool:
    """Whether a process exists that no kernel has begun to end."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    pending = [int(line.split()[1], 16) for line in status if line.startswith(("SigPnd:", "ShdPnd:"))]
    return fields[0] not in "ZX" and not int(fields[6]) & PF_EXITING and not any(p & SIGKILL_PENDING for p in pending)


class Faults:
    """What is done to a suite and to the run on it."""

    def __init__(self, cluster: Suite, run: Run, chance: random.Random) -> None:
        self.cluster = cluster
        self.run = run
        self.chance = chance
        self.done: list[str] = []
        self.ends: list[tuple[int, int]] = []
        """Rank and exit status of each rank that was ended."""
        self.unseen: Counter[int] = Counter()
        """By rank: how often nobody was there to see how it ended."""

    def one(self) -> None:
        kind = self.chance.choice(KINDS)
        if getattr(self, f"_{kind}")():
            self.done.append(kind)

    def _agent(self) -> bool:
        program = self.cluster.programs()[self.chance.choice(NODES)]
        return program.pid != 0 and _kill(program.pid)

    def _keeper(self) -> bool:
        there = self.cluster.keepers(self.run.name)
        return bool(there) and _kill(self.chance.choice(there).pid)

    def _supervisord(self) -> bool:
        self.cluster.supervisord().kill()
        time.sleep(self.chance.uniform(0.0, 0.5))
        wait_for("supervisord to be started again", self._up)
        return True

    def _up(self) -> bool:
        """What systemd does until it succeeds."""
        try:
            self.cluster.up()
        except AssertionError:
            return False
        return True

    def _rank(self) -> bool:
        rank = self.chance.randrange(4)
        report = self.run.reports(rank)[-1]
        process = report["pid"]
        if report["event"] != "step" or not lives(process):
            return False
        # An agent that was started anew sees nothing before it has taken its workers up.
        agents = [self.cluster.programs()[name].pid for name in NODES]
        watched = _has_keeper(process) or any(watches(agent, process) for agent in agents)
        number = self.chance.choice(list(ENDS))
        try:
            os.kill(process, number)
        except ProcessLookupError:
            return False
        self.ends.append((rank, ENDS[number]))
        if not watched or not KEEPS_EXITS:
            self.unseen[rank] += 1
        return True


def _kill(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def _has_keeper(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid).parent()
        return parent is not None and "--socket" in parent.cmdline()
    return False


def _together(run: Run) -> bool:
    """Whether every rank has done a step in the newest iteration."""
    run.check_alive()
    latest = [(run.reports(rank) or [{"event": "none"}])[-1] for rank in range(4)]
    return {one["event"] for one in latest} == {"step"} and len({one["iteration"] for one in latest}) == 1


@pytest.mark.timeout(300 + 4 * SECONDS)
def test_daemons_keepers_and_ranks_killed_at_random_moments(tmp_path: Path) -> None:
    facts = results.opening("daemon_soak", SEED)
    chance = random.Random(SEED)
    until = tmp_path / "until"
    pace = ("--steps", "100000000", "--every", "10", "--pause", "0.02", "--until", str(until))
    with suite(tmp_path / "s") as cluster, contextlib.ExitStack() as ending:
        options = ("--nnodes", "2", "--nproc-per-node", "2", "--max-restarts", "100000")
        run = cluster.run(tmp_path / "r", *options, name="soak", arguments=pace)
        ending.callback(run.close)
        for rank in range(4):
            run.wait_step(rank, 5, 0)
        faults = Faults(cluster, run, chance)
        with Census(run) as census:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                time.sleep(chance.uniform(*PAUSE))
                faults.one()
            cluster.wait_healthy()
            wait_for(f"steps of all ranks after {faults.done[-5:]}", lambda: _together(run), SETTLED)
            wait_for("a keeper for each node", lambda: len(cluster.keepers("soak")) == 2)
            steps = max(report["step"] for report in run.reports(0) if report["event"] == "step") + 50
            (tmp_path / "end").write_text(str(steps))
            (tmp_path / "end").rename(until)
            assert run.finish() == 0, run.text() + run.logs() + cluster.logs()
        incidents, digests = run.incidents(), run.digests()
        slots = {report["pid"]: rank for rank in range(4) for report in run.reports(rank)}
        iterations = {report["iteration"] for report in run.reports(0) if "iteration" in report}
    assert len(digests) == 1
    _no_rank_twice(census, slots)
    unknown = _every_exit_code(faults, incidents)
    print(f"{Counter(faults.done)}, {faults.ends}, {unknown} unknown, seed {SEED}")
    if not LONG:
        return
    with standalone(tmp_path / "u", "--nproc-per-node", "4", arguments=("--steps", str(steps), "--every", "1000")) as u:
        assert u.finish(DEADLINE + 2 * SECONDS) == 0, u.text()
        assert u.digests() == digests
    record = {
        "seconds": SECONDS,
        "faults": dict(Counter(faults.done)),
        "ranks_ended": len(faults.ends),
        "exit_codes_unknown": unknown,
        "iterations": len(iterations),
        "steps": steps,
        "looks_for_doubled_ranks": census.looks,
        "most_ranks_at_once": max(map(len, census.found)),
    }
    command = f"SEAMARK_SOAK={SECONDS:g} SEAMARK_SEED={SEED} pytest tests/integration/test_daemon_soak.py"
    results.write(RESULT, {**facts, "command": command, **results.closing(True), **record})


def _no_rank_twice(census: Census, slots: dict[int, int]) -> None:
    assert max(map(len, census.found)) <= 4
    for pids in census.found:
        ranks = [slots[pid] for pid in pids if pid in slots]
        assert len(ranks) == len(set(ranks)), f"two processes of one rank at once: {sorted(pids)}, ranks {ranks}"


def _every_exit_code(faults: Faults, incidents: list[dict]) -> int:
    """How many of them nobody could know."""
    told: dict[int, list[int]] = {rank: [] for rank in range(4)}
    for failure in itertools.chain.from_iterable(one["failures"] for one in incidents):
        cause = failure["cause"]
        if failure["kind"] == "lost" and cause["kind"] in ("exit", "signal"):
            told[failure["rank"]].append(-cause["status"] if cause["kind"] == "signal" else cause["status"])
    unknown, not_started = 0, 0
    for rank, statuses in told.items():
        missing = Counter(status for one, status in faults.ends if one == rank)
        missing.subtract(statuses)
        not_started -= missing.pop(NOT_STARTED, 0)
        unseen = -missing.pop(UNKNOWN_STATUS, 0)
        unknown += unseen
        assert unseen <= faults.unseen[rank], f"rank {rank}: {unseen} unknown, {faults.unseen[rank]} nobody could see"
        assert missing.total() == unseen, f"rank {rank}: {faults.ends} were caused, {statuses} were told"
        assert all(count >= 0 for count in missing.values()), f"rank {rank}: {faults.ends}, {statuses} were told"
    assert not_started <= faults.done.count("keeper"), "who can't be started has a keeper that was killed in its start"
    return unknown
