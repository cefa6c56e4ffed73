"""What the daemons cost at rest: memory of each, and the time from its start until it serves.

Starts each daemon as supervisord would, on addresses of its own, asks it until it answers, and reads its resident
memory a second later. Nothing else runs meanwhile; the samples are all kept.

    .venv/bin/python benchmarks/daemons.py --json benchmarks/results/daemons.json
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import psutil
from rich.table import Table

from harness.command import BenchmarkRun, json_option, work_directory
from seamark.protocol.messages import CoordinatorStatus, LighthouseStatus
from seamarkd.cli.status import ask_one

SETTLED = 1.0
DEADLINE = 10.0
MEBI = 1 << 20


@click.command(help=__doc__)
@click.option("--starts", default=20, show_default=True, type=click.IntRange(1), help="Starts of each daemon.")
@json_option
def main(starts: int, json_path: Path | None) -> None:
    """Measures, prints, and writes the result file."""
    run = BenchmarkRun("daemons", 0, json_path)
    samples: dict[str, dict[str, list[float]]] = {
        role: {"seconds_until_serving": [], "resident_mib": []} for role in ("lighthouse", "coordinator", "agent")
    }
    with run.measuring(), run.progress() as progress:
        task = progress.add_task("starting daemons", total=starts, last="")
        for _ in range(starts):
            with work_directory() as home, contextlib.ExitStack() as running:
                for role in samples:
                    process, seconds = running.enter_context(started(role, environment(home)))
                    samples[role]["seconds_until_serving"].append(seconds)
                    time.sleep(SETTLED)
                    samples[role]["resident_mib"].append(psutil.Process(process.pid).memory_info().rss / MEBI)
            progress.advance(task)
    run.finish(table_of(samples), {"samples": samples})


def table_of(samples: dict[str, dict[str, list[float]]]) -> Table:
    """A row for each daemon."""
    table = Table("daemon", "n", "serving p50", "max", "memory p50", "max")
    for role, values in samples.items():
        seconds, memory = values["seconds_until_serving"], values["resident_mib"]
        if memory:
            table.add_row(
                role,
                str(len(memory)),
                f"{statistics.median(seconds) * 1e3:.0f} ms",
                f"{max(seconds) * 1e3:.0f} ms",
                f"{statistics.median(memory):.1f} MiB",
                f"{max(memory):.1f} MiB",
            )
    return table


def environment(home: Path) -> dict[str, str]:
    """Of daemons that have addresses and directories of their own."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SEAMARK_", "SUPERVISOR_"))},
        "XDG_RUNTIME_DIR": f"{home}/run",
        "XDG_STATE_HOME": f"{home}/state",
        "SEAMARK_LIGHTHOUSE_ADDRESS": f"ipc://{home}/l",
        "SEAMARK_LIGHTHOUSE_EVENTS": f"ipc://{home}/e",
        "SEAMARK_COORDINATOR_ADDRESS": f"ipc://{home}/c",
    }


@contextlib.contextmanager
def started(role: str, env: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """A daemon, and the seconds until it served; it ends with the context."""
    command = str(Path(sys.executable).with_name(f"seamark-{role}"))
    began = time.monotonic()
    process = subprocess.Popen([command], env=env, stderr=subprocess.DEVNULL)
    try:
        _serves(role, env)
        yield process, time.monotonic() - began
    finally:
        process.send_signal(signal.SIGHUP)
        process.wait()


def _serves(role: str, env: dict[str, str]) -> None:
    ready: dict[str, Callable[[], bool]] = {
        "lighthouse": lambda: isinstance(
            ask_one(env["SEAMARK_LIGHTHOUSE_ADDRESS"], LighthouseStatus), LighthouseStatus
        ),
        "coordinator": lambda: bool(_nodes(env) is not None),
        "agent": lambda: bool(_nodes(env)),
    }
    deadline = time.monotonic() + DEADLINE
    # A client that connects too early waits for its own next try, up to half a second.
    address = Path(env["SEAMARK_LIGHTHOUSE_ADDRESS" if role == "lighthouse" else "SEAMARK_COORDINATOR_ADDRESS"][6:])
    while not address.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    while not ready[role]():
        if time.monotonic() >= deadline:
            raise click.ClickException(f"the {role} does not serve after {DEADLINE:g} s")
        time.sleep(0.001)


def _nodes(env: dict[str, str]) -> list[Any] | None:
    """The nodes that the coordinator knows: an agent serves once it is one of them."""
    answer = ask_one(env["SEAMARK_COORDINATOR_ADDRESS"], CoordinatorStatus)
    return answer.nodes if isinstance(answer, CoordinatorStatus) else None


if __name__ == "__main__":
    main()
