"""From a death to the last of 32 subscribers that is told of it: Seamark's suite beside torchft's lighthouse.

A process of any size is killed; a host is cut off its network. Both by the clock of this machine, which is everybody's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Group as Lines
from rich.progress import TaskID
from rich.table import Table
from rich.text import Text

from harness import peers
from harness.command import (
    BenchmarkRun,
    find_peer,
    json_option,
    names_option,
    peer_env_option,
    work_directory,
)
from harness.hosts import Hosts
from harness.network import Network, NoNamespaces
from harness.processes import SystemFailed, end_descendants
from harness.replica_groups import SuiteFleet
from harness.summary import Summary, duration
from harness.systems import MAX_RESTARTS, TRAINING
from lighthouses import servers
from lighthouses.children import Child

SUBSCRIBERS, PROCESSES = 32, 4
SIZES = {"10M": 10 << 20, "1G": 1 << 30, "4G": 4 << 30}
BEAT = 0.1
PAUSE = (0.2, 0.5)
"""Seconds of peace before each death, so that it falls anywhere between two beats."""
PATIENCE = 60.0

NOTES = f"""\
A sample begins right before SIGKILL is sent, or the host's packets begin to go nowhere, and ends when the last of
    {SUBSCRIBERS} subscribers in {PROCESSES} processes has it. Defaults everywhere.
kill: a rank under `seamark up`, seamark.Wrapper, policy replace; subscribers are seamark.FailureListener. seen: the
    agent's report; published: by the lighthouse; freed: when the process was gone, its memory given back.
host: agents on network namespaces, two of them; one is cut off, nobody gets a reset. One subscriber.
torchft: {SUBSCRIBERS} replicas wait for a quorum together with one that was in the last and is killed: its lighthouse
    publishes nothing, who waits learns of a death by the next quorum's members."""

EXAMPLES = """\b
Examples:
  python benchmarks/detect.py --kills 3 --peer-kills 1     does it run here?
  python benchmarks/detect.py --json detect.json           all of it, with a result file
  python benchmarks/detect.py --rows kill-10M,host         only these
  python benchmarks/detect.py --peer-env /opt/torchft      an environment that has torchft already
"""


@dataclass
class Row:
    """What dies, and the seconds of each death; ``parts`` of them by what was seen on the way."""

    key: str
    title: str
    version: str
    deaths: int
    samples: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    error: str = ""

    def add(self, seconds: float, **parts: float) -> None:
        """One death."""
        self.samples.append(seconds)
        for name, value in parts.items():
            self.parts.setdefault(name, []).append(value)


# --- a process of Seamark's is killed ----------------------------------------------------------------------


class Holding(SuiteFleet):
    """A suite with one job of one rank that holds so many bytes."""

    def __init__(self, directory: Path, size: int) -> None:
        super().__init__(directory)
        self._size = size

    def start(self) -> None:
        """`seamark up`, the job, and the subscribers."""
        self.bring_up()
        arguments = [sys.executable, "-m", "seamarkd.cli", "run", "--name", "holds"]
        arguments += ["--max-restarts", str(MAX_RESTARTS), str(TRAINING / "hold_memory.py"), str(self._size)]
        self.run("holds", arguments, self._environment)

    def holding(self, besides: set[int]) -> int:
        """The pid of the rank, as soon as it holds its memory."""
        path = self.reports_directory / "holding"
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            self.check_alive()
            lines = path.read_text().splitlines() if path.exists() else []
            pids = {int(json.loads(line)["pid"]) for line in lines} - besides
            if pids:
                return pids.pop()
            time.sleep(0.005)
        raise SystemFailed(f"no rank holds its memory after {PATIENCE:g} s: {self.last_words()}")

    @contextmanager
    def subscribers(self) -> Iterator[list[Child]]:
        """Connected ones."""
        with ExitStack() as running:
            children = []
            for number in range(PROCESSES):
                child = Child.of_seamark(f"subscribers-{number}", "subscribers", self.directory)
                children.append(running.enter_context(child))
                child.tell(lighthouse=self.lighthouse, events=self.events, subscribers=SUBSCRIBERS // PROCESSES)
            for child in children:
                child.hear(PATIENCE)
            yield children


def kill_ranks(row: Row, size: int, seed: int, work: Path, advance: Callable[[], None]) -> None:
    """One rank after the other, each the replacement of the one before."""
    rng = random.Random(f"{seed} {row.key}")
    fleet = Holding(work / row.key, size)
    killed: set[int] = set()
    try:
        fleet.start()
        with fleet.subscribers() as children:
            while len(row.samples) < row.deaths:
                pid = fleet.holding(besides=killed)
                killed.add(pid)
                time.sleep(rng.uniform(*PAUSE))
                began = time.monotonic()
                os.kill(pid, signal.SIGKILL)
                freed = _gone(pid)
                told = [child.hear(PATIENCE) for child in children]
                first = told[0]
                if any((one["kind"], one["published"]) != ("lost", first["published"]) for one in told):
                    raise SystemFailed(f"not one loss: {told}")
                row.add(
                    max(one["last"] for one in told) - began,
                    seen=first["detected"] - began,
                    published=first["published"] - began,
                    freed=freed - began,
                )
                advance()
    finally:
        fleet.stop()


def _gone(pid: int) -> float:
    """When the process had given its memory back: its keeper has reaped it, or could."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return time.monotonic()
    try:
        # Blocked, not polled: on two cores a loop here would take its time from those who tell and are told.
        select.select([handle], [], [])
    finally:
        os.close(handle)
    return time.monotonic()


# --- a host is cut off -------------------------------------------------------------------------------------


def cut_hosts(row: Row, seed: int, work: Path, advance: Callable[[], None]) -> None:
    """The same host again and again; each time with a job that has a worker on it."""
    rng = random.Random(f"{seed} {row.key}")
    home = work / row.key
    home.mkdir()
    try:
        joined = Network(3, seed)
    except (NoNamespaces, OSError) as error:
        raise SystemFailed(f"needs root, network namespaces and TUN devices: {error}") from None
    with joined, Hosts(home, joined) as hosts:
        hosts.subscribe()
        while len(row.samples) < row.deaths:
            job = f"job-{len(row.samples)}"
            hosts.submit(job)
            time.sleep(rng.uniform(*PAUSE))
            began = time.monotonic()
            joined.cut(hosts.nodes["c"])
            told = hosts.listen(PATIENCE)
            if told is None or (told["job"], told["cause"]) != (job, "node"):
                raise SystemFailed(f"not the loss of a node of {job}: {told}")
            row.add(told["last"] - began, published=told["published"] - began)
            advance()
            joined.mend()
            hosts.wait("the host again", lambda: hosts.hears("c"))


# --- torchft -----------------------------------------------------------------------------------------------


def kill_replicas(row: Row, peer: peers.Peer, seed: int, work: Path, advance: Callable[[], None]) -> None:
    """A replica that was in the last quorum and beats dies while all others wait for the next."""
    rng = random.Random(f"{seed} {row.key}")
    names = [f"replica-{number}" for number in range(SUBSCRIBERS)]
    share = SUBSCRIBERS // PROCESSES
    with ExitStack() as running:
        server = running.enter_context(servers.torchft(work, peer, 1))

        def child(name: str, program: str, members: Sequence[str], **order: Any) -> Child:
            made = running.enter_context(Child.of_torchft(name, program, work, peer.python))
            made.tell(address=server.address, names=list(members), **order)
            return made

        waiting = [
            child(f"members-{number}", "torchft_members", names[number * share : (number + 1) * share])
            for number in range(PROCESSES)
        ]
        beats = child("beats", "torchft_beats", names, clients=PROCESSES, interval=BEAT)
        for one in (*waiting, beats):
            one.hear(PATIENCE)
        step = 0
        while len(row.samples) < row.deaths:
            name = f"victim-{len(row.samples)}"
            dying = child(f"{name}-beats", "torchft_beats", [name], clients=1, interval=BEAT)
            joining = child(name, "torchft_members", [name])
            for one in (dying, joining):
                one.hear(PATIENCE)
            answers = _quorum([*waiting, joining], step)
            if answers[0]["participants"] != SUBSCRIBERS + 1:
                raise SystemFailed(f"the victim is not in the quorum: {answers[0]}")
            for one in waiting:
                one.tell(round=step + 1)
            time.sleep(rng.uniform(*PAUSE))
            began = time.monotonic()
            dying.kill()
            answers = [one.hear(PATIENCE) for one in waiting]
            if answers[0]["participants"] != SUBSCRIBERS:
                raise SystemFailed(f"answered with the victim in it: {answers[0]}")
            row.add(max(one["answered"] for one in answers) - began)
            step += 2
            advance()


def _quorum(members: Sequence[Child], step: int) -> list[dict[str, Any]]:
    for one in members:
        one.tell(round=step)
    return [one.hear(PATIENCE) for one in members]


# --- the table ---------------------------------------------------------------------------------------------


def table_of(rows: Sequence[Row]) -> Lines:
    """All rows, what went wrong in any of them, and the notes without which no row should be read."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("what dies", "version"):
        table.add_column(heading)
    for heading in ("n", "p50", "p99 or max", "seen p50", "published p50", "freed p50"):
        table.add_column(heading, justify="right", no_wrap=True)
    problems = Text(style="red")
    for row in rows:
        table.add_row(row.title, row.version, *_figures(row))
        if row.error:
            problems.append(f"{row.title}: {row.error}\n")
    return Lines(table, problems, Text(NOTES, style="dim"))


def _figures(row: Row) -> list[str]:
    if not row.samples:
        return ["0", *["-"] * 5]
    summary = Summary.of(row.samples)
    worst = f"{duration(summary.maximum)} max" if summary.p99 is None else f"{duration(summary.p99)} p99"
    parts = [
        duration(Summary.of(row.parts[name]).p50) if name in row.parts else "-"
        for name in ("seen", "published", "freed")
    ]
    return [str(summary.n), duration(summary.p50), worst, *parts]


def record_of(row: Row) -> dict[str, object]:
    """A row of the result file: the figures and every sample, in seconds."""
    summary = dataclasses.asdict(Summary.of(row.samples)) if row.samples else {"n": 0}
    return {**dataclasses.asdict(row), **summary}


# --- the command -------------------------------------------------------------------------------------------

KEYS = (*(f"kill-{size}" for size in SIZES), "host", "torchft")


@click.command(epilog=EXAMPLES)
@click.option("--kills", default=100, show_default=True, type=click.IntRange(1), help="Deaths in each row.")
@click.option("--peer-kills", default=10, show_default=True, type=click.IntRange(1), help="Deaths in torchft's row.")
@names_option("--rows", "chosen", KEYS, "Rows to run")
@peer_env_option("torchft")
@click.option("--seed", default=0, show_default=True, help="Decides on the pauses.")
@json_option
def main(
    kills: int, peer_kills: int, chosen: tuple[str, ...], peer_env: Path, seed: int, json_path: Path | None
) -> None:
    """Time from a death to the last subscriber that is told of it, of Seamark's suite and torchft's lighthouse.

    A full run takes about 15 minutes. Nothing is left running, after Ctrl-C neither.
    """
    run = BenchmarkRun("detect", seed, json_path)
    rows: list[Row] = []
    with run.measuring(), work_directory() as work:
        peer = None
        for key in chosen:
            if key == "torchft":
                with run.preparing():
                    peer, why = find_peer(peer_env, "torchft", "torchft.coordination")
                rows.append(Row(key, "torchft: a replica", peer.version, peer_kills, error=why))
            else:
                title = "a host" if key == "host" else f"a process of {key.removeprefix('kill-')}"
                rows.append(Row(key, f"seamark: {title}", run.version, kills))
        measure(rows, seed, peer, work, run)
    records = {"rows": [record_of(row) for row in rows], "subscribers": SUBSCRIBERS}
    run.finish(table_of(rows), records, failed=any(row.error for row in rows))


def measure(rows: Sequence[Row], seed: int, peer: peers.Peer | None, work: Path, run: BenchmarkRun) -> None:
    """Row by row, and show how far that is."""
    with run.progress() as progress:
        for row in rows:
            if row.error:
                continue
            task = progress.add_task(row.title, total=row.deaths, last="")

            def advance(row: Row = row, task: TaskID = task) -> None:
                progress.update(task, completed=len(row.samples), last=duration(row.samples[-1]))

            try:
                if row.key == "torchft":
                    assert peer is not None
                    kill_replicas(row, peer, seed, work, advance)
                elif row.key == "host":
                    cut_hosts(row, seed, work, advance)
                else:
                    kill_ranks(row, SIZES[row.key.removeprefix("kill-")], seed, work, advance)
            except SystemFailed as error:
                row.error = str(error)
            finally:
                end_descendants()
            run.note(f"{row.title}: {len(row.samples)} of {row.deaths}")


if __name__ == "__main__":
    main()
