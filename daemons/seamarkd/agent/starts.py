"""Starting workers: forked by their keeper, watched, written down, and only then let go."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from seamark.progress import ProgressPage
from seamarkd.agent.effects import StartWorker
from seamarkd.agent.endings import Endings
from seamarkd.agent.ground import Ground
from seamarkd.agent.keeper_answers import Held, KeeperError
from seamarkd.agent.keeper_answers import Process as KeeperProcess
from seamarkd.agent.keeper_client import KeeperClient
from seamarkd.agent.keepers import Keepers
from seamarkd.agent.kept import Kept, Process
from seamarkd.agent.logfiles import LogLimits, log_path, remove_outdated
from seamarkd.agent.watch import How
from seamarkd.agent.watched import Watched
from seamarkd.agent.workers import cpus, environment, threads_per_worker
from seamarkd.exits import NOT_STARTED

log = logging.getLogger(__name__)


class Starts:
    """Those of one node's workers.

    Args:
        ground: what it stands on.
        keepers: whom to ask.
        endings: what hears of exits.
        limits: how much of the workers' output is kept.
        door: the address that a worker knows.
        digests: where a job's workers write down which checkpoints they have hashed.
        before: variables that the job's own environment goes before.
        after: variables that go before the job's.
    """

    def __init__(
        self,
        ground: Ground,
        keepers: Keepers,
        endings: Endings,
        *,
        limits: LogLimits,
        door: str,
        digests: Callable[[str], Path],
        before: Mapping[str, str],
        after: Mapping[str, str],
    ) -> None:
        self._core, self._jobs, self._tasks, self._perform = ground
        self._keepers = keepers
        self._endings = endings
        self._log_limits = limits
        self._door = door
        self._digests = digests
        self._before = dict(before)
        self._after = dict(after)

    async def start(self, order: StartWorker) -> None:
        """Has the keeper start it; where that was killed meanwhile, the next one."""
        kept = connecting = None
        try:
            kept = self._keepers.of(order.job)
            connecting = kept.keeper
            held = await self._fork(await connecting, kept, order)
        except (KeeperError, OSError) as error:
            if kept is None or kept.keeper is connecting:
                self._not_started(order, str(error))
            elif not kept.ending:
                # Its keeper was killed, and what that may have forked meanwhile has ended unreleased.
                self._tasks.spawn(self.start(order))
            return
        if held is not None and kept.keeper is not connecting:
            self._endings.keep_orphan(order.job, kept, held)
            self._perform(self._core.losses.keeper_lost(order.job))

    def take_in(self, job: str, kept: Kept, held: Held) -> None:
        """A living process is this agent's to watch from now on."""
        incarnation = held.process.incarnation

        def dying(how: How, at: float) -> None:
            self._perform(self._core.losses.dying(time.monotonic(), job, incarnation, how, at))

        watched = Watched(held.process.pid, held.pidfd, ProgressPage(held.page), dying)
        kept.processes[incarnation] = Process(held, watched)

    def watch_canaries(self, job: str, incarnation: str) -> None:
        """The worker has named its canaries by now."""
        kept = self._jobs.get(job)
        process = kept.processes.get(incarnation) if kept else None
        if process is not None:
            process.watched.arm()

    async def release(self, keeper: KeeperClient, process: KeeperProcess) -> None:
        """It is written down, with its process id: from now on it may do something."""
        # It ends unreleased where its keeper was killed, or was told to end it.
        with contextlib.suppress(KeeperError):
            await keeper.release(process.slot, process.incarnation)

    async def _fork(self, keeper: KeeperClient, kept: Kept, order: StartWorker) -> Held | None:
        """The new process; None if it has ended already, or is wanted no more."""
        job = self._core.node.jobs.get(order.job)
        worker = job.workers.get(order.incarnation) if job is not None else None
        if job is None or worker is None:
            return None
        if worker.ordered:
            raise KeeperError("stopping", "it was to end before it had begun")
        roster = job.roster
        assert roster is not None
        slot = next(slot for slot in roster.slots if slot.member == order.member)
        path = kept.logs[order.incarnation] = log_path(roster.spec, slot, roster.generation)
        if roster.generation >= self._log_limits.generations:
            remove_outdated(path, self._log_limits.generations)
        self._jobs.watch_logs(order.job)
        digests = self._digests(order.job)
        held = await keeper.start_worker(
            order.member,
            order.incarnation,
            roster.spec.argv,
            env=self._before | environment(roster, slot, order.incarnation, self._door, digests) | self._after,
            cwd=roster.spec.cwd,
            log=str(path),
            num_threads=threads_per_worker(roster.spec),
            module=roster.spec.module,
            cpus=cpus(roster, slot),
            held=True,
        )
        if held.process.status is not None or order.incarnation in kept.ended or order.incarnation in kept.processes:
            kept.ended.discard(order.incarnation)
            held.close()
            return None
        self.take_in(order.job, kept, held)
        pid, forked_at = held.process.pid, held.process.forked_at
        self._perform(self._core.places.worker_started(time.monotonic(), order.job, order.incarnation, pid, forked_at))
        if not worker.ordered:
            await self.release(keeper, held.process)
        return held

    def _not_started(self, order: StartWorker, why: str) -> None:
        """For policy and budget it has a place and has ended."""
        kept = self._jobs.get(order.job)
        if kept is None or kept.ending:
            return
        log.error("job %s: can't start %s: %s", order.job, order.member, why)
        path, now = kept.logs.pop(order.incarnation, None), time.monotonic()
        tail = [f"node {self._core.node.name}: {why}"]
        self._perform(
            self._core.losses.exited(now, order.job, order.incarnation, NOT_STARTED, now, str(path or ""), tail)
        )
