"""The one place where ZeroMQ sockets are made and get their options.

Everything bounded: queue lengths, frame sizes, the time a close may take. The reconnect interval is drawn per
process, because ZeroMQ switches its own jitter off once a maximum is set (thousands of peers of a restarted
daemon would come back at the same instant). A connection whose other side is gone without a word, with its host or
its network, is given up by the kernel, and ZeroMQ makes a new one. With a key every TCP connection is encrypted, and
each side knows the other by its key (CURVE). Nothing here knows messages.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import zmq

from seamark.protocol.codec import MAX_BODY
from seamark.protocol.keys import Key

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
ZAP_DOMAIN = b"seamark"
"""Not empty: with an empty one a missing handler would let everybody in."""
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


def connect(socket: zmq.Socket[Any], address: str, key: Key | None = None, server: str = "") -> None:
    """Connects it; over TCP with a key encrypted, and only to who has the other half of the server's key.

    Args:
        socket: one that is not connected yet.
        address: checked by ``check_address``.
        key: this process's own; None to speak in the clear.
        server: the public half of the server's key; the daemons' by default.

    Raises:
        ValueError: ZeroMQ can't use the address.
        zmq.ZMQError: it can't be connected to.
    """
    if key is not None and encrypted(address):
        _give(socket, key)
        socket.setsockopt(zmq.CURVE_SERVERKEY, (server or key.daemon).encode())
    socket.connect(check_address(address))


def bind(socket: zmq.Socket[Any], address: str, key: Key | None = None) -> None:
    """Binds it; over TCP with a key only to those whom the ZAP handler of its context lets in.

    Args:
        socket: one that is not bound yet.
        address: checked by ``check_address``.
        key: this process's own; None to let everybody in.

    Raises:
        ValueError: ZeroMQ can't use the address.
        zmq.ZMQError: it can't be bound to.
    """
    if key is not None and encrypted(address):
        _give(socket, key)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
    socket.bind(check_address(address))


def encrypted(address: str) -> bool:
    """Whether a key is used there: a socket in a private directory needs none."""
    return address.startswith("tcp://")


def new_pair() -> tuple[str, str]:
    """The public and the secret half of a new key."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _give(socket: zmq.Socket[Any], key: Key) -> None:
    socket.setsockopt(zmq.CURVE_PUBLICKEY, key.public.encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, key.secret.encode())


def receive(socket: zmq.Socket[Any]) -> list[bytes] | None:
    """The frames of the next message; None if none waits.

    By frame objects, which know whether another follows: ``recv_multipart()`` asks the socket, at twice to three
    times the whole price.

    Raises:
        zmq.ZMQError: the socket can't be read.
    """
    recv = socket.recv
    try:
        frame = recv(_NOBLOCK, False)
    except zmq.Again:
        return None
    frames = [frame.bytes]
    while frame.more:
        frame = recv(_NOBLOCK, False)
        frames.append(frame.bytes)
    return frames


class Received(NamedTuple):
    """A message, and what ZeroMQ knows of its sender: the public half of its key, and its address.

    Both are empty where the connection has none: in the clear, or within a process.
    """

    frames: list[bytes]
    user: str
    address: str


def receive_signed(socket: zmq.Socket[Any]) -> Received | None:
    """The next message with its sender; None if none waits.

    Raises:
        zmq.ZMQError: the socket can't be read.
    """
    try:
        frame = socket.recv(_NOBLOCK, copy=False)
    except zmq.Again:
        return None
    frames = [frame.bytes]
    user, address = _property(frame, "User-Id"), _property(frame, "Peer-Address")
    while frame.more:
        frame = socket.recv(_NOBLOCK, copy=False)
        frames.append(frame.bytes)
    return Received(frames, user, address)


def _property(frame: zmq.Frame, name: str) -> str:
    try:
        return str(frame.get(name))
    except zmq.ZMQError:
        return ""


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
