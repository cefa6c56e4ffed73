"""A rank's conversation with its replica group's manager, on a thread of its own.

The thread owns the socket. Callers hand it a request and wait for the answer; failures that the manager passes on go
to a callback on the thread, because the caller may be blocked in a collective when they come.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq

from seamark.protocol.codec import ProtocolError, decode, encode
from seamark.protocol.keys import Key
from seamark.protocol.messages import FailureEvent, Message, RankQuorum, Refused
from seamark.protocol.sockets import connect, encrypted, make_socket, receive

log = logging.getLogger(__name__)

REPEAT_INTERVAL = 1.0
"""Seconds after which an unanswered request is sent again."""
CLOSED = "this Manager was shut down"
ANSWER_MARGIN = 2.0
"""Seconds beyond its own timeout that a request may take to be answered: the manager says why it ran out."""


class ManagerError(RuntimeError):
    """The manager or the lighthouse refused, with the sentence that says why.

    Attributes:
        code: the refusal's code.
    """

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class QuorumTimeout(ManagerError, TimeoutError):
    """A wait for the others ran out."""


class RankSession:
    """The connection of one rank.

    Args:
        context: a ZeroMQ context of this process.
        address: where the manager listens.
        key: what replica groups speak with over TCP, the same for all; None to speak in the clear.
        on_failure: called on the thread for every published failure of the job's replica groups.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        address: str,
        on_failure: Callable[[FailureEvent], None],
        key: Key | None = None,
    ) -> None:
        self._context = context
        self._address = address
        self._key = key
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._outgoing: deque[Message] = deque()
        self._answers: queue.SimpleQueue[Message] = queue.SimpleQueue()
        # Not from 1: a rank started anew must not be taken for its predecessor's repetition.
        self._request = secrets.randbits(40)
        self._pending: Message | None = None
        self.lost: set[str] = set()
        """Incarnations whose failure came after the last quorum's answer."""
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._serve, name="seamark-rank", daemon=True)
        self._thread.start()

    def ask(self, make: Callable[[int], Message], timeout: float) -> Message:
        """Sends the request that ``make`` builds from its number, again until it is answered.

        Raises:
            QuorumTimeout: nobody answered within ``timeout`` seconds, or the manager says that the time is over.
            ManagerError: it was refused.
        """
        with self._lock:
            if self._closing:
                raise ManagerError("UNREACHABLE", CLOSED)
            self._request += 1
            request = make(self._request)
            self._pending = request
            self._post(request)
            until = time.monotonic() + timeout + ANSWER_MARGIN
            try:
                while True:
                    try:
                        answer = self._answers.get(timeout=max(0.0, until - time.monotonic()))
                    except queue.Empty:
                        sentence = f"the manager at {self._address} did not answer within {timeout:g} s"
                        raise QuorumTimeout("TIMEOUT", sentence) from None
                    if self._closing:
                        raise ManagerError("UNREACHABLE", CLOSED)
                    if getattr(answer, "request", None) == self._request:
                        break
            finally:
                self._pending = None
        if isinstance(answer, Refused):
            kind = QuorumTimeout if answer.code in ("TIMEOUT", "UNREACHABLE") else ManagerError
            raise kind(answer.code, answer.reason)
        return answer

    def close(self) -> None:
        """Ends the thread, and whoever waits for an answer; its socket is closed when this returns. Idempotent."""
        if self._closing:
            return
        self._closing = True
        self._answers.put(Refused(0, "UNREACHABLE", CLOSED))  # wakes who waits
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        with self._lock:  # nobody may write to a descriptor that is another's by now
            os.close(self._wake)

    def _post(self, message: Message) -> None:
        self._outgoing.append(message)
        os.eventfd_write(self._wake, 1)

    def _serve(self) -> None:
        socket = make_socket(self._context, zmq.DEALER)
        try:
            if encrypted(self._address):
                connect(socket, self._address, self._key, self._key.public if self._key else "")
            else:
                socket.connect(self._address)
            poller = zmq.Poller()
            poller.register(socket, zmq.POLLIN)
            poller.register(self._wake, zmq.POLLIN)
            while not self._closing:
                for source, _ in poller.poll(int(REPEAT_INTERVAL * 1_000)):
                    if source == self._wake:
                        os.eventfd_read(self._wake)
                sent = False
                while self._outgoing:
                    self._send(socket, self._outgoing.popleft())
                    sent = True
                heard = self._receive(socket)
                pending = self._pending
                if pending is not None and not sent and not heard:
                    self._send(socket, pending)
        finally:
            socket.close()

    def _send(self, socket: zmq.Socket[Any], message: Message) -> None:
        try:
            socket.send_multipart(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            log.warning("the manager does not read: %s will be repeated", type(message).__name__)

    def _receive(self, socket: zmq.Socket[Any]) -> bool:
        heard = False
        while (frames := receive(socket)) is not None:
            try:
                message = decode(frames)
            except ProtocolError as error:
                log.warning("dropped a frame of the manager: %s", error)
                continue
            heard = True
            if isinstance(message, FailureEvent):
                self.lost.add(message.failure.incarnation)
                self._on_failure(message)
            else:
                if isinstance(message, RankQuorum):
                    self.lost.clear()  # what was lost before this quorum and is in it came back
                self._answers.put(message)
        return heard
