"""``seamark why JOB``: what happened to a job, and what was decided about it, as a person reads it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click
import msgspec
from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from seamark.protocol.keys import Key
from seamark.protocol.messages import (
    Decisions,
    DecisionsRequest,
    Failure,
    FollowJob,
    Incident,
    Incidents,
    IncidentsRequest,
    JobStatus,
    ShardDecision,
)
from seamarkd.cli.operator import Operator, RefusedError, UnreachableError
from seamarkd.cli.status import connectable, plain
from seamarkd.cli.timeline import Segment, segments, total
from seamarkd.coordinator.books import reading
from seamarkd.coordinator.job import first_line
from seamarkd.paths import job_directory, state_directory
from seamarkd.settings import Settings, load
from seamarkd.standalone import over, serving

BAR_WIDTH = 24
ASK_TIMEOUT = 2.0
DECISIONS_SHOWN = 20


class Story(Struct):
    """What is known of a job."""

    summary: str
    incidents: list[Incident]
    decisions: list[ShardDecision]
    now: float
    """Of the clock that the decisions' times are of."""


class Target(Struct, frozen=True):
    """What of a job is asked about."""

    job: str
    rank: int | None = None
    dataset: str = ""
    shard: int = -1


class TargetParam(click.ParamType[Target]):
    """``JOB``, ``JOB/RANK``, ``JOB/DATASET`` or ``JOB/DATASET/SHARD``."""

    name = "JOB[/RANK | /DATASET[/SHARD]]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Target:
        """The target.

        Raises:
            click.BadParameter: it is none.
        """
        if isinstance(value, Target):
            return value
        job, *rest = str(value).split("/")
        match rest:
            case []:
                return Target(job)
            case [rank] if rank.isdecimal():
                return Target(job, rank=int(rank))
            case [dataset]:
                return Target(job, dataset=dataset)
            case [dataset, shard] if shard.isdecimal():
                return Target(job, dataset=dataset, shard=int(shard))
            case _:
                pass
        return self.fail(f"{value!r}: write JOB, JOB/RANK, JOB/DATASET or JOB/DATASET/SHARD", param, ctx)


@click.command()
@click.argument("target", required=False, type=TargetParam())
@click.option(
    "--incident", "number", type=click.IntRange(min=1), help="Only this incident, with every rank's own times."
)
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON.")
@click.option("--config", type=click.Path(path_type=Path), help="The suite's settings; by default $SEAMARK_CONFIG.")
def why(target: Target | None, number: int | None, as_json: bool, config: Path | None) -> int:
    """Shows what happened to a job: who failed, what each phase of the restart cost in ms, how its shards were retried.

    The job is a standalone one or one of the suite, and may still be running; without TARGET it is the standalone job
    that was started last.

    \b
    Examples:
      seamark why
      seamark why train_bytes-3f2a --incident 2
      seamark why infer-41c7/3              what happened to rank 3
      seamark why infer-41c7/inputs/12      to shard 12 of data set inputs
    """
    home = state_directory() / "standalone"
    if target is None:
        directory = _latest(home)
        if directory is None:
            raise click.UsageError(f"which JOB? There is no standalone job in {home}")
        target = Target(directory.name)
    try:
        story = _of(target, config)
    except RefusedError as error:
        known = ", ".join(sorted(path.name for path in home.glob("*") if path.is_dir())) or "none"
        raise click.UsageError(f"{error}; standalone jobs in {home}: {known}") from None
    _narrow(story, target, number)
    if as_json:
        records = {"incidents": story.incidents, "decisions": story.decisions}
        click.echo(msgspec.json.format(msgspec.json.encode(records)))
        return 0
    console = Console()
    if not target.dataset:
        show(console, target.job, story.summary, story.incidents, every_rank=number is not None)
    show_decisions(console, target, story.decisions, story.now)
    return 0


def incidents_of(job: str, config: Path | None) -> list[Incident]:
    """What happened to a job, standalone or of the suite, from its coordinator or from what that left.

    Raises:
        RefusedError: there is no such job.
        SettingsError: the configuration is invalid.
    """
    return _of(Target(job), config).incidents


def _of(target: Target, config: Path | None) -> Story:
    directory = job_directory(target.job)
    if not (directory / "manifest.db").exists():
        return _of_the_suite(load(config, os.environ, {}), target)
    address = serving(directory)
    running = _ask(address, target) if address else None
    return running or _read(directory / "manifest.db", target, alone=True)


def _narrow(story: Story, target: Target, number: int | None) -> None:
    if number is not None:
        story.incidents = [incident for incident in story.incidents if incident.number == number]
        story.decisions = []
        if not story.incidents:
            raise click.UsageError(f"job {target.job} has no incident {number}")
    if target.dataset:
        story.incidents = []
    if target.rank is not None:
        member = f"{target.job}/{target.rank}"
        story.incidents = [one for one in story.incidents if _concerns(one, member)]
        story.decisions = [one for one in story.decisions if one.member == member]


def _concerns(incident: Incident, member: str) -> bool:
    return any(failure.member == member for failure in (*incident.failures, *incident.consequences))


def _of_the_suite(settings: Settings, target: Target) -> Story:
    manifest = settings.state_directory / "coordinator.db"
    running = _ask(connectable(settings.coordinator.address), target, settings.key("operator"))
    if running is None and not manifest.exists():
        raise RefusedError(f"there is no job {target.job}: no coordinator answers, and {manifest} does not exist")
    return running or _read(manifest, target)


def _ask(address: str, target: Target, key: Key | None = None) -> Story | None:
    """From the coordinator; None if nobody answers."""
    job = target.job
    try:
        with Operator(address, key) as operator:
            status = operator.ask(lambda n: FollowJob(n, job), JobStatus, ASK_TIMEOUT)
            answer = operator.ask(lambda n: IncidentsRequest(n, job), Incidents, ASK_TIMEOUT)
            about = operator.ask(
                lambda n: DecisionsRequest(n, job, target.dataset, target.shard), Decisions, ASK_TIMEOUT
            )
    except UnreachableError:
        return None
    return Story(f"{status.state.lower()}: {status.sentence}", answer.incidents, about.decisions, about.now)


def _read(manifest: Path, target: Target, *, alone: bool = False) -> Story:
    """From the manifest that a coordinator left; of a standalone job (``alone``) nobody goes on without it."""
    with reading(manifest) as books:
        record = books.job(target.job)
        if record is None:
            raise RefusedError(f"there is no job {target.job} in {manifest}")
        record = over(record, time.monotonic()) if alone else record
        decisions = [
            one
            for one in books.decisions(target.job)
            if target.dataset in ("", one.dataset) and target.shard in (-1, one.shard)
        ]
        summary = f"{record.state.lower()}: {record.result}" if record.result else record.state.lower()
        return Story(summary, books.incidents(target.job), decisions, time.monotonic())


def show_decisions(console: Console, target: Target, decisions: list[ShardDecision], now: float) -> None:
    """Prints what was decided about shards: the latest, where one has not asked about one of them."""
    shown = decisions if target.shard >= 0 or target.rank is not None else decisions[-DECISIONS_SHOWN:]
    if not decisions:
        if target.dataset:
            what = f"shard {target.shard}" if target.shard >= 0 else "no shard"
            text = f"nothing was decided about {what} of {target.dataset}: it never failed"
            console.print(text if target.shard >= 0 else f"{what} of {target.dataset} failed", highlight=False)
        return
    console.print()
    console.print(f"[bold]shards[/]: {len(decisions)} failures, oldest first", highlight=False)
    if len(shown) < len(decisions):
        console.print(f"  the last {len(shown)} of {len(decisions)}; the others: seamark why {target.job} --json")
    table = Table(box=None, padding=(0, 1, 0, 2))
    for name in ("ago", "shard", "by", "what was done, and why"):
        table.add_column(name, no_wrap=name in ("ago", "shard"), overflow="fold")
    for one in shown:
        batch = f" batch {one.batch}" if one.batch >= 0 else ""
        where = f"{one.dataset}/{one.shard}{batch}"
        by = f"rank {one.member.rpartition('/')[2]} on {one.node}"
        cells = (f"{max(0.0, now - one.at):.1f} s", where, by, one.reason)
        table.add_row(*(Text(plain(cell)) for cell in cells))
    console.print(table)


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
        for line in _restarts_alone(incident):
            console.print(f"   {line}", markup=False, highlight=False)
        return
    console.print(
        f"   seen by {culprit.detector}; iteration {incident.iteration} → {incident.next_iteration}, "
        f"{len(incident.members)} ranks, [bold]{whole * 1e3:.1f} ms[/] in all",
        highlight=False,
    )
    console.print(_picture(rows, whole))
    if every_rank:
        console.print(_ranks(incident))


def _restarts_alone(incident: Incident) -> list[str]:
    """What followed where no quorum was answered."""
    lines = [
        f"{who(failure)} was started anew alone: forked "
        f"{max(0.0, incident.started[failure.member] - _began(failure)) * 1e3:.1f} ms after that, as seen by "
        f"{failure.detector}"
        for failure in incident.failures
        if failure.member in incident.started
    ]
    return lines or ["no restart in process followed: all workers were restarted, or this rank alone, or the job ended"]


def _began(failure: Failure) -> float:
    return failure.occurred_at if failure.occurred_at >= 0 else failure.detected_at


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
    start = _began(incident.failures[0])
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
