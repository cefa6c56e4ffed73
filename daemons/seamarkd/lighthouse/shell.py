"""The lighthouse's shell: sockets, timers and nothing else; the thinking is in ``core.py``."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Coroutine
from typing import Any

import zmq
from msgspec.structs import replace

from seamark.protocol.authority import Refusal
from seamark.protocol.messages import Message, StatusRequest
from seamark.protocol.sockets import bind, encrypted, make_socket
from seamarkd.channel import Channel
from seamarkd.effects import Effect, Probe, ProbeMember, Publish, Send, Wake
from seamarkd.gate import Gate
from seamarkd.lighthouse.core import Lighthouse
from seamarkd.lighthouse.nodes import AGENT_GRACE, BEAT_INTERVAL, NodeWatch, ProbeResult
from seamarkd.lighthouse.replicas import ReplicaOptions
from seamarkd.rhythm import next_beat
from seamarkd.software import software
from seamarkd.tally import Tally, ages, counts

log = logging.getLogger(__name__)

TICK = 0.1
"""Seconds; the quorum tick of torchft. Only time-outs wait for it, everything else is answered at the event."""
EVENT_BEAT = 0.2
"""Seconds. A restart of this daemon is seen by the epoch in its next beat, and a lost last event by its number."""
PROBE_TIMEOUT = 0.2
PROBE_AGAIN = 0.05
"""Seconds after which another connection is tried beside: the kernel repeats a lost SYN only after a second."""
LATENESS_KEPT = 10.0
OPEN_AGAIN = 0.02
"""Seconds between two attempts to listen at an address that a socket of this process is just giving up."""
OPEN_AGAIN_PATIENCE = 250
"""Attempts after which that is somebody else's doing, and said."""


def topic(job: str) -> bytes:
    """What a subscriber of a job's events subscribes to; ends so that no job's topic begins another's."""
    return b"job/" + job.encode() + b"\0"


EVENT_BEAT_TOPIC = b"beat\0"


class LighthouseShell:
    """A lighthouse that serves on two addresses.

    Args:
        context: the process's ZeroMQ context.
        address: where peers' requests arrive (ROUTER).
        events: where subscribers listen (PUB).
        epoch: rises with every start.
        options: limits of replica groups.
        agent_grace: seconds an unreachable agent has to come back.
        beat_interval: seconds between two beats of a node.
        gate: who may come in over TCP; None lets everybody in.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        address: str,
        events: str,
        epoch: int,
        options: ReplicaOptions | None = None,
        agent_grace: float = AGENT_GRACE,
        beat_interval: float = BEAT_INTERVAL,
        gate: Gate | None = None,
    ) -> None:
        self.core = Lighthouse(epoch, time.monotonic(), options, NodeWatch(agent_grace, beat_interval))
        self._context = context
        self._gate = gate
        router = make_socket(context, zmq.ROUTER)
        bind(router, address, gate.key if gate else None)
        self.address = router.getsockopt_string(zmq.LAST_ENDPOINT)
        keyed = gate is not None and encrypted(address)
        self._requests = Channel(router, self._on_message, self._refusal if keyed else None, signed=keyed)
        self._events = self._publisher(events)
        self.events = self._events.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        if gate is not None and encrypted(events):
            gate.when_revoked(self._leave_subscribers)
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._probes: set[asyncio.Task[None]] = set()
        self._since = time.monotonic()
        # Where nodes are wanted to beat more slowly, and nobody waits for anything, nothing is due more often either.
        self._idle_tick = max(TICK, beat_interval)
        self._event_beat = max(EVENT_BEAT, beat_interval)
        self._event_beat_due = 0.0
        self._lateness = (0.0, 0.0)
        self._lateness_since = self._since
        self._tick_in(TICK)

    def close(self) -> None:
        """Stops serving; may be called twice."""
        self._closed = True
        self._timer.cancel()
        for probe in self._probes:
            probe.cancel()
        self._requests.close()
        self._events.close()

    def _publisher(self, address: str) -> Channel:
        socket = make_socket(self._context, zmq.PUB)
        try:
            bind(socket, address, self._gate.key if self._gate else None)
        except zmq.ZMQError:
            socket.close()
            raise
        return Channel(socket)

    def _leave_subscribers(self) -> None:
        """All have to come in anew; who still may has lost nothing but a moment, for gaps are asked for."""
        self._events.close()
        self._publish_again(1)

    def _publish_again(self, attempt: int) -> None:
        if self._closed:
            return
        try:
            self._events = self._publisher(self.events)
        except zmq.ZMQError as error:
            if attempt % OPEN_AGAIN_PATIENCE == 0:
                log.error("can't publish events at %s, trying on: %s", self.events, error.strerror)
            self._loop.call_later(OPEN_AGAIN, self._publish_again, attempt + 1)

    def _refusal(self, user: str, message: Message) -> Refusal | None:
        assert self._gate is not None
        return self._gate.refusal(user, message, self.core.foreign)

    def _tallies(self) -> list[Tally]:
        return [self._requests.dropped, self._requests.refused, *([self._gate.refused] if self._gate else [])]

    def _on_message(self, route: bytes, message: Message) -> None:
        if isinstance(message, StatusRequest):
            status = replace(
                self.core.status(time.monotonic(), message.request),
                software=software(),
                pid=os.getpid(),
                uptime=time.monotonic() - self._since,
                dropped=counts(self._tallies()),
                dropped_ago=ages(time.monotonic(), self._tallies()),
                lateness=max(self._lateness),
                wall_clock=time.time(),
            )
            self._requests.send(status, route)
            return
        self._perform(self.core.handle(time.monotonic(), route, message))
        if self._period > TICK and self.core.waits:
            self._timer.cancel()
            self._tick_in(TICK)

    def _tick_in(self, period: float) -> None:
        self._period = period
        self._due = next_beat(self._loop.time(), period)
        self._timer = self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        late = self._loop.time() - self._due
        self._note(late)
        if late > TICK or self._requests.behind:
            # Beats that were not read yet are nobody's silence, either.
            self.core.late(time.monotonic(), max(late, TICK))
        self._perform(self.core.tick(time.monotonic()))
        if self._loop.time() >= self._event_beat_due:
            self._events.send(self.core.event_beat(), EVENT_BEAT_TOPIC)
            self._event_beat_due = next_beat(self._loop.time(), self._event_beat)
        self._tick_in(TICK if self.core.waits else self._idle_tick)

    def _note(self, late: float) -> None:
        if time.monotonic() - self._lateness_since > LATENESS_KEPT:
            self._lateness, self._lateness_since = (0.0, self._lateness[0]), time.monotonic()
        self._lateness = (max(late, self._lateness[0]), self._lateness[1])

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(to, message):
                    self._requests.send(message, to)
                case Publish(job, message):
                    self._events.send(message, topic(job))
                case Probe(node, address):
                    self._spawn(self._probe_node(node, address, self.core.nodes.nodes[node].incarnation))
                case ProbeMember():
                    self._spawn(self._probe_member(effect))
                case Wake(after):
                    self._loop.call_later(after, self._look_again)

    def _look_again(self) -> None:
        self._perform(self.core.tick(time.monotonic()))

    def _spawn(self, probe: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(probe)
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)

    async def _probe_node(self, node: str, address: str, incarnation: str) -> None:
        self.core.probed(node, incarnation, await probe(address))

    async def _probe_member(self, order: ProbeMember) -> None:
        result = await probe(order.address)
        now = time.monotonic()
        self._perform(self.core.member_probed(now, order.job, order.member, order.incarnation, result))


async def probe(address: str) -> ProbeResult:
    """What comes of connecting to a peer's address, within ``PROBE_TIMEOUT``."""
    attempts: set[asyncio.Task[ProbeResult]] = set()
    try:
        async with asyncio.timeout(PROBE_TIMEOUT):
            while True:
                attempts.add(asyncio.create_task(_attempt(address)))
                done, _ = await asyncio.wait(attempts, timeout=PROBE_AGAIN, return_when=asyncio.FIRST_COMPLETED)
                for attempt in done:
                    return attempt.result()
    except TimeoutError:
        return "silent"
    finally:
        for attempt in attempts:
            attempt.cancel()


async def _attempt(address: str) -> ProbeResult:
    try:
        if address.startswith("ipc://"):
            _, writer = await asyncio.open_unix_connection(address.removeprefix("ipc://"))
        else:
            host, _, port = address.removeprefix("tcp://").rpartition(":")
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        writer.close()
    except (ConnectionError, FileNotFoundError):
        return "refused"
    except (OSError, ValueError) as error:
        log.info("can't probe %s: %s", address, error)
        return "silent"
    return "accepted"
