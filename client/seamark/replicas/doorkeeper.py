"""Who comes in at a manager's door: ranks of the suite's replica groups, known by the key that they all have."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import zmq

from seamark.environment import SECURITY_KEYS
from seamark.protocol import zap
from seamark.protocol.authority import Refusal
from seamark.protocol.keys import AllowList
from seamark.protocol.messages import Message
from seamark.protocol.sockets import Received, receive

log = logging.getLogger(__name__)

LOOK_INTERVAL = 1.0
"""Seconds between two looks at the directory of keys, where messages come."""
LOG_INTERVAL = 60.0
"""Seconds between two log lines."""


class Doorkeeper:
    """The ZAP handler of a manager's ZeroMQ context; used on the manager's thread.

    Args:
        context: the process's context.

    Raises:
        KeyError: ``$SEAMARK_SECURITY_KEYS`` is not set.
    """

    def __init__(self, context: zmq.Context[Any]) -> None:
        self._allowed = AllowList(Path(os.environ[SECURITY_KEYS]))
        self._looked_at = time.monotonic()
        self._logged = -LOG_INTERVAL
        self.socket = context.socket(zmq.REP)
        """To be polled."""
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(zap.ENDPOINT)

    def answer(self) -> None:
        """Answers the questions that wait."""
        while (frames := receive(self.socket)) is not None:
            self._look()
            reply = zap.answer(frames, self._allowed)
            self.socket.send_multipart(reply.frames)
            if reply.reason:
                self._say(f"a connection from {reply.address}", reply.sentence)

    def refusal(self, received: Received, message: Message) -> Refusal | None:
        """Why this message is not taken; None if it is. Who has neither key nor address is of this process."""
        if not received.user and not received.address:
            return None
        self._look()
        refused = self._allowed.refusal(received.user, message)
        if refused is not None:
            self._say(f"a message from {received.address}", refused.sentence)
        return refused

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked_at >= LOOK_INTERVAL:
            self._looked_at = now
            self._allowed.refresh()

    def _say(self, what: str, why: str) -> None:
        now = time.monotonic()
        if now - self._logged >= LOG_INTERVAL:
            self._logged = now
            log.warning("refused %s: %s", what, why)
