"""Members whose loss is waited for: one falls silent, another is reported lost; when does a subscriber see it?

One process is reporter and subscriber, so that both times come from one clock reader. In a job of nodes every silent
member is a node of its own, whose address answers no connection: its host is gone. In a job of replica groups a
silent one stops to beat, and a reported one is lost by a drill (InjectFailure). Whoever was missed comes back as a new
process. Between losses everybody beats every 100 ms, each on a connection of its own and none in step with the next.

Also the job's coordinator: it sends the roster, of the load's ranks and its own.
"""

from __future__ import annotations

import json
import math
import select
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

import zmq

from lighthouses.seamark_beats import cpu_seconds, say
from seamark.protocol.codec import decode, encode
from seamark.protocol.messages import (
    REPLICAS,
    Acknowledged,
    Beat,
    BeatAnswer,
    Cause,
    FailureEvent,
    InjectFailure,
    JobSpec,
    MemberLost,
    MemberStarted,
    Message,
    NodeHello,
    Refused,
    ReplicaBeat,
    Roster,
    Slot,
    StoreAddress,
)
from seamark.protocol.sockets import make_socket
from seamarkd.lighthouse.shell import topic

BEAT = 0.1
SILENCE_EVERY = {"node": 0.1, "replica": 0.25}
"""Seconds between two that fall silent. A few at once are far below what a lighthouse takes for its own trouble."""
TOLD_EVERY = 0.05
SETTLED = 1.0
"""Seconds a member beats, at least, before it is silenced again."""
PATIENCE = 15.0
"""Seconds after the window in which who is missing may still be missed; after them it never was."""


@dataclass
class Member:
    """One of the witness's members. ``silent_since``: when it beat last, if it has fallen silent."""

    name: str
    node: str
    connection: zmq.Socket[Any]
    start: int = 1
    since: float = 0.0
    silent_since: float | None = None
    reported_at: float | None = None

    @property
    def incarnation(self) -> str:
        """Of its present process."""
        return f"{self.name}.{self.start}"


class Witness:
    """The witness's members, its connection, its subscription.

    Args:
        order: address, events, kind ("node" or "replica"), job, generation, load (names, ranks), own (count).
    """

    def __init__(self, order: dict[str, Any]) -> None:
        self._order = order
        self._job = order["job"]
        self._nodes = order["kind"] == "node"
        self._silent_address, self._held = address_that_answers_nobody()
        self._context: zmq.Context[Any] = zmq.Context()
        self._reports = self._connected()
        self._events = make_socket(self._context, zmq.SUB)
        self._events.subscribe(topic(self._job))
        self._events.connect(order["events"])
        self._poller = zmq.Poller()
        self._poller.register(self._reports, zmq.POLLIN)
        self._poller.register(self._events, zmq.POLLIN)
        self._poller.register(sys.stdin.fileno(), select.POLLIN)
        first, count = len(order["load"]) * order["ranks"], order["own"]
        names = [f"{self._job}/{first + index}" for index in range(2 * count)]
        self._silenced = [Member(name, name.replace("/", "-"), self._connected()) for name in names[:count]]
        # In a job of nodes, all who are reported lost live on one node, and it beats for them.
        host = Member("told", "told", self._connected())
        self._told = [
            Member(name, host.node, host.connection if self._nodes else self._connected()) for name in names[count:]
        ]
        self._beating = [*self._silenced, *([host] if self._nodes else self._told)]
        self._host = host
        self._next = 0
        self._beat_due = time.monotonic()
        self._request = 0
        self._sequence = 0
        self._clear()

    def _clear(self) -> None:
        self.silence: list[float] = []
        self.told: list[float] = []
        self.beats = 0
        self.false: list[str] = []
        self.refusals: list[str] = []

    def _connected(self) -> zmq.Socket[Any]:
        connection = make_socket(self._context, zmq.DEALER)
        connection.connect(self._order["address"])
        return connection

    def _number(self) -> int:
        self._request += 1
        return self._request

    # --- beginning -----------------------------------------------------------------------------------------

    def introduce(self) -> None:
        """The roster first, then this process's own nodes and members."""
        now = time.monotonic()
        if self._nodes:
            self._reports.send_multipart(encode(self._roster()))
            while not isinstance(message := self._receive(PATIENCE), Acknowledged):
                raise SystemExit(f"the roster was answered by {message}")
            self._hello(self._host, len(self._told))
            for member in self._told:
                self._start(member)
        for member in self._silenced:
            self._revive(member, now)

    def _roster(self) -> Roster:
        order = self._order
        slots = []
        for number, node in enumerate(order["load"]):
            for local in range(order["ranks"]):
                rank = number * order["ranks"] + local
                slots.append(Slot(f"{self._job}/{rank}", rank, local, node, number))
        for group, member in enumerate((*self._silenced, *self._told), len(order["load"])):
            slots.append(Slot(member.name, len(slots), 0, member.node, group))
        spec = JobSpec(
            name=self._job,
            argv=["train.py"],
            module=False,
            python=sys.executable,
            cwd="/",
            env={},
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=1,
            policy="replace",
            max_restarts=0,
            checkpoint_dir="",
            log_dir="/tmp",
        )
        return Roster(
            request=self._number(),
            job=self._job,
            generation=order["generation"],
            policy="replace",
            min_members=1,
            slots=slots,
            store=StoreAddress(),
            master_addr="127.0.0.1",
            master_port=0,
            base_iteration=-1,
            join_timeout=30.0,
            start_timeout=120.0,
            allowance=0,
            spec=spec,
        )

    def _receive(self, timeout: float) -> Message:
        if not self._reports.poll(int(timeout * 1e3)):
            raise SystemExit(f"the lighthouse said nothing for {timeout:g} s")
        return decode(self._reports.recv_multipart())

    def _hello(self, member: Member, slots: int) -> None:
        hello = NodeHello(member.node, member.incarnation, self._silent_address, slots)
        member.connection.send_multipart(encode(hello))

    def _start(self, member: Member) -> None:
        order = self._order
        started = MemberStarted(
            self._number(), self._job, order["generation"], member.name, member.incarnation, member.node
        )
        member.connection.send_multipart(encode(started))

    def _revive(self, member: Member, now: float) -> None:
        member.silent_since = None
        member.since = now
        if self._nodes:
            self._hello(member, 1)
            self._start(member)

    # --- going on ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Beat until the input ends; report on each window that is asked for."""
        self.introduce()
        say(ready=len(self._silenced) + len(self._told))
        window_end = give_up = silence_due = told_due = math.inf
        while True:
            now = time.monotonic()
            if now >= self._beat_due:
                self._beat(now)
            if now < window_end and now >= silence_due:
                silence_due += SILENCE_EVERY[self._order["kind"]]
                self._silence_one(now)
            if now < window_end and now >= told_due:
                told_due += TOLD_EVERY
                self._tell_one()
            timeout = min(self._beat_due, silence_due, told_due) - time.monotonic()
            for ready, _ in self._poller.poll(max(0, math.ceil(timeout * 1e3))):
                if ready is self._events:
                    self._take_events()
                elif ready is self._reports:
                    self._take_answers(self._reports)
                else:
                    line = sys.stdin.readline()
                    if not line:
                        return
                    self._clear()
                    began, used = time.monotonic(), cpu_seconds()
                    window_end = began + json.loads(line)["measure"]
                    give_up = window_end + PATIENCE
                    silence_due = told_due = began
            now = time.monotonic()
            missing = [one for one in self._silenced if one.silent_since is not None]
            untold = [one for one in self._told if one.reported_at is not None]
            if now >= window_end and (now >= give_up or not (missing or untold)):
                self._report(len(missing), len(untold), now - began, cpu_seconds() - used)
                window_end = give_up = silence_due = told_due = math.inf

    def _beat(self, now: float) -> None:
        """Whose turn it is beats; answers to beats are looked at once a round of all."""
        step = BEAT / len(self._beating)
        while self._beat_due <= now:
            self._beat_due = max(self._beat_due + step, now - BEAT)
            member = self._beating[self._next]
            if member.silent_since is None:
                self._send_beat(member)
            self._next = (self._next + 1) % len(self._beating)
            self._take_answers(member.connection)

    def _send_beat(self, member: Member) -> None:
        self._sequence += 1
        self.beats += 1
        member.connection.send_multipart(encode(self._beat_of(member)))

    def _beat_of(self, member: Member) -> Message:
        if self._nodes:
            return Beat(member.node, member.incarnation, self._sequence)
        return ReplicaBeat(
            self._job, member.name, member.incarnation, self._silent_address, self._sequence, self._sequence
        )

    def _silence_one(self, now: float) -> None:
        settled = [one for one in self._silenced if one.silent_since is None and now - one.since > SETTLED]
        if settled:
            member = min(settled, key=lambda one: one.since)
            # Its last beat leaves now, so that silences begin at any point of the others' interval.
            self._send_beat(member)
            member.silent_since = time.monotonic()

    def _tell_one(self) -> None:
        member = next((one for one in self._told if one.reported_at is None), None)
        if member is None:
            return
        self._told.remove(member)
        self._told.append(member)
        order = self._order
        old = member.incarnation
        if self._nodes:
            member.start += 1
            report: Message = MemberLost(
                self._number(),
                self._job,
                order["generation"],
                member.name,
                old,
                Cause("signal", 9),
                -1.0,
                time.monotonic(),
                "canary",
                member.incarnation,
            )
        else:
            report = InjectFailure(self._number(), self._job, REPLICAS, member.name)
        frames = encode(report)
        member.reported_at = time.monotonic()
        self._reports.send_multipart(frames)

    def _take_events(self) -> None:
        while self._events.poll(0):
            frames = self._events.recv_multipart()
            event = decode(frames[1:])
            now = time.monotonic()
            if isinstance(event, FailureEvent):
                self._seen(event, now)

    def _seen(self, event: FailureEvent, now: float) -> None:
        failed = event.failure.member
        for member in self._silenced:
            if member.name == failed and member.silent_since is not None:
                self.silence.append(now - member.silent_since)
                member.start += 1
                self._revive(member, now)
                return
        for member in self._told:
            if member.name == failed and member.reported_at is not None:
                self.told.append(now - member.reported_at)
                member.reported_at = None
                return
        self.false.append(f"{failed}: {event.failure.cause.kind} {event.failure.cause.text}")

    def _take_answers(self, connection: zmq.Socket[Any]) -> None:
        while connection.poll(0):
            match decode(connection.recv_multipart()):
                case Refused(reason=reason):
                    self.refusals.append(reason)
                case BeatAnswer(known=False):
                    self.refusals.append("a node of the witness was not known any more")

    def _report(self, missing: int, untold: int, seconds: float, cpu: float) -> None:
        say(
            silence=self.silence,
            told=self.told,
            never_missed=missing,
            never_told=untold,
            beats_per_second=self.beats / seconds,
            false_losses=len(self.false),
            first_false_losses=self.false[:8],
            refused=len(self.refusals),
            first_refusals=self.refusals[:8],
            core_share=cpu / seconds,
        )


def address_that_answers_nobody() -> tuple[str, list[socket.socket]]:
    """An address where a connection is neither accepted nor refused, as at a host that is gone; and what keeps it so.

    Its listener's queue is full, so the kernel drops what asks for a place in it.
    """
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    held = [listener]
    while True:
        queued = socket.socket()
        queued.settimeout(0.2)
        held.append(queued)
        try:
            queued.connect(listener.getsockname())
        except TimeoutError:
            return f"tcp://127.0.0.1:{listener.getsockname()[1]}", held


def main() -> None:
    """Take the order, introduce all, go on."""
    Witness(json.loads(sys.stdin.readline())).run()


if __name__ == "__main__":
    main()
