"""Cause one fault after another in a running job, and time each until training goes on.

A sample begins where the fault is caused: in the raising rank right before `raise`, or here right before
SIGKILL is sent. It ends when the last rank of the expected world is past the first collective of a later
attempt, by that rank's own clock reading. When this process notices has no part in it.
"""

from __future__ import annotations

import math
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from harness.processes import Job, SystemFailed
from harness.reports import ContradictoryReports, Report, Reports
from harness.systems import RANKS, System

START_DEADLINE = 180.0
SETTLE = (0.05, 0.2)  # seconds between a complete restart and the next fault, drawn anew each time
POLL = 0.01
MISSES_BEFORE_GIVING_UP = 5

T = TypeVar("T")


class RecoveryMissed(Exception):
    """The job was not whole again before the deadline."""


@dataclass(frozen=True)
class Scenario:
    """One row: what is done to which system, and what counts as recovered."""

    system: System
    fault: Literal["exception", "kill"]
    outcome: str
    faults: int
    world_after: int = RANKS
    victims: range = range(RANKS)
    faults_per_job: int | None = None


@dataclass(frozen=True)
class Sample:
    """One fault. After a missed deadline `seconds` is infinite, and what tells of the recovery is empty."""

    seconds: float
    victim_rank: int
    victim_pid: int
    attempt_before: int
    attempt_after: int | None = None
    processes_kept: int | None = None
    rank_seconds: dict[int, float] = field(default_factory=dict)


@dataclass
class Row:
    """What was measured in one scenario. `unprovoked`: restarts that no fault of ours had asked for."""

    scenario: Scenario
    samples: list[Sample] = field(default_factory=list)
    unprovoked: int = 0
    error: str | None = None

    @property
    def missed(self) -> int:
        """Faults after which the job was not whole again before the deadline."""
        return sum(math.isinf(sample.seconds) for sample in self.samples)

    @property
    def most_restarts(self) -> int | None:
        """The most restarts that one fault took, by the system's own count."""
        return max(
            (s.attempt_after - s.attempt_before for s in self.samples if s.attempt_after is not None),
            default=None,
        )


class TrainingJob:
    """A job of RANKS ranks under one system."""

    def __init__(self, scenario: Scenario, directory: Path, deadline: float) -> None:
        self._scenario = scenario
        self._deadline = deadline
        self._job = Job(scenario.system.commands(), directory)
        self._reports = Reports(self._job.reports)
        self._attempt = -1
        self.unprovoked = 0

    def start(self) -> None:
        """Wait until every rank is past its first collective. Raises SystemFailed."""
        try:
            self._attempt = self._wait_for_attempt(RANKS, START_DEADLINE)
        except RecoveryMissed:
            late = f"not started within {START_DEADLINE:.0f} s"
            raise SystemFailed(f"{late}: {self._job.last_words()}") from None

    def settle(self, seconds: float) -> None:
        """Let training go on for `seconds`; a restart meanwhile is counted and waited for."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(POLL)
            self._reports.read()
            if self._reports.latest_attempt() > self._attempt:
                self._wait_out_unprovoked()
                until = time.monotonic() + seconds

    def fault(self, victim_rank: int) -> Sample:
        """Cause a fault in `victim_rank` and wait for the recovery; a missed deadline makes it infinite."""
        victim = self._reports.attempts[self._attempt][victim_rank]
        before = self._attempt
        try:
            at = self._kill(victim) if self._scenario.fault == "kill" else self._make_raise(victim)
            self._attempt = self._wait_for_attempt(self._scenario.world_after, self._deadline, since=at)
        except ProcessLookupError:
            self._wait_out_unprovoked()
            return self.fault(victim_rank)
        except RecoveryMissed:
            return Sample(math.inf, victim_rank, victim.pid, before)
        reached = self._reports.attempts[self._attempt]
        if self._scenario.fault == "kill" and victim.pid in {report.pid for report in reached.values()}:
            raise ContradictoryReports(f"pid {victim.pid} was killed and reports attempt {self._attempt}")
        earlier = {report.pid for report in self._reports.attempts[before].values()}
        seconds = {rank: report.monotonic - at for rank, report in sorted(reached.items())}
        return Sample(
            seconds=max(seconds.values()),
            victim_rank=victim_rank,
            victim_pid=victim.pid,
            attempt_before=before,
            attempt_after=self._attempt,
            processes_kept=len(earlier & {report.pid for report in reached.values()}),
            rank_seconds=seconds,
        )

    def stop(self) -> None:
        """End the job."""
        self._job.stop(self._scenario.system.grace)

    def _kill(self, victim: Report) -> float:
        at = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        return at

    def _make_raise(self, victim: Report) -> float:
        known = len(self._reports.faults)
        os.kill(victim.pid, signal.SIGUSR1)
        return self._wait_for(lambda: self._fault_time(known, victim), self._deadline)

    def _fault_time(self, known: int, victim: Report) -> float | None:
        new = self._reports.faults[known:]
        return next((report.monotonic for report in new if report.pid == victim.pid), None)

    def _wait_out_unprovoked(self) -> None:
        self.unprovoked += 1
        self._attempt = self._wait_for_attempt(RANKS, self._deadline)

    def _wait_for_attempt(self, world_size: int, deadline: float, since: float = 0.0) -> int:
        after = self._attempt
        return self._wait_for(lambda: self._reports.complete_attempt(world_size, after, since), deadline)

    def _wait_for(self, condition: Callable[[], T | None], deadline: float) -> T:
        until = time.monotonic() + deadline
        while True:
            self._reports.read()
            if (found := condition()) is not None:
                return found
            if time.monotonic() > until:
                raise RecoveryMissed
            self._job.check_alive()
            time.sleep(POLL)


def measure(row: Row, work: Path, seed: int, deadline: float, on_sample: Callable[[Sample], None]) -> None:
    """Fill `row`, in new directories below `work`. What goes wrong with the system becomes the row's error.

    The victims and the pauses follow from `seed` and the row alone, whatever other rows are run.
    """
    scenario = row.scenario
    rng = random.Random(f"{seed} {scenario.system.name} {scenario.fault} {scenario.outcome}")
    jobs = 0
    try:
        while len(row.samples) < scenario.faults:
            job = TrainingJob(scenario, work / f"{jobs:02d}", deadline)
            jobs += 1
            try:
                job.start()
                _measure_job(row, job, rng, on_sample)
            finally:
                job.stop()
                row.unprovoked += job.unprovoked
            if row.missed >= MISSES_BEFORE_GIVING_UP and len(row.samples) < scenario.faults:
                row.error = f"given up after {row.missed} faults that took longer than {deadline:.0f} s"
                return
    except (SystemFailed, ContradictoryReports) as error:
        row.error = str(error)
    except RecoveryMissed:
        row.error = f"a restart that no fault had asked for was not complete within {deadline:.0f} s"


def _measure_job(row: Row, job: TrainingJob, rng: random.Random, on_sample: Callable[[Sample], None]) -> None:
    scenario = row.scenario
    remaining = scenario.faults - len(row.samples)
    for _ in range(min(remaining, scenario.faults_per_job or remaining)):
        job.settle(rng.uniform(*SETTLE))
        sample = job.fault(rng.choice(scenario.victims))
        row.samples.append(sample)
        on_sample(sample)
        if math.isinf(sample.seconds):
            return
