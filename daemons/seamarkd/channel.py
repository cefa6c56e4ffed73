"""ZeroMQ sockets on an asyncio loop: typed messages in, typed messages out.

A plain socket is drained non-blocking whenever its file descriptor becomes readable: four to five times
cheaper than awaiting ``zmq.asyncio``, and nothing is lost to a cancelled receive. The descriptor is
edge-triggered, and a send may swallow an edge, so the socket's own event state is looked at after every drain
and every send. A drain is bounded, so that a flood can't starve timers. Where messages come one by one faster than a
loop's turn pays for, they are let gather for two milliseconds. What is not a message is counted, logged at a bounded
rate and dropped.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import zmq

from seamark.protocol.codec import ProtocolError, Reason, decode, encode
from seamark.protocol.messages import Message, Refused
from seamark.protocol.sockets import receive

log = logging.getLogger(__name__)

DRAIN_LIMIT = 256
RUSH_GAP = 0.0005
"""Seconds between two drains that follow each other in a rush."""
RUSH_DRAINS = 64
"""So many of them in a row, and messages are let gather; a few workers that answer each other never make as many."""
RUSH_PAUSE = 0.002
"""Seconds they gather; a beat that waits for so long is as good as before."""
RUSH_OVER = 4
"""Fewer than so many gathered: the rush is over."""
LOG_INTERVAL = 60.0
"""Seconds between two log lines about unreadable frames of one peer."""
MAX_PEERS_LOGGED = 1_000
_NOBLOCK = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)

Handler = Callable[[bytes, Message], None]


class Channel:
    """One socket, its decoder and its handler.

    Args:
        socket: a bound or connected socket; the channel owns it from now on.
        handler: called on the loop with (routing id or topic, message); both empty bytes for a DEALER.
    """

    def __init__(self, socket: zmq.Socket[Any], handler: Handler | None = None) -> None:
        self.socket = socket
        self.dropped: Counter[str] = Counter()
        self._handler = handler
        kind = socket.getsockopt(zmq.TYPE)
        self._prefixed = kind in (zmq.ROUTER, zmq.SUB)
        self._routed = kind in (zmq.ROUTER, zmq.PUB)
        self._answers = kind == zmq.ROUTER
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self._rush = 0
        self._drained_at = 0.0
        self._gathering: asyncio.TimerHandle | None = None
        self._logged: dict[bytes, float] = {}
        self._closed = False
        self.behind = False
        """True while more waits to be read than one drain takes."""
        if handler is not None:
            self._fd = int(socket.getsockopt(zmq.FD))
            self._loop.add_reader(self._fd, self._drain)
            self._schedule()

    def send(self, message: Message, to: bytes = b"") -> bool:
        """Sends without blocking; ``to`` is a ROUTER's peer or a PUB's topic. False if it could not be queued."""
        if self._closed:
            return False
        frames = [to, *encode(message)] if self._routed else encode(message)
        return self.forward(frames)

    def forward(self, frames: list[bytes]) -> bool:
        """Sends frames that are already encoded."""
        if self._closed:
            return False
        try:
            # Frame by frame with plain numbers: send_multipart() and the flags' enumeration cost more than the send.
            for frame in frames[:-1]:
                self.socket.send(frame, _MORE)
            self.socket.send(frames[-1], _NOBLOCK)
        except zmq.ZMQError as error:
            self.dropped[f"send:{error.strerror}"] += 1
            return False
        finally:
            self._schedule()
        return True

    def close(self) -> None:
        """Stops reading and closes the socket; may be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._gathering is not None:
            self._gathering.cancel()
        elif self._handler is not None:
            self._loop.remove_reader(self._fd)
        self.socket.close()

    def _schedule(self) -> None:
        if self._handler is not None and not self._scheduled and not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        if self._closed or self._gathering is not None:
            self._scheduled = False
            return
        taken = self._take()
        if self._closed or taken == DRAIN_LIMIT:
            return
        now = self._loop.time()
        self._rush = self._rush + 1 if taken and now - self._drained_at < RUSH_GAP else 0
        self._drained_at = now
        if self._rush > RUSH_DRAINS:
            self._loop.remove_reader(self._fd)
            self._gathering = self._loop.call_later(RUSH_PAUSE, self._drain_gathered)

    def _drain_gathered(self) -> None:
        if self._take() >= RUSH_OVER and not self._closed:
            self._gathering = self._loop.call_later(RUSH_PAUSE, self._drain_gathered)
            return
        self._gathering = None
        self._rush = 0
        if not self._closed:
            self._loop.add_reader(self._fd, self._drain)
            self._schedule()

    def _take(self) -> int:
        """Handles what is there, up to the limit; how much it was."""
        # A send meanwhile asks for no drain of its own: this one goes on until nothing is left.
        self._scheduled = True
        taken = DRAIN_LIMIT
        try:
            taken = self._handle_waiting()
        finally:
            # Also after a handler that raised: what is left was announced by an edge that is spent.
            self._scheduled = False
            self.behind = taken == DRAIN_LIMIT
            if self.behind:
                self._schedule()
        return taken

    def _handle_waiting(self) -> int:
        for taken in range(DRAIN_LIMIT):
            if self._closed:
                return taken
            frames = receive(self.socket)
            if frames is None:
                return taken
            prefix = frames.pop(0) if self._prefixed and frames else b""
            try:
                message = decode(frames)
            except ProtocolError as error:
                self._drop(prefix, error)
                continue
            assert self._handler is not None
            self._handler(prefix, message)
        return DRAIN_LIMIT

    def _drop(self, peer: bytes, error: ProtocolError) -> None:
        self.dropped[error.reason] += 1
        if error.reason is Reason.VERSION and self._answers:
            self.send(Refused(request=0, code="BAD_REQUEST", reason=str(error)), peer)
        now = time.monotonic()
        if now - self._logged.get(peer, -LOG_INTERVAL) >= LOG_INTERVAL:
            if len(self._logged) >= MAX_PEERS_LOGGED:
                self._logged.clear()
            self._logged[peer] = now
            log.warning("dropped a frame of peer %r: %s (reason %s)", peer[:32], error, error.reason)
