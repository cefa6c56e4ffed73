"""``seamark events``: what the lighthouse published, in the order of its numbers, each event once.

``Reader`` decides what is new, what is old and what was missed, and knows no socket. Where the lighthouse no longer
keeps an event, that is said: no number is left out in silence.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import click
import msgspec
import psutil
import zmq

from seamark.protocol.codec import ProtocolError, decode
from seamark.protocol.messages import (
    CompletedEvent,
    CoordinatorStatus,
    Event,
    EventBeat,
    FailureEvent,
    LighthouseStatus,
    QuorumEvent,
    RecoveredEvent,
    ReplicaQuorumEvent,
    Snapshot,
    SnapshotRequest,
    StatusRequest,
)
from seamark.protocol.sockets import connect, make_socket
from seamarkd.cli.exit_codes import CONFIGURATION
from seamarkd.cli.operator import Operator, RefusedError, UnreachableError
from seamarkd.cli.status import connectable, on_loopback, plain
from seamarkd.cli.why import what
from seamarkd.lighthouse.shell import EVENT_BEAT_TOPIC, topic
from seamarkd.settings import Settings, SettingsError, load

ASK_TIMEOUT = 2.0
POLL_MS = 1_000


@click.command()
@click.argument("job", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens from now on, until Ctrl-C.")
@click.option("--since", type=click.FloatRange(min=0), metavar="SECONDS", help="Only the last so many seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per event.")
@click.option("--config", type=click.Path(path_type=Path), help="The configuration file.")
def events(job: str | None, follow: bool, since: float | None, as_json: bool, config: Path | None) -> int:
    """Prints the failures, returns, quorums and completions of JOB, or of every job, one line each.

    \b
    Examples:
      seamark events
      seamark events train-3f2a --since 600
      seamark events -f --json
    """
    try:
        settings = load(config, os.environ, {})
    except SettingsError as error:
        click.echo(f"seamark: {error}", err=True)
        return CONFIGURATION
    local = on_this_host(settings.lighthouse.address)
    if since is not None and not local:
        raise click.UsageError("--since needs the lighthouse's clock: use it on the lighthouse's host")
    printer = Printer(as_json=as_json, local=local, not_before=time.monotonic() - since if since is not None else None)
    with Feed(settings, job, follow=follow) as feed:
        jobs = _jobs(settings, feed, job)
        reader = Reader(feed.snapshot)
        for name in jobs:
            printer.show(reader.open(name))
        while follow:
            message = feed.receive()
            if isinstance(message, EventBeat):
                printer.show(reader.beat(message, job))
            elif isinstance(message, Event):
                printer.show(reader.event(message))
    return 0


def _jobs(settings: Settings, feed: Feed, job: str | None) -> list[str]:
    try:
        with Operator(connectable(settings.coordinator.address), settings.key("operator")) as operator:
            answer = operator.ask(StatusRequest, CoordinatorStatus, ASK_TIMEOUT)
    except UnreachableError:
        if job is None:
            raise
        return [job]
    # Replica groups need no coordinator: of a job without ranks only the lighthouse knows.
    known = list(dict.fromkeys([*(status.job for status in answer.jobs), *feed.jobs()]))
    if job is None:
        return known
    if job not in known:
        raise click.UsageError(f"there is no job {job}; jobs there are: {', '.join(known) or 'none'}")
    return [job]


class Feed:
    """The lighthouse's two sockets: snapshots on request and, if wanted, the events as they happen.

    It subscribes before the first snapshot is asked for, so that nothing falls between the two.
    """

    def __init__(self, settings: Settings, job: str | None, *, follow: bool) -> None:
        key = settings.key("operator")
        self._operator = Operator(connectable(settings.lighthouse.address), key)
        self._address = settings.lighthouse.address
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = make_socket(self._context, zmq.SUB)
        if follow:
            for prefix in (topic(job), EVENT_BEAT_TOPIC) if job is not None else (b"",):
                self._socket.subscribe(prefix)
            connect(self._socket, connectable(settings.lighthouse.events), key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()
        self._context.term()
        self._operator.__exit__(None, None, None)

    def snapshot(self, job: str) -> Snapshot | None:
        """A job as the lighthouse knows it; None if it does not know it.

        Raises:
            UnreachableError: no answer.
        """
        try:
            return self._operator.ask(lambda n: SnapshotRequest(n, job), Snapshot, ASK_TIMEOUT)
        except RefusedError:
            return None
        except UnreachableError:
            sentence = f"no answer from the lighthouse at {self._address} within {ASK_TIMEOUT:g} s"
            raise UnreachableError(sentence) from None

    def jobs(self) -> list[str]:
        """The jobs that have a group at the lighthouse; none if it does not answer."""
        try:
            answer = self._operator.ask(StatusRequest, LighthouseStatus, ASK_TIMEOUT)
        except UnreachableError:
            return []
        return [group.job for group in answer.groups]

    def receive(self) -> object:
        """The next message of the subscription; None if there was none for a second, or it was no message."""
        if not self._socket.poll(POLL_MS):
            return None
        try:
            return decode(self._socket.recv_multipart()[1:])
        except ProtocolError as error:
            click.echo(f"seamark: {error}", err=True)
            return None


@dataclass(slots=True)
class Reader:
    """Puts events in order: each comes out once, and strings between them say what was missed.

    Args:
        snapshot: asks for a job's snapshot; None if the lighthouse does not know the job.
    """

    snapshot: Callable[[str], Snapshot | None]
    _at: dict[str, tuple[int, int]] = field(default_factory=dict, init=False)
    """By job: epoch and number of the last event that came out."""

    def open(self, job: str) -> list[Event | str]:
        """The history of a job."""
        answer = self.snapshot(job)
        return [] if answer is None else self._take(answer)

    def event(self, event: Event) -> list[Event | str]:
        """What comes out at this event of the subscription."""
        epoch, last = self._at.get(event.job, (0, 0))
        if (event.epoch, event.sequence) <= (epoch, last):
            return []
        if event.epoch == epoch and event.sequence == last + 1:
            self._at[event.job] = (event.epoch, event.sequence)
            return [event]
        out = self._missed(event.job, event.epoch, event.sequence - 1)
        if (event.epoch, event.sequence) > self._at.get(event.job, (0, 0)):
            out += self._gap(event.job, event.epoch, event.sequence)
            out.append(event)
        return out

    def beat(self, beat: EventBeat, only: str | None) -> list[Event | str]:
        """What comes out when the lighthouse repeats its latest numbers: the tail of what was lost."""
        out: list[Event | str] = []
        for job, latest in beat.latest.items():
            if only in (None, job) and (beat.epoch, latest) > self._at.get(job, (0, 0)):
                out += self._missed(job, beat.epoch, latest)
        return out

    def _missed(self, job: str, epoch: int, until: int) -> list[Event | str]:
        known, last = self._at.get(job, (0, 0))
        out: list[Event | str] = []
        if known and epoch != known:
            out.append(f"{job}: the lighthouse was started anew, its numbers begin again: snapshot taken")
        elif known and until > last:
            out.append(f"{job}: {numbers(last + 1, until)} missed: snapshot taken")
        try:
            answer = self.snapshot(job)
        except UnreachableError as error:
            return [*out, f"{job}: {error}"]
        if answer is not None and (answer.epoch, answer.sequence) > (known, last):
            out += self._take(answer)
        elif known != epoch:
            self._at[job] = (epoch, 0)
        return out

    def _take(self, answer: Snapshot) -> list[Event | str]:
        kept: dict[int, Event] = {event.sequence: event for event in answer.failures}
        kept |= {event.sequence: event for event in answer.quorums}
        kept |= {event.sequence: event for event in answer.recovered}
        if answer.completed and answer.sequence not in kept:
            group = answer.quorums[-1].group if answer.quorums else ""
            kept[answer.sequence] = CompletedEvent(answer.job, group, answer.epoch, answer.sequence)
        out: list[Event | str] = []
        for sequence in sorted(kept):
            if (answer.epoch, sequence) > self._at.get(answer.job, (0, 0)):
                out += self._gap(answer.job, answer.epoch, sequence)
                out.append(kept[sequence])
        out += self._gap(answer.job, answer.epoch, answer.sequence + 1)
        self._at[answer.job] = (answer.epoch, answer.sequence)
        return out

    def _gap(self, job: str, epoch: int, sequence: int) -> list[Event | str]:
        """Moves on to this number, and says which ones nobody keeps any more."""
        known, last = self._at.get(job, (0, 0))
        first = last + 1 if known == epoch else 1
        self._at[job] = (epoch, sequence)
        if first >= sequence:
            return []
        return [f"{job}: {numbers(first, sequence - 1)} no longer kept by the lighthouse"]


def numbers(first: int, last: int) -> str:
    """``event 7 was`` or ``events 7-9 were``."""
    return f"event {first} was" if first == last else f"events {first}-{last} were"


@dataclass(slots=True)
class Printer:
    """Prints what a Reader lets out.

    Args:
        as_json: events as JSON objects on stdout, sentences on stderr.
        local: whether the lighthouse's monotonic clock is this host's.
        not_before: monotonic seconds; older events are left out.
    """

    as_json: bool
    local: bool
    not_before: float | None = None
    _reached: dict[str, float] = field(default_factory=dict, init=False)
    """By job: the time of its last event that says when it was; those that don't came after it."""

    def show(self, items: list[Event | str]) -> None:
        """Prints these, one line each."""
        sentences: list[str] = []
        for item in items:
            if isinstance(item, str):
                sentences.append(item)
                continue
            at = moment(item)
            reached = self._reached[item.job] = max(at, self._reached.get(item.job, -1.0))
            if self.not_before is not None and 0 <= reached < self.not_before:
                # What was missed before an event that is too old is too old as well.
                sentences.clear()
                continue
            self._say(sentences)
            sentences = []
            seen = wall(at) if self.local and at >= 0 else None
            if self.as_json:
                kind = type(item).__name__.removesuffix("Event").lower()
                record = {"time": seen.isoformat() if seen else None, "event": kind, **msgspec.to_builtins(item)}
                click.echo(json.dumps(record))
            else:
                clock = seen.strftime("%H:%M:%S.%f")[:-3] if seen else "--:--:--.---"
                where = f"{plain(item.job)}  #{item.sequence}  {plain(item.group)}"
                click.echo(f"{clock}  {where}  {plain(sentence(item))}")
        self._say(sentences)

    def _say(self, sentences: list[str]) -> None:
        for text in sentences:
            click.echo(f"{'' if self.as_json else ' ' * 14}{plain(text)}", err=self.as_json)


def moment(event: Event) -> float:
    """When it was published, in the lighthouse's monotonic seconds; -1.0 where the event does not say."""
    match event:
        case FailureEvent():
            return event.failure.published_at
        case QuorumEvent():
            return event.answered_at
        case CompletedEvent() | RecoveredEvent() | ReplicaQuorumEvent():
            return -1.0


def wall(at: float) -> datetime:
    """The wall clock's time of a moment of this host's monotonic clock, in this host's time zone."""
    return datetime.fromtimestamp(time.time() - time.monotonic() + at).astimezone()


def sentence(event: Event) -> str:
    """What happened, for people."""
    match event:
        case FailureEvent(failure=failure):
            text = what(failure)
            return text if failure.iteration < 0 else f"{text} (iteration {failure.iteration})"
        case RecoveredEvent():
            return f"{event.member} is back"
        case ReplicaQuorumEvent():
            steps = sorted({replica.step for replica in event.participants})
            at = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}" if steps else "no step"
            names = ", ".join(replica.replica_id for replica in event.participants)
            count = len(event.participants)
            return f"quorum: {count} {'replica' if count == 1 else 'replicas'} at {at}: {names}"
        case QuorumEvent():
            text = f"quorum: iteration {event.iteration}, {len(event.members)} ranks, restart {event.restarts}"
            if event.consequences:
                text += f" (with {len(event.consequences)} consequences of the same incident)"
            return text
        case CompletedEvent():
            return "completed"


def on_this_host(address: str) -> bool:
    """Whether the process at this address shares this host's monotonic clock."""
    if on_loopback(address):
        return True
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    own = {one.address.partition("%")[0] for addresses in psutil.net_if_addrs().values() for one in addresses}
    return host in own | {"*", "0.0.0.0", os.uname().nodename}
