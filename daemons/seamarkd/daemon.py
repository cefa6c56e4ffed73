"""The life of a daemon: options, signals, readiness, exit codes. What it serves is its role's own.

SIGTERM says that this host goes away, SIGHUP that only this daemon is replaced (D12). Under supervisord a daemon ends
with it: whoever starts supervisord again finds the addresses free.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import click
import zmq

from seamarkd import logs
from seamarkd.cli.exit_codes import CONFIGURATION, SUCCEEDED, USAGE
from seamarkd.errors import StateError
from seamarkd.settings import FORMATS, LEVELS, Settings, SettingsError, load

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
F = TypeVar("F", bound=Callable[..., Any])


class Served(Protocol):
    """A daemon that serves."""

    async def leave(self) -> int:
        """The host goes away: ends what this daemon is responsible for. Returns the exit code."""

    async def close(self) -> None:
        """Only this daemon is replaced: lets go of everything, touches no worker."""


Start = Callable[[zmq.Context[Any]], Awaitable[Served]]


def options(function: F) -> F:
    """The options that all daemons have."""
    for option in (
        click.option("--log-format", type=click.Choice(FORMATS), help="One line per event: text or JSON."),
        click.option("--log-level", type=click.Choice(LEVELS), help="The least that is logged."),
        click.option("--insecure", is_flag=True, help="Accept addresses off loopback, in the clear and without keys."),
        click.option(
            "--config", type=click.Path(path_type=Path), help="The settings file; by default $SEAMARK_CONFIG."
        ),
    ):
        function = option(function)
    return function


def settings(
    config: Path | None, insecure: bool, log_level: str | None, log_format: str | None, flags: Mapping[str, object]
) -> Settings:
    """The settings of this daemon: flag over environment over file over default.

    Args:
        config, insecure, log_level, log_format: the common options.
        flags: the role's own, by the key that they set.

    Raises:
        SettingsError: with all problems.
    """
    common = {"log.level": log_level, "log.format": log_format, "security.insecure": True if insecure else None}
    return load(config, os.environ, {**common, **flags})


def run(role: str, chosen: Settings, start: Start) -> NoReturn:
    """Serves until a signal ends it, and exits."""
    logs.configure(role, chosen.log.level, chosen.log.format)
    if "SUPERVISOR_ENABLED" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGHUP, 0, 0, 0)
        if not _supervised():
            log.error("supervisord was gone before this %s had begun: it ends", role)
            sys.exit(SUCCEEDED)
    try:
        code = asyncio.run(_serve(role, start))
    except zmq.ZMQError as error:
        log.error("can't listen: %s: is another %s running? seamark doctor tells", error.strerror, role)
        code = CONFIGURATION
    except (SettingsError, StateError, PermissionError) as error:
        for line in str(error).splitlines():
            log.error("%s", line)
        code = CONFIGURATION
    sys.exit(code)


def _supervised() -> bool:
    # The death of a parent before prctl() sends no signal.
    try:
        return b"supervisord" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return False


def main(command: click.Command) -> NoReturn:
    """Runs a daemon's command line; what is wrong with it is a sentence and an exit code."""
    try:
        command.main(standalone_mode=False)
    except click.UsageError as error:
        error.show()
        sys.exit(USAGE)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except SettingsError as error:
        click.echo(f"{error}", err=True)
        sys.exit(CONFIGURATION)
    sys.exit(SUCCEEDED)


async def _serve(role: str, start: Start) -> int:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def end(signum: int) -> None:
        # A second SIGTERM changes nothing: the first one's time goes on running.
        if not ended.done():
            ended.set_result(signum)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(signum, end, signum)
    context: zmq.Context[Any] = zmq.Context()
    try:
        served = await start(context)
        log.info("%s serves", role, extra={"pid": os.getpid()})
        received = await ended
        log.info("%s ends by %s", role, signal.Signals(received).name)
        if received == signal.SIGHUP:
            await served.close()
            return SUCCEEDED
        return await served.leave()
    finally:
        context.destroy(linger=0)
