"""What Seamark costs a training that nothing happens to: a step, a ping, a section, an import.

Two ranks over Gloo run the same steps of about 20 ms under torchrun without a wrapper, under `seamark run` with its
wrapper, a ping and a section in each step, and under nvidia-resiliency-ext's wrapper. All three are alive at once and
take turns of less than a second, the processes of the others stopped: so what a machine does to one it does to all.
"""

from __future__ import annotations

import json
import math
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil
from rich import box
from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from harness.command import BenchmarkRun, find_peer, json_option, peer_env_option, work_directory
from harness.peers import Peer
from harness.processes import Command, Job, SystemFailed, descendants
from harness.provenance import REPOSITORY
from harness.systems import TRAINING, free_ports

RANKS = 2
SETTLING = 5
IMPORTS = 5
PATIENCE = 120.0
SCRIPT = str(TRAINING / "step_cost.py")
NOTES = f"""\
step: milliseconds of a step on rank 0 of {RANKS}, the median of the rounds' means; the first {SETTLING} of each turn
    do not count. more: by how much a round's mean is above the round's mean without a wrapper, the median of the
    rounds, and its 95 % interval (sign test). cpu more: the same of the processor time of a whole turn, in all
    processes of the system, daemons and launcher included. The first system finds how many products make about
    20 ms; the others do as many. ping, section: microseconds of one call in a loop of 100,000, the best of 5.
    import seamark: in a new interpreter."""
EXAMPLES = """\b
Examples:
  python benchmarks/overhead.py --rounds 5                  does it run here?
  python benchmarks/overhead.py --json overhead.json        all of it, with a result file
  python benchmarks/overhead.py --peer-env /opt/nvrx        an environment that has nvidia-resiliency-ext already
"""
IMPORT = """
import json, os, sys, time
def kib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
before, began = kib(), time.perf_counter()
import seamark
took = time.perf_counter() - began
print(json.dumps({"seconds": took, "kib": kib() - before, "torch": "torch" in sys.modules}))
"""


@dataclass
class Row:
    """One way to run the loop; each round's mean step, and a call of ping() and of a section, in seconds.

    ``cpu``: processor seconds of each round's turn, of all its processes.
    """

    system: str
    version: str
    steps: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    calls: dict[str, float] = field(default_factory=dict)
    error: str = ""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median, by the sign test: no assumption but that the rounds are independent."""
    ordered, tail, rank = sorted(values), 0.0, 0
    while (tail := tail + math.comb(len(ordered), rank) / 2 ** len(ordered)) <= 0.025:
        rank += 1
    outermost = max(0, rank - 1)
    return ordered[outermost], ordered[-1 - outermost]


def more(values: Sequence[float], without: Sequence[float]) -> str:
    """By how much they are above the same rounds' without a wrapper."""
    ratios = [value / other - 1 for value, other in zip(values, without, strict=False)]
    if not ratios:
        return "-"
    return "{:+.2%} ({:+.2%} to {:+.2%})".format(statistics.median(ratios), *interval(ratios))


def commands(system: str, steps: int, peer: Peer | None, products: float | None) -> list[Command]:
    """What starts the loop."""
    fixed = {} if products is None else {"PRODUCTS": str(int(products))}
    if system == "seamark":
        sources = os.pathsep.join([str(REPOSITORY / "client"), str(REPOSITORY / "daemons")])
        run = [sys.executable, "-m", "seamarkd.cli", "run", "--standalone", "--nproc-per-node", str(RANKS)]
        return [Command([*run, SCRIPT, "seamark", str(steps)], {"PYTHONPATH": sources, **fixed})]
    if system == "nothing":
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        return [Command([*run, SCRIPT, "nothing", str(steps)], fixed)]
    assert peer is not None
    job = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(3)), **fixed}
    arguments = [str(peer.python), SCRIPT, "nvrx", str(steps)]
    return [Command(arguments, {"RANK": str(rank), "LOCAL_RANK": str(rank), **job}) for rank in range(RANKS)]


class Turns:
    """One system that runs its loop when it is told to. All its processes are stopped while it is another's turn.

    Args:
        commands_: what starts it.
        directory: a new one, for its logs and reports.

    Raises:
        SystemFailed: it did not start, or does not answer.
    """

    def __init__(self, commands_: list[Command], directory: Path) -> None:
        others = {process.pid for process in descendants()}
        self._job = Job(commands_, directory)
        until = time.monotonic() + PATIENCE
        while not (self._job.reports / "turns").exists():
            if time.monotonic() > until:
                raise SystemFailed(f"it is not ready within {PATIENCE:g} s: {self._job.last_words()}")
            self._job.check_alive()
            time.sleep(0.05)
        self._turns = (self._job.reports / "turns").open("w", buffering=1)
        self._answers = (self._job.reports / "answers").open()
        self._processes = [process for process in descendants() if process.pid not in others]
        self._signal(signal.SIGSTOP)

    def ask(self, order: str) -> dict[str, Any]:
        """Let it do this while all others stand still; ``cpu``: the processor seconds that all its processes took."""
        before = self._cpu()
        self._signal(signal.SIGCONT)
        self._turns.write(f"{order}\n")
        if not select.select([self._answers], [], [], PATIENCE)[0]:
            raise SystemFailed(f"no answer within {PATIENCE:g} s: {self._job.last_words()}")
        line = self._answers.readline()
        self._signal(signal.SIGSTOP)
        if not line:
            raise SystemFailed(f"it ended: {self._job.last_words()}")
        answer: dict[str, Any] = json.loads(line)
        return answer | {"cpu": self._cpu() - before}

    def _cpu(self) -> float:
        total = 0.0
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def imports() -> dict[str, float]:
    """What an import costs a new interpreter."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def table_of(rows: list[Row], imported: list[dict[str, float]]) -> Lines:
    """All rows."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("wrapper", "version", "n", "step", "more", "cpu more", "ping", "section"):
        table.add_column(heading, justify="left" if heading in ("wrapper", "version") else "right", no_wrap=True)
    nothing = next(row for row in rows if row.system == "nothing")
    problems = Text(style="red")
    for row in rows:
        ping, section = row.calls.get("ping"), row.calls.get("section")
        table.add_row(
            row.system,
            row.version,
            str(len(row.steps)),
            f"{statistics.median(row.steps) * 1e3:.3f} ms" if row.steps else "-",
            "-" if row is nothing else more(row.steps, nothing.steps),
            "-" if row is nothing else more(row.cpu, nothing.cpu),
            "-" if ping is None else f"{ping * 1e6:.3f} µs",
            "-" if section is None or row.system != "seamark" else f"{section * 1e6:.3f} µs",
        )
        if row.error:
            problems.append(f"{row.system}: {row.error}\n")
    cost = Text("")
    if imported:
        seconds = statistics.median(one["seconds"] for one in imported)
        memory = statistics.median(one["kib"] for one in imported) / 1024
        torch = "torch was imported with it" if imported[0]["torch"] else "torch not imported"
        cost = Text(f"import seamark: {seconds * 1e3:.1f} ms, {memory:.1f} MiB, {torch} (n = {len(imported)})\n")
    return Lines(table, problems, cost, Text(NOTES, style="dim"))


@click.command(epilog=EXAMPLES)
@click.option("--rounds", default=100, show_default=True, type=click.IntRange(1), help="Turns of each system.")
@click.option("--steps", default=40, show_default=True, type=click.IntRange(SETTLING + 1), help="Steps of a turn.")
@click.option("--seed", default=0, show_default=True, help="Decides on the order in each round.")
@peer_env_option("nvidia-resiliency-ext")
@json_option
def main(rounds: int, steps: int, seed: int, peer_env: Path, json_path: Path | None) -> None:
    """What Seamark's wrapper costs a training that nothing happens to, beside nvidia-resiliency-ext's.

    A full run takes about 6 minutes. Nothing is left running, after Ctrl-C neither.
    """
    run = BenchmarkRun("overhead", seed, json_path, width=130)
    rows: list[Row] = []
    imported: list[dict[str, float]] = []
    with run.measuring(), work_directory() as work, run.progress() as progress:
        peer, why = find_peer(peer_env, "nvidia-resiliency-ext", "nvidia_resiliency_ext.inprocess")
        torch = str(run.facts["versions"]["torch"])
        rows += [Row("nothing", f"torchrun {torch}"), Row("seamark", run.version), Row("nvrx", peer.version, error=why)]
        imported += [imports() for _ in range(IMPORTS)]
        task = progress.add_task("starting", total=rounds, last="")
        systems: dict[str, Turns] = {}
        products = None
        for row in rows:
            if not row.error:
                try:
                    systems[row.system] = Turns(commands(row.system, steps, peer, products), work / row.system)
                    products = products or systems[row.system].ask("products")["products"]
                except SystemFailed as error:
                    row.error = str(error)
        order = random.Random(seed)
        for _ in range(rounds):
            progress.update(task, description="taking turns")
            for row in order.sample(rows, len(rows)):
                if not row.error:
                    try:
                        answer = systems[row.system].ask("steps")
                        row.steps.append(statistics.fmean(answer["steps"][SETTLING:]))
                        row.cpu.append(answer["cpu"])
                    except SystemFailed as error:
                        row.error = str(error)
            progress.advance(task)
        for row in rows:
            if row.system != "nothing" and not row.error:
                row.calls = systems[row.system].ask("calls")
    records = {"rows": [asdict(row) for row in rows], "imports": imported, "turn": steps}
    run.finish(table_of(rows, imported), records, failed=any(row.error for row in rows))


if __name__ == "__main__":
    main()
