"""From a replica group's death to the others' next commit: Seamark beside torchft.

Three replica groups of one rank train over Gloo on this machine; again and again one is killed, and comes back.
README.md has the method, `--help` the options.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import click
from rich import box
from rich.console import Group
from rich.progress import TaskID
from rich.table import Table
from rich.text import Text

from harness import provenance
from harness.command import (
    BenchmarkRun,
    deadline_option,
    find_peer,
    json_option,
    names_option,
    peer_env_option,
    work_dir_option,
    work_directory,
)
from harness.replica_groups import REPLICAS, SETTLE, Row, Sample, SeamarkFleet, SuiteFleet, TorchftFleet, measure
from harness.summary import Summary, duration

SYSTEMS = ("seamark", "suite", "torchft")
FULL = {"kills": 50, "peer_kills": 5}
QUICK = {"kills": 3, "peer_kills": 1}
PHASES = ("published", "asked", "answered", "group", "reduced", "commit")

NOTES = f"""\
{REPLICAS} replica groups of one rank over Gloo on one machine; steps of about 10 ms; one is killed with SIGKILL.
next commit: from the kill to the last survivor's first commit without the killed process. any: to its first
    commit at all, that of a step which the killed process had still finished included.
back: from the start of the replacement (under the suite: from the kill, for the suite starts it) to its
    first commit with both others, import of torch included. joining: from its Manager's construction on.
seamark: plain processes, so the lighthouse finds the death by connecting. seamark, suite: each replica group
    is a job under an agent, which reports the death and starts the replacement.
torchft: its defaults, but its Gloo group has a timeout of 5 s as in its own example, not 60 s. heartbeat 1 s:
    --heartbeat_timeout_ms 1000. join 0.1 s: --join_timeout_ms 100, the default of its LighthouseServer in
    Python; it goes on without whoever is later than that, dead or slow."""

PHASE_NOTES = """\
Milliseconds since the kill, medians over the slowest survivor of each kill. published: the lighthouse has
    announced the death. asked: start_quorum of the step that was committed. answered: its quorum came.
    group: its process group is made. reduced: its allreduce is through. commit: should_commit() returned."""

EXAMPLES = """\b
Examples:
  python benchmarks/replicas.py --quick                     every row, few kills: does it run here?
  python benchmarks/replicas.py --json replicas.json        all of it, with a result file
  python benchmarks/replicas.py --systems suite --kills 200 without the slow rows: their replacements import torch
  python benchmarks/replicas.py --peer-env /opt/torchft     an environment that has torchft already
"""


def seamark_rows(chosen: Sequence[str], version: str, kills: int) -> list[Row]:
    """Seamark without and with its agents."""
    rows = {"seamark": Row("seamark", version, SeamarkFleet, kills)}
    rows["suite"] = Row("seamark, suite", version, SuiteFleet, kills)
    return [row for name, row in rows.items() if name in chosen]


def torchft_rows(kills: int, environment: Path) -> list[Row]:
    """torchft at its defaults, and with the two settings of its lighthouse that decide on the figure."""
    peer, why = find_peer(environment, "torchft", "torchft")

    def row(name: str, *options: str) -> Row:
        return Row(name, peer.version, lambda directory: TorchftFleet(directory, peer, options), kills, error=why)

    return [
        row("torchft"),
        row("torchft, heartbeat 1 s", "--heartbeat_timeout_ms", "1000"),
        row("torchft, join 0.1 s", "--join_timeout_ms", "100"),
    ]


def run_rows(rows: Sequence[Row], work: Path, seed: int, deadline: float, run: BenchmarkRun) -> None:
    """Measure one row after the other, and show how far each is."""
    with run.progress() as progress:
        for index, row in enumerate(rows):
            if row.error:
                continue
            task = progress.add_task(row.system, total=row.kills, last="starting")

            def on_sample(sample: Sample, task: TaskID = task) -> None:
                progress.update(task, advance=1, last=shown(sample.seconds, deadline))

            directory = work / f"{index:02d}"
            directory.mkdir()
            measure(row, directory, seed, deadline, on_sample)
            progress.stop_task(task)
            progress.update(task, last="failed" if row.error else "done")
            run.note(f"{row.system}: {len(row.samples)} of {row.kills} kills")


def shown(seconds: float, deadline: float) -> str:
    """A duration for people; an infinite one is only known to be longer than the deadline."""
    return f"> {deadline:.0f} s" if math.isinf(seconds) else duration(seconds)


COLUMNS: dict[str, Callable[[Sample], float]] = {
    "next commit": lambda sample: sample.seconds,
    "any": lambda sample: sample.any_commit_seconds,
    "back": lambda sample: sample.back_seconds,
    "joining": lambda sample: sample.joining_seconds,
}


def table_of(rows: Sequence[Row], deadline: float) -> Group:
    """All rows, where the time goes, what went wrong, and the notes without which no row should be read."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("system", "version"):
        table.add_column(heading, overflow="fold")
    for heading in ("n", *(f"{name}\np50 / max" for name in COLUMNS), "missed"):
        table.add_column(heading, justify="right", no_wrap=True)
    problems = Text(style="red")
    for row in rows:
        cells = [figures([of(sample) for sample in row.samples], deadline) for of in COLUMNS.values()]
        names = (Text(row.system), Text(row.version))
        table.add_row(*names, str(len(row.samples)), *cells, str(row.missed))
        if row.error:
            problems.append(f"{row.system}: {row.error}\n")
    notes = Text(NOTES, style="dim")
    return Group(table, phase_table(rows), Text(PHASE_NOTES, style="dim"), Text(), problems, notes)


def figures(samples: Sequence[float], deadline: float) -> str:
    """Median and maximum of a column; instead of the maximum the 99th percentile, marked, where there is one."""
    if not samples:
        return "-"
    summary = Summary.of(samples)
    worst = shown(summary.maximum, deadline) if summary.p99 is None else f"p99 {shown(summary.p99, deadline)}"
    return f"{shown(summary.p50, deadline)} / {worst}"


def phase_table(rows: Sequence[Row]) -> Table:
    """Where the time goes, in each row."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("system")
    for phase in PHASES:
        table.add_column(phase, justify="right", no_wrap=True)
    for row in rows:
        medians = phase_medians(row)
        if medians:
            times = [f"{medians[phase] * 1e3:.1f}" if phase in medians else "-" for phase in PHASES]
            table.add_row(Text(row.system), *times)
    return table


def phase_medians(row: Row) -> dict[str, float]:
    """The median of each phase over the samples that have it, in seconds since the kill."""
    times = {phase: [one.phases[phase] for one in row.samples if phase in one.phases] for phase in PHASES}
    return {phase: statistics.median(found) for phase, found in times.items() if found}


def record_of(row: Row) -> dict[str, object]:
    """A row of the result file: the figures and every sample, in seconds."""
    columns = {
        name.replace(" ", "_"): dataclasses.asdict(Summary.of([of(sample) for sample in row.samples]))
        for name, of in COLUMNS.items()
        if row.samples
    }
    return {
        "system": row.system,
        "version": row.version,
        "torch": row.torch,
        "kills_planned": row.kills,
        "n": len(row.samples),
        "missed": row.missed,
        "error": row.error or None,
        **columns,
        "phase_medians": phase_medians(row),
        "samples": [dataclasses.asdict(sample) for sample in row.samples],
    }


@click.command(epilog=EXAMPLES)
@names_option("--systems", "chosen", SYSTEMS, "Systems to run")
@click.option("--kills", type=click.IntRange(1), show_default=str(FULL["kills"]), help="Kills in each row of Seamark.")
@click.option(
    "--peer-kills",
    type=click.IntRange(1),
    show_default=str(FULL["peer_kills"]),
    help="Kills in each row of torchft.",
)
@click.option("--quick", is_flag=True, help="Few kills: 3 in each row of Seamark, 1 in each row of torchft.")
@click.option("--seed", default=0, show_default=True, help="Decides on victims and on the pauses between kills.")
@deadline_option
@peer_env_option("torchft")
@json_option
@work_dir_option
def main(
    chosen: tuple[str, ...],
    kills: int | None,
    peer_kills: int | None,
    quick: bool,
    seed: int,
    deadline: float,
    peer_env: Path,
    json_path: Path | None,
    work_dir: Path | None,
) -> None:
    """Time from a replica group's death to the others' next commit, of Seamark and torchft.

    Three replica groups of one rank train together over Gloo; one is killed, the others go on, and it comes back, again
    and again. Nothing is left running, after Ctrl-C neither.
    """
    counts = QUICK if quick else FULL
    kills, peer_kills = kills or counts["kills"], peer_kills or counts["peer_kills"]
    run = BenchmarkRun("replicas", seed, json_path)
    rows: list[Row] = []
    with run.measuring(), work_directory(work_dir) as work:
        with run.preparing():
            run.facts["slowest_reverse_lookup_seconds"] = provenance.slowest_reverse_lookup()
            rows += seamark_rows(chosen, run.version, kills)
            rows += torchft_rows(peer_kills, peer_env) if "torchft" in chosen else []
        run_rows(rows, work, seed, deadline, run)
    if work_dir is None and any(row.error for row in rows):
        run.console.print("Run again with --work-dir DIR to keep the logs.")
    method = {"settle_seconds": SETTLE, "deadline_seconds": deadline, "replicas": REPLICAS}
    run.finish(table_of(rows, deadline), {**method, "rows": [record_of(row) for row in rows]})


if __name__ == "__main__":
    main()
