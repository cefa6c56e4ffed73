"""The coordinator's shell: sockets, the manifest's commits, timers.

Commits run on a thread, so that an fsync never stands between a death and its broadcast when the daemons share a
process; whatever arrived meanwhile is the next transaction (group commit). Effects keep their order: what follows
a ``Persist`` waits until it is durable.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

import zmq
from msgspec.structs import replace

from seamark.protocol.authority import Refusal
from seamark.protocol.messages import Message, StatusRequest
from seamark.protocol.sockets import bind, connect, encrypted, make_socket
from seamarkd.channel import Channel
from seamarkd.coordinator.effects import Effect, Forget, Persist, Tell, ToLighthouse
from seamarkd.coordinator.job import status
from seamarkd.coordinator.jobs import Coordinator
from seamarkd.coordinator.manifest import Manifest, ManifestError
from seamarkd.effects import Send
from seamarkd.gate import Gate
from seamarkd.software import software

log = logging.getLogger(__name__)

TELL_INTERVAL = 0.1
"""Seconds between two status messages to a follower, at the least."""
TICK = 1.0
COMMIT_RETRY = 1.0
STOPPED_LOOK = 0.05


def coalesced(changes: Iterable[Persist | Forget]) -> list[Persist | Forget]:
    """The changes with one record per job, its latest: as durable, and bounded while the disk is full."""
    latest: dict[str, Persist | Forget] = {}
    for change in changes:
        name = change.job if isinstance(change, Forget) else change.record.spec.name
        before = latest.pop(name, None)
        if isinstance(change, Persist) and isinstance(before, Persist) and not change.fresh:
            incidents = {one.number: one for one in (*before.incidents, *change.incidents)}
            change = Persist(change.record, tuple(incidents.values()), before.fresh)
        latest[name] = change
    return list(latest.values())


class CoordinatorShell:
    """A coordinator that serves.

    Args:
        context: the process's ZeroMQ context.
        address: where agents and operators reach it (ROUTER).
        lighthouse, events: the lighthouse's two addresses.
        manifest: its durable state, from which the jobs of an earlier start are taken up.
        gate: who may come in over TCP, and the key to come to the lighthouse with; None lets everybody in.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        address: str,
        lighthouse: str,
        events: str,
        manifest: Manifest,
        gate: Gate | None = None,
    ) -> None:
        self.core = Coordinator(manifest.epoch)
        self.core.restore(time.monotonic(), [(one, manifest.incidents(one.spec.name)) for one in manifest.jobs()])
        self._manifest = manifest
        self._since = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._gate = gate
        key = gate.key if gate else None
        router = make_socket(context, zmq.ROUTER)
        bind(router, address, key)
        dealer = make_socket(context, zmq.DEALER)
        connect(dealer, lighthouse, key)
        subscriber = make_socket(context, zmq.SUB)
        subscriber.subscribe(b"")
        connect(subscriber, events, key)
        keyed = gate is not None and encrypted(address)
        self._requests = Channel(router, self._on_message, self._refusal if keyed else None, signed=keyed)
        self._lighthouse = Channel(dealer, self._on_lighthouse)
        self._subscription = Channel(subscriber, self._on_lighthouse)
        self._waiting: deque[Effect] = deque()
        self._committer: asyncio.Task[None] | None = None
        self._closing = False
        self._told: dict[str, asyncio.TimerHandle] = {}
        self._timer = self._loop.call_later(TICK, self._tick)

    async def shut_down(self, patience: float) -> None:
        """Stops every job, as far as its nodes answer within ``patience`` seconds, and closes."""
        self._perform(self.core.shut_down(time.monotonic()))
        deadline = time.monotonic() + patience
        while self.core.stopping and time.monotonic() < deadline:
            await asyncio.sleep(STOPPED_LOOK)
        await self.close()

    async def close(self) -> None:
        """Commits what waits, stops serving, closes the manifest."""
        self._timer.cancel()
        for handle in self._told.values():
            handle.cancel()
        if self._committer is not None:
            self._closing = True
            await self._committer
        self._requests.close()
        self._lighthouse.close()
        self._subscription.close()
        self._manifest.close()

    def _refusal(self, user: str, message: Message) -> Refusal | None:
        assert self._gate is not None
        return self._gate.refusal(user, message, self.core.foreign)

    def _at_the_gate(self) -> Counter[str]:
        return self._gate.refused if self._gate else Counter()

    def _on_message(self, route: bytes, message: Message) -> None:
        if isinstance(message, StatusRequest):
            status = replace(
                self.core.status(time.monotonic(), message.request),
                software=software(),
                pid=os.getpid(),
                uptime=time.monotonic() - self._since,
                dropped=dict(self._requests.dropped + self._requests.refused + self._at_the_gate()),
            )
            self._requests.send(status, route)
            return
        self._perform(self.core.handle(time.monotonic(), route, message))

    def _on_lighthouse(self, topic: bytes, message: Message) -> None:
        self._perform(self.core.from_lighthouse(time.monotonic(), message))

    def _tick(self) -> None:
        if self._committer is None or self._committer.done():
            self.core.trouble = self._manifest.trouble()
        self._perform(self.core.tick(time.monotonic()))
        self._timer = self._loop.call_later(TICK, self._tick)

    def _perform(self, effects: list[Effect]) -> None:
        self._waiting.extend(effects)
        if self._committer is None or self._committer.done():
            self._send_ready()
            if self._waiting:
                self._committer = self._loop.create_task(self._commit())

    def _send_ready(self) -> None:
        while self._waiting and not isinstance(self._waiting[0], Persist | Forget):
            self._send(self._waiting.popleft())

    def _send(self, effect: Effect) -> None:
        match effect:
            case Send(to, message):
                self._requests.send(message, to)
            case ToLighthouse(message):
                self._lighthouse.send(message)
            case Tell(job):
                if job not in self._told:
                    self._told[job] = self._loop.call_later(TELL_INTERVAL, self._tell, job)
            case Persist() | Forget():
                raise AssertionError("a change of the manifest is committed, not sent")

    async def _commit(self) -> None:
        while self._waiting:
            batch = coalesced(effect for effect in self._waiting if isinstance(effect, Persist | Forget))
            sends = deque(effect for effect in self._waiting if not isinstance(effect, Persist | Forget))
            self._waiting.clear()
            try:
                await self._loop.run_in_executor(None, self._manifest.commit, batch)
            except ManifestError as error:
                self.core.trouble = str(error)
                log.error("can't write the manifest, trying again in %g s: %s", COMMIT_RETRY, error)
                if self._closing:
                    return
                # What came meanwhile belongs to the next try, behind what failed.
                self._waiting.extendleft(reversed([*batch, *sends]))
                await asyncio.sleep(COMMIT_RETRY)
                continue
            self.core.trouble = ""
            while sends:
                self._send(sends.popleft())
            self._send_ready()

    def _tell(self, name: str) -> None:
        self._told.pop(name, None)
        job = self.core.jobs.get(name)
        if job is not None:
            now = time.monotonic()
            for route in job.followers:
                self._requests.send(status(job, now), route)
