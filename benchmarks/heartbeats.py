"""How many heartbeats one lighthouse takes, what they cost it, and how soon it misses a member meanwhile.

Seamark's lighthouse takes one beat a node for all its ranks, or one a replica group; torchft's takes one a replica.
Each load runs against a daemon of its own, in turns; while it runs, a witness counts how long losses take.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil
from rich import box
from rich.console import Group as Lines
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
from harness.processes import SystemFailed
from harness.summary import Summary, duration
from lighthouses import servers
from lighthouses.children import Child
from lighthouses.seamark_beats import UNANSWERED

JOB = "bench"
WITNESSES = 40
CLIENTS = 16
"""Clients of each process that beats for torchft."""
SETTLE = 2.0
"""Seconds between the last introduction and the window that is measured."""
CONNECTING = 120.0
MISSING = 20.0
MEBI = 1 << 20
WIDTH_OF_FILES = 120  # columns of the output that goes to no terminal


@dataclass(frozen=True)
class Load:
    """What beats: `connections`, each for `ranks` ranks (nodes) or for one replica, every `interval` seconds.

    An interval of 0: each connection beats again as soon as it is answered.
    """

    key: str
    title: str
    system: str
    connections: int
    ranks: int
    interval: float
    processes: int

    @property
    def offered(self) -> float:
        """Beats a second; infinite where the lighthouse sets the pace."""
        return self.connections / self.interval if self.interval else math.inf


LOADS = (
    Load("nodes", "10,000 ranks at 100 ms: 1,250 nodes of 8", "seamark", 1_250, 8, 0.1, 1),
    Load("nodes-100k", "100,000 ranks at 250 ms: 12,500 nodes of 8", "seamark", 12_500, 8, 0.25, 1),
    Load("nodes-max", "nodes of 8 ranks, 32 connections, as many as it takes", "seamark", 32, 8, 0.0, 1),
    Load("replicas", "1,000 replicas at 100 ms, each its connection", "seamark", 1_000, 0, 0.1, 1),
    Load("replicas-max", "32 replicas, as many as it takes", "seamark", 32, 0, 0.0, 1),
    Load("torchft", "1,000 replicas at 100 ms through 32 clients", "torchft", 1_000, 0, 0.1, 2),
    Load("torchft-max", "32 replicas, 32 clients, as many as it takes", "torchft", 32, 0, 0.0, 2),
)

NOTES = f"""\
Lighthouses are daemons over TCP on loopback, at their defaults, one load at a time. rank-beats: a node's beat
    counts for each of its ranks, and the witness's own beats count too. lighthouse, load: shares of one core, user and
    system time; idle: of the whole machine. Where idle is near 0 or beats/s is below what was offered, the
    machine or the load may have set the limit: compare "per core", the rank-beats for each second of the
    lighthouse's processor time.
answer: from a beat to its answer, read by the load. late: how far the load ran behind its own schedule (p99).
seamark's load is bytes over plain TCP sockets, one for each node or replica, spread evenly over the interval;
    torchft's is its own client (LighthouseClient.heartbeat), one thread for each client.
silent: from a member's last beat to its failure at a subscriber; told: from a report (MemberLost, or InjectFailure
    for replicas) to that. A silent node is one whose host answers no probe. {WITNESSES} members of either kind stand
    among the load. never: not seen within 15 s. false: losses of members that were there.
Figures are medians of the rounds, their p99 and max those of the worst round; losses are pooled."""

EXAMPLES = """\b
Examples:
  python benchmarks/heartbeats.py --rounds 1 --seconds 2            does it run here?
  python benchmarks/heartbeats.py --json heartbeats.json            all of it, with a result file
  python benchmarks/heartbeats.py --loads nodes,nodes-100k          only these
  python benchmarks/heartbeats.py --scale 0.1 --loads nodes         a tenth of the nodes
  python benchmarks/heartbeats.py --peer-env /opt/torchft           an environment that has torchft already
"""


@dataclass
class Row:
    """One load: what each round gave, and what went wrong."""

    load: Load
    version: str
    rounds: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""

    def middle(self, key: str) -> float:
        """The median of the rounds."""
        return statistics.median(float(one[key]) for one in self.rounds)

    def worst(self, key: str, figure: str) -> float:
        """The largest of the rounds' `figure`; infinite where a round has none, since nothing came."""
        return max(float(one[key].get(figure, math.inf)) for one in self.rounds)

    def samples(self, key: str) -> list[float]:
        """All rounds' samples of the witness; who was never missed counts as infinitely late."""
        never = {"silence": "never_missed", "told": "never_told"}[key]
        found: list[float] = []
        for one in self.rounds:
            if one["witness"]:
                found += one["witness"][key] + [math.inf] * one["witness"][never]
        return found


def measure(row: Row, work: Path, seconds: float, peer: peers.Peer | None, tick: Callable[[str], None]) -> None:
    """One round of one load against a new daemon."""
    load = row.load
    with ExitStack() as running:
        tick("starting")
        if peer is None:
            server = running.enter_context(servers.seamark(work))
        else:
            server = running.enter_context(servers.torchft(work, peer, 1))
        idle = server.memory()
        names = [f"{'n' if load.ranks else 'replica-'}{number}" for number in range(load.connections)]
        label = f"{load.key}-{len(row.rounds)}"
        witness = None
        if peer is None:
            tick("the witness")
            witness = running.enter_context(Child.of_seamark(f"{label}-witness", "witness", work))
            witness.tell(
                address=server.address,
                events=server.events,
                kind="node" if load.ranks else "replica",
                job=JOB,
                generation=1,
                load=names if load.ranks else [],
                ranks=load.ranks or 1,
                own=WITNESSES,
            )
            witness.hear(CONNECTING)
        tick("connecting")
        children = _loading(load, names, server, work, label, peer, running)
        time.sleep(SETTLE)
        tick("measuring")
        everybody = [*children, witness] if witness else children
        cores = len(os.sched_getaffinity(0))
        began, used, machine = time.monotonic(), server.cpu_seconds(), psutil.cpu_times()
        for child in everybody:
            child.tell(measure=seconds)
        while (left := began + seconds - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))
            tick("measuring")
        wall, spent, later = time.monotonic() - began, server.cpu_seconds() - used, psutil.cpu_times()
        loaded = server.memory()
        reports = [child.hear(MISSING) for child in children]
        tick("waiting for losses")
        seen = witness.hear(MISSING) if witness else None
    answered = sum(report["answered"] / report["seconds"] for report in reports)
    # The witness's members are one rank each, and cost the lighthouse as much as any other.
    rank_beats = answered * (load.ranks or 1) + (seen["beats_per_second"] if seen else 0.0)
    share = spent / wall
    row.rounds.append(
        {
            "start_seconds": server.seconds,
            "idle_rss": idle[0],
            "idle_pss": idle[1],
            "rss": loaded[0],
            "pss": loaded[1],
            "seconds": wall,
            "beats_per_second": answered,
            "rank_beats_per_second": rank_beats,
            "lighthouse_core_share": share,
            "rank_beats_per_core_second": rank_beats / share if share else math.nan,
            "load_core_share": sum(report["cpu_seconds"] / report["seconds"] for report in reports),
            "machine_idle_share": (later.idle - machine.idle) / wall / (os.cpu_count() or cores),
            "answer": _worst_of([report["answer"] for report in reports]),
            "late": _worst_of([report["late"] for report in reports]),
            "loads": reports,
            "witness": seen,
        }
    )


def _loading(
    load: Load,
    names: Sequence[str],
    server: servers.Server,
    work: Path,
    label: str,
    peer: peers.Peer | None,
    running: ExitStack,
) -> list[Child]:
    """The processes that beat, once all their connections are known to the lighthouse."""
    children = []
    share = math.ceil(len(names) / load.processes)
    for process in range(load.processes):
        own, name = names[process * share : (process + 1) * share], f"{label}-{process}"
        if peer is None:
            child = running.enter_context(Child.of_seamark(name, "seamark_beats", work))
            kind = "node" if load.ranks else "replica"
            child.tell(
                address=server.address,
                kind=kind,
                job=JOB,
                generation=1,
                names=own,
                first=process * share,
                ranks=load.ranks,
                interval=load.interval,
            )
        else:
            child = running.enter_context(Child.of_torchft(name, "torchft_beats", work, peer.python))
            child.tell(address=server.address, names=own, clients=min(CLIENTS, len(own)), interval=load.interval)
        children.append(child)
    for child in children:
        child.hear(CONNECTING)
    return children


def _worst_of(spreads: Sequence[dict[str, float]]) -> dict[str, float]:
    found = [one for one in spreads if one]
    return {name: max(one[name] for one in found) for name in ("p50", "p99", "max")} if found else {}


# --- the tables --------------------------------------------------------------------------------------------


def tables_of(rows: Sequence[Row]) -> Lines:
    """Throughput, detection, the daemons at rest; what went wrong; the notes without which no row should be read."""
    problems = Text(style="red")
    for row in rows:
        if row.error:
            problems.append(f"{row.load.key}: {row.error}\n")
        for one in row.rounds:
            seen = one["witness"] or {}
            for text in (*seen.get("first_false_losses", [])[:1], *seen.get("first_refusals", [])[:1]):
                problems.append(f"{row.load.key}: {text}\n")
            for report in one["loads"]:
                if report["strangers"] or report["refused"]:
                    why = f"{report['strangers']} beats of strangers, {report['refused']} refused ({report['refusal']})"
                    problems.append(f"{row.load.key}: {why}\n")
                if report["held_back"]:
                    problems.append(
                        f"{row.load.key}: {report['held_back']} beats held back, {UNANSWERED} before them unanswered\n"
                    )
    measured = [row for row in rows if row.rounds]
    return Lines(_throughput(rows), _detection(measured), _at_rest(measured), problems, Text(NOTES, style="dim"))


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in words:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _throughput(rows: Sequence[Row]) -> Table:
    numbers = ("n", "beats/s", "rank-beats/s", "lighthouse", "load", "idle", "per core", "answer p50", "p99", "late")
    table = _table("Heartbeats", ("system", "load"), numbers)
    for row in rows:
        load = row.load
        if not row.rounds:
            table.add_row(load.system, load.title, "0", *["-"] * 9)
            continue
        table.add_row(
            load.system,
            load.title,
            str(len(row.rounds)),
            f"{row.middle('beats_per_second'):,.0f}",
            f"{row.middle('rank_beats_per_second'):,.0f}",
            f"{row.middle('lighthouse_core_share'):.0%}",
            f"{row.middle('load_core_share'):.0%}",
            f"{row.middle('machine_idle_share'):.0%}",
            f"{row.middle('rank_beats_per_core_second'):,.0f}",
            _shown(statistics.median(one["answer"].get("p50", math.inf) for one in row.rounds)),
            _shown(row.worst("answer", "p99")),
            "-" if load.interval == 0 else _shown(row.worst("late", "p99")),
        )
    return table


def _detection(rows: Sequence[Row]) -> Table:
    numbers = ("n", "silent p50", "p99 or max", "n", "told p50", "p99 or max", "never", "false")
    table = _table("A loss, meanwhile", ("load",), numbers)
    for row in rows:
        seen = [one["witness"] for one in row.rounds if one["witness"]]
        if not seen:
            continue
        cells = []
        for key in ("silence", "told"):
            samples = row.samples(key)
            summary = Summary.of(samples) if samples else None
            if summary is None:
                cells += ["0", "-", "-"]
                continue
            worst, name = (summary.maximum, "max") if summary.p99 is None else (summary.p99, "p99")
            cells += [str(summary.n), _shown(summary.p50), f"{_shown(worst)} {name}"]
        never = sum(one["never_missed"] + one["never_told"] for one in seen)
        false = sum(one["false_losses"] for one in seen)
        table.add_row(row.load.title, *cells, str(never), str(false))
    return table


def _shown(seconds: float) -> str:
    return "never" if math.isinf(seconds) else duration(seconds)


def _at_rest(rows: Sequence[Row]) -> Table:
    numbers = ("n", "start p50", "max", "idle RSS", "idle PSS", "max RSS under load", "PSS")
    table = _table("The daemons", ("system", "version"), numbers)
    for system in dict.fromkeys(row.load.system for row in rows):
        own = [row for row in rows if row.load.system == system]
        rounds = [one for row in own for one in row.rounds]
        starts = [one["start_seconds"] for one in rounds]
        table.add_row(
            system,
            own[0].version,
            str(len(rounds)),
            duration(statistics.median(starts)),
            duration(max(starts)),
            *(f"{statistics.median(one[key] for one in rounds) / MEBI:.1f} MiB" for key in ("idle_rss", "idle_pss")),
            *(f"{max(one[key] for one in rounds) / MEBI:.1f} MiB" for key in ("rss", "pss")),
        )
    return table


def record_of(row: Row) -> dict[str, object]:
    """A row of the result file: the load and every round."""
    return dataclasses.asdict(row)


# --- the command -------------------------------------------------------------------------------------------


def scaled(load: Load, factor: float) -> Load:
    """The load with so many times its connections; its title says so."""
    if factor == 1.0:
        return load
    connections = max(load.processes, round(load.connections * factor))
    return dataclasses.replace(load, connections=connections, title=f"{load.title}, times {factor:g}")


@click.command(epilog=EXAMPLES)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Daemons started for each load.")
@click.option(
    "--seconds",
    default=12.0,
    show_default=True,
    type=click.FloatRange(min=1.0),
    help="Length of the window that is measured in a round.",
)
@names_option("--loads", "chosen", tuple(load.key for load in LOADS), "Loads to run")
@click.option(
    "--scale", default=1.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Times the connections."
)
@peer_env_option("torchft")
@click.option("--seed", default=0, show_default=True, help="Decides on the order of the loads in each round.")
@json_option
def main(
    rounds: int,
    seconds: float,
    chosen: tuple[str, ...],
    scale: float,
    peer_env: Path,
    seed: int,
    json_path: Path | None,
) -> None:
    """Heartbeats that Seamark's and torchft's lighthouse take, what they cost, and how soon a loss is seen meanwhile.

    A full run takes about 15 minutes. Nothing is left running, after Ctrl-C neither.
    """
    run = BenchmarkRun("heartbeats", seed, json_path, WIDTH_OF_FILES)
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    loads = [scaled(load, scale) for load in LOADS if load.key in chosen]
    if most < max(load.connections for load in loads) + 200:
        raise click.UsageError(f"this process may open {most} files: fewer than the connections. ulimit -Hn, --scale")
    rows = [Row(load, run.version) for load in loads]
    with run.measuring(), work_directory() as work:
        peer = None
        if theirs := [row for row in rows if row.load.system == "torchft"]:
            with run.preparing():
                peer, why = find_peer(peer_env, "torchft", "torchft.coordination")
            for row in theirs:
                row.version, row.error = peer.version, why
        measure_in_turns(rows, rounds, seconds, seed, peer, work, run)
    method = {"rounds": rounds, "seconds": seconds, "open_files": {"before": files, "during": most}}
    records = {**method, "rows": [record_of(row) for row in rows]}
    run.finish(tables_of(rows), records, failed=any(row.error for row in rows))


def measure_in_turns(
    rows: Sequence[Row],
    rounds: int,
    seconds: float,
    seed: int,
    peer: peers.Peer | None,
    work: Path,
    run: BenchmarkRun,
) -> None:
    """Run all loads, in another order in each round, and show how far that is."""
    rng = random.Random(seed)
    with run.progress() as progress:
        tasks = {
            row.load.key: progress.add_task(f"{row.load.system}: {row.load.title}", total=rounds, start=False, last="")
            for row in rows
        }
        for number in range(1, rounds + 1):
            for row in rng.sample(rows, len(rows)):
                if row.error:
                    continue
                task = tasks[row.load.key]
                progress.start_task(task)

                def tick(what: str, task: Any = task, number: int = number) -> None:
                    progress.update(task, last=f"round {number}: {what}")

                try:
                    measure(row, work, seconds, peer if row.load.system == "torchft" else None, tick)
                except SystemFailed as error:
                    row.error = f"round {number}: {error}"
                last = "failed" if row.error else f"{row.rounds[-1]['rank_beats_per_second']:,.0f} rank-beats/s"
                progress.update(task, completed=len(row.rounds), last=last)
                run.note(f"round {number}, {row.load.key}: {last}")


if __name__ == "__main__":
    main()
