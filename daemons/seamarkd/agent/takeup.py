"""What an earlier start of this agent left on the node: its jobs are taken up, with or without their keepers."""

from __future__ import annotations

import asyncio
import logging
import time

from seamark.protocol.messages import StopWorkers, StoreAddress
from seamarkd.agent import orphans
from seamarkd.agent.endings import STORE_SLOT, Endings
from seamarkd.agent.ground import Ground
from seamarkd.agent.job import Job, Worker
from seamarkd.agent.keeper_answers import Held, KeeperError
from seamarkd.agent.keeper_client import READY_TIMEOUT, REQUEST_TIMEOUT
from seamarkd.agent.keepers import Keepers
from seamarkd.agent.kept import Kept
from seamarkd.agent.logfiles import log_path
from seamarkd.agent.memory import Remembered
from seamarkd.agent.starts import Starts
from seamarkd.agent.store_starts import StoreStarts

log = logging.getLogger(__name__)

PATIENCE = 0.5
"""Seconds that an agent waits for the keepers of its jobs before it serves. Commonly they answer in a hundredth."""


class TakeUp:
    """The jobs of one node.

    Args:
        ground: what it stands on.
        keepers, endings, starts, store_starts: whom it leaves what it has found to.
    """

    def __init__(
        self,
        ground: Ground,
        keepers: Keepers,
        endings: Endings,
        starts: Starts,
        store_starts: StoreStarts,
    ) -> None:
        self._core, self._jobs, self._tasks, self._perform = ground
        self._keepers = keepers
        self._endings = endings
        self._starts = starts
        self._store_starts = store_starts

    async def adopt(self, remembered: Remembered) -> None:
        """Returns once it is known how its workers are, or after ``PATIENCE``: then they are what they were last.

        Whoever has to know more waits for `Kept.settled`.
        """
        job = self._core.node.jobs[remembered.job.name] = remembered.job
        others = any(one.pid and not one.orphan for one in (*job.workers.values(), *job.exited.values()))
        # One that has workers has imported all that it will; another may still import torch, for seconds.
        ready = any(one.pid and not one.orphan for one in job.workers.values())
        kept = self._jobs.add(
            job.name,
            Kept(
                self._keepers.find(job.name, remembered.keeper, REQUEST_TIMEOUT if ready else READY_TIMEOUT),
                remembered.keeper,
                store=job.store_incarnation,
                store_born=remembered.store,
                adopted=True,
                settled=asyncio.Event(),
            ),
        )
        for worker in [one for one in job.workers.values() if one.orphan]:
            self._take_up_orphan(job, kept, worker)
        work = asyncio.ensure_future(self._settle(job, kept, job.stopping))
        if others:
            await asyncio.wait([work], timeout=PATIENCE)
        if work.done():
            work.result()
        else:
            # The other jobs' workers want their agent, and the other daemons its beat.
            self._tasks.spawn(work)

    async def _settle(self, job: Job, kept: Kept, stopped_before: StopWorkers | None) -> None:
        try:
            await self._take_up(job, kept, stopped_before)
        finally:
            kept.settled.set()

    async def _take_up(self, job: Job, kept: Kept, stopped_before: StopWorkers | None) -> None:
        connecting = kept.keeper
        processes: list[Held] = []
        try:
            keeper = await connecting
            processes = await keeper.list_processes()
        except KeeperError as error:
            log.error("job %s: its keeper is gone (%s): its workers live on without one", job.name, error)
            self._perform(self._core.losses.keeper_lost(job.name))
            self._keepers.replace(job.name, kept, connecting)
        ended: list[Held] = []
        for held in processes:
            if held.process.slot == STORE_SLOT and held.process.status is None:
                kept.keep_store(held)
                if held.process.incarnation == job.store_incarnation and not job.store.port:
                    self._store_starts.listens(job.name, held.process)
            elif held.process.status is not None:
                ended.append(held)
            else:
                self._take_in(job, kept, held)
        self._take_up_logs(job, kept)
        known = {held.process.incarnation: (held.process.pid, held.process.forked_at) for held in processes}
        others = [one for one in (*job.workers.values(), *job.exited.values()) if one.incarnation not in known]
        # Of these no keeper knows: they live without one, or have ended.
        unknown = [one for one in others if one.pid or one.incarnation in job.exited]
        for worker in unknown:
            if worker.incarnation in job.workers and worker.incarnation not in kept.processes:
                self._take_up_orphan(job, kept, worker)
            known[worker.incarnation] = (worker.pid, worker.forked_at)
        store_lost = kept.store_process is None and job.has_store and not self._take_up_store(job, kept)
        if store_lost and job.roster is None:
            job.store = StoreAddress()
        since = stopped_since(stopped_before, job.stopping)
        self._perform(self._core.adopt(time.monotonic(), job, known, stopping=since))
        for held in ended:
            self._endings.exited(job.name, held.process)
            held.close()
        for worker in unknown:
            if worker.incarnation in job.workers and worker.incarnation not in kept.processes:
                self._endings.unseen(job.name, worker)
        if store_lost and job.roster is not None:
            self._perform(self._core.stores.exited(job.name))
        self._jobs.remember(job.name)
        for held in processes:
            if held.process.kind == "worker" and held.process.status is None:
                self._tasks.spawn(self._starts.release(keeper, held.process))
        log.info("job %s: took up %d workers", job.name, len(kept.processes))

    def _take_up_logs(self, job: Job, kept: Kept) -> None:
        roster = job.roster
        if roster is not None:
            kept.logs = {
                worker.incarnation: log_path(roster.spec, slot, worker.generation)
                for worker in (*job.workers.values(), *job.exited.values())
                for slot in roster.slots
                if slot.member == worker.member
            }
            self._jobs.watch_logs(job.name)

    def _take_in(self, job: Job, kept: Kept, held: Held) -> None:
        self._starts.take_in(job.name, kept, held)
        self._starts.watch_canaries(job.name, held.process.incarnation)

    def _take_up_orphan(self, job: Job, kept: Kept, worker: Worker) -> None:
        """Nothing happens if it has ended."""
        held = orphans.take_up(worker.member, worker.incarnation, worker.pid, worker.forked_at)
        if held is not None:
            self._take_in(job, kept, held)
            self._endings.keep_orphan(job.name, kept, held)

    def _take_up_store(self, job: Job, kept: Kept) -> bool:
        """Whether it lives."""
        pid, forked_at = kept.store_born
        held = orphans.take_up(STORE_SLOT, job.store_incarnation, pid, forked_at) if pid else None
        kept.keep_store(held)
        if held is not None:
            self._endings.keep_orphan(job.name, kept, held)
        return held is not None


def stopped_since(before: StopWorkers | None, now: StopWorkers | None) -> bool:
    """Whether the job's stop was ordered while it was being taken up, and so is under way already.

    Args:
        before: what had been ordered when the earlier agent ended.
        now: what is ordered. The same order once more starts nothing.
    """
    return now is not None and (before is None or (now.final and not before.final))
