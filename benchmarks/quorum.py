"""From the last member's join to the last member's answer: Seamark's lighthouse beside torchft's.

The members of a quorum live in four processes on this machine. In every round all of them join, and all are answered.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich import box
from rich.console import Group as Lines
from rich.progress import TaskID
from rich.table import Table
from rich.text import Text

from harness.command import (
    BenchmarkRun,
    find_peer,
    json_option,
    names_option,
    peer_env_option,
    work_directory,
)
from harness.processes import SystemFailed
from harness.summary import SAMPLES_FOR_P99, Summary
from lighthouses import servers
from lighthouses.children import Child

PROCESSES = 4
SIZES = (1, 2, 8, 32, 128)
PAUSE = (0.0, 0.01)
"""Seconds between two rounds, so that none of them begins in step with a timer of a lighthouse."""
PATIENCE = 60.0

NOTES = f"""\
Members live in {PROCESSES} processes of this machine and share its cores with the lighthouse. In a round all join
    and all are answered; its figure is the time from the last join sent to the last answer decoded. The
    systems take turns in a random order. Both lighthouses are daemons at their defaults and told to wait for
    all members. Nothing is left out, the first round of a group neither.
seamark: one connection for each member, one thread for each process. seamark, shared: one connection for each
    process; answers to its members come as one message.
torchft: one client and one thread for each member, since its call blocks."""

EXAMPLES = """\b
Examples:
  python benchmarks/quorum.py --rounds 20                 does it run here?
  python benchmarks/quorum.py --json quorum.json          all of it, with a result file
  python benchmarks/quorum.py --members 8,128 --systems seamark
  python benchmarks/quorum.py --peer-env /opt/torchft     an environment that has torchft already
"""


@dataclass
class Row:
    """One system at one size: the seconds of each round, and what went wrong."""

    system: str
    version: str
    members: int
    planned: int
    samples: list[float] = field(default_factory=list)
    quorum_ids: list[int] = field(default_factory=list)
    resets: int = 0
    error: str = ""


@dataclass(frozen=True)
class System:
    """A system under test: what starts its lighthouse and its members' processes.

    `shared`: the members of a process share its connection. `fuse`: seconds after which no further round of one size
    is begun.
    """

    name: str
    version: str
    serve: Callable[[Path, int], AbstractContextManager[servers.Server]]
    program: Callable[[str, Path], Child]
    shared: bool = False
    fuse: float = float("inf")
    error: str = ""


def systems_of(chosen: Sequence[str], version: str, peer_env: Path, fuse: float) -> list[System]:
    """The rows of each size. A torchft that can't be installed is a row with the reason."""

    def serve(directory: Path, _members: int) -> AbstractContextManager[servers.Server]:
        return servers.seamark(directory)

    def program(name: str, directory: Path) -> Child:
        return Child.of_seamark(name, "seamark_members", directory)

    found = []
    if "seamark" in chosen:
        found = [
            System("seamark", version, serve, program),
            System("seamark, shared", version, serve, program, shared=True),
        ]
    if "torchft" in chosen:
        found.append(_torchft(peer_env, fuse))
    return found


def _torchft(peer_env: Path, fuse: float) -> System:
    peer, why = find_peer(peer_env, "torchft", "torchft.coordination")

    def serve(directory: Path, members: int) -> AbstractContextManager[servers.Server]:
        return servers.torchft(directory, peer, members)

    def program(name: str, directory: Path) -> Child:
        return Child.of_torchft(name, "torchft_members", directory, peer.python)

    return System("torchft", peer.version, serve, program, fuse=fuse, error=why)


class Team:
    """The processes of one system at one size, and their lighthouse."""

    def __init__(self, system: System, row: Row, address: str, directory: Path, running: ExitStack) -> None:
        self.system = system
        self.row = row
        self.spent = 0.0
        names = [f"replica-{number:03d}" for number in range(row.members)]
        self._children = []
        for process in range(min(PROCESSES, row.members)):
            label = f"{system.name.replace(', ', '-')}-{row.members}-{process}"
            child = running.enter_context(system.program(label, directory))
            # The daemon of a shared connection knows the same replicas; another job keeps the groups apart.
            job = f"{system.name.replace(', ', '-')}-{row.members}"
            own = names[process::PROCESSES]
            child.tell(address=address, job=job, names=own, world=row.members, shared=system.shared)
            self._children.append(child)

    @property
    def goes_on(self) -> bool:
        """True while a further round is to be run."""
        return not self.row.error and self.spent < self.system.fuse and len(self.row.samples) < self.row.planned

    def started(self) -> None:
        """Wait until all processes are ready; importing torch takes seconds."""
        for child in self._children:
            child.hear(PATIENCE)

    def introduce(self) -> None:
        """Have all members heard, each by a heartbeat: from now on they are connected."""
        for child in self._children:
            child.tell(introduce=True)
        for child in self._children:
            child.hear(PATIENCE)

    def round(self, number: int) -> None:
        """All join; the round's figure goes to the row."""
        began = time.monotonic()
        for child in self._children:
            child.tell(round=number)
        answers = [child.hear(PATIENCE) for child in self._children]
        self.spent += time.monotonic() - began
        ids = {answer["quorum_id"] for answer in answers}
        if len(ids) != 1 or any(answer["participants"] != self.row.members for answer in answers):
            raise SystemFailed(f"round {number}: not one quorum of all members: {answers}")
        self.row.samples.append(max(one["answered"] for one in answers) - max(one["joined"] for one in answers))
        self.row.quorum_ids.append(ids.pop())
        self.row.resets += sum(one["resets"] for one in answers)


def measure(
    systems: Sequence[System], rows: Sequence[Row], seed: int, work: Path, advance: Callable[[Row], None]
) -> None:
    """Measure the rows of one size: all systems side by side, round by round."""
    rng = random.Random(f"{seed} {rows[0].members}")
    with ExitStack() as running:
        teams = []
        # Seamark's rows share a daemon.
        daemons: dict[Callable[..., object], servers.Server] = {}
        for system, row in zip(systems, rows, strict=True):
            if system.error:
                row.error = system.error
                continue
            with _failing(row):
                if system.serve not in daemons:
                    daemons[system.serve] = running.enter_context(system.serve(work, row.members))
                teams.append(Team(system, row, daemons[system.serve].address, work, running))
        for step in (Team.started, Team.introduce):
            for team in teams:
                with _failing(team.row):
                    step(team)
        number = 0
        while current := [team for team in teams if team.goes_on]:
            number += 1
            rng.shuffle(current)
            for team in current:
                with _failing(team.row):
                    team.round(number)
                advance(team.row)
                time.sleep(rng.uniform(*PAUSE))


@contextmanager
def _failing(row: Row) -> Iterator[None]:
    try:
        yield
    except SystemFailed as error:
        row.error = str(error)


def table_of(rows: Sequence[Row]) -> Lines:
    """All rows, what went wrong in any of them, and the notes without which no row should be read."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("members", "system", "version"):
        table.add_column(heading)
    for heading in ("n", "p50", "p99", "max", "min"):
        table.add_column(heading, justify="right", no_wrap=True)
    problems = Text(style="red")
    previous = None
    for row in rows:
        if previous not in (None, row.members):
            table.add_section()
        previous = row.members
        table.add_row(str(row.members), row.system, row.version, *_figures(row))
        if row.error:
            problems.append(f"{row.system}, {row.members} members: {row.error}\n")
    return Lines(table, problems, Text(NOTES, style="dim"))


def _figures(row: Row) -> list[str]:
    if not row.samples:
        return ["0", "-", "-", "-", "-"]
    summary = Summary.of(row.samples)
    p99 = f"(n < {SAMPLES_FOR_P99})" if summary.p99 is None else milliseconds(summary.p99)
    return [
        str(summary.n),
        milliseconds(summary.p50),
        p99,
        milliseconds(summary.maximum),
        milliseconds(summary.minimum),
    ]


def milliseconds(seconds: float) -> str:
    """A duration for people, in milliseconds: these differ in their second digit."""
    return f"{seconds * 1e3:.2f} ms"


def record_of(row: Row) -> dict[str, object]:
    """A row of the result file: the figures and every sample, in seconds."""
    summary = dataclasses.asdict(Summary.of(row.samples)) if row.samples else {"n": 0}
    return {**dataclasses.asdict(row), **summary}


def parse_members(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Split `--members` at its commas."""
    try:
        sizes = tuple(int(size) for size in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value}: numbers by commas, such as 8,32") from None
    if min(sizes) < 1:
        raise click.BadParameter("a quorum has at least 1 member")
    return sizes


@click.command(epilog=EXAMPLES)
@click.option("--rounds", default=300, show_default=True, type=click.IntRange(1), help="Quorums of each row.")
@click.option(
    "--members",
    default=",".join(map(str, SIZES)),
    show_default=True,
    callback=parse_members,
    help="Sizes of the quorum, by commas.",
)
@names_option("--systems", "chosen", ("seamark", "torchft"), "Systems to run")
@click.option(
    "--peer-seconds",
    default=120.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Begin no further round of torchft at one size after this time.",
)
@peer_env_option("torchft")
@click.option("--seed", default=0, show_default=True, help="Decides on the systems' turns and the pauses.")
@json_option
def main(
    rounds: int,
    members: tuple[int, ...],
    chosen: tuple[str, ...],
    peer_seconds: float,
    peer_env: Path,
    seed: int,
    json_path: Path | None,
) -> None:
    """Time from the last member's join to the last member's answer, of Seamark's and torchft's lighthouse.

    The members live in 4 processes; in every round all of them join. Nothing is left running, after Ctrl-C neither.
    """
    run = BenchmarkRun("quorum", seed, json_path)
    rows: list[Row] = []
    with run.measuring(), work_directory() as work:
        with run.preparing():
            systems = systems_of(chosen, run.version, peer_env, peer_seconds)
        measure_sizes(systems, members, rounds, seed, work, rows, run)
    method = {"processes": PROCESSES, "pause_seconds": PAUSE, "peer_seconds": peer_seconds}
    records = {**method, "rows": [record_of(row) for row in rows]}
    run.finish(table_of(rows), records, failed=any(row.error for row in rows))


def measure_sizes(
    systems: Sequence[System],
    sizes: Sequence[int],
    rounds: int,
    seed: int,
    work: Path,
    rows: list[Row],
    run: BenchmarkRun,
) -> None:
    """Measure one size after the other, and show how far each is."""
    with run.progress() as progress:
        for size in sizes:
            these = [Row(system.name, system.version, size, rounds) for system in systems]
            rows += these
            tasks: dict[str, TaskID] = {
                row.system: progress.add_task(f"{size} members, {row.system}", total=rounds, last="starting")
                for row in these
            }

            def advance(row: Row, tasks: dict[str, TaskID] = tasks) -> None:
                last = row.error or milliseconds(row.samples[-1])
                progress.update(tasks[row.system], completed=len(row.samples), last=last)

            measure(systems, these, seed, work, advance)
            for row in these:
                progress.update(tasks[row.system], last="failed" if row.error else "done")
                progress.stop_task(tasks[row.system])
                run.note(f"{size} members, {row.system}: {len(row.samples)} of {rounds} rounds")


if __name__ == "__main__":
    main()
