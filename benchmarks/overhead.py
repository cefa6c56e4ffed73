"""What Seamark costs a training that nothing happens to: a step, a ping, a section, an import.

Two ranks over Gloo run the same steps of about 20 ms under torchrun without a wrapper, under `seamark run` with its
wrapper, a ping and a section in each step, and under nvidia-resiliency-ext's wrapper, in turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
from rich import box
from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from harness.command import BenchmarkRun, find_peer, json_option, peer_env_option, work_directory
from harness.peers import Peer
from harness.processes import Command, Job, SystemFailed
from harness.provenance import REPOSITORY
from harness.systems import TRAINING, free_ports

RANKS = 2
PATIENCE = 120.0
SCRIPT = str(TRAINING / "step_cost.py")
NOTES = f"""\
step: milliseconds of a step on rank 0 of {RANKS}, the median of the rounds' medians, and how much longer it is than
    without a wrapper. The first run finds how many products make about 20 ms; all others do as many. ping, section:
    microseconds of one call in a loop of 100,000, the best of 5, the median of the rounds. import seamark: in a new
    interpreter."""
EXAMPLES = """\b
Examples:
  python benchmarks/overhead.py --rounds 1 --steps 50       does it run here?
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
    """One way to run the loop, and what each round gave."""

    system: str
    version: str
    rounds: list[dict[str, float]] = field(default_factory=list)
    error: str = ""

    def middle(self, key: str) -> float | None:
        """The median of the rounds; None where a round has none."""
        values = [one[key] for one in self.rounds if key in one]
        return statistics.median(values) if values else None


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


def measure(row: Row, commands_: list[Command], directory: Path) -> None:
    """One run of the loop."""
    job = Job(commands_, directory)
    costs, until = job.reports / "costs", time.monotonic() + PATIENCE
    try:
        # Not until they have ended: that is not what is measured, and not every system does it soon.
        while not costs.exists():
            if time.monotonic() > until:
                raise SystemFailed(f"it reported nothing within {PATIENCE:g} s: {job.last_words()}")
            job.check_alive()
            time.sleep(0.05)
        line = costs.read_text()
    finally:
        job.stop(5.0)
    row.rounds.append({name: value for name, value in json.loads(line).items() if name != "wrapped_by"})


def imports() -> dict[str, float]:
    """What an import costs a new interpreter."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def table_of(rows: list[Row], imported: list[dict[str, float]]) -> Lines:
    """All rows."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("wrapper", "version", "n", "step", "more", "ping", "section"):
        table.add_column(heading, justify="left" if heading in ("wrapper", "version") else "right", no_wrap=True)
    plain = next((row.middle("step") for row in rows if row.system == "nothing"), None)
    problems = Text(style="red")
    for row in rows:
        step, ping, section = (row.middle(key) for key in ("step", "ping", "section"))
        table.add_row(
            row.system,
            row.version,
            str(len(row.rounds)),
            "-" if step is None else f"{step * 1e3:.3f} ms",
            "-" if step is None or plain is None or row.system == "nothing" else f"{step / plain - 1:+.2%}",
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
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Runs of each system.")
@click.option("--steps", default=300, show_default=True, type=click.IntRange(1), help="Timed steps of a run.")
@peer_env_option("nvidia-resiliency-ext")
@json_option
def main(rounds: int, steps: int, peer_env: Path, json_path: Path | None) -> None:
    """What Seamark's wrapper costs a training that nothing happens to, beside nvidia-resiliency-ext's.

    A full run takes about 5 minutes. Nothing is left running, after Ctrl-C neither.
    """
    run = BenchmarkRun("overhead", 0, json_path)
    rows: list[Row] = []
    imported: list[dict[str, float]] = []
    with run.measuring(), work_directory() as work, run.progress() as progress:
        peer, why = find_peer(peer_env, "nvidia-resiliency-ext", "nvidia_resiliency_ext.inprocess")
        torch = str(run.facts["versions"]["torch"])
        rows += [Row("nothing", f"torchrun {torch}"), Row("seamark", run.version), Row("nvrx", peer.version, error=why)]
        task = progress.add_task("running", total=rounds * len(rows), last="")
        products = None
        for number in range(rounds):
            imported.append(imports())
            for row in rows:
                progress.update(task, description=f"round {number + 1}, {row.system}")
                if not row.error:
                    try:
                        measure(row, commands(row.system, steps, peer, products), work / f"{number}-{row.system}")
                        products = products or row.rounds[-1]["products"]
                    except SystemFailed as error:
                        row.error = str(error)
                progress.advance(task)
            run.note(f"round {number + 1} of {rounds}")
    records = {"rows": [asdict(row) for row in rows], "imports": imported, "steps": steps}
    run.finish(table_of(rows, imported), records, failed=any(row.error for row in rows))


if __name__ == "__main__":
    main()
