"""The keepers of a node's jobs: started, found again, replaced when they were killed."""

from __future__ import annotations

import asyncio
import logging
import secrets
from pathlib import Path
from typing import Any

from seamarkd.agent.effects import StartKeeper
from seamarkd.agent.endings import Endings
from seamarkd.agent.ground import Ground
from seamarkd.agent.keeper_answers import KeeperError, was_killed
from seamarkd.agent.keeper_client import KeeperClient
from seamarkd.agent.kept import Kept, other_logs

log = logging.getLogger(__name__)


class Keepers:
    """Those of one agent.

    Args:
        ground: what it stands on.
        endings: what hears of exits.
        directory: where they listen, mode 0700.
        epoch: rises with every start of this agent; keepers obey the highest.
        linger: seconds they wait for another agent when this one is gone; None for ever.
    """

    def __init__(self, ground: Ground, endings: Endings, *, directory: Path, epoch: int, linger: float | None) -> None:
        self._core, self._jobs, _, self._perform = ground
        self._endings = endings
        self._directory = directory
        self._epoch = epoch
        self._linger = linger
        self._loop = asyncio.get_running_loop()

    def of(self, job: str) -> Kept:
        """What is held of a job; a keeper of it is there, or is being started."""
        kept = self._jobs.get(job)
        if kept is None:
            Path(self._core.node.spec(job).log_dir).mkdir(parents=True, exist_ok=True)
            socket = str(self._directory / f"keeper-{secrets.token_hex(3)}")
            kept = self._jobs.add(job, Kept(self._loop.create_task(self._spawn(job, socket)), socket))
            self._jobs.remember(job)
        elif kept.keeper.done() and (kept.keeper.cancelled() or kept.keeper.exception() is not None):
            self.replace(job, kept, kept.keeper)
        return kept

    def find(self, job: str, socket: str, timeout: float) -> asyncio.Task[KeeperClient]:
        """The one that an earlier start of this agent has started; ``timeout``: seconds until it has to answer."""
        return self._loop.create_task(KeeperClient.connect(socket, timeout=timeout, **self._hears(job)))

    async def start(self, order: StartKeeper) -> None:
        """Has one ready, which imports torch ahead of the workers."""
        try:
            await self.of(order.job).keeper
        except (KeeperError, OSError) as error:
            self._perform(self._core.stores.failed(order.job, str(error), killed=was_killed(error)))

    def replace(self, job: str, kept: Kept, lost: asyncio.Future[KeeperClient]) -> None:
        """Another one imports torch from now on, for those that may have to be replaced."""
        if kept.keeper is lost and not kept.ending:
            kept.adopted = False
            kept.keeper = self._loop.create_task(self._spawn(job, kept.socket))

    async def _spawn(self, job: str, socket: str) -> KeeperClient:
        spec = self._core.node.spec(job)
        keeper_log, _ = other_logs(spec)
        self._jobs.watch_logs(job)
        try:
            keeper = await KeeperClient.spawn(
                spec.python,
                socket,
                job=job,
                env=spec.env,
                cwd=spec.cwd,
                log=str(keeper_log),
                linger=self._linger,
                preload=spec.preload,
                **self._hears(job),
            )
        except KeeperError as error:
            try:
                # One that an earlier start of this agent has started may have come first.
                keeper = await KeeperClient.connect(socket, **self._hears(job))
            except KeeperError:
                raise error from None
        if not keeper.ready.forks:
            log.warning("job %s: workers are started by exec, not forked: %s", job, keeper.ready.reason)
        return keeper

    def _hears(self, job: str) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "on_exited": lambda process: self._endings.exited(job, process),
            "on_closed": lambda why: self._lost(job, why),
        }

    def _lost(self, job: str, why: str) -> None:
        kept = self._jobs.get(job)
        if kept is None or kept.ending:
            return
        log.error("job %s: lost the keeper: %s", job, why)
        lost = kept.keeper
        # One that was never ready has no process, and is awaited by whoever wanted it.
        if lost.done() and not lost.cancelled() and lost.exception() is None and not lost.result().superseded:
            self._endings.keep_orphans(job, kept)
            self._perform(self._core.losses.keeper_lost(job))
            self.replace(job, kept, lost)
