"""ZMTP 3.0 by hand, for a load generator that has to cost less than what it loads.

A libzmq socket costs its owner two threads' wake-ups a message; a thousand of them leave a small machine no core for
the daemon. Here a connection is a plain TCP socket: greeting, READY, then frames. It is a DEALER without security
that sends short messages of two frames and reads any. What it sends is byte for byte what libzmq sends for the same
message; the daemon can't tell them apart.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
MORE, LONG, COMMAND = 1, 2, 4
TIMEOUT = 10.0


class HandshakeError(OSError):
    """The other side is no ROUTER that talks in the clear."""


def frames(parts: Sequence[bytes]) -> bytes:
    """The bytes of a message."""
    data = bytearray()
    for index, part in enumerate(parts):
        flags = MORE if index < len(parts) - 1 else 0
        if len(part) < 256:
            data += bytes((flags, len(part)))
        else:
            data += bytes((flags | LONG,)) + struct.pack(">Q", len(part))
        data += part
    return bytes(data)


def connect(host: str, port: int, identity: bytes) -> socket.socket:
    """A connection that is ready for messages and does not block.

    Raises:
        HandshakeError: the handshake failed.
        OSError: nobody listens there, or says nothing for ten seconds.
    """
    connection = socket.create_connection((host, port), TIMEOUT)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Ends with a reset: thousands of ports in TIME_WAIT would be missing in the next round.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.sendall(GREETING)
    greeting = _exactly(connection, 64)
    if greeting[0] != 0xFF or greeting[10] < 3 or greeting[12:17] != b"NULL\0":
        raise HandshakeError("the greeting is not that of ZMTP 3 without security")
    ready = b"\x05READY" + _property(b"Socket-Type", b"DEALER") + _property(b"Identity", identity)
    connection.sendall(bytes((COMMAND, len(ready))) + ready)
    flags, length = _exactly(connection, 2)
    if flags != COMMAND or not _exactly(connection, length).startswith(b"\x05READY"):
        raise HandshakeError("the handshake was refused")
    connection.setblocking(False)
    return connection


def _property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + struct.pack(">I", len(value)) + value


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise HandshakeError("the other side closed the connection")
        data += piece
    return data


class Reader:
    """Messages from the pieces that arrive on one connection."""

    def __init__(self) -> None:
        self._data = b""
        self._parts: list[bytes] = []

    @property
    def empty(self) -> bool:
        """True while no part of a message is held."""
        return not self._data and not self._parts

    def feed(self, piece: bytes) -> Iterator[list[bytes]]:
        """The messages that this piece completes."""
        self._data += piece
        while len(self._data) >= 2:
            flags, length, begin = self._data[0], self._data[1], 2
            if flags & LONG:
                if len(self._data) < 9:
                    return
                length, begin = struct.unpack_from(">Q", self._data, 1)[0], 9
            if len(self._data) < begin + length:
                return
            part, self._data = self._data[begin : begin + length], self._data[begin + length :]
            if flags & COMMAND:
                continue
            self._parts.append(part)
            if not flags & MORE:
                yield self._parts
                self._parts = []
