"""What Seamark costs a training that nothing happens to: a step, processor time, a ping, a section, an import.

Two ranks over Gloo run the same steps of about 20 ms under torchrun without a wrapper, under `seamark run` with its
wrapper, a ping and a section in each step, and now and then under nvidia-resiliency-ext's wrapper. All are alive at
once and take turns of about a second, the processes of the others stopped: what a machine does to one it does to all.
All of them are started anew several times: where a process's memory happens to lie makes its steps faster or slower.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
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
from harness.intervals import Estimate, estimate, excess, trimmed_mean
from harness.peers import Peer
from harness.processes import Command, Job, SystemFailed, descendants, end_descendants
from harness.provenance import REPOSITORY
from harness.systems import TRAINING, free_ports

RANKS = 2
SETTLING = 5
"""Steps at the beginning of a turn that don't count: timers that came due while all stood still fire in them."""
PEER_EVERY = 4
"""The peer, whose cost nobody asked to know to half a percent, takes a turn in every so manieth round."""
IMPORTS = 5
PATIENCE = 120.0
SCRIPT = str(TRAINING / "step_cost.py")
NOTES = f"""\
step: milliseconds of a step on rank 0 of {RANKS}, mean of all that count; the first {SETTLING} of each turn do not.
    longest: of all steps that count. daemons: processor time of launcher and daemons, in thousandths of a core.
    foreign: what all else on the machine used of its cores meanwhile, in thousandths of a core; on a machine that
    is not quiet the figures say more about that than about the wrapper.
more: by how much a turn's figure is above the figure of the turn without a wrapper in the same round. Each start of
    all systems gives one figure, and the interval (95 %, Student's t) is over the starts.
    mean: everything counts, rare costs too, and so does whatever else disturbed the machine: the widest interval.
    trimmed: without the fifth of the rounds at either end. It hides what happens in fewer than a fifth of the rounds;
    the daemons' timers, up to a second apart, are in every one. median: the middle round; the least disturbed.
    typical step: the median step of each turn in place of its mean, trimmed: what each step pays, without what hits
    a few of a turn. processor time: of the whole turn, in all processes of the system; what the machine does beside
    is not in it.
ping, section: microseconds of one call in a loop of 100,000, the best of 5. import seamark: in a new interpreter."""
EXAMPLES = """\b
Examples:
  python benchmarks/overhead.py --starts 2 --rounds 4       does it run here?
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
class Turn:
    """A turn of one system. Durations are seconds.

    Attributes:
        start, round: of which start of all systems, and which of its rounds.
        mean, median, longest: of the steps that count.
        ranks_cpu, others_cpu: processor time of the whole turn: the ranks' processes, and all others of the system.
        foreign_cpu: of all else on the machine, what a hypervisor took from it included; to a hundredth.
        wall: of the whole turn.
    """

    start: int
    round: int
    mean: float
    median: float
    longest: float
    ranks_cpu: float
    others_cpu: float
    foreign_cpu: float
    wall: float

    @property
    def cpu(self) -> float:
        """Of all processes."""
        return self.ranks_cpu + self.others_cpu


@dataclass
class Row:
    """One way to run the loop; its turns, and a call of ping() and of a section, in seconds."""

    system: str
    version: str
    turns: list[Turn] = field(default_factory=list)
    calls: dict[str, float] = field(default_factory=dict)
    error: str = ""


MEASURES = {
    "mean": ("mean", statistics.fmean),
    "trimmed": ("mean", trimmed_mean),
    "median": ("mean", statistics.median),
    "typical step": ("median", trimmed_mean),
    "processor time": ("cpu", trimmed_mean),
    "processor time, mean": ("cpu", statistics.fmean),
}
"""What is compared: a turn's figure, and how those of a start become one."""


def compare(row: Row, without: Row) -> dict[str, Estimate]:
    """By how much the row is above the one without a wrapper, each measure over the starts."""
    pairs = {(turn.start, turn.round): turn for turn in without.turns}
    found = [(pairs[turn.start, turn.round], turn) for turn in row.turns if (turn.start, turn.round) in pairs]
    return {
        name: estimate(excess([(p.start, getattr(p, figure), getattr(q, figure)) for p, q in found], middle))
        for name, (figure, middle) in MEASURES.items()
    }


def commands(system: str, steps: int, peer: Peer | None, products: int | None) -> list[Command]:
    """What starts the loop."""
    fixed = {} if products is None else {"PRODUCTS": str(products)}
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


class Clock:
    """The processor time of a process, all its threads, to the nanosecond: the kernel's clock of it.

    Args:
        pid: a living process.

    Raises:
        ProcessLookupError: there is none.
    """

    def __init__(self, pid: int) -> None:
        number = ctypes.c_int()
        if ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(number)):
            raise ProcessLookupError(pid)
        self._number = number.value

    def read(self) -> float:
        """Seconds; 0.0 once it has ended."""
        try:
            return time.clock_gettime(self._number)
        except OSError:
            return 0.0


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
        self._clocks = {process.pid: Clock(process.pid) for process in self._processes}
        self._signal(signal.SIGSTOP)
        about = self.ask("about")
        self.products: int = about["products"]
        self._ranks = frozenset(about["pids"])

    def close(self) -> None:
        """Closes its pipes; its processes are ended with all others."""
        self._answers.close()
        with suppress(BrokenPipeError):
            self._turns.close()

    def turn(self, start: int, round_: int) -> Turn:
        """One turn: everybody else stands still."""
        before, machine, began = self._cpu(), _busy(), time.monotonic()
        counted = self.ask("steps")["steps"][SETTLING:]
        wall, machine, after = time.monotonic() - began, _busy() - machine, self._cpu()
        took = {pid: after[pid] - before[pid] for pid in before}
        ranks, all_of_them = sum(took[pid] for pid in self._ranks), sum(took.values())
        return Turn(
            start,
            round_,
            mean=statistics.fmean(counted),
            median=statistics.median(counted),
            longest=max(counted),
            ranks_cpu=ranks,
            others_cpu=all_of_them - ranks,
            foreign_cpu=max(0.0, machine - all_of_them),
            wall=wall,
        )

    def ask(self, order: str) -> dict[str, Any]:
        """Let it do this while all others stand still."""
        self._signal(signal.SIGCONT)
        self._turns.write(f"{order}\n")
        if not select.select([self._answers], [], [], PATIENCE)[0]:
            raise SystemFailed(f"no answer within {PATIENCE:g} s: {self._job.last_words()}")
        line = self._answers.readline()
        self._signal(signal.SIGSTOP)
        if not line:
            raise SystemFailed(f"it ended: {self._job.last_words()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _cpu(self) -> dict[int, float]:
        return {pid: clock.read() for pid, clock in self._clocks.items()}

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def _busy() -> float:
    """Seconds that all processors were not idle."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def imports() -> dict[str, float]:
    """What an import costs a new interpreter."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def orders(rounds: int, rows: Sequence[Row], chance: random.Random) -> Iterator[list[Row]]:
    """Who takes turns in each round, and in which order: of two rounds the second goes backwards, against a drift."""
    peers = [row for row in rows if row.system == "nvrx"]
    ours = [row for row in rows if row not in peers]
    for number in range(rounds):
        ours = chance.sample(ours, len(ours)) if number % 2 == 0 else ours[::-1]
        yield ours if number % PEER_EVERY else chance.sample([*ours, *peers], len(ours) + len(peers))


FIGURES = ("step", "longest", "daemons", "foreign", "ping", "section")


def figures(row: Row) -> list[str]:
    """One for each of ``FIGURES``."""
    calls = [row.calls.get("ping"), row.calls.get("section") if row.system == "seamark" else None]
    called = ["-" if call is None else f"{call * 1e6:.3f} µs" for call in calls]
    if not row.turns:
        return ["-", "-", "-", "-", *called]
    wall = sum(turn.wall for turn in row.turns)
    shares = [sum(turn.others_cpu for turn in row.turns) / wall, sum(turn.foreign_cpu for turn in row.turns) / wall]
    return [
        f"{statistics.fmean(turn.mean for turn in row.turns) * 1e3:.3f} ms",
        f"{max(turn.longest for turn in row.turns) * 1e3:.1f} ms",
        *(f"{share * 1e3:.1f}" for share in shares),
        *called,
    ]


def table_of(rows: list[Row], imported: list[dict[str, float]]) -> Lines:
    """All rows: what it is, and by how much it is more."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("wrapper", "version", "starts", "turns", *FIGURES):
        table.add_column(heading, justify="left" if heading in ("wrapper", "version") else "right", no_wrap=True)
    nothing = next(row for row in rows if row.system == "nothing")
    others = [row for row in rows if row is not nothing and row.turns and nothing.turns]
    compared = Table("more than without", *(row.system for row in others), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    estimates = [compare(row, nothing) for row in others]
    for name in MEASURES:
        compared.add_row(name, *(str(found[name]) for found in estimates))
    problems = Text(style="red")
    for row in rows:
        starts = len({turn.start for turn in row.turns})
        table.add_row(row.system, row.version, str(starts), str(len(row.turns)), *figures(row))
        if row.error:
            problems.append(f"{row.system}: {row.error}\n")
    cost = Text("")
    if imported:
        seconds = statistics.median(one["seconds"] for one in imported)
        memory = statistics.median(one["kib"] for one in imported) / 1024
        torch = "torch was imported with it" if imported[0]["torch"] else "torch not imported"
        cost = Text(f"import seamark: {seconds * 1e3:.1f} ms, {memory:.1f} MiB, {torch} (n = {len(imported)})\n")
    return Lines(table, compared, problems, cost, Text(NOTES, style="dim"))


class Starts:
    """All systems, started together, again and again.

    Args:
        rows: what is filled in.
        steps: of a turn.
        peer: the environment of the peer.
        work: the directory of their logs.
        chance: decides on the order.
    """

    def __init__(self, rows: list[Row], steps: int, peer: Peer | None, work: Path, chance: random.Random) -> None:
        self._rows = rows
        self._steps = steps
        self._peer = peer
        self._work = work
        self._chance = chance
        self._products: int | None = None

    def run(self, start: int, rounds: int, last: bool) -> None:
        """One start of all that run, and its rounds; in the last one the calls are timed, too."""
        living = {row.system: turns for row in self._rows if not row.error and (turns := self._started(row, start))}
        for number, order in enumerate(orders(rounds, self._rows, self._chance)):
            for row in order:
                if not row.error:
                    try:
                        row.turns.append(living[row.system].turn(start, number))
                    except SystemFailed as error:
                        row.error = str(error)
        for row in self._rows:
            if last and row.system != "nothing" and not row.error:
                row.calls = living[row.system].ask("calls")
        end_descendants()
        for turns in living.values():
            turns.close()

    def _started(self, row: Row, start: int) -> Turns | None:
        directory = self._work / f"{row.system}-{start}"
        try:
            turns = Turns(commands(row.system, self._steps, self._peer, self._products), directory)
        except SystemFailed as error:
            row.error = str(error)
            return None
        self._products = self._products or turns.products
        return turns


@click.command(epilog=EXAMPLES)
@click.option("--starts", default=10, show_default=True, type=click.IntRange(2), help="Starts of all systems.")
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(1), help="Rounds of turns in each.")
@click.option("--steps", default=60, show_default=True, type=click.IntRange(SETTLING + 1), help="Steps of a turn.")
@click.option("--seed", default=0, show_default=True, help="Decides on the order in each round.")
@peer_env_option("nvidia-resiliency-ext")
@json_option
def main(starts: int, rounds: int, steps: int, seed: int, peer_env: Path, json_path: Path | None) -> None:
    """What Seamark's wrapper costs a training that nothing happens to, beside nvidia-resiliency-ext's.

    A full run takes about 12 minutes on a quiet machine, longer where steps take longer than 20 ms because others
    use its cores, too. Nothing is left running, after Ctrl-C neither.
    """
    run = BenchmarkRun("overhead", seed, json_path, width=150)
    rows: list[Row] = []
    imported: list[dict[str, float]] = []
    with run.measuring(), work_directory() as work, run.progress(auto_refresh=False) as progress:
        peer, why = find_peer(peer_env, "nvidia-resiliency-ext", "nvidia_resiliency_ext.inprocess")
        torch = str(run.facts["versions"]["torch"])
        rows += [Row("nothing", f"torchrun {torch}"), Row("seamark", run.version), Row("nvrx", peer.version, error=why)]
        imported += [imports() for _ in range(IMPORTS)]
        task = progress.add_task("taking turns", total=starts, last="")
        all_of_them = Starts(rows, steps, peer, work, random.Random(seed))
        for start in range(starts):
            progress.refresh()
            all_of_them.run(start, rounds, last=start == starts - 1)
            progress.advance(task)
    nothing = next((row for row in rows if row.system == "nothing"), None)
    more = {row.system: compare(row, nothing) for row in rows if nothing and row is not nothing and row.turns}
    records = {
        "rows": [asdict(row) for row in rows],
        "more": {system: {name: one._asdict() for name, one in found.items()} for system, found in more.items()},
        "imports": imported,
        "steps_of_a_turn": steps,
    }
    run.finish(table_of(rows, imported), records, failed=any(row.error for row in rows))


if __name__ == "__main__":
    main()
