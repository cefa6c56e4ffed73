"""The socket to an agent: one JSON object a packet, with descriptors beside it."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
from collections import deque
from collections.abc import Iterable, Sequence

from .log import say
from .requests import MAX_PACKET_BYTES, Message


class Connection:
    """An agent, or somebody who has yet to say hello."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 2 * MAX_PACKET_BYTES)

    @property
    def backlog(self) -> bool:
        """Whether the peer has yet to read what it was sent. So long it is not read from: what waits is bounded."""
        return bool(self._unsent)

    @property
    def events(self) -> int:
        return select.POLLOUT if self.backlog else select.POLLIN

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        # Duplicates: a record may be forgotten, and its descriptors closed, while its packet waits.
        duplicates: list[int] = []
        try:
            duplicates += map(os.dup, fds)
        except OSError:
            close_all(duplicates)
            raise
        self._unsent.append((json.dumps(message).encode(), duplicates))
        self.flush()

    def flush(self) -> None:
        while self._unsent:
            payload, fds = self._unsent[0]
            try:
                socket.send_fds(self.sock, [payload], fds)
            except BlockingIOError:
                return
            except OSError as error:
                # The peer is gone, as reading will find, too.
                if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF):
                    say(f"dropped a message to the agent: {error.strerror}")
            self._unsent.popleft()
            close_all(fds)

    def close(self) -> None:
        for _, fds in self._unsent:
            close_all(fds)
        self._unsent.clear()
        self.sock.close()


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
