"""``seamark status``: how the daemons, nodes, jobs and ranks of a suite are, in one picture.

``assess`` turns the two daemons' answers into rows and an exit code and does nothing else; asking and printing stand
apart from it. What jobs wrote reaches the terminal only through ``plain``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from seamark.protocol.codec import ProtocolError, Reason
from seamark.protocol.keys import Key
from seamark.protocol.messages import (
    REPLICAS,
    CoordinatorStatus,
    DatasetStatus,
    FailureEvent,
    GroupMember,
    GroupStatus,
    JobStatus,
    LighthouseStatus,
    MemberStatus,
    StatusRequest,
)
from seamarkd.cli.exit_codes import CONFIGURATION, FAILED, SUCCEEDED, UNREACHABLE
from seamarkd.cli.operator import Operator, RefusedError, UnreachableError
from seamarkd.cli.supervisor import NotRunningError, Supervisor
from seamarkd.coordinator.job import ENDED, first_line
from seamarkd.lighthouse.nodes import LOST_BEATS
from seamarkd.paths import state_directory
from seamarkd.settings import Settings, SettingsError, load
from seamarkd.standalone import ADDRESS_FILE, lighthouse_beside, serving

ASK_TIMEOUT = 2.0
REDRAW_INTERVAL = 1.0
MEMBERS_SHOWN = 20
ENDED_SHOWN = 10
LATE = 0.5
"""Seconds by which a lighthouse is late that finds lost hosts noticeably later."""
RECENT = 300.0
"""Seconds for which something that was refused is shown in red."""
CLOCKS = frozenset({"uptime", "beat_age", "running_for", "lateness", "dropped_ago", "refused_ago"})
"""Fields that differ between any two answers: no change that anybody would want a line for."""

REFUSALS = {
    "unknown_key": "connections with a key that nobody knows",
    "revoked_key": "connections and messages with a revoked key",
    "not_allowed": "messages that are not their sender's to send",
    "other_node": "messages in the name of another node",
}
"""What daemons count, in words."""

Answer = TypeVar("Answer", CoordinatorStatus, LighthouseStatus)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table; ``bad`` rows are red."""

    cells: tuple[str, ...]
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Replicas:
    """The replica groups of a job: what their quorum waits for or was, the failed ones first, and how many more."""

    sentence: str
    rows: list[Row]
    more: int


@dataclass(slots=True)
class Picture:
    """What is shown. ``problems`` are the sentences behind an exit code that is not 0; ``notes`` change no code."""

    code: int = SUCCEEDED
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    daemons: list[Row] = field(default_factory=list)
    nodes: list[Row] = field(default_factory=list)
    jobs: list[Row] = field(default_factory=list)
    members: dict[str, list[Row]] = field(default_factory=dict)
    more: dict[str, int] = field(default_factory=dict)
    """By job: how many of its members are not among the rows."""
    ended: int = 0
    """How many ended jobs are not among the rows."""
    replicas: dict[str, Replicas] = field(default_factory=dict)
    datasets: list[Row] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """Sentences that alarm nobody."""
    alone: dict[str, Alone] = field(default_factory=dict)
    """Where no suite runs: the suites that standalone jobs have for themselves, by job."""


@dataclass(frozen=True, slots=True)
class Alone:
    """The suite of one standalone job."""

    coordinator: CoordinatorStatus | str
    lighthouse: LighthouseStatus | str
    picture: Picture


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the daemons' answers as JSON.")
@click.option("--watch", is_flag=True, help="Draw again every second, until Ctrl-C; a JSON line per change in a pipe.")
@click.option("--verbose", is_flag=True, help="Also the daemons' versions and epochs.")
@click.option("--config", type=click.Path(path_type=Path), help="The configuration file.")
def status(as_json: bool, watch: bool, verbose: bool, config: Path | None) -> int:
    """Shows the daemons, nodes, jobs, ranks and replica groups of a suite.

    Where no suite runs on this host, and its addresses are this host's, it shows the standalone jobs that run.

    \b
    Exit codes:
      0   all is well
      1   something needs a look: a daemon or node is silent, a job waits, a rank or replica is lacking
      2   neither the coordinator nor the lighthouse answers, or no suite runs here, nor a standalone job

    \b
    Examples:
      seamark status
      seamark status --watch
      seamark status --json | jq .problems
    """
    try:
        settings = load(config, os.environ, {})
    except SettingsError as error:
        click.echo(f"seamark: {error}", err=True)
        return CONFIGURATION
    console = Console()
    if watch:
        _watch(settings, console, verbose=verbose, as_json=as_json or not console.is_terminal)
    coordinator, lighthouse = ask(settings)
    picture = look(settings, coordinator, lighthouse)
    if as_json:
        click.echo(json.dumps(data(coordinator, lighthouse, picture), indent=2))
    else:
        console.print(draw(picture, verbose=verbose))
    return picture.code


def look(settings: Settings, coordinator: CoordinatorStatus | str, lighthouse: LighthouseStatus | str) -> Picture:
    """The picture of the configured suite; of the standalone jobs where none runs on this host."""
    if isinstance(coordinator, str) and isinstance(lighthouse, str) and _runs_nowhere(settings):
        home = state_directory() / "standalone"
        serve = {path.parent.name: serving(path.parent) for path in sorted(home.glob(f"*/{ADDRESS_FILE}"))}
        return without_suite({job: _ask_both(at, lighthouse_beside(at), None) for job, at in serve.items() if at})
    return assess(coordinator, lighthouse, exposed(settings))


def _runs_nowhere(settings: Settings) -> bool:
    """Whether the suite would be on this host, and is not: nothing of it was started."""
    here = all(map(on_loopback, map(connectable, (settings.coordinator.address, settings.lighthouse.address))))
    if not here:
        return False
    try:
        with Supervisor(settings.run_directory) as supervisor:
            supervisor.pid()
    except NotRunningError:
        return True
    return False


def without_suite(jobs: Mapping[str, tuple[CoordinatorStatus | str, LighthouseStatus | str]]) -> Picture:
    """The picture of a host on which no suite runs.

    Args:
        jobs: the answers of the suites that standalone jobs have for themselves, by job.
    """
    alone = {job: Alone(*answers, assess(*answers)) for job, answers in jobs.items()}
    if alone:
        code = max(one.picture.code for one in alone.values())
        problems = [f"{job}: {problem}" for job, one in alone.items() for problem in one.picture.problems]
        return Picture(code, problems, remarks=["no suite runs on this host"], alone=alone)
    text = "no suite runs on this host, nor a standalone job: seamark up starts a suite"
    return Picture(UNREACHABLE, [text], remarks=[text])


def ask(settings: Settings) -> tuple[CoordinatorStatus | str, LighthouseStatus | str]:
    """Both daemons' answers, asked at the same time; in place of one that did not come, the reason."""
    return _ask_both(settings.coordinator.address, settings.lighthouse.address, settings.key("operator"))


def _ask_both(
    coordinator: str, lighthouse: str, key: Key | None
) -> tuple[CoordinatorStatus | str, LighthouseStatus | str]:
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask_one, coordinator, CoordinatorStatus, key=key)
        second = pool.submit(ask_one, lighthouse, LighthouseStatus, key=key)
        return first.result(), second.result()


def ask_one(address: str, answer: type[Answer], timeout: float = ASK_TIMEOUT, key: Key | None = None) -> Answer | str:
    """The status of the daemon at this address, or why there is none, after ``timeout`` seconds at the latest."""
    with Operator(connectable(address), key) as operator:
        try:
            return operator.ask(StatusRequest, answer, timeout)
        except UnreachableError:
            return f"no answer at {address} within {timeout:g} s{operator.doubt}"
        except RefusedError as error:
            return f"{address}: {error}"
        except ProtocolError as error:
            return f"{address}: {error}"


def assess(
    coordinator: CoordinatorStatus | str, lighthouse: LighthouseStatus | str, exposed: list[str] | None = None
) -> Picture:
    """The picture of a suite.

    Args:
        coordinator, lighthouse: the answers, or the reason why there is none.
        exposed: addresses that anybody on the network can reach.
    """
    picture = Picture()
    for address in exposed or []:
        picture.notes.append(f"{address} is open to the network without keys: whoever reaches it can run programs")
    picture.daemons = [_daemon(picture, "lighthouse", lighthouse), _daemon(picture, "coordinator", coordinator)]
    if isinstance(lighthouse, LighthouseStatus):
        _refusals(picture, "the lighthouse", lighthouse.dropped, lighthouse.dropped_ago)
        if lighthouse.lateness > LATE:
            late = duration(lighthouse.lateness)
            picture.notes.append(
                f"the lighthouse ran {late} late in the last seconds: its host is busy, and losses are found later"
            )
    _nodes(picture, coordinator, lighthouse)
    if isinstance(coordinator, CoordinatorStatus):
        _refusals(picture, "the coordinator", coordinator.dropped, coordinator.dropped_ago)
        for node in coordinator.nodes:
            _refusals(picture, f"the agent of node {node.node}", node.refused, node.refused_ago)
        waiting = lighthouse.waiting if isinstance(lighthouse, LighthouseStatus) else {}
        _jobs(picture, coordinator, waiting)
    if isinstance(lighthouse, LighthouseStatus):
        for group in lighthouse.groups:
            if group.group == REPLICAS:
                picture.replicas[group.job] = _replicas(picture, group)
    if isinstance(coordinator, str) and isinstance(lighthouse, str):
        picture.code = UNREACHABLE
    elif picture.problems:
        picture.code = FAILED
    return picture


def _refusals(picture: Picture, who: str, counts: Mapping[str, int], ago: Mapping[str, float]) -> None:
    """What a daemon did not take, in sentences: what was no message, and what was not its sender's to send.

    In red for a while: of what has long ceased nobody has to be alarmed.
    """
    unreadable = {reason: count for reason, count in counts.items() if reason in set(Reason)}
    refused = {reason: count for reason, count in counts.items() if reason in REFUSALS}
    for found, sentence in (
        (unreadable, "{} dropped frames that were no message, the last {} ago: {}"),
        (refused, "{} refused, the last {} ago: {}: its log names the peers"),
    ):
        if found:
            last = min(ago.get(reason, 0.0) for reason in found)
            what = ", ".join(f"{count} {REFUSALS.get(reason, reason)}" for reason, count in sorted(found.items()))
            (picture.notes if last < RECENT else picture.remarks).append(sentence.format(who, duration(last), what))


def _daemon(picture: Picture, role: str, answer: CoordinatorStatus | LighthouseStatus | str) -> Row:
    if isinstance(answer, str):
        picture.problems.append(f"the {role} is unreachable ({answer}): start it with seamark up")
        return Row((role, "unreachable", "", "", "", "", answer), bad=True)
    trouble = answer.trouble if isinstance(answer, CoordinatorStatus) else answer.sentence
    if trouble:
        picture.problems.append(f"the {role}: {trouble}")
    cells = (role, "up", str(answer.pid), duration(answer.uptime), answer.software, str(answer.epoch), trouble)
    return Row(cells, bad=bool(trouble))


def _nodes(picture: Picture, coordinator: CoordinatorStatus | str, lighthouse: LighthouseStatus | str) -> None:
    places = {} if isinstance(coordinator, str) else {node.node: node for node in coordinator.nodes}
    health = {} if isinstance(lighthouse, str) else {node.node: node for node in lighthouse.nodes}
    for name in sorted(places.keys() | health.keys()):
        slots = f"{places[name].used}/{places[name].slots}" if name in places else "?"
        beat = health.get(name)
        if beat is None:
            unknown = isinstance(lighthouse, str)
            word = "not seen: the lighthouse is unreachable" if unknown else "not beating"
            if not unknown:
                picture.problems.append(f"node {name} sends no heartbeat to the lighthouse")
            picture.nodes.append(Row((name, slots, "", word), bad=True))
            continue
        assert not isinstance(lighthouse, str)
        silent = beat.beat_age > LOST_BEATS * lighthouse.beat_interval
        word = beat.verdict or ("silent" if silent else "")
        if word:
            picture.problems.append(f"node {name}: {word}, last beat {duration(beat.beat_age)} ago")
        draining = places[name].draining if name in places else ""
        unhealthy = places[name].unhealthy if name in places else ""
        if unhealthy:
            picture.problems.append(f"node {name} takes no more jobs: {unhealthy}")
        usual = f"drains: {draining}" if draining else f"takes no more jobs: {unhealthy}" if unhealthy else "ok"
        picture.nodes.append(Row((name, slots, duration(beat.beat_age), word or usual), bad=bool(word or unhealthy)))


def _jobs(picture: Picture, coordinator: CoordinatorStatus, waiting: dict[str, str]) -> None:
    living = [job for job in coordinator.jobs if job.state not in ENDED]
    ended = [job for job in coordinator.jobs if job.state in ENDED]
    picture.ended = max(0, len(ended) - ENDED_SHOWN)
    for job in [*living, *ended[-ENDED_SHOWN:]]:
        sentence = job.result or job.sentence
        if job.state not in ENDED:
            sentence = waiting.get(job.job) or job.sentence
        trouble = _trouble(job, sentence)
        if trouble:
            picture.problems.append(trouble)
        ranks = f"{job.alive}/{job.world_size}"
        counts = (str(max(job.iteration, 0)), str(job.restarts), ranks, str(job.step))
        picture.jobs.append(Row((job.job, job.state.lower(), *counts, sentence), bad=bool(trouble)))
        picture.datasets += [_dataset(job.job, one) for one in job.datasets]
    for job in living:
        members = sorted(coordinator.members.get(job.job, []), key=_worst_first)
        picture.members[job.job] = [_member(member) for member in members[:MEMBERS_SHOWN]]
        picture.more[job.job] = max(0, len(members) - MEMBERS_SHOWN)


def _dataset(job: str, one: DatasetStatus) -> Row:
    part = f"{100 * one.done / one.total:.1f} %" if one.total else ""
    counts = (one.done, one.leased, one.quarantined, one.failed, one.skipped)
    cells = (job, one.name, str(one.total), part, *(str(count) for count in counts))
    return Row(cells, bad=one.quarantined + one.failed > 0)


def _trouble(job: JobStatus, sentence: str) -> str:
    if job.state == "PENDING":
        return f"job {job.job} waits to be placed: {sentence}"
    if job.state == "RUNNING" and job.alive < job.world_size:
        return f"job {job.job} runs with {job.alive} of {job.world_size} ranks: {sentence}"
    return ""


def _worst_first(member: MemberStatus) -> tuple[bool, int, int]:
    return member.alive, member.step, member.rank


def _member(member: MemberStatus) -> Row:
    state = "alive" if member.alive else "dead"
    step = str(member.step) if member.step >= 0 else "none yet"
    return Row((str(member.rank), member.node, str(member.pid), state, step), bad=not member.alive)


def _replicas(picture: Picture, group: GroupStatus) -> Replicas:
    for event in group.failures:
        if event.failure.cause.kind != "left":
            text = first_line(event.failure.cause.text)
            picture.problems.append(f"job {group.job}: {event.failure.member} {event.failure.kind}: {text}")
    rows = [*map(_failed_replica, group.failures), *map(_replica, group.members)]
    return Replicas(group.reason, rows[:MEMBERS_SHOWN], max(0, len(rows) - MEMBERS_SHOWN))


def _failed_replica(event: FailureEvent) -> Row:
    failure = event.failure
    left = failure.cause.kind == "left"
    return Row((failure.member, "", "", "left" if left else failure.kind, first_line(failure.cause.text)), bad=not left)


def _replica(member: GroupMember) -> Row:
    step = str(member.step) if member.step >= 0 else "none yet"
    return Row((member.member, duration(member.beat_age), step, "joined" if member.joined else "alive", ""))


def exposed(settings: Settings) -> list[str]:
    """The addresses that reach beyond this host, where the configuration allows that."""
    if not settings.security.insecure or settings.keys_directory is not None:
        return []
    addresses = (settings.lighthouse.address, settings.lighthouse.events, settings.coordinator.address)
    return [address for address in addresses if not on_loopback(address)]


def connectable(address: str) -> str:
    """Where to connect for a daemon that listens at this address: a wildcard is this host."""
    for wildcard in ("tcp://*:", "tcp://0.0.0.0:"):
        if address.startswith(wildcard):
            return f"tcp://127.0.0.1:{address.removeprefix(wildcard)}"
    return address


def on_loopback(address: str) -> bool:
    """Whether an address can be reached from its own host alone."""
    if not address.startswith("tcp://"):
        return True
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def data(coordinator: CoordinatorStatus | str, lighthouse: LighthouseStatus | str, picture: Picture) -> dict[str, Any]:
    """The answers as data: null for a daemon that gave none."""
    return {
        "code": picture.code,
        "problems": picture.problems,
        "notes": picture.notes,
        "remarks": picture.remarks,
        "coordinator": None if isinstance(coordinator, str) else msgspec.to_builtins(coordinator),
        "lighthouse": None if isinstance(lighthouse, str) else msgspec.to_builtins(lighthouse),
        "standalone": {job: data(one.coordinator, one.lighthouse, one.picture) for job, one in picture.alone.items()},
    }


def draw(picture: Picture, *, verbose: bool = False) -> Group:
    """The picture for a terminal."""
    parts: list[Table | Text | Group] = [Text(plain(note), style="bold red") for note in picture.notes]
    parts += [Text(plain(remark)) for remark in picture.remarks]
    hidden = () if verbose else (4, 5)
    names = ("daemon", "", "pid", "up for", "version", "epoch", "trouble")
    if picture.daemons:
        parts.append(_table(names, picture.daemons, hidden))
    if picture.nodes:
        parts.append(_table(("node", "slots", "last beat", "verdict"), picture.nodes))
    if picture.jobs:
        parts.append(_table(("job", "state", "iteration", "restarts", "ranks", "step", ""), picture.jobs))
    if picture.datasets:
        columns = ("job", "data set", "shards", "", "done", "leased", "quarantined", "failed", "batches left out")
        parts.append(_table(columns, picture.datasets))
    if picture.ended:
        parts.append(Text(f"  and {picture.ended} more that ended", style="dim"))
    for job, rows in picture.members.items():
        if rows:
            parts.append(Text(f"\nranks of {plain(job)}, worst first", style="bold"))
            parts.append(_table(("rank", "node", "pid", "", "step"), rows))
        if picture.more[job]:
            parts.append(Text(f"  and {picture.more[job]} more", style="dim"))
    for job, replicas in picture.replicas.items():
        parts.append(Text(f"\nreplicas of {plain(job)}: {plain(replicas.sentence)}", style="bold"))
        if replicas.rows:
            parts.append(_table(("replica", "last beat", "step", "", ""), replicas.rows))
        if replicas.more:
            parts.append(Text(f"  and {replicas.more} more", style="dim"))
    for job, one in picture.alone.items():
        parts += [Text(f"\nstandalone job {plain(job)}", style="bold"), draw(one.picture, verbose=verbose)]
    return Group(*parts)


def _table(names: tuple[str, ...], rows: list[Row], hidden: tuple[int, ...] = ()) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for at, name in enumerate(names):
        if at not in hidden:
            table.add_column(name, overflow="fold")
    for row in rows:
        cells = [Text(plain(cell)) for at, cell in enumerate(row.cells) if at not in hidden]
        table.add_row(*cells, style="red" if row.bad else None)
    return table


def plain(text: str) -> str:
    """Text from elsewhere, with what would steer a terminal (or can't be encoded) written as an escape."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def duration(seconds: float) -> str:
    """Seconds, for people."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for limit, unit, name in ((120, 1, "s"), (7_200, 60, "min"), (172_800, 3_600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.0f} d"


def unclocked(value: Any) -> Any:
    """The same data without the fields that only say how late it is."""
    if isinstance(value, dict):
        return {key: unclocked(item) for key, item in value.items() if key not in CLOCKS}
    if isinstance(value, list):
        return [unclocked(item) for item in value]
    return value


def _lengths(picture: Picture) -> dict[str, int]:
    """In place of sentences that say how long ago something was: when there is another one."""
    return {name: len(getattr(picture, name)) for name in ("problems", "notes", "remarks")}


def _watch(settings: Settings, console: Console, *, verbose: bool, as_json: bool) -> NoReturn:
    seen: Any = None
    live = None if as_json else Live(console=console, auto_refresh=False, vertical_overflow="crop")
    try:
        if live is not None:
            live.start()
        while True:
            next_at = time.monotonic() + REDRAW_INTERVAL
            answers = ask(settings)
            picture = look(settings, *answers)
            if live is not None:
                live.update(draw(picture, verbose=verbose), refresh=True)
            else:
                now = data(*answers, picture)
                if (stripped := unclocked({**now, **_lengths(picture)})) != seen:
                    seen = stripped
                    click.echo(json.dumps(now))
            time.sleep(max(0.0, next_at - time.monotonic()))
    finally:
        if live is not None:
            live.stop()
