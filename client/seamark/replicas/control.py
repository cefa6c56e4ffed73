"""The manager's shell: a thread with the sockets of a replica group's rank 0; the thinking is in ``core.py``."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from typing import Any

import zmq

from seamark.protocol.codec import ProtocolError, decode, encode
from seamark.protocol.keys import Key
from seamark.protocol.messages import Message, Refused
from seamark.protocol.sockets import bind, check_address, connect, make_socket, receive_signed
from seamark.replicas.core import Effect, ManagerCore, Reconnect, Settings, ToLighthouse, ToRank
from seamark.replicas.doorkeeper import Doorkeeper

log = logging.getLogger(__name__)

LEAVE_TIMEOUT = 1.0
"""Seconds the end of a replica group waits for the lighthouse's acknowledgement; its silence is noticed anyway."""
LOCAL = "inproc://manager"
"""Where the ranks of the same process reach it, in the same context."""


class Control:
    """A running manager.

    Args:
        context: the ZeroMQ context that this process's ranks share with it.
        settings: who it is; ``address`` is filled in from the port that it gets.
        host: the address of this host under which other hosts reach it.
        key: what all replica groups of a suite speak with, so that its door is open to them alone; None: to everybody.
    """

    def __init__(self, context: zmq.Context[Any], settings: Settings, host: str, key: Key | None = None) -> None:
        self._context = context
        self._key = key
        self._doorkeeper = Doorkeeper(context) if key is not None else None
        self._lighthouse_address = check_address(settings.lighthouse)
        self._door = make_socket(context, zmq.ROUTER)
        bind(self._door, f"tcp://{host}:*", key)
        port = self._door.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2]
        self._door.bind(LOCAL)
        self.address = f"tcp://{host}:{port}"
        self._identity = settings.incarnation.encode()
        self._lighthouse = self._connect()
        self._core = ManagerCore(
            Settings(
                settings.job,
                settings.replica_id,
                settings.incarnation,
                settings.world_size,
                self.address,
                settings.store_address,
                settings.lighthouse,
                settings.heartbeat_interval,
            ),
            time.monotonic(),
        )
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._serve, name="seamark-manager", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Says goodbye to the lighthouse and ends the thread; its sockets are closed when this returns."""
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def _connect(self) -> zmq.Socket[Any]:
        socket = make_socket(self._context, zmq.DEALER, identity=self._identity)
        connect(socket, self._lighthouse_address, self._key)
        return socket

    def _serve(self) -> None:
        poller = zmq.Poller()
        for source in (self._door, self._lighthouse, self._wake):
            poller.register(source, zmq.POLLIN)
        if self._doorkeeper is not None:
            poller.register(self._doorkeeper.socket, zmq.POLLIN)
        leave_by: float | None = None
        try:
            while True:
                now = time.monotonic()
                if self._closing and leave_by is None:
                    leave_by = now + LEAVE_TIMEOUT
                    poller.unregister(self._wake)
                    self._perform(poller, self._core.leave(now, "shut down"))
                if leave_by is not None and (self._core.left or now >= leave_by):
                    return
                until = self._core.wake_at() if leave_by is None else min(leave_by, self._core.wake_at())
                poller.poll(math.ceil(max(0.0, until - now) * 1_000))
                self._receive(poller)
                self._perform(poller, self._core.tick(time.monotonic()))
        finally:
            self._door.close()
            self._lighthouse.close()
            if self._doorkeeper is not None:
                self._doorkeeper.socket.close()

    def _receive(self, poller: zmq.Poller) -> None:
        if self._doorkeeper is not None:
            self._doorkeeper.answer()
        for source in (self._door, self._lighthouse):
            while (received := receive_signed(source)) is not None:
                frames = received.frames
                route = frames.pop(0) if source is self._door else b""
                try:
                    message = decode(frames)
                except ProtocolError as error:
                    log.warning("dropped a frame: %s", error)
                    continue
                if source is self._door and self._doorkeeper is not None:
                    refused = self._doorkeeper.refusal(received, message)
                    if refused is not None:
                        number = getattr(message, "request", 0)
                        self._send(self._door, [route], Refused(number, "NOT_ALLOWED", refused.sentence))
                        continue
                now = time.monotonic()
                if source is self._door:
                    self._perform(poller, self._core.from_rank(now, route, message))
                else:
                    self._perform(poller, self._core.from_lighthouse(now, message))
                    if source is not self._lighthouse:
                        break

    def _perform(self, poller: zmq.Poller, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case ToRank(route, message):
                    self._send(self._door, [route], message)
                case ToLighthouse(message):
                    self._send(self._lighthouse, [], message)
                case Reconnect():
                    poller.unregister(self._lighthouse)
                    self._lighthouse.close()
                    self._lighthouse = self._connect()
                    poller.register(self._lighthouse, zmq.POLLIN)

    @staticmethod
    def _send(socket: zmq.Socket[Any], route: list[bytes], message: Message) -> None:
        try:
            socket.send_multipart([*route, *encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # Whoever asked asks again; a peer that went away doesn't.
            log.debug("%s was not sent: %s", type(message).__name__, error)
