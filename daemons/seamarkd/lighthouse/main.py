"""``seamark-lighthouse``: the lighthouse as a daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import zmq

from seamarkd import daemon
from seamarkd.cli.exit_codes import SUCCEEDED
from seamarkd.epoch import next_epoch
from seamarkd.gate import Gate
from seamarkd.lighthouse.shell import LighthouseShell


class _Served:
    def __init__(self, shell: LighthouseShell, gate: Gate | None) -> None:
        self._shell = shell
        self._gate = gate

    async def leave(self) -> int:
        await self.close()
        return SUCCEEDED

    async def close(self) -> None:
        self._shell.close()
        if self._gate is not None:
            self._gate.close()


@click.command()
@click.option("--address", help="Where it answers, as tcp://HOST:PORT.")
@click.option("--events", help="Where it publishes its events, as tcp://HOST:PORT.")
@daemon.options
def command(
    address: str | None,
    events: str | None,
    config: Path | None,
    insecure: bool,
    log_level: str | None,
    log_format: str | None,
) -> None:
    """Watches the nodes' heartbeats, answers quorums, publishes failures.

    \b
    Examples:
      seamark-lighthouse --config /etc/seamark/seamark.toml
      seamark-lighthouse --address tcp://127.0.0.1:29710 --log-format json
    """
    flags = {"lighthouse.address": address, "lighthouse.events": events}
    chosen = daemon.settings(config, insecure, log_level, log_format, flags)

    async def start(context: zmq.Context[Any]) -> daemon.Served:
        epoch = next_epoch(chosen.state_directory / "lighthouse.epoch")
        asked = chosen.lighthouse
        gate = Gate.of(context, chosen)
        shell = LighthouseShell(
            context,
            asked.address,
            asked.events,
            epoch,
            agent_grace=asked.agent_grace,
            beat_interval=asked.beat_interval,
            gate=gate,
        )
        return _Served(shell, gate)

    daemon.run("lighthouse", chosen, start)


def main() -> None:
    """Entry point."""
    daemon.main(command)
