"""Work of an event loop that nobody awaits: its errors belong in the log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable

from seamarkd.agent.keeper_answers import KeeperError

log = logging.getLogger(__name__)


class Tasks:
    """Those of one agent, for use in the running event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Awaitable[None]) -> None:
        """Has it done."""
        task = asyncio.get_running_loop().create_task(_logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self) -> None:
        """Nothing of it is done any more."""
        for task in self._tasks:
            task.cancel()


async def _logged(work: Awaitable[None]) -> None:
    try:
        await work
    except (KeeperError, OSError) as error:
        log.error("%s", error)
