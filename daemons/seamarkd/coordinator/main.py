"""``seamark-coordinator``: the coordinator as a daemon."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import Any

import click
import zmq

from seamarkd import daemon
from seamarkd.cli.exit_codes import FAILED, TERMINATED
from seamarkd.coordinator.manifest import Manifest, trouble
from seamarkd.coordinator.shell import CoordinatorShell
from seamarkd.errors import StateError

log = logging.getLogger(__name__)

PATIENCE = 30.0
"""Seconds the nodes have to stop their workers when the suite is stopped (D12)."""
DISK_RETRY = 1.0
"""Seconds until a coordinator whose disk takes nothing ends, to be started again (unlike after other bad state)."""


class _Served:
    def __init__(self, shell: CoordinatorShell) -> None:
        self._shell = shell

    async def leave(self) -> int:
        await self._shell.shut_down(PATIENCE)
        return TERMINATED

    async def close(self) -> None:
        await self._shell.close()


async def _opened(path: Path) -> Manifest:
    """The manifest. Where its disk takes nothing, another start has to try again: somebody may make room."""
    try:
        return Manifest(path)
    except StateError as error:
        why = trouble(path.parent)
        if not why:
            raise
        log.error("%s; %s; begins anew in %g s", error, why, DISK_RETRY)
    await asyncio.sleep(DISK_RETRY)
    sys.exit(FAILED)


@click.command()
@click.option("--address", help="Where it answers, as tcp://HOST:PORT.")
@daemon.options
def command(
    address: str | None, config: Path | None, insecure: bool, log_level: str | None, log_format: str | None
) -> None:
    """Keeps the jobs: who runs where, what is restarted, how it ends.

    \b
    Examples:
      seamark-coordinator --config /etc/seamark/seamark.toml
      seamark-coordinator --address tcp://127.0.0.1:29712 --log-format json
    """
    chosen = daemon.settings(config, insecure, log_level, log_format, {"coordinator.address": address})

    async def start(context: zmq.Context[Any]) -> daemon.Served:
        return _Served(
            CoordinatorShell(
                context,
                chosen.coordinator.address,
                chosen.lighthouse.address,
                chosen.lighthouse.events,
                await _opened(chosen.state_directory / "coordinator.db"),
            )
        )

    daemon.run("coordinator", chosen, start)


def main() -> None:
    """Entry point."""
    daemon.main(command)
