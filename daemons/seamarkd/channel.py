"""ZeroMQ sockets on an asyncio loop: typed messages in, typed messages out.

A plain socket is drained non-blocking whenever its file descriptor becomes readable: four to five times
cheaper than awaiting ``zmq.asyncio``, and nothing is lost to a cancelled receive. The descriptor is
edge-triggered, and a send may swallow an edge, so the socket's own event state is looked at after every drain
and every send. A drain is bounded, so that a flood can't starve timers. Where messages come one by one faster than a
loop's turn pays for, they are let gather for two milliseconds. What is not a message, or not its sender's to send, is
counted, logged at a bounded rate and dropped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import zmq

from seamark.protocol.authority import Refusal
from seamark.protocol.codec import ProtocolError, Reason, decode, encode
from seamark.protocol.messages import Message, Refused
from seamark.protocol.sockets import receive, receive_signed
from seamarkd.logs import Sparing
from seamarkd.tally import Tally

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
_NOBLOCK = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)

Handler = Callable[[bytes, Message], None]
Authority = Callable[[str, Message], Refusal | None]
"""(public half of the sender's key, empty where there is none; message) to why it is refused, or None."""


class Channel:
    """One socket, its decoder and its handler.

    Args:
        socket: a bound or connected socket; the channel owns it from now on.
        handler: called on the loop with (routing id or topic, message); both empty bytes for a DEALER.
        authority: asked before the handler; None takes every message.
        signed: the sender's key is asked for, for the authority.
    """

    def __init__(
        self,
        socket: zmq.Socket[Any],
        handler: Handler | None = None,
        authority: Authority | None = None,
        *,
        signed: bool = False,
    ) -> None:
        self.socket = socket
        self.dropped = Tally()
        """What was not taken or not sent, by reason."""
        self.refused = Tally()
        """Messages that their senders may not send, by reason."""
        self._handler = handler
        self._authority = authority
        self._signed = signed
        kind = socket.getsockopt(zmq.TYPE)
        self._prefixed = kind in (zmq.ROUTER, zmq.SUB)
        self._routed = kind in (zmq.ROUTER, zmq.PUB)
        self._answers = kind == zmq.ROUTER
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self._rush = 0
        self._drained_at = 0.0
        self._gathering: asyncio.TimerHandle | None = None
        self._logged = Sparing()
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
            user = address = ""
            if self._signed:
                frames, user, address = receive_signed(self.socket) or (None, "", "")
            else:
                frames = receive(self.socket)
            if frames is None:
                return taken
            prefix = frames.pop(0) if self._prefixed and frames else b""
            try:
                message = decode(frames)
            except ProtocolError as error:
                self._drop(prefix, address, error)
                continue
            if self._authority is not None:
                refused = self._authority(user, message)
                if refused is not None:
                    self._refuse(prefix, user, address, message, refused)
                    continue
            assert self._handler is not None
            self._handler(prefix, message)
        return DRAIN_LIMIT

    def _drop(self, peer: bytes, address: str, error: ProtocolError) -> None:
        self.dropped[error.reason] += 1
        if error.reason is Reason.VERSION and self._answers:
            self.send(Refused(request=0, code="BAD_REQUEST", reason=str(error)), peer)
        if self._logged.due(peer):
            log.warning("dropped a frame of peer %r%s: %s (reason %s)", peer[:32], _at(address), error, error.reason)

    def _refuse(self, peer: bytes, user: str, address: str, message: Message, refused: Refusal) -> None:
        self.refused[refused.reason] += 1
        if self._answers:
            number = getattr(message, "request", 0)
            self.send(Refused(request=number, code="NOT_ALLOWED", reason=refused.sentence), peer)
        if self._logged.due((user or peer, refused.reason)):
            who = _at(address) or f" of peer {peer[:32]!r}"
            log.warning("refused a message%s: %s (reason %s)", who, refused.sentence, refused.reason)


def _at(address: str) -> str:
    return f" from {address}" if address else ""
