"""What has ended: told to the core once, with its status and the end of its log; and who has no keeper to say it."""

from __future__ import annotations

import logging
import signal
import time

from msgspec.structs import replace

from seamarkd.agent.ground import Ground
from seamarkd.agent.job import Worker
from seamarkd.agent.keeper_answers import Held, KeeperError, Process
from seamarkd.agent.kept import Kept
from seamarkd.agent.logfiles import log_tail
from seamarkd.agent.oom import OomKills
from seamarkd.agent.orphans import Orphan
from seamarkd.exits import UNKNOWN_STATUS

log = logging.getLogger(__name__)

STORE_SLOT = "store"


class Endings:
    """The ends of one node's processes.

    Args:
        ground: what it stands on.
        oom_kills: whom the kernel has ended for want of memory.
    """

    def __init__(self, ground: Ground, oom_kills: OomKills) -> None:
        self._core, self._jobs, self._tasks, self._perform = ground
        self._oom_kills = oom_kills

    def exited(self, job: str, ended: Process) -> None:
        """Its keeper, or the watch of an orphan, says that it has ended; perhaps not for the first time."""
        kept = self._jobs.get(job)
        if kept is None or ended.status is None:
            return
        reported = self._core.node.runs(job, ended.incarnation)
        if ended.slot == STORE_SLOT:
            if kept.store_process is not None and kept.store_process.process.incarnation == ended.incarnation:
                kept.store_process.close()
                kept.keep_store(None)
            if ended.incarnation == kept.store and not kept.ending:
                log.warning("job %s: the TCPStore service ended with status %d, starting another", job, ended.status)
                self._perform(self._core.stores.exited(job))
        else:
            process = kept.processes.pop(ended.incarnation, None)
            if process is None:
                kept.ended.add(ended.incarnation)
            else:
                process.close()
            if not kept.processes:
                kept.emptied.set()
            path = kept.logs.pop(ended.incarnation, None)
            tail = log_tail(path) if path is not None and ended.status != 0 else []
            now = time.monotonic()
            at = ended.at if ended.at is not None else now
            effects = self._core.losses.exited(
                now,
                job,
                ended.incarnation,
                ended.status,
                at,
                str(path or ""),
                tail,
                discarded=ended.discarded,
                oom_kill=ended.status == -signal.SIGKILL and self._oom_kills.rose(),
            )
            self._perform(effects)
        if (ended.slot == STORE_SLOT or not reported) and not kept.ending:
            self._tasks.spawn(self.forget(job, ended.slot, ended.incarnation))

    def unseen(self, job: str, worker: Worker) -> None:
        """It ended while nobody looked."""
        status = UNKNOWN_STATUS if worker.status is None else worker.status
        path = self._jobs[job].logs.pop(worker.incarnation, None)
        tail = log_tail(path) if path is not None and status != 0 else []
        now = time.monotonic()
        self._perform(self._core.losses.exited(now, job, worker.incarnation, status, now, str(path or ""), tail))

    async def forget(self, job: str, slot: str, incarnation: str) -> None:
        """The keeper need not hold this exit any longer."""
        kept = self._jobs.get(job)
        if kept is None or kept.ending:
            return
        keeper = await kept.keeper
        try:
            await keeper.acknowledge(slot, incarnation)
        except KeeperError as error:
            if error.code != "unknown_process":
                raise
            # It was another keeper's, which was killed.

    def keep_orphan(self, job: str, kept: Kept, held: Held) -> None:
        """It has no keeper: its end is seen from here."""
        incarnation = held.process.incarnation

        def exited(status: int) -> None:
            del kept.orphans[incarnation]
            process = kept.processes.get(incarnation)
            discarded = process is not None and process.watched.page.discarded
            self.exited(job, replace(held.process, status=status, at=time.monotonic(), discarded=discarded))

        kept.orphans[incarnation] = Orphan(held, exited)

    def keep_orphans(self, job: str, kept: Kept) -> None:
        """The keeper was killed: none of its processes has one."""
        living = [process.held for process in kept.processes.values()]
        living += [kept.store_process] if kept.store_process is not None else []
        for held in living:
            if held.process.incarnation not in kept.orphans:
                self.keep_orphan(job, kept, held)
