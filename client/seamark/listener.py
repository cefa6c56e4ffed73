"""``seamark.FailureListener``: the failures of a job, each once, wherever the lighthouse is meanwhile.

Sockets and a thread around ``listening.py``, which decides what is new. A listener may be made before any lighthouse
is there; it reconnects by itself, and what it missed meanwhile it asks for.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, Self

import zmq

from seamark.environment import LIGHTHOUSE_ADDRESS, LIGHTHOUSE_EVENTS
from seamark.listening import Delivery, EventsLost, Listening
from seamark.protocol.codec import ProtocolError, decode, encode
from seamark.protocol.keys import Key, client_key
from seamark.protocol.messages import Event, EventBeat, Message, Snapshot, SnapshotRequest
from seamark.protocol.sockets import check_address, connect, encrypted, make_socket, receive

log = logging.getLogger(__name__)

REPEAT_INTERVAL = 1.0
"""Seconds after which a snapshot that did not come is asked for again."""
PING_MS, PING_TIMEOUT_MS = 1_000, 5_000
"""A subscriber never sends, so nothing else would tell it that the lighthouse's host is gone from the network."""
LOG_INTERVAL = 60.0
"""Seconds between two log lines about unreadable frames."""


class ListenerClosedError(RuntimeError):
    """The listener was closed, and everything that it had received was delivered."""


class FailureListener:
    """Delivers each failure exactly once, from now on, through reconnects and restarts of the lighthouse.

    Three ways to use it: ``for failure in listener`` (ends once it is closed), ``listener.get(timeout)``, or
    ``on_failure``. Deliveries are ``FailureEvent``, ``RecoveredEvent`` (with ``recoveries``), and ``EventsLost`` in the
    place of failures that can't be delivered any more: ``isinstance`` tells. Threads may share a listener, processes
    may not: after a fork the child makes its own.

    Args:
        lighthouse: where the lighthouse answers, ``tcp://HOST:PORT``; default ``$SEAMARK_LIGHTHOUSE_ADDRESS``.
        events: where it publishes; default ``$SEAMARK_LIGHTHOUSE_EVENTS``.
        job: the only job to listen to; None for all.
        group: the only group to listen to, ``"ranks"`` or ``"replicas"``; None for all.
        include_current: deliver the failures in force first: those whose members did not come back yet.
        recoveries: deliver returns of members, too.
        on_failure: called with each delivery on the listener's thread; then there is no iterator. What it raises is
            logged. While it runs, nothing is received; what the network drops meanwhile is asked for.
        queue_size: how many deliveries wait for the consumer; what comes when it is full is counted in an
            ``EventsLost``.

    Raises:
        ValueError: an address is missing or can't be connected to, ``queue_size`` is less than 1, or the suite's keys
            (``$SEAMARK_SECURITY_KEYS``) can't be used.
    """

    def __init__(
        self,
        lighthouse: str | None = None,
        events: str | None = None,
        *,
        job: str | None = None,
        group: str | None = None,
        include_current: bool = False,
        recoveries: bool = False,
        on_failure: Callable[[Delivery], object] | None = None,
        queue_size: int = 10_000,
    ) -> None:
        if queue_size < 1:
            raise ValueError(f"queue_size must be at least 1, not {queue_size}")
        requests = _address("lighthouse", lighthouse, LIGHTHOUSE_ADDRESS)
        published = _address("events", events, LIGHTHOUSE_EVENTS)
        self._core = Listening(job, group, include_current, recoveries=recoveries)
        self._on_failure = on_failure
        self._queue: deque[Delivery] = deque()
        self._queue_size = queue_size
        self._overflow: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._closing = False
        self._ended = False
        self._ready = False
        self._request = 0
        self._logged = -LOG_INTERVAL
        self._pid = os.getpid()
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            key = client_key() if encrypted(requests) or encrypted(published) else None
            self._requests = _connected(self._context, key, zmq.DEALER, requests)
            self._events = _connected(self._context, key, zmq.SUB, published, topics(job))
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._serve, name="seamark-listener", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delivery:
        try:
            return self.get()
        except ListenerClosedError:
            raise StopIteration from None

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Waits until a lighthouse was heard and has said who the members are: "now" is settled.

        Failures before that moment may be delivered or not; each later one is, also if the lighthouse is not there
        when it happens.

        Args:
            timeout: seconds; None waits for ever.

        Returns:
            False if that has not happened in time, or the listener was closed first.

        Raises:
            RuntimeError: this is another process than the one that made the listener.
        """
        self._check_process()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended, timeout)
            return self._ready

    def get(self, timeout: float | None = None) -> Delivery:
        """The next delivery.

        Args:
            timeout: seconds to wait for it; None waits until there is one or the listener is closed.

        Raises:
            TimeoutError: there was none.
            ListenerClosedError: the listener is closed, and nothing is left.
            RuntimeError: this is another process than the one that made the listener, or ``on_failure`` has them.
        """
        self._check_process()
        if self._on_failure is not None:
            raise RuntimeError("this FailureListener hands its deliveries to on_failure: leave that out to iterate")
        with self._changed:
            if not self._changed.wait_for(lambda: self._queue or self._overflow or self._ended, timeout):
                raise TimeoutError(f"no failure within {timeout:g} s")
            if not self._queue:
                self._say_overflow()
            if not self._queue:
                raise ListenerClosedError("this FailureListener is closed")
            return self._queue.popleft()

    def close(self) -> None:
        """Ends the thread and lets go of sockets and descriptors; may be called twice, and in the callback.

        What was received before can still be taken; then the iterator ends.
        """
        if os.getpid() != self._pid:
            # What a fork copied is not this process's to end.
            return
        with self._changed:
            self._closing = True
            if not self._ended:
                os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"this FailureListener belongs to process {self._pid}, which forked this one: make another one here"
            )

    # --- consumer's queue ----------------------------------------------------------------------------------

    def _deliver(self, deliveries: Iterable[Delivery]) -> None:
        for delivery in deliveries:
            if self._on_failure is not None:
                if self._closing:
                    # By the callback itself, perhaps, and what came with its failure is nobody's any more.
                    return
                try:
                    self._on_failure(delivery)
                except Exception:
                    log.exception("on_failure raised; the listener goes on")
                continue
            with self._changed:
                if len(self._queue) >= self._queue_size:
                    self._overflow[delivery.job] += delivery.count if isinstance(delivery, EventsLost) else 1
                    continue
                self._say_overflow()
                self._queue.append(delivery)
                self._changed.notify_all()

    def _say_overflow(self) -> None:
        """In the place of what did not fit: after what was queued before, and before what comes next."""
        self._queue += [EventsLost(job, count) for job, count in self._overflow.items()]
        self._overflow.clear()

    # --- thread --------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._listen()
        except Exception:
            log.exception("the failure listener ended")
        finally:
            self._context.destroy(linger=0)
            with self._changed:
                self._ended = True
                os.close(self._wake)
                self._changed.notify_all()

    def _listen(self) -> None:
        poller = zmq.Poller()
        for source in (self._requests, self._events, self._wake):
            poller.register(source, zmq.POLLIN)
        repeat_at = time.monotonic() + REPEAT_INTERVAL
        while not self._closing:
            # One message and another look: asking a socket that has none raises, which costs more than to look.
            ready = [source for source, _ in poller.poll(max(0, int((repeat_at - time.monotonic()) * 1_000) + 1))]
            # Snapshots first: an event that was read before one makes it a thing of the past.
            if self._requests in ready:
                self._read(receive(self._requests))
            elif self._events in ready:
                self._read((receive(self._events) or [])[1:])
            if not self._ready and self._core.ready:
                with self._changed:
                    self._ready = True
                    self._changed.notify_all()
            if time.monotonic() >= repeat_at:
                repeat_at = time.monotonic() + REPEAT_INTERVAL
                self._ask(self._core.wanted)

    def _read(self, frames: list[bytes] | None) -> None:
        if frames is None:
            return
        try:
            message = decode(frames)
        except ProtocolError as error:
            self._unreadable(error)
            return
        if isinstance(message, Event | Snapshot | EventBeat):
            heard = self._core.take(message)
            self._ask(heard.ask)
            self._deliver(heard.deliver)

    def _ask(self, jobs: Iterable[str]) -> None:
        for job in jobs:
            self._request += 1
            self._send(SnapshotRequest(self._request, job))

    def _send(self, message: Message) -> None:
        try:
            self._requests.send_multipart(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            # Not connected now: it is asked again.
            return

    def _unreadable(self, error: ProtocolError) -> None:
        now = time.monotonic()
        if now - self._logged >= LOG_INTERVAL:
            self._logged = now
            log.warning("dropped a frame of the lighthouse: %s (reason %s)", error, error.reason)


def topics(job: str | None) -> list[bytes]:
    """What to subscribe to for the events of a job, or of all, and the idle beat."""
    # The beat comes last: whoever hears one has the events' subscription in force.
    return [b"job/" if job is None else b"job/" + job.encode() + b"\0", b"beat\0"]


def _address(name: str, given: str | None, variable: str) -> str:
    address = given if given is not None else os.environ.get(variable)
    if not address:
        raise ValueError(f"where is the lighthouse? Give FailureListener {name}=, or set {variable} (tcp://HOST:PORT)")
    return check_address(address)


def _connected(
    context: zmq.Context[Any], key: Key | None, kind: int, address: str, subscriptions: Iterable[bytes] = ()
) -> zmq.Socket[Any]:
    socket = make_socket(context, kind)
    socket.setsockopt(zmq.HEARTBEAT_IVL, PING_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, PING_TIMEOUT_MS)
    if kind == zmq.DEALER:
        # Else the requests of a time without a lighthouse would all reach the next one at once.
        socket.setsockopt(zmq.IMMEDIATE, 1)
    for subscription in subscriptions:
        socket.subscribe(subscription)
    try:
        connect(socket, address, key)
    except zmq.ZMQError as error:
        raise ValueError(f"{address}: can't be connected to: {error.strerror}") from None
    return socket
