"""The agent's sockets: the workers' door, the lighthouse and its events, the coordinator; and what keeps them alive.

Typed messages come in and go to the core, whose effects go to whoever performs them. Processes are not known here.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

import zmq
from msgspec.structs import replace

from seamark.protocol.authority import Refusal, refusal
from seamark.protocol.keys import Key
from seamark.protocol.messages import (
    Beat,
    BeatAnswer,
    Event,
    EventBeat,
    Message,
    NodeHello,
    NodeRefusals,
    Refused,
    Snapshot,
    SnapshotRequest,
    Welcome,
)
from seamark.protocol.sockets import check_address, connect, make_socket
from seamarkd.agent.core import Agent
from seamarkd.agent.effects import Effect, Introduce, TellWorkers, ToCoordinator, ToLighthouse, ToWorker
from seamarkd.channel import Channel
from seamarkd.logs import Sparing
from seamarkd.rhythm import next_beat
from seamarkd.tally import ages

log = logging.getLogger(__name__)

LONGEST_TICK = 0.5
"""Seconds until reports that nobody has acknowledged are looked at, where beats are rarer."""
BEAT_INTERVAL = 0.1
"""Seconds between two beats until the lighthouse says how many it wants."""
COORDINATOR_BEAT_INTERVAL = 0.5


def numeric(host: str) -> str:
    """The address that a host's name stands for, IPv4 first, as the ranks look names up; itself if it stands for none.

    A job's store is told to all by address. What can't be looked up nothing can listen on: ``start`` says so.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return host
    return str(min(found, key=lambda one: one[0] != socket.AF_INET)[4][0])


class NotThisHostError(Exception):
    """The host that others are to reach this one by is no address of it."""


class Wires:
    """The sockets of one agent.

    Args:
        context: the process's ZeroMQ context.
        core: what the messages are for.
        perform: called with the effects of each message.
        address: the workers' door.
        lighthouse, events: where the lighthouse answers and publishes.
        coordinator: where it listens; None where there is none.
        key: what it speaks with over TCP; None to speak in the clear.
        server: the public half of the key of who listens there; the daemons' by default.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        core: Agent,
        perform: Callable[[list[Effect]], None],
        *,
        address: str,
        lighthouse: str,
        events: str,
        coordinator: str | None,
        key: Key | None = None,
        server: str = "",
    ) -> None:
        self._core = core
        self._key = key
        self._server = server
        self._told = 0
        """How many refusals the coordinator knows of."""
        self._logged = Sparing()
        self._perform = perform
        self._loop = asyncio.get_running_loop()
        self._incarnation = secrets.token_hex(8)
        self.address = check_address(address)
        self._beats = 0
        self._answered = 0
        """The latest beat that the coordinator has answered."""
        self._untold: set[str] = set()
        self._beat_interval = BEAT_INTERVAL
        self._hello: NodeHello | None = None
        self._knocks: asyncio.Server | None = None
        self.lighthouse_heard_at: float | None = None
        """When the lighthouse said anything last, seconds of the loop's clock; None before its first word."""
        self._workers = Channel(make_socket(context, zmq.ROUTER), self._on_worker, _of_a_worker)
        self._lighthouse = Channel(self._connect(context, lighthouse), self._on_lighthouse)
        self._coordinator = Channel(self._connect(context, coordinator), self._on_coordinator) if coordinator else None
        subscriber = make_socket(context, zmq.SUB)
        subscriber.subscribe(b"")
        connect(subscriber, events, key, server)
        self._events = Channel(subscriber, self._on_event)
        self._timers: dict[Callable[[], float], asyncio.TimerHandle] = {}

    async def start(self, host: str, slots: int) -> None:
        """Opens the door and introduces this node to the other daemons.

        Args:
            host: the address under which other nodes reach this one.
            slots: worker places of the node.

        Raises:
            NotThisHostError: nothing can listen on that host.
        """
        self._workers.socket.bind(self.address)
        try:
            self._knocks = await asyncio.start_server(_answer_knock, host, 0)
        except OSError as error:
            raise NotThisHostError(f"{host} is no address of this host ({error.strerror or error})") from None
        name, port = self._knocks.sockets[0].getsockname()[:2]
        knock = f"tcp://[{name}]:{port}" if ":" in name else f"tcp://{name}:{port}"
        self._hello = NodeHello(self._core.node.name, self._incarnation, knock, slots)
        self._introduce(self._lighthouse)
        self.repeat(self._tick)
        self.repeat(self._beat)
        if self._coordinator is not None:
            self._introduce(self._coordinator)
            self.repeat(self._beat_coordinator)

    def close(self) -> None:
        """Stops serving."""
        for timer in self._timers.values():
            timer.cancel()
        if self._knocks is not None:
            self._knocks.close()
        for channel in (self._workers, self._lighthouse, self._coordinator, self._events):
            if channel is not None:
                channel.close()

    def repeat(self, action: Callable[[], float]) -> None:
        """Calls it now, and again at each multiple of the seconds that it returns (``rhythm``)."""
        period = action()
        self._timers[action] = self._loop.call_at(next_beat(self._loop.time(), period), self.repeat, action)

    def perform(self, effect: Effect) -> bool:
        """Sends what is to be sent; False for an effect of another kind."""
        match effect:
            case ToLighthouse(message):
                self._lighthouse.send(message)
            case ToCoordinator(message):
                self.tell_coordinator(message)
            case ToWorker(incarnation, message):
                self._workers.send(message, incarnation.encode())
            case TellWorkers(job, message):
                self._tell_workers(job, message)
            case Introduce():
                if self._coordinator is not None:
                    self._introduce(self._coordinator)
                return False
            case _:
                return False
        return True

    def ask_coordinator(self) -> Callable[[], bool]:
        """Sends a beat; what it returns says whether the coordinator has had that, and all that was sent before."""
        self._beats += 1
        sequence = self._beats
        self.tell_coordinator(Beat(self._core.node.name, self._incarnation, sequence))
        return lambda: self._coordinator is None or self._answered >= sequence

    def tell_coordinator(self, message: Message) -> None:
        """Sends it, if there is a coordinator."""
        if self._coordinator is not None:
            self._coordinator.send(message)

    def _connect(self, context: zmq.Context[Any], address: str) -> zmq.Socket[Any]:
        socket = make_socket(context, zmq.DEALER, identity=self._incarnation.encode())
        connect(socket, address, self._key, self._server)
        return socket

    # --- messages ------------------------------------------------------------------------------------------

    def _on_worker(self, route: bytes, message: Message) -> None:
        self._perform(self._core.from_worker(time.monotonic(), route.decode(errors="replace"), message))

    def _on_lighthouse(self, route: bytes, message: Message) -> None:
        self.lighthouse_heard_at = self._loop.time()
        match message:
            case BeatAnswer(known=False):
                self._introduce(self._lighthouse)
            case Welcome():
                self._beat_interval = message.beat_interval or self._beat_interval
                self._perform(self._core.registered(time.monotonic()))
            case Refused(code="NOT_ALLOWED"):
                self._not_allowed(message)
            case Snapshot():
                self._perform(self._core.sessions.heard(message))
            case _:
                self._perform(self._core.from_lighthouse(time.monotonic(), message))

    def _on_coordinator(self, route: bytes, message: Message) -> None:
        if isinstance(message, BeatAnswer):
            self._answered = max(self._answered, message.sequence)
        match message:
            case BeatAnswer(known=False):
                assert self._coordinator is not None
                self._introduce(self._coordinator)
            case Refused(code="NOT_ALLOWED"):
                self._not_allowed(message)
            case Welcome():
                self._told = 0
                self._perform(self._core.welcomed(time.monotonic()))
        self._perform(self._core.from_coordinator(time.monotonic(), message))

    def _not_allowed(self, refused: Refused) -> None:
        if self._logged.due(refused.reason):
            log.error("a daemon refuses this agent's messages: %s", refused.reason)

    def _introduce(self, daemon: Channel) -> None:
        if self._hello is not None:
            daemon.send(replace(self._hello, draining=self._core.node.draining, unhealthy=self._core.node.unhealthy))

    def _on_event(self, topic: bytes, message: Message) -> None:
        if isinstance(message, Event | EventBeat):
            self._perform(self._core.sessions.heard(message))

    def _tell_workers(self, job: str, message: Message) -> None:
        for incarnation in self._core.node.listening(job):
            if not self._workers.send(message, incarnation.encode()):
                # It has not come back to this door yet, and asks for nothing while it trains.
                self._untold.add(job)

    # --- time ----------------------------------------------------------------------------------------------

    def _beat(self) -> float:
        self._beats += 1
        self._lighthouse.send(Beat(self._core.node.name, self._incarnation, self._beats))
        return self._beat_interval

    def _beat_coordinator(self) -> float:
        self.tell_coordinator(Beat(self._core.node.name, self._incarnation, self._beats))
        refused = self._workers.refused
        if refused.total() != self._told:
            self._told = refused.total()
            self.tell_coordinator(NodeRefusals(self._core.node.name, dict(refused), ages(time.monotonic(), [refused])))
        return COORDINATOR_BEAT_INTERVAL

    def _tick(self) -> float:
        untold, self._untold = self._untold, set()
        for job in untold:
            self._lighthouse.send(SnapshotRequest(0, job))
        self._perform(self._core.reports.due(time.monotonic()))
        # With a beat, so that both share a wake-up.
        return min(self._beat_interval, LONGEST_TICK)


def _of_a_worker(user: str, message: Message) -> Refusal | None:
    """Workers have no keys: whoever reaches the door is of this node."""
    return refusal("worker", "", message)


async def _answer_knock(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Who knocks wants to know that this host lives: the connection itself says so."""
    writer.close()
