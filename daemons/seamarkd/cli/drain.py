"""``seamark drain NODE`` and ``seamark undrain NODE``: a host is to be left by its workers, and to serve again."""

from __future__ import annotations

import os
from pathlib import Path

import click

from seamark.protocol.messages import Acknowledged, DrainNode
from seamarkd.cli.operator import Operator, RefusedError
from seamarkd.cli.status import connectable
from seamarkd.settings import load

ASK_TIMEOUT = 5.0
config_option = click.option("--config", type=click.Path(path_type=Path), help="The configuration file.")


@click.command()
@click.argument("node")
@click.option("--reason", default="by seamark drain", show_default=True, help="Shown by status and in the jobs' lines.")
@config_option
def drain(node: str, reason: str, config: Path | None) -> int:
    """Has all workers leave NODE, and no new ones come.

    They get SIGTERM and 30 seconds for a checkpoint (seamark.on_preemption), as if the host were taken away; their
    ranks get places on other nodes that have room. The agent stays; the node serves again after seamark undrain.

    \b
    Examples:
      seamark drain gpu-07 --reason "new driver"
      seamark status
      seamark undrain gpu-07
    """
    _order(DrainNode(0, node, reason), config)
    click.echo(f"{node} drains: seamark status shows when nothing of it is in use any more")
    return 0


@click.command()
@click.argument("node")
@config_option
def undrain(node: str, config: Path | None) -> int:
    """Lets NODE take workers again.

    \b
    Example:
      seamark undrain gpu-07
    """
    _order(DrainNode(0, node, "", undo=True), config)
    click.echo(f"{node} serves")
    return 0


def _order(order: DrainNode, config: Path | None) -> None:
    settings = load(config, os.environ, {})
    try:
        with Operator(connectable(settings.coordinator.address), settings.key("operator")) as operator:
            operator.ask(
                lambda number: DrainNode(number, order.node, order.reason, order.undo), Acknowledged, ASK_TIMEOUT
            )
    except RefusedError as error:
        raise click.UsageError(str(error)) from None
