"""``seamark-agent``: a node's agent as a daemon."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import zmq

from seamark.protocol.keys import Key
from seamarkd import daemon
from seamarkd.agent.health import HealthChecks
from seamarkd.agent.logfiles import LogLimits
from seamarkd.agent.notice import NoticeWatch
from seamarkd.agent.shell import AgentShell
from seamarkd.agent.wires import NotThisHostError, numeric
from seamarkd.cli.exit_codes import TERMINATED
from seamarkd.epoch import next_epoch
from seamarkd.paths import private
from seamarkd.settings import SettingsError

log = logging.getLogger(__name__)

LINGER = 3_600.0
"""Seconds that keepers and workers live on without an agent before they end themselves."""


KEY_LOOK = 1.0
"""Seconds between two looks at this node's key."""


class _Served:
    def __init__(self, shell: AgentShell, notice: str, key: Callable[[], Key | None]) -> None:
        self._shell = shell
        self._key = key
        self._spoken = key()
        self._loop = asyncio.get_running_loop()
        self._looks = self._loop.call_later(KEY_LOOK, self._look_at_key) if self._spoken is not None else None
        self._why = "its agent was told to end (SIGTERM)"
        self._notices = NoticeWatch(notice, self._on_notice) if notice else None

    def _on_notice(self, why: str) -> None:
        log.warning("%s: this node is left", why)
        self._why = why
        # What a notice means is what SIGTERM means.
        os.kill(os.getpid(), signal.SIGTERM)

    def _look_at_key(self) -> None:
        """A key that was added again is another one, and the sockets have the old one for as long as they live."""
        self._looks = self._loop.call_later(KEY_LOOK, self._look_at_key)
        try:
            key = self._key()
        except SettingsError:
            return  # revoked here, or on its way: whom it does not let in says so
        if key != self._spoken:
            self._spoken = key
            log.warning("this node has another key now, and this agent is replaced: its workers go on")
            os.kill(os.getpid(), signal.SIGHUP)

    def _look_no_more(self) -> None:
        if self._looks is not None:
            self._looks.cancel()

    async def leave(self) -> int:
        self._look_no_more()
        await self._shell.leave(self._why)
        return TERMINATED

    async def close(self) -> None:
        self._look_no_more()
        if self._notices is not None:
            self._notices.close()
        self._shell.close()


@click.command()
@click.option("--node", help="This node's name; by default the host's.")
@click.option("--slots", type=click.IntRange(1), help="Worker places of this node.")
@click.option("--instance", type=click.IntRange(0), default=0, help="Tells several agents on one host apart.")
@daemon.options
def command(
    node: str | None,
    slots: int | None,
    instance: int,
    config: Path | None,
    insecure: bool,
    log_level: str | None,
    log_format: str | None,
) -> None:
    """Starts, watches and restarts the training processes of one node.

    \b
    Examples:
      seamark-agent --config /etc/seamark/seamark.toml
      seamark-agent --node gpu-07 --slots 8
    """
    chosen = daemon.settings(config, insecure, log_level, log_format, {"agent.node": node, "agent.slots": slots})

    async def start(context: zmq.Context[Any]) -> daemon.Served:
        directory = private(chosen.run_directory / f"agent-{instance}")
        name = chosen.node_of(instance)

        def key() -> Key | None:
            return chosen.key("node", name)

        shell = AgentShell(
            context,
            node=name,
            slots=chosen.slots,
            run_directory=directory,
            lighthouse=chosen.lighthouse.address,
            events=chosen.lighthouse.events,
            coordinator=chosen.coordinator.address,
            host=numeric(chosen.agent.host),
            epoch=next_epoch(directory / "epoch"),
            linger=LINGER,
            key=key(),
            keys=chosen.keys_directory,
            logs=LogLimits(chosen.log.worker_max_bytes, chosen.log.worker_generations),
            health=HealthChecks(
                tuple(chosen.agent.health_checks),
                chosen.agent.health_interval,
                chosen.agent.health_timeout,
                (chosen.state_directory, directory),
            ),
        )
        try:
            await shell.start()
        except NotThisHostError as error:
            shell.close()
            raise SettingsError([f"agent.host: {error}: give the name or address that others reach it by"]) from None
        return _Served(shell, chosen.agent.preemption_notice, key)

    daemon.run("agent", chosen, start)


def main() -> None:
    """Entry point."""
    daemon.main(command)
