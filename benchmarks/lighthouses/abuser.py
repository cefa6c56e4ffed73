"""Everything that a lighthouse should not be sent, at a rate, and subscribers and peers that never read."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgpack
import zmq

from lighthouses.seamark_beats import cpu_seconds, say
from seamark.protocol.codec import MAGIC, MAX_BODY, encode
from seamark.protocol.messages import (
    RANKS,
    VERSION,
    Beat,
    InjectFailure,
    Join,
    Message,
    Replica,
    ReplicaBeat,
    ReplicaJoin,
)
from seamark.protocol.sockets import make_socket

JOB = "misused"
OVERSIZED_EVERY = 1.0
"""Seconds between two bodies over the limit: each ends its connection, which has to be made anew."""
NOWHERE = "tcp://127.0.0.1:1"

Frames = list[bytes]


def joining(name: str, incarnation: str, join_timeout: float) -> Message:
    """A replica group that asks for a quorum."""
    replica = Replica(name, incarnation, NOWHERE, NOWHERE, 0, 1)
    return ReplicaJoin(JOB, 1, replica, 0, [], join_timeout=join_timeout)


def negative_step() -> Frames:
    """A heartbeat at step -1, as no encoder of ours writes it."""
    header, body = encode(ReplicaBeat(JOB, "r", "i", NOWHERE, 1, 0))
    return [header, msgpack.packb(msgpack.unpackb(body) | {"step": -1})]


BEAT = encode(Beat("nobody", "i", 1))
KINDS: dict[str, Callable[[], Frames]] = {
    "wrong version": lambda: [MAGIC + bytes((VERSION + 1, 4)), BEAT[1]],
    "garbage": lambda: [os.urandom(4), os.urandom(64)],
    "garbage body": lambda: [BEAT[0], os.urandom(64)],
    "truncated": lambda: [BEAT[0], BEAT[1][:-3]],
    "one frame": lambda: [BEAT[0]],
    "five frames": lambda: [*BEAT, b"", b"", b""],
    "unknown type": lambda: [MAGIC + bytes((VERSION, 250)), b""],
    "a stranger's beat": lambda: BEAT,
    "unknown job": lambda: encode(Join("nobody", RANKS, 0, "nobody/0", "i", 1, -1, 0, 0, [])),
    "unknown group": lambda: encode(InjectFailure(1, "bench", "nobody", "bench/0")),
    "one name, two processes": lambda: encode(ReplicaBeat(JOB, "twice", f"i{time.monotonic_ns() % 2}", NOWHERE, 1, 0)),
    "negative step": negative_step,
    "contradicting timeouts": lambda: encode(joining(f"r{time.monotonic_ns() % 2}", "i", time.monotonic() % 9 + 1)),
}


class Abuser:
    """One peer that sends and never reads, and subscribers that never read.

    Args:
        order: address, events, rate (messages a second), subscribers.
    """

    def __init__(self, order: dict[str, Any]) -> None:
        self._order = order
        self._context: zmq.Context[Any] = zmq.Context()
        self._peer = self._connected(zmq.DEALER, order["address"])
        self._subscribers = [self._connected(zmq.SUB, order["events"]) for _ in range(order["subscribers"])]
        self.sent: Counter[str] = Counter()

    def _connected(self, kind: int, address: str) -> zmq.Socket[Any]:
        socket = make_socket(self._context, kind)
        socket.setsockopt(zmq.RCVHWM, 1)
        if kind == zmq.SUB:
            socket.subscribe(b"")
        socket.connect(address)
        return socket

    def run(self, seconds: float) -> None:
        """Misbehave for so long."""
        began, used = time.monotonic(), cpu_seconds()
        oversized_due = began
        self.sent.clear()
        kinds = itertools.cycle(KINDS.items())
        for number in itertools.count():
            now = time.monotonic()
            if now >= began + seconds:
                break
            if now >= oversized_due:
                oversized_due += OVERSIZED_EVERY
                self._oversized()
            name, frames = next(kinds)
            try:
                self._peer.send_multipart(frames(), zmq.NOBLOCK)
                self.sent[name] += 1
            except zmq.Again:
                self.sent["could not be sent"] += 1
            time.sleep(max(0.0, began + number / self._order["rate"] - time.monotonic()))
        say(sent=dict(self.sent), core_share=(cpu_seconds() - used) / seconds)

    def _oversized(self) -> None:
        with make_socket(self._context, zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 200)
            socket.connect(self._order["address"])
            socket.send_multipart([BEAT[0], bytes(MAX_BODY + 1)])
        self.sent["oversized"] += 1


def main() -> None:
    """Take the order, connect, and misbehave in each window that is asked for."""
    abuser = Abuser(json.loads(sys.stdin.readline()))
    say(ready=1)
    for line in sys.stdin:
        abuser.run(json.loads(line)["measure"])
    os._exit(0)  # its context would wait for what nobody reads


if __name__ == "__main__":
    main()
