"""Who comes in: ZeroMQ's questions about keys, answered on the daemon's own loop, and the authority of each message.

The allow-list is looked at again every second, so that a revoked key ends without a restart: its new connections are
refused here, the messages of its standing ones by the channels that ask ``refusal``, and a publisher is told to open
its socket anew, for it never hears who listens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import zmq

from seamark.protocol import zap
from seamark.protocol.authority import Refusal
from seamark.protocol.keys import AllowList, Key
from seamark.protocol.messages import Message
from seamark.protocol.sockets import receive
from seamarkd.logs import Sparing
from seamarkd.settings import Settings
from seamarkd.tally import Tally

log = logging.getLogger(__name__)

LOOK_INTERVAL = 1.0
"""Seconds between two looks at the directory of keys."""
DRAIN_LIMIT = 256


class Gate:
    """The ZAP handler of a ZeroMQ context, and its allow-list.

    Args:
        context: the process's context; it can have one gate.
        key: this process's own.
        directory: the allow-list.
    """

    def __init__(self, context: zmq.Context[Any], key: Key, directory: Path) -> None:
        self.key = key
        self.refused = Tally()
        """Connections, by reason."""
        self._allowed = AllowList(directory)
        self._on_revoked: list[Callable[[], None]] = []
        self._logged = Sparing()
        self._loop = asyncio.get_running_loop()
        # Not by make_socket: nothing of it leaves the process.
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(zap.ENDPOINT)
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._answer)
        self._closed = False
        self._timer = self._loop.call_later(LOOK_INTERVAL, self._look)

    @classmethod
    def of(cls, context: zmq.Context[Any], settings: Settings) -> Self | None:
        """The gate of a daemon that serves the suite; None where no keys are used.

        Raises:
            SettingsError: the daemons' key is not there, or can't be used.
        """
        key, directory = settings.key("daemon"), settings.keys_directory
        return cls(context, key, directory) if key is not None and directory is not None else None

    def refusal(self, user: str, message: Message, foreign: Callable[[str, Message], bool]) -> Refusal | None:
        """Why the owner of this key may not send this message; None if it may.

        Args:
            user: the public half.
            message: what it sent.
            foreign: what the daemon knows: whether it is about something of another than this node, or (of a client's
                key, which has none) of the suite.
        """
        refused = self._allowed.refusal(user, message)
        key = self._allowed.find(user)
        if refused is not None or key is None or key.role not in ("node", "client"):
            return refused
        if not foreign(key.name if key.role == "node" else "", message):
            return None
        what = getattr(message, "member", "") or f"job {getattr(message, 'job', '')}"
        sentence = f"the key {key.name} may not speak for {what}, which is another's ({type(message).__name__})"
        return Refusal("other_node", sentence)

    def when_revoked(self, act: Callable[[], None]) -> None:
        """Has this called whenever somebody who might speak before may no longer."""
        self._on_revoked.append(act)

    def close(self) -> None:
        """Lets nobody in any more; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        self._loop.remove_reader(self._fd)
        self._socket.close()

    def _answer(self) -> None:
        for _ in range(DRAIN_LIMIT):
            frames = None if self._closed else receive(self._socket)
            if frames is None:
                return
            reply = zap.answer(frames, self._allowed)
            self._socket.send_multipart(reply.frames)
            if reply.reason:
                self.refused[reply.reason] += 1
                if self._logged.due((reply.address, reply.reason)):
                    where = reply.address or "somewhere"
                    log.warning("refused a connection from %s: %s (reason %s)", where, reply.sentence, reply.reason)
        # The descriptor is edge-triggered: the rest has no edge of its own.
        self._loop.call_soon(self._answer)

    def _look(self) -> None:
        self._timer = self._loop.call_later(LOOK_INTERVAL, self._look)
        gone = self._allowed.refresh()
        if gone:
            log.info("revoked, and heard no longer: %s", ", ".join(gone))
            for act in self._on_revoked:
                act()
