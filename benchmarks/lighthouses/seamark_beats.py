"""Heartbeats for Seamark's lighthouse, from many connections of one process, and their answers read.

Each connection is a node with its ranks (one Beat for all of them) or a replica group (ReplicaBeat). Beats are spread
evenly over the interval, as those of hosts that know nothing of each other. With an interval of 0 each connection
sends its next beats when the last ones are answered: as many as the lighthouse takes. A replica's beat is answered,
and every tenth of a node's.

A node introduces itself first and reports its ranks as started; it does so again when it is told that nobody knows it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import resource
import select
import socket
import sys
import time
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from lighthouses import zmtp
from seamark.protocol.codec import decode, encode
from seamark.protocol.messages import (
    ANSWER_EVERY,
    Acknowledged,
    Beat,
    BeatAnswer,
    FailureEvent,
    MemberStarted,
    Message,
    NodeHello,
    Refused,
    ReplicaBeat,
    Welcome,
)

PR_SET_TIMERSLACK = 29  # <linux/prctl.h>
SPLICED = 0x5EA3A12C  # no other field of a beat has it
BEHIND = 0.25
"""Seconds a beat may be late before the pace counts as lost, and what is overdue is not made up for."""
HELLO_AGAIN = 5.0
"""Seconds until an introduction without an answer is repeated."""
UNANSWERED = 20
"""Beats that a connection leaves unanswered; then it holds back. An agent gives its socket up earlier."""
IDLE = 0.0005


class Peer:
    """One connection: what it says of itself, and its beats as bytes around their number."""

    __slots__ = (
        "_beat",
        "acknowledged",
        "after",
        "before",
        "connection",
        "hello",
        "hello_due",
        "known",
        "reader",
        "sent",
        "sequence",
        "started",
        "starts",
    )

    def __init__(
        self, connection: socket.socket, beat: Beat | ReplicaBeat, hello: bytes, starts: Sequence[bytes]
    ) -> None:
        self.connection = connection
        self._beat = beat
        self.before, self.after = around_number(beat)
        self.hello = hello
        self.hello_due = 0.0
        self.known = not hello
        self.starts = b"".join(starts)
        self.started = not starts
        self.acknowledged = 0
        self.sequence = 0
        self.sent: deque[tuple[int, float]] = deque()
        """Number and time of each beat that no answer was for yet, neither its own nor a later one's."""
        self.reader = zmtp.Reader()

    def see(self, failure: int) -> None:
        """A failure was pushed to it; a beat that does not say so has it pushed again."""
        assert isinstance(self._beat, ReplicaBeat)
        if failure > self._beat.seen:
            self._beat = replace(self._beat, seen=failure)
            self.before, self.after = around_number(self._beat)

    def beat(self) -> bytes:
        """The next beat."""
        self.sequence += 1
        return self.before + self.sequence.to_bytes(4, "big") + self.after


def around_number(beat: Message) -> tuple[bytes, bytes]:
    """What stands before and after the number in the bytes of a beat that was encoded with ``SPLICED``."""
    before, number, after = zmtp.frames(encode(beat)).partition(b"\xce" + SPLICED.to_bytes(4, "big"))
    spliced = [*zmtp.Reader().feed(before + number[:1] + (1).to_bytes(4, "big") + after)]
    assert len(spliced) == 1
    decoded = decode(spliced[0])
    assert isinstance(decoded, Beat | ReplicaBeat)
    assert decoded.sequence == 1
    return before + number[:1], after


class Generator:
    """All connections of this process.

    Args:
        order: address, kind ("node" or "replica"), job, names, ranks of a node, interval.
    """

    def __init__(self, order: dict[str, Any]) -> None:
        self._order = order
        self._interval = float(order["interval"])
        # Here an agent or a manager would listen; the lighthouse connects to it when beats are late.
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=4_096)
        own = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        host, _, port = order["address"].removeprefix("tcp://").rpartition(":")
        self._epoll = select.epoll()
        self._peers: list[Peer] = []
        self._by_fd: dict[int, Peer] = {}
        for number, name in enumerate(order["names"]):
            incarnation = f"{name}.1"
            connection = zmtp.connect(host, int(port), incarnation.encode())
            node = order["kind"] == "node"
            peer = self._node(connection, number, own) if node else self._replica(connection, name, own)
            self._peers.append(peer)
            self._by_fd[connection.fileno()] = peer
            self._epoll.register(connection.fileno(), select.EPOLLIN)
        self._epoll.register(sys.stdin.fileno(), select.EPOLLIN)
        self._listener.setblocking(False)
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._unready = len(self._peers)
        self._clear()

    def _node(self, connection: socket.socket, number: int, own: str) -> Peer:
        order, name = self._order, self._order["names"][number]
        incarnation = f"{name}.1"
        hello = zmtp.frames(encode(NodeHello(name, incarnation, own, order["ranks"])))
        starts = []
        for local in range(order["ranks"]):
            member = f"{order['job']}/{(order['first'] + number) * order['ranks'] + local}"
            started = MemberStarted(local + 1, order["job"], order["generation"], member, f"{member}.1", name)
            starts.append(zmtp.frames(encode(started)))
        return Peer(connection, Beat(name, incarnation, SPLICED), hello, starts)

    def _replica(self, connection: socket.socket, name: str, own: str) -> Peer:
        return Peer(connection, ReplicaBeat(self._order["job"], name, f"{name}.1", own, SPLICED, 0), b"", [])

    def _clear(self) -> None:
        self.sent = self.answered = self.strangers = self.refused = self.held_back = self.probes = 0
        self.refusal = ""
        self.answer_seconds: array[float] = array("d")
        self.late_seconds: array[float] = array("d")

    # --- one connection ------------------------------------------------------------------------------------

    def _turn(self, peer: Peer, now: float) -> None:
        """Send this connection's next beat, or what has to be said before."""
        if not peer.known:
            if now >= peer.hello_due:
                peer.hello_due = now + HELLO_AGAIN
                self._send(peer, peer.hello)
            return
        answered = ANSWER_EVERY if peer.hello else 1
        # While the connections are made, the lighthouse sets the pace.
        if len(peer.sent) >= (answered if self._unready else UNANSWERED):
            self.held_back += 1
            return
        beats = answered if self._interval == 0.0 else 1
        data = b"".join(peer.beat() for _ in range(beats))
        if not peer.started:
            peer.started = True
            data += peer.starts
        if self._send(peer, data):
            self.sent += beats
            peer.sent += [(number, now) for number in range(peer.sequence - beats + 1, peer.sequence + 1)]

    def _send(self, peer: Peer, data: bytes) -> bool:
        try:
            taken = peer.connection.send(data)
        except BlockingIOError:
            self.held_back += 1
            return False
        if taken != len(data):
            raise SystemExit("the lighthouse reads so slowly that a beat was cut in two")
        return True

    def _read(self, peer: Peer) -> None:
        """Take what has arrived."""
        piece = peer.connection.recv(65_536)
        if not piece:
            raise SystemExit("the lighthouse closed a connection")
        for frames in peer.reader.feed(piece):
            match decode(frames):
                case BeatAnswer(known=known, sequence=sequence):
                    self._answered(peer, sequence)
                    if not known:
                        # Its ranks are announced again, too, as an agent does.
                        self.strangers += 1
                        peer.known, peer.started = False, not peer.starts
                case Welcome():
                    peer.known = True
                case Acknowledged():
                    peer.acknowledged += 1
                    if peer.acknowledged == self._order["ranks"]:
                        self._unready -= 1
                case FailureEvent(sequence=sequence):
                    peer.see(sequence)
                case Refused(reason=reason):
                    self.refused += 1
                    self.refusal = self.refusal or reason

    def _answered(self, peer: Peer, sequence: int) -> None:
        """A node's tenth beat is answered, and with it those before."""
        if not peer.starts and not peer.acknowledged:
            peer.acknowledged = 1
            self._unready -= 1
        while peer.sent and peer.sent[0][0] <= sequence:
            _, at = peer.sent.popleft()
            self.answered += 1
        self.answer_seconds.append(time.monotonic() - at)

    def _probed(self) -> None:
        """The lighthouse looks whether this host lives."""
        with contextlib.suppress(OSError):
            self._listener.accept()[0].close()
        self.probes += 1

    # --- all of them ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """Beat until the input ends; say "ready" once, and report on each window that is asked for."""
        saturating = self._interval == 0.0
        step = (self._interval or 1.0) / len(self._peers)
        due, index, window_end = time.monotonic(), 0, math.inf
        announced = False
        rounds = 0
        while True:
            now = time.monotonic()
            if saturating and rounds < len(self._peers):
                self._turn(self._peers[rounds], now)
                rounds += 1
            while not saturating and due <= now:
                if now - due > BEHIND:
                    due = now
                self.late_seconds.append(now - due)
                self._turn(self._peers[index], now)
                index = (index + 1) % len(self._peers)
                due += step
            # epoll itself counts in milliseconds.
            wait = IDLE if saturating else max(0.0, due - time.monotonic())
            if wait:
                select.select([self._epoll.fileno()], [], [], wait)
            for fd, _event in self._epoll.poll(0, 1_024):
                peer = self._by_fd.get(fd)
                if fd == self._listener.fileno():
                    self._probed()
                    continue
                if peer is None:
                    line = sys.stdin.readline()
                    if not line:
                        return
                    self._clear()
                    began, used = time.monotonic(), cpu_seconds()
                    window_end = began + json.loads(line)["measure"]
                    continue
                self._read(peer)
                if saturating and not peer.sent:
                    self._turn(peer, time.monotonic())
            if not announced and not self._unready:
                announced = True
                say(ready=len(self._peers))
            if time.monotonic() >= window_end:
                window_end = math.inf
                self._report(time.monotonic() - began, cpu_seconds() - used)

    def _report(self, wall: float, cpu: float) -> None:
        say(
            seconds=wall,
            cpu_seconds=cpu,
            sent=self.sent,
            answered=self.answered,
            strangers=self.strangers,
            refused=self.refused,
            refusal=self.refusal,
            held_back=self.held_back,
            probes=self.probes,
            answer=spread(self.answer_seconds),
            late=spread(self.late_seconds),
        )


def spread(samples: array[float]) -> dict[str, float]:
    """Median, 99th percentile (nearest rank) and maximum; empty without samples."""
    ordered = sorted(samples)
    if not ordered:
        return {}
    return {
        "p50": ordered[len(ordered) // 2],
        "p99": ordered[math.ceil(0.99 * len(ordered)) - 1],
        "max": ordered[-1],
    }


def cpu_seconds() -> float:
    """Processor time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def say(**answer: Any) -> None:
    """Answer the benchmark."""
    print(json.dumps(answer), flush=True)


def main() -> None:
    """Take the order, connect, beat."""
    # Sleeps of some 10 µs come out as such, and no collection of garbage delays a beat.
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
    gc.disable()
    Generator(json.loads(sys.stdin.readline())).run()


if __name__ == "__main__":
    main()
