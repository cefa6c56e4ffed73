"""Whether this node takes workers, as it is now: its health checks, and that it drains, kept through a new start."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from seamarkd.agent.effects import Effect
from seamarkd.agent.health import HealthChecks, probe, summary
from seamarkd.agent.node import UNCHECKED, Node

log = logging.getLogger(__name__)


class Fitness:
    """That of one node; what an earlier start of its agent has written down holds from the beginning.

    Args:
        node: what its agent knows of it.
        perform: carries out what follows.
        health: what is checked before it takes workers.
        file: where it is written down that it drains.
    """

    def __init__(self, node: Node, perform: Callable[[list[Effect]], None], health: HealthChecks, file: Path) -> None:
        self._node = node
        self._perform = perform
        self._health = health
        self._file = file
        self._check_now = asyncio.Event()
        if health.checks:
            node.begin_checks()
        if file.exists():
            node.drain(file.read_text())

    @property
    def has_checks(self) -> bool:
        """Whether there is anything to check."""
        return bool(self._health.checks)

    def changed(self) -> None:
        """It drains, or serves again, or its checks have another result."""
        self._keep_draining()
        if self._node.unhealthy == UNCHECKED:
            self._check_now.set()

    def forget(self) -> None:
        """Its agent ends: one that is started later serves."""
        self._file.unlink(missing_ok=True)

    async def check(self) -> None:
        """At the start, after each ``undrain``, and from time to time."""
        while True:
            self._check_now.clear()
            try:
                problem = summary(await probe(self._health.checks, self._health.directories, self._health.timeout))
            except OSError as error:
                problem = f"its health checks can't be run: {error}"
            if not self._check_now.is_set():
                before = self._node.unhealthy
                self._perform(self._node.checked(problem))
                if problem and problem != before:
                    log.error("this node takes no more jobs: %s", problem)
                elif before and not problem:
                    log.info("this node's health checks pass")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._check_now.wait(), self._health.interval)

    def _keep_draining(self) -> None:
        """An agent that is started anew on this node drains it on."""
        try:
            if self._node.draining:
                self._file.write_text(self._node.draining)
            else:
                self._file.unlink(missing_ok=True)
        except OSError as error:
            log.error("can't write down that this node drains: %s", error)
