"""From a fault to the first collective of the last rank: Seamark beside torchrun and nvidia-resiliency-ext.

Four ranks over Gloo on this machine run one training loop (`training/`) under each system in turn, and are
made to raise or are killed. README.md has the method, `--help` the options.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import click
from rich.progress import TaskID

from harness import provenance, systems
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
from harness.restart_table import record_of, shown, table_of
from harness.restarts import SETTLE, Row, Sample, Scenario, measure

SYSTEMS = ("seamark", "torchrun", "nvrx")
FULL = {"exceptions": 200, "kills": 50, "peer_faults": 5}
QUICK = {"exceptions": 5, "kills": 3, "peer_faults": 1}

STALLED_LOOK_UP = 0.1  # seconds
STALLED = """\
Reverse look-ups of 127.0.0.1 took up to {:.1f} s on this machine. torch makes them at each connection to
a TCPStore, so samples of all systems hold such stalls. The cure: "::ffff:127.0.0.1 localhost" in /etc/hosts.
"""

EXAMPLES = """\b
Examples:
  python benchmarks/restart.py --quick               every row, few faults: does it run here?
  python benchmarks/restart.py --json restart.json   all of it, with a result file
  python benchmarks/restart.py --systems seamark     without the peers
  python benchmarks/restart.py --systems torchrun,nvrx --peer-faults 20
"""


def seamark_version() -> str:
    """The version as installed, or the commit of the sources that are run."""
    try:
        return metadata.version("seamark")
    except metadata.PackageNotFoundError:
        commit = provenance.commit()["commit"]
        return f"commit {commit[:9]}" if isinstance(commit, str) else "not committed"


def seamark_rows(exceptions: int, kills: int) -> list[Row]:
    """Seamark: one rank raises, one is killed and replaced, one is killed and nobody takes its place."""
    system, alone = systems.seamark(seamark_version()), systems.seamark_alone(seamark_version())
    return [
        Row(Scenario(system, "exception", "in process", exceptions)),
        Row(Scenario(system, "kill", "replace", kills)),
        Row(Scenario(alone, "kill", "shrink", kills, systems.RANKS - 1, faults_per_job=1)),
    ]


def torchrun_rows(faults: int) -> list[Row]:
    """torchrun, which answers either fault by replacing all ranks."""
    version = metadata.version("torch")
    rows = []
    for system in (systems.torchrun(version), systems.torchrun_new_store(version)):
        rows.append(Row(Scenario(system, "exception", "replace", faults)))
        rows.append(Row(Scenario(system, "kill", "replace", faults)))
    return rows


def nvrx_rows(faults: int, environment: Path) -> list[Row]:
    """nvidia-resiliency-ext: its wrapper, which brings no dead rank back, and its launcher, which does."""
    peer, why = find_peer(environment, "nvidia-resiliency-ext", "nvidia_resiliency_ext.inprocess")
    error = why or None
    survivors, all_but_its_store = systems.RANKS - 1, range(1, systems.RANKS)
    rows = [Row(Scenario(systems.nvrx_launcher(peer), "kill", "replace", faults), error=error)]
    for wrapper in (systems.nvrx_inprocess(peer), systems.nvrx_inprocess(peer, tuned=True)):
        rows += [
            Row(Scenario(wrapper, "exception", "in process", faults), error=error),
            Row(Scenario(wrapper, "kill", "shrink", faults, survivors, all_but_its_store, 1), error=error),
        ]
    return rows


def run_rows(rows: list[Row], work: Path, seed: int, deadline: float, run: BenchmarkRun) -> None:
    """Measure one row after the other, and show how far each is."""
    with run.progress() as progress:
        for index, row in enumerate(rows):
            if row.error:
                continue
            scenario = row.scenario
            name = f"{scenario.system.name}: {scenario.fault}, {scenario.outcome}"
            task = progress.add_task(name, total=scenario.faults, last="starting")

            def on_sample(sample: Sample, task: TaskID = task) -> None:
                progress.update(task, advance=1, last=shown(sample.seconds, deadline))

            directory = work / f"{index:02d}"
            directory.mkdir()
            measure(row, directory, seed, deadline, on_sample)
            progress.stop_task(task)
            progress.update(task, last="failed" if row.error else "done")
            run.note(f"{name}: {len(row.samples)} of {scenario.faults} faults")


@click.command(epilog=EXAMPLES)
@names_option("--systems", "chosen", SYSTEMS, "Systems to run")
@click.option(
    "--exceptions",
    type=click.IntRange(1),
    show_default=str(FULL["exceptions"]),
    help="Exceptions under Seamark.",
)
@click.option(
    "--kills",
    type=click.IntRange(1),
    show_default=str(FULL["kills"]),
    help="Kills under Seamark.",
)
@click.option(
    "--peer-faults",
    type=click.IntRange(1),
    show_default=str(FULL["peer_faults"]),
    help="Faults in each row of a peer.",
)
@click.option("--quick", is_flag=True, help="Few faults: 5 exceptions, 3 kills, 1 in each row of a peer.")
@click.option("--seed", default=0, show_default=True, help="Decides on victims and pauses between faults.")
@deadline_option
@peer_env_option("nvidia-resiliency-ext")
@json_option
@work_dir_option
def main(
    chosen: tuple[str, ...],
    exceptions: int | None,
    kills: int | None,
    peer_faults: int | None,
    quick: bool,
    seed: int,
    deadline: float,
    peer_env: Path,
    json_path: Path | None,
    work_dir: Path | None,
) -> None:
    """Time from a fault to the first collective of the last rank, of Seamark and its peers.

    Each system runs the same loop on 4 ranks over Gloo; one rank is made to raise, or is killed, again and
    again. Nothing is left running, after Ctrl-C neither.
    """
    counts = QUICK if quick else FULL
    exceptions, kills = exceptions or counts["exceptions"], kills or counts["kills"]
    peer_faults = peer_faults or counts["peer_faults"]
    run = BenchmarkRun("restart", seed, json_path)
    rows: list[Row] = []
    with run.measuring(), work_directory(work_dir) as work:
        with run.preparing():
            look_up = run.facts["slowest_reverse_lookup_seconds"] = provenance.slowest_reverse_lookup()
            rows += seamark_rows(exceptions, kills) if "seamark" in chosen else []
            rows += torchrun_rows(peer_faults) if "torchrun" in chosen else []
            rows += nvrx_rows(peer_faults, peer_env) if "nvrx" in chosen else []
        if look_up > STALLED_LOOK_UP:
            run.console.print(STALLED.format(look_up), style="yellow")
        rows.sort(key=lambda row: (row.scenario.fault, row.scenario.world_after))
        run_rows(rows, work, seed, deadline, run)
    if work_dir is None and any(row.error for row in rows):
        run.console.print("Run again with --work-dir DIR to keep the logs.")
    method = {"settle_seconds": SETTLE, "deadline_seconds": deadline, "ranks": systems.RANKS}
    run.finish(table_of(rows, deadline), {**method, "rows": [record_of(row) for row in rows]})


if __name__ == "__main__":
    main()
