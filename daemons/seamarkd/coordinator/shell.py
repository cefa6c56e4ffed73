"""The coordinator's shell: sockets, the manifest's commits, timers.

Commits run on a thread, so that an fsync never stands between a death and its broadcast when the daemons share a
process; whatever arrived meanwhile is the next transaction (group commit). Effects keep their order: what follows
a ``Persist`` waits until it is durable.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import Any

import zmq

from seamark.protocol.messages import Message
from seamark.protocol.sockets import check_address, make_socket
from seamarkd.channel import Channel
from seamarkd.coordinator.jobs import Coordinator, Effect, Persist, Tell, ToLighthouse, status
from seamarkd.coordinator.manifest import Manifest, ManifestError
from seamarkd.effects import Send

log = logging.getLogger(__name__)

TELL_INTERVAL = 0.1
"""Seconds between two status messages to a follower, at the least."""
TICK = 1.0
COMMIT_RETRY = 1.0


class CoordinatorShell:
    """A coordinator that serves.

    Args:
        context: the process's ZeroMQ context.
        address: where agents and operators reach it (ROUTER).
        lighthouse, events: the lighthouse's two addresses.
        manifest: its durable state.
        epoch: rises with every start.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        address: str,
        lighthouse: str,
        events: str,
        manifest: Manifest,
        epoch: int,
    ) -> None:
        self.core = Coordinator(epoch)
        self._manifest = manifest
        self._loop = asyncio.get_running_loop()
        router = make_socket(context, zmq.ROUTER)
        router.bind(check_address(address))
        dealer = make_socket(context, zmq.DEALER)
        dealer.connect(check_address(lighthouse))
        subscriber = make_socket(context, zmq.SUB)
        subscriber.subscribe(b"")
        subscriber.connect(check_address(events))
        self._requests = Channel(router, self._on_message)
        self._lighthouse = Channel(dealer, self._on_lighthouse)
        self._subscription = Channel(subscriber, self._on_lighthouse)
        self._waiting: deque[Effect] = deque()
        self._committer: asyncio.Task[None] | None = None
        self._told: dict[str, asyncio.TimerHandle] = {}
        self._timer = self._loop.call_later(TICK, self._tick)

    async def close(self) -> None:
        """Commits what waits, stops serving, closes the manifest."""
        self._timer.cancel()
        for handle in self._told.values():
            handle.cancel()
        if self._committer is not None:
            await self._committer
        self._requests.close()
        self._lighthouse.close()
        self._subscription.close()
        self._manifest.close()

    def _on_message(self, route: bytes, message: Message) -> None:
        self._perform(self.core.handle(time.monotonic(), route, message))

    def _on_lighthouse(self, topic: bytes, message: Message) -> None:
        self._perform(self.core.from_lighthouse(time.monotonic(), message))

    def _tick(self) -> None:
        self._perform(self.core.tick(time.monotonic()))
        self._timer = self._loop.call_later(TICK, self._tick)

    def _perform(self, effects: list[Effect]) -> None:
        self._waiting.extend(effects)
        if self._committer is None or self._committer.done():
            self._send_ready()
            if self._waiting:
                self._committer = self._loop.create_task(self._commit())

    def _send_ready(self) -> None:
        while self._waiting and not isinstance(self._waiting[0], Persist):
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
            case Persist():
                raise AssertionError("a Persist is committed, not sent")

    async def _commit(self) -> None:
        while self._waiting:
            batch = [effect for effect in self._waiting if isinstance(effect, Persist)]
            sends = list(self._waiting)
            self._waiting.clear()
            while True:
                try:
                    await self._loop.run_in_executor(None, self._manifest.commit, batch)
                    break
                except ManifestError as error:
                    log.error("can't write the manifest, trying again in %g s: %s", COMMIT_RETRY, error)
                    await asyncio.sleep(COMMIT_RETRY)
            for effect in sends:
                if not isinstance(effect, Persist):
                    self._send(effect)
            self._send_ready()

    def _tell(self, name: str) -> None:
        self._told.pop(name, None)
        job = self.core.jobs.get(name)
        if job is not None:
            now = time.monotonic()
            for route in job.followers:
                self._requests.send(status(job, now), route)
