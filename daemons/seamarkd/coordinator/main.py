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
from seamarkd.exits import PREEMPTION_GRACE
from seamarkd.gate import Gate

log = logging.getLogger(__name__)

PATIENCE = PREEMPTION_GRACE + 4.0
"""Seconds until the nodes have stopped their workers: what those have to save (D12), and the way there and back."""
DISK_RETRY = 1.0
"""Seconds until a coordinator whose disk takes nothing ends, to be started again (unlike after other bad state)."""


class _Served:
    def __init__(self, shell: CoordinatorShell, gate: Gate | None) -> None:
        self._shell = shell
        self._gate = gate

    async def leave(self) -> int:
        await self._shell.leave(PATIENCE)
        self._close_gate()
        return TERMINATED

    async def close(self) -> None:
        await self._shell.close()
        self._close_gate()

    def _close_gate(self) -> None:
        if self._gate is not None:
            self._gate.close()


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
        gate = Gate.of(context, chosen)
        manifest = await _opened(chosen.state_directory / "coordinator.db")
        shell = CoordinatorShell(
            context,
            chosen.coordinator.address,
            chosen.lighthouse.address,
            chosen.lighthouse.events,
            manifest,
            gate,
        )
        return _Served(shell, gate)

    daemon.run("coordinator", chosen, start)


def main() -> None:
    """Entry point."""
    daemon.main(command)
