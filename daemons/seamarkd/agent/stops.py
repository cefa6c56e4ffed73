"""Ending what runs on a node: a worker, or a whole job with its store and its keeper."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time

from seamarkd.agent.effects import StopJobHere
from seamarkd.agent.endings import Endings
from seamarkd.agent.ground import Ground
from seamarkd.agent.keeper_answers import KeeperError
from seamarkd.agent.kept import Kept
from seamarkd.agent.orphans import Orphan

log = logging.getLogger(__name__)


class Stops:
    """Those of one node.

    Args:
        ground: what it stands on.
        endings: what hears of exits.
    """

    def __init__(self, ground: Ground, endings: Endings) -> None:
        self._core, self._jobs, _, self._perform = ground
        self._endings = endings

    async def signal(self, job: str, incarnation: str, signum: int, *, group: bool = True) -> None:
        """A worker, or its whole process group; it has no effect on one that has ended."""
        kept = self._jobs.get(job)
        if kept is None:
            return
        if incarnation not in kept.processes:
            await kept.settled.wait()
        process = kept.processes.get(incarnation)
        if process is None:
            return
        if incarnation in kept.orphans:
            kept.orphans[incarnation].signal(signum, group=group)
            return
        keeper = await kept.keeper
        await keeper.signal(process.held.process.slot, incarnation, signum, group=group)

    async def end_worker(self, job: str, incarnation: str, grace: float) -> None:
        """SIGTERM, and SIGKILL ``grace`` seconds later if it is still to end; at once with a grace of 0."""
        if grace:
            # Not to its children: a DataLoader's workers that die of it would fail the training before it has saved.
            await self.signal(job, incarnation, signal.SIGTERM, group=False)
            await asyncio.sleep(grace)
            if not self._core.node.is_to_end(job, incarnation):
                return
        # It has no effect on who has ended meanwhile: the keeper goes by the incarnation.
        await self.signal(job, incarnation, signal.SIGKILL)

    async def stop(self, order: StopJobHere) -> None:
        """As ordered, and the core is told."""
        kept = self._jobs.get(order.job)
        if kept is not None:
            if order.patience:
                await kept.settled.wait()
            if order.patience and kept.processes:
                kept.emptied.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(kept.emptied.wait(), order.patience)
            await self.end(order.job, kept, order.grace, final=order.final)
            if order.final:
                self._jobs.drop(order.job)
        self._perform(self._core.stopped(time.monotonic(), order.job, final=order.final))

    async def end(self, job: str, kept: Kept, grace: float, *, final: bool = True) -> None:
        """All of a job, by SIGTERM and SIGKILL ``grace`` seconds later; with ``final`` its store and keeper, too."""
        await asyncio.gather(self._stop_keeper(job, kept, grace, final=final), self._stop_orphans(job, kept, grace))
        # Its keeper may have been killed while it stopped them; and the store goes last.
        await self._stop_orphans(job, kept, grace)
        # It heeds nothing less than SIGKILL, and has nothing to save.
        await self._stop_orphans(job, kept, 0.0, store=final)
        if final:
            kept.let_go()
        else:
            kept.close_processes()

    async def _stop_orphans(self, job: str, kept: Kept, grace: float, *, store: bool = False) -> None:
        left = [one for one in kept.orphans.values() if store or one.held is not kept.store_process]
        await asyncio.gather(*(self._stop_orphan(job, one, grace) for one in left))

    @staticmethod
    async def _stop_orphan(job: str, orphan: Orphan, grace: float) -> None:
        """What can't be done about one keeps nobody from the others."""
        try:
            await orphan.stop(grace)
        except OSError as error:
            log.error("job %s: can't stop process %d: %s", job, orphan.held.process.pid, error)

    async def _stop_keeper(self, job: str, kept: Kept, grace: float, *, final: bool) -> None:
        await kept.settled.wait()
        connecting = kept.keeper
        if final and not connecting.done() and not kept.adopted:
            # It imports torch, for seconds; it has no process yet.
            kept.ending = True
            connecting.cancel()
            await asyncio.wait([connecting])
            return
        try:
            keeper = await connecting
            kept.ending = final
            left = await keeper.stop(grace, final=final)
        except (KeeperError, OSError) as error:
            if kept.over:
                # Its end was asked for twice (the job's, the agent's own), and the other was sooner.
                return
            log.error("job %s: can't stop the workers: %s", job, error)
            kept.ending = final
            self._endings.keep_orphans(job, kept)
            return
        kept.over = final
        if left:
            log.error("job %s: processes that not even SIGKILL ended: %s", job, left)
