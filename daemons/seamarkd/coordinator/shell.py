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
from collections import deque
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import zmq
from msgspec.structs import replace

from seamark.protocol.authority import Refusal
from seamark.protocol.messages import (
    BeatAnswer,
    Datasets,
    DatasetsRequest,
    Decisions,
    DecisionsRequest,
    Incidents,
    Message,
    Refused,
    ShardAnswer,
    ShardRequest,
    ShardsPage,
    ShardsRequest,
    StatusRequest,
)
from seamark.protocol.sockets import bind, connect, encrypted, make_socket
from seamarkd.channel import Channel
from seamarkd.coordinator.backlog import Change, coalesced, compacted
from seamarkd.coordinator.core import Coordinator
from seamarkd.coordinator.dispatch import decisions_asked
from seamarkd.coordinator.effects import Effect, Forget, Persist, Tell, ToLighthouse
from seamarkd.coordinator.job import ENDED, status
from seamarkd.coordinator.manifest import Manifest
from seamarkd.coordinator.shards import Record
from seamarkd.effects import Send
from seamarkd.errors import ManifestError
from seamarkd.gate import Gate
from seamarkd.rhythm import next_beat
from seamarkd.software import software
from seamarkd.tally import Tally, ages, counts

log = logging.getLogger(__name__)

TELL_INTERVAL = 0.1
"""Seconds between two status messages to a follower, at the least."""
TICK = 1.0
SHORTEST_TICK = 0.02
COMMIT_RETRY = 1.0
STOPPED_LOOK = 0.05
MAX_LOOKUPS = 10_000
"""Questions about the books that wait; who gets no answer asks again."""
BACKUP_INTERVAL = 300.0
"""Seconds between two copies of the manifest, if anything was written meanwhile."""
COMPACT_FROM = 1_000
"""So many effects may wait for a commit before it is looked for those that nobody needs any more."""
AT_ONCE = (BeatAnswer, Decisions, Incidents, Refused)
"""Answers that promise nothing: they go past what waits for the disk."""

Lookup: TypeAlias = ShardsRequest | DatasetsRequest | DecisionsRequest
"""A question that the books on disk answer."""


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
        now = time.monotonic()
        jobs = manifest.jobs()
        self.core.restore(now, [(one, manifest.incidents(one.spec.name)) for one in jobs])
        for job in jobs:
            if job.state not in ENDED:
                self.core.restore_shards(now, job.spec.name, manifest.shards(job.spec.name))
        # A million shards take a second to read.
        self.core.restored_at(time.monotonic())
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
        self._compact_at = COMPACT_FROM
        self._refused = ""
        """Why the last commit failed, until one succeeds."""
        self._committer: asyncio.Task[None] | None = None
        # One thread for all that touches the database: it has one connection.
        self._disk = ThreadPoolExecutor(1, "seamark-manifest")
        self._reading: set[asyncio.Task[None]] = set()
        self._lookups: dict[tuple[bytes, str], Lookup] = {}
        self._looking_up = False
        self._backup_due = 0.0
        self._commits = 0
        self._closing = False
        self._told: dict[str, asyncio.TimerHandle] = {}
        self._timer = self._loop.call_later(TICK, self._tick)

    async def leave(self, patience: float) -> None:
        """This host goes away: all workers are asked to save, stopped, and go on at the next start of a coordinator.

        What they complete within ``patience`` seconds is taken.
        """
        self._perform(self.core.suspend(time.monotonic()))
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
        await asyncio.gather(*self._reading)
        self._requests.close()
        self._lighthouse.close()
        self._subscription.close()
        self._disk.shutdown()
        self._manifest.close()

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
                commits=self._commits,
                dropped=counts(self._tallies()),
                dropped_ago=ages(time.monotonic(), self._tallies()),
            )
            self._requests.send(status, route)
            return
        in_memory = isinstance(message, DecisionsRequest) and self._has_shards(message.job)
        if isinstance(message, Lookup) and not in_memory:
            self._look_up_later(route, message)
            return
        if self._refused and isinstance(message, ShardRequest):
            # Nothing it asks for can be promised, and nothing of it has to be kept: it is asked again.
            wait = ShardAnswer(message.request, message.job, message.consumer, "wait", reason=self._refused)
            self._requests.send(wait, route)
            return
        self._perform(self.core.handle(time.monotonic(), route, message))

    def _read(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)

    def _has_shards(self, name: str) -> bool:
        """Whether a job's decisions are in memory: those of one that had ended before this start are not."""
        job = self.core.jobs.get(name)
        return job is None or job.shards is not None or job.state not in ENDED

    def _look_up_later(self, route: bytes, request: Lookup) -> None:
        """Of each asker the latest question alone, and one at a time: commits go through the same thread."""
        asker = (route, getattr(request, "consumer", ""))
        self._lookups.pop(asker, None)
        if len(self._lookups) < MAX_LOOKUPS:
            self._lookups[asker] = request
        if not self._looking_up:
            self._looking_up = True
            self._read(self._look_up())

    async def _look_up(self) -> None:
        """In the books on disk, which also know the shards of jobs that have ended."""
        try:
            while self._lookups:
                asker = next(iter(self._lookups))
                request = self._lookups.pop(asker)
                answer = await self._loop.run_in_executor(self._disk, self._looked_up, request)
                self._requests.send(answer, asker[0])
        finally:
            self._looking_up = False

    def _looked_up(self, request: Lookup) -> Message:
        if isinstance(request, ShardsRequest):
            return self._page(request)
        if isinstance(request, DecisionsRequest):
            return decisions_asked(time.monotonic(), request, self._manifest.decisions(request.job))
        if self._manifest.job(request.job) is None:
            return Refused(request.request, "UNKNOWN_JOB", f"there is no job named {request.job}", request.job)
        return Datasets(request.request, request.job, [spec for _, spec in self._manifest.datasets(request.job)])

    def _page(self, request: ShardsRequest) -> ShardsPage | Refused:
        found = {spec.name: (number, spec) for number, spec in self._manifest.datasets(request.job)}
        if request.dataset not in found:
            known = ", ".join(found) or "none"
            why = f"job {request.job} has no data set {request.dataset}; it has: {known}"
            return Refused(request.request, "UNKNOWN_JOB", why, request.job, "", request.consumer)
        number, spec = found[request.dataset]
        job = self._manifest.job(request.job)
        living = job is not None and job.state not in ENDED
        entries = self._manifest.page(number, request.first, request.limit, living=living)
        following = entries[-1].shard + 1 if len(entries) == request.limit else -1
        return ShardsPage(request.request, request.job, request.consumer, spec, entries, following)

    async def _back_up(self) -> None:
        try:
            await self._loop.run_in_executor(self._disk, self._manifest.back_up)
        except ManifestError as error:
            log.error("%s", error)

    def _on_lighthouse(self, topic: bytes, message: Message) -> None:
        self._perform(self.core.from_lighthouse(time.monotonic(), message))

    def _tick(self) -> None:
        self.core.cluster.trouble = self._refused or self._manifest.trouble()
        now = time.monotonic()
        self._perform(self.core.tick(now))
        if now >= self._backup_due:
            self._backup_due = now + BACKUP_INTERVAL
            self._read(self._back_up())
        due = self.core.due()
        at = next_beat(now, TICK)
        self._timer = self._loop.call_at(at if due is None else min(at, max(due, now + SHORTEST_TICK)), self._tick)

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.message, AT_ONCE):
                self._send(effect)
            else:
                self._waiting.append(effect)
        if len(self._waiting) >= self._compact_at:
            self._compact()
        if self._committer is None or self._committer.done():
            self._send_ready()
            if self._waiting:
                self._committer = self._loop.create_task(self._commit())

    def _compact(self) -> None:
        self._waiting = deque(compacted(self._waiting))
        self._compact_at = max(COMPACT_FROM, 2 * len(self._waiting))

    def _send_ready(self) -> None:
        while self._waiting and not isinstance(self._waiting[0], Change):
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
            case Persist() | Forget() | Record():
                raise AssertionError("a change of the manifest is committed, not sent")

    async def _commit(self) -> None:
        while self._waiting:
            batch, records = coalesced(effect for effect in self._waiting if isinstance(effect, Change))
            sends = deque(effect for effect in self._waiting if not isinstance(effect, Change))
            self._waiting.clear()
            try:
                await self._loop.run_in_executor(self._disk, self._manifest.commit, batch, records)
            except Exception as error:
                # Whatever it was: what is not on disk is told to nobody, and is not forgotten either.
                self._refused = self.core.cluster.trouble = self._manifest.trouble() or str(error)
                unexpected = None if isinstance(error, ManifestError) else error
                log.error("can't write it down, trying again in %g s: %s", COMMIT_RETRY, error, exc_info=unexpected)
                if self._closing:
                    return
                # What came meanwhile belongs to the next try, behind what failed.
                self._waiting.extendleft(reversed([*batch, *records, *sends]))
                self._compact()
                await asyncio.sleep(COMMIT_RETRY)
                continue
            self._commits += 1
            if self._refused:
                self._refused = ""
                self.core.cluster.trouble = self._manifest.trouble()
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
