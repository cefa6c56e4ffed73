"""The one place where ZeroMQ sockets are made and get their options.

Everything bounded: queue lengths, frame sizes, the time a close may take. The reconnect interval is drawn per
process, because ZeroMQ switches its own jitter off once a maximum is set (thousands of peers of a restarted
daemon would come back at the same instant). A connection whose other side is gone without a word, with its host or
its network, is given up by the kernel, and ZeroMQ makes a new one. Nothing here knows messages.
"""

from __future__ import annotations

import random
from typing import Any

import zmq

from seamark.protocol.codec import MAX_BODY

QUEUE_LENGTH = 10_000
"""Messages a socket holds per peer before it drops (PUB, ROUTER) or blocks (DEALER)."""
RECONNECT_MS = (10, 50)
RECONNECT_MAX_MS = 500
HANDSHAKE_MS = 3_000
"""A silent connection is dropped after this; at ZeroMQ's 30 s some hundred of them keep new clients out."""
UNACKNOWLEDGED_MS = 2_000
"""What was sent and not acknowledged for so long ends its connection (TCP_USER_TIMEOUT)."""
CONNECT_MS = 1_000
"""The kernel alone doubles the pause between two attempts, and finds a host that is back half a minute late."""
KEEPALIVE = {zmq.TCP_KEEPALIVE: 1, zmq.TCP_KEEPALIVE_IDLE: 1, zmq.TCP_KEEPALIVE_INTVL: 1, zmq.TCP_KEEPALIVE_CNT: 2}
"""For who only listens and has nothing unacknowledged: silent for a second, asked twice, a second apart."""
CONNECTIONS_WAITING = 4_096
"""That the kernel holds for a listener (up to net.core.somaxconn): all agents come back at once to a restarted daemon,
and at ZeroMQ's 100 most of them try again a second later, or are reset."""
IPC_PATH_LIMIT = 107
_NOBLOCK = int(zmq.NOBLOCK)


def make_socket(context: zmq.Context[Any], kind: int, *, identity: bytes | None = None) -> zmq.Socket[Any]:
    """A socket of this kind with the suite's options.

    Args:
        context: the process's own context (contexts must not cross a fork).
        kind: ``zmq.ROUTER``, ``zmq.DEALER``, ``zmq.PUB`` or ``zmq.SUB``.
        identity: routing id of a DEALER; the incarnation of its owner, so that a restarted peer is a new one.
    """
    socket: zmq.Socket[Any] = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, QUEUE_LENGTH)
    socket.setsockopt(zmq.RCVHWM, QUEUE_LENGTH)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_BODY)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, random.randint(*RECONNECT_MS))
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
    socket.setsockopt(zmq.BACKLOG, CONNECTIONS_WAITING)
    socket.setsockopt(zmq.TCP_MAXRT, UNACKNOWLEDGED_MS)
    for option, value in KEEPALIVE.items():
        socket.setsockopt(option, value)
    if kind == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    if identity is not None:
        socket.setsockopt(zmq.IDENTITY, identity)
    return socket


def receive(socket: zmq.Socket[Any]) -> list[bytes] | None:
    """The frames of the next message; None if none waits.

    By frame objects, which know whether another follows: ``recv_multipart()`` asks the socket, at twice to three
    times the whole price.

    Raises:
        zmq.ZMQError: the socket can't be read.
    """
    try:
        frame = socket.recv(_NOBLOCK, copy=False)
    except zmq.Again:
        return None
    frames = [frame.bytes]
    while frame.more:
        frame = socket.recv(_NOBLOCK, copy=False)
        frames.append(frame.bytes)
    return frames


def check_address(address: str) -> str:
    """The address itself, if ZeroMQ can use it.

    Raises:
        ValueError: the path of an ``ipc://`` address is longer than the kernel allows, or the scheme is another.
    """
    if address.startswith("ipc://"):
        path = address.removeprefix("ipc://")
        if len(path.encode()) > IPC_PATH_LIMIT:
            raise ValueError(
                f"{path}: a socket path may have {IPC_PATH_LIMIT} bytes, this one has {len(path.encode())}: "
                "choose a shorter run directory"
            )
        return address
    if address.startswith("tcp://"):
        return address
    raise ValueError(f"{address}: an address begins with ipc:// or tcp://")
