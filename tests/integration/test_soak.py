"""A random fault every second or three, and a training that comes to the end of one that nothing happens to."""

from __future__ import annotations

import functools
import itertools
import os
import random
import signal
import statistics
import time
from pathlib import Path

import pytest
from standalone import DEADLINE, Standalone, standalone, wait_for

pytestmark = pytest.mark.inprocess

SECONDS = float(os.environ.get("SEAMARK_SOAK_SECONDS", "5"))
"""The proof is five minutes: ``SEAMARK_SOAK_SECONDS=300 scripts/test.sh --timeout 3600 -k soak``."""
SEED = int(os.environ.get("SEAMARK_SEED", "0"))
PAUSE = (1.0, 3.0)
QUIET = 10.0
"""Seconds that a rank may be without a step or a new iteration."""
MORE_STEPS = 50
SIGNALS = {
    "killed": signal.SIGKILL,
    "terminated": signal.SIGTERM,
    "segmentation fault": signal.SIGSEGV,
    "aborted": signal.SIGABRT,
    "stopped": signal.SIGSTOP,
    "exception": signal.SIGUSR1,
    "hang": signal.SIGUSR2,
}
TIMEOUTS = ("--soft-timeout", "1.5", "--hard-timeout", "3")
FOUR = ("--nproc-per-node", "4", "--max-restarts", "10000")


def test_soak(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    until = tmp_path / "until"
    arguments = ("--steps", "100000000", "--every", "10", "--pause", "0.005", "--until", str(until), *TIMEOUTS)
    faults: list[str] = []
    with standalone(tmp_path / "soak", *FOUR, arguments=arguments) as run:
        end = time.monotonic() + SECONDS
        for number in itertools.count():
            for rank in range(4):
                what = f"a step of rank {rank} after {number} faults, the last of them {faults[-5:]}"
                wait_for(what, functools.partial(_moved, run, rank))
            if time.monotonic() > end:
                break
            time.sleep(chance.uniform(*PAUSE))
            faults.append(chance.choice(sorted(SIGNALS)))
            for rank in chance.sample(range(4), 2 if chance.random() < 0.1 else 1):
                os.kill(run.pid(rank), SIGNALS[faults[-1]])
        steps = max(report["step"] for report in run.reports(0) if report["event"] == "step") + MORE_STEPS
        until.write_text(str(steps))
        assert run.finish() == 0, run.text() + run.logs()
        digests, incidents = run.digests(), run.incidents()
    quiet = [after["at"] - before["at"] for rank in range(4) for before, after in itertools.pairwise(run.reports(rank))]
    assert max(quiet) < QUIET, f"a rank was without a step or a new iteration for {max(quiet):.1f} s"
    assert len(digests) == 1
    with standalone(tmp_path / "undisturbed", *FOUR, arguments=("--steps", str(steps), "--every", "1000")) as run:
        # It has all the steps to do that the other one did meanwhile.
        assert run.finish(DEADLINE + 2 * SECONDS) == 0, run.text() + run.logs()
        assert run.digests() == digests
    _tell(faults, quiet, steps, len(incidents))


def _moved(run: Standalone, rank: int) -> bool:
    """Whether the rank has done a step in the newest iteration that any rank is in."""
    run.check_alive()
    latest = [run.reports(one)[-1:] for one in range(4)]
    if not all(latest):
        return False
    newest = max(one[0].get("iteration", -1) for one in latest)
    return latest[rank][0]["event"] == "step" and latest[rank][0]["iteration"] == newest


def _tell(faults: list[str], quiet: list[float], steps: int, incidents: int) -> None:
    """A histogram for people: how long ranks were without a step around each restart."""
    restarts = sorted(one for one in quiet if one > 0.03)
    print(f"{len(faults)} faults, {incidents} incidents, {steps} steps, seed {SEED}")
    print(", ".join(f"{faults.count(kind)} {kind}" for kind in sorted(SIGNALS)))
    if restarts:
        print(f"without a step: p50 {statistics.median(restarts) * 1e3:.0f} ms, max {restarts[-1]:.2f} s")
    for low, high in itertools.pairwise((0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, QUIET)):
        count = sum(low <= one < high for one in restarts)
        print(f"{low:5.2f} - {high:5.2f} s {count:6d} " + "#" * min(60, count))
