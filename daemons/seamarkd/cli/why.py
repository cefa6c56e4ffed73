"""``seamark why JOB``: the incident records of a job, as a timeline a person reads."""

from __future__ import annotations

import os
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from seamark.protocol.messages import Failure, FollowJob, Incident, Incidents, IncidentsRequest, JobStatus
from seamarkd.cli.operator import Operator, RefusedError, UnreachableError
from seamarkd.cli.timeline import Segment, segments, total
from seamarkd.coordinator.job import first_line
from seamarkd.coordinator.manifest import read
from seamarkd.paths import state_directory
from seamarkd.settings import Settings, load
from seamarkd.standalone import ADDRESS_FILE

BAR_WIDTH = 24
ASK_TIMEOUT = 2.0


@click.command()
@click.argument("job", required=False)
@click.option(
    "--incident", "number", type=click.IntRange(min=1), help="Only this incident, with every rank's own times."
)
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON.")
@click.option("--config", type=click.Path(path_type=Path), help="The suite's settings; by default $SEAMARK_CONFIG.")
def why(job: str | None, number: int | None, as_json: bool, config: Path | None) -> int:
    """Shows what happened to JOB: who failed, and what each phase of the restart cost, in ms.

    JOB is a standalone job or one of the suite, and may still be running; it defaults to the standalone job that was
    started last.

    \b
    Examples:
      seamark why
      seamark why train_bytes-3f2a --incident 2
    """
    home = state_directory() / "standalone"
    if job is None:
        directory = _latest(home)
        if directory is None:
            raise click.UsageError(f"which JOB? There is no standalone job in {home}")
        job = directory.name
    try:
        summary, incidents = _of(job, config)
    except RefusedError as error:
        known = ", ".join(sorted(path.name for path in home.glob("*") if path.is_dir())) or "none"
        raise click.UsageError(f"{error}; standalone jobs in {home}: {known}") from None
    if number is not None:
        incidents = [incident for incident in incidents if incident.number == number]
        if not incidents:
            raise click.UsageError(f"job {job} has no incident {number}")
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(incidents)))
        return 0
    show(Console(), job, summary, incidents, every_rank=number is not None)
    return 0


def incidents_of(job: str, config: Path | None) -> list[Incident]:
    """What happened to a job, standalone or of the suite, from its coordinator or from what that left.

    Raises:
        RefusedError: there is no such job.
        SettingsError: the configuration is invalid.
    """
    return _of(job, config)[1]


def _of(job: str, config: Path | None) -> tuple[str, list[Incident]]:
    directory = state_directory() / "standalone" / job
    if not (directory / "manifest.db").exists():
        return _of_the_suite(load(config, os.environ, {}), job)
    address = directory / ADDRESS_FILE
    running = _ask(address.read_text(), job) if address.exists() else None
    return running or _read(directory / "manifest.db", job)


def _of_the_suite(settings: Settings, job: str) -> tuple[str, list[Incident]]:
    manifest = settings.state_directory / "coordinator.db"
    running = _ask(settings.coordinator.address, job)
    if running is None and not manifest.exists():
        raise RefusedError(f"there is no job {job}: no coordinator answers, and {manifest} does not exist")
    return running or _read(manifest, job)


def _ask(address: str, job: str) -> tuple[str, list[Incident]] | None:
    """From the coordinator; None if nobody answers."""
    try:
        with Operator(address) as operator:
            status = operator.ask(lambda n: FollowJob(n, job), JobStatus, ASK_TIMEOUT)
            answer = operator.ask(lambda n: IncidentsRequest(n, job), Incidents, ASK_TIMEOUT)
    except UnreachableError:
        return None
    return f"{status.state.lower()}: {status.sentence}", answer.incidents


def _read(manifest: Path, job: str) -> tuple[str, list[Incident]]:
    """From the manifest that a coordinator left."""
    record, incidents = read(manifest, job)
    if record is None:
        raise RefusedError(f"there is no job {job} in {manifest}")
    return (f"{record.state.lower()}: {record.result}" if record.result else record.state.lower()), incidents


def show(console: Console, job: str, summary: str, incidents: list[Incident], *, every_rank: bool) -> None:
    """Prints the incidents of a job."""
    times = "once" if len(incidents) == 1 else f"{len(incidents)} times"
    console.print(
        f"[bold]{escape(job)}[/] {escape(summary)}; interrupted {times if incidents else 'never'}", highlight=False
    )
    for incident in incidents:
        _show_incident(console, incident, every_rank=every_rank)


def headline(incident: Incident) -> str:
    """Who failed and why, in one line."""
    return what(incident.failures[0])


def what(failure: Failure) -> str:
    """What happened to whom, in a line; a rank that joined has not failed."""
    text = first_line(failure.cause.text)
    return text if failure.cause.kind == "joined" else f"{who(failure)} {failure.kind}: {text}"


def who(failure: Failure) -> str:
    """A failure's subject, for people."""
    if failure.rank >= 0:
        return f"rank {failure.rank} on {failure.node}"
    return "the TCPStore service" if failure.cause.kind == "store" else failure.member


def _show_incident(console: Console, incident: Incident, *, every_rank: bool) -> None:
    rows = segments(incident)
    whole = total(rows)
    console.print()
    console.print(f"[bold]#{incident.number}[/] {escape(headline(incident))}", highlight=False)
    culprit = incident.failures[0]
    for other in incident.failures[1:]:
        console.print(f"   also {what(other)}", markup=False, highlight=False)
    for other in incident.consequences:
        console.print(f"   consequence: {who(other)}: {first_line(other.cause.text)}", markup=False, highlight=False)
    if incident.next_iteration < 0:
        console.print("   ended by a restart of all workers, or by the job's end", highlight=False)
        return
    console.print(
        f"   seen by {culprit.detector}; iteration {incident.iteration} → {incident.next_iteration}, "
        f"{len(incident.members)} ranks, [bold]{whole * 1e3:.1f} ms[/] in all",
        highlight=False,
    )
    console.print(_picture(rows, whole))
    if every_rank:
        console.print(_ranks(incident))


def _picture(rows: list[Segment], whole: float) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 2))
    table.add_column("phase", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("at", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("last", no_wrap=True)
    for row in rows:
        if row.end is None:
            table.add_row(row.name, "", "", Text("not observed", style="dim"), "")
            continue
        left = min(int(BAR_WIDTH * row.begin / whole), BAR_WIDTH - 1) if whole else 0
        right = round(BAR_WIDTH * row.end / whole) if whole else 0
        bar = " " * left + "█" * max(1, right - left)
        table.add_row(
            row.name,
            f"{(row.end - row.begin) * 1e3:.1f}",
            f"{row.end * 1e3:.1f}",
            Text(bar.ljust(BAR_WIDTH), style="cyan"),
            "" if row.rank is None else f"rank {row.rank}",
        )
    return table


def _ranks(incident: Incident) -> Table:
    culprit = incident.failures[0]
    start = culprit.occurred_at if culprit.occurred_at >= 0 else culprit.detected_at
    table = Table(box=None, padding=(0, 1, 0, 2), title="every rank, in ms", title_justify="left")
    for name in ("rank", "forked", "told", "aborted", "left", "joined", "answered", "group", "step"):
        table.add_column(name, justify="right")
    for rank, member in enumerate(incident.members):
        stamps = incident.stamps.get(member.member)
        forked = incident.started.get(member.member, -1.0)
        times = [forked]
        if stamps is not None:
            times += [stamps.told, stamps.aborted, stamps.left, stamps.joined]
            times += [stamps.answered, stamps.group_ready, stamps.first_step]
        table.add_row(str(rank), *("-" if time < 0 else f"{(time - start) * 1e3:.1f}" for time in times))
    return table


def _latest(home: Path) -> Path | None:
    manifests = sorted(home.glob("*/manifest.db"), key=lambda path: path.stat().st_mtime)
    return manifests[-1].parent if manifests else None
