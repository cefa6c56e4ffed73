"""What an agent costs at rest: processor time and memory with 8 and with 64 workers that do nothing but live.

Lighthouse, coordinator and agent are daemons of their own; the workers are in seamark.Wrapper and ping once a second,
so that the agent has their pages, canaries and hang watch to look after. The keeper and the workers are not counted.
"beside" is what else the machine was busy with in the same windows, in cores: the workers, the other daemons, and
whatever else ran there.

    .venv/bin/python benchmarks/agent.py --json benchmarks/results/agent.json
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import psutil
from rich.table import Table

from daemons import MEBI, environment, started
from harness.command import BenchmarkRun, json_option, work_directory
from harness.processes import SystemFailed
from harness.systems import TRAINING
from seamark.protocol.messages import CoordinatorStatus
from seamarkd.cli.status import ask_one

WORKERS = (8, 64)
STARTING = 120.0
SETTLED = 5.0


@click.command(help=__doc__)
@click.option(
    "--windows", default=5, show_default=True, type=click.IntRange(1), help="Windows for each number of workers."
)
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(1.0), help="Length of a window.")
@json_option
def main(windows: int, seconds: float, json_path: Path | None) -> None:
    """Measures, prints, and writes the result file."""
    run = BenchmarkRun("agent", 0, json_path)
    samples: dict[str, dict[str, list[float]]] = {}
    with run.measuring(), run.progress() as progress:
        task = progress.add_task("starting", total=windows * len(WORKERS), last="")
        for workers in WORKERS:
            row = samples[str(workers)] = {"core_share": [], "resident_mib": [], "cores_beside": []}
            with work_directory() as home, contextlib.ExitStack() as running:
                env = environment(home) | {"SEAMARK_AGENT_SLOTS": str(workers)}
                for role in ("lighthouse", "coordinator"):
                    running.enter_context(started(role, env))
                agent = psutil.Process(running.enter_context(started("agent", env))[0].pid)
                running.enter_context(_job(env, home, workers))
                time.sleep(SETTLED)
                for _ in range(windows):
                    progress.update(task, description=f"{workers} workers")
                    before, machine, began = agent.cpu_times(), _busy(), time.monotonic()
                    time.sleep(seconds)
                    after, took = agent.cpu_times(), time.monotonic() - began
                    used = after.user + after.system - before.user - before.system
                    row["core_share"].append(used / took)
                    row["cores_beside"].append((_busy() - machine - used) / took)
                    row["resident_mib"].append(agent.memory_info().rss / MEBI)
                    progress.advance(task)
    run.finish(table_of(samples), {"samples": samples, "seconds": seconds})


def table_of(samples: dict[str, dict[str, list[float]]]) -> Table:
    """A row for each number of workers."""
    table = Table("workers", "n", "of a core p50", "max", "memory p50", "max", "cores beside p50", "max")
    for workers, values in samples.items():
        share, memory, beside = values["core_share"], values["resident_mib"], values["cores_beside"]
        if share:
            table.add_row(
                workers,
                str(len(share)),
                *(f"{statistics.median(share):.2%}", f"{max(share):.2%}"),
                *(f"{statistics.median(memory):.1f} MiB", f"{max(memory):.1f} MiB"),
                *(f"{statistics.median(beside):.2f}", f"{max(beside):.2f}"),
            )
    return table


def _busy() -> float:
    """Processor seconds that the whole machine has worked so far."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


@contextlib.contextmanager
def _job(env: dict[str, str], home: Path, workers: int) -> Iterator[None]:
    """A job of so many workers, all of them alive; its agent ends it."""
    command = [sys.executable, "-m", "seamarkd.cli", "run", "--name", "rest", "--nproc-per-node", str(workers)]
    with (home / "run.log").open("wb") as output:
        follower = subprocess.Popen([*command, str(TRAINING / "rest.py")], env=env, stdout=output, stderr=output)
    try:
        until = time.monotonic() + STARTING
        while not _alive(env, workers):
            if time.monotonic() > until or follower.poll() is not None:
                raise SystemFailed(f"{workers} workers do not run: {(home / 'run.log').read_text()[-500:]}")
            time.sleep(0.1)
        yield
    finally:
        follower.terminate()
        follower.wait()


def _alive(env: dict[str, str], workers: int) -> bool:
    status = ask_one(env["SEAMARK_COORDINATOR_ADDRESS"], CoordinatorStatus)
    return isinstance(status, CoordinatorStatus) and any(job.alive == workers and job.step for job in status.jobs)


if __name__ == "__main__":
    main()
