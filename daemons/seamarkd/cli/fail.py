"""``seamark fail JOB MEMBER``: a drill. What would happen if this one failed? It happens, and nobody is killed."""

from __future__ import annotations

import os
from pathlib import Path

import click

from seamark.protocol.messages import RANKS, REPLICAS, Acknowledged, InjectFailure
from seamarkd.cli.operator import REPEAT_INTERVAL, Operator, RefusedError, UnreachableError
from seamarkd.cli.status import connectable
from seamarkd.settings import load

ASK_TIMEOUT = REPEAT_INTERVAL
"""Asked once only: repeated, it would be another failure."""


@click.command()
@click.argument("job")
@click.argument("member")
@click.option(
    "--group",
    type=click.Choice([RANKS, REPLICAS]),
    default=RANKS,
    show_default=True,
    help="The group of MEMBER.",
)
@click.option("--config", type=click.Path(path_type=Path), help="The configuration file.")
def fail(job: str, member: str, group: str, config: Path | None) -> int:
    """A drill: publishes a failure of MEMBER of JOB.

    MEMBER is a rank's number, or the id of a replica group. It is not killed: all ranks leave their iteration and begin
    the next one together; replica groups form a new quorum, to which this one comes back.

    \b
    Examples:
      seamark fail train-3f2a 2
      seamark fail train-3f2a replica_0 --group replicas
    """
    settings = load(config, os.environ, {})
    name = f"{job}/{member}" if group == RANKS and member.isdecimal() else member
    address = settings.lighthouse.address
    try:
        with Operator(connectable(address), settings.key("operator")) as operator:
            operator.ask(lambda number: InjectFailure(number, job, group, name), Acknowledged, ASK_TIMEOUT)
    except RefusedError as error:
        raise click.UsageError(str(error)) from None
    except UnreachableError:
        sentence = f"no answer from the lighthouse at {address} within {ASK_TIMEOUT:g} s: see seamark events"
        raise UnreachableError(sentence) from None
    click.echo(f"published the failure of {name}: seamark events {job}")
    return 0
