"""The ``seamark`` command: its sub-commands, and how errors become sentences and exit codes."""

from __future__ import annotations

import sys
from importlib.metadata import version

import click

from seamark.protocol.codec import ProtocolError
from seamarkd.cli.doctor import doctor
from seamarkd.cli.drain import drain, undrain
from seamarkd.cli.events import events
from seamarkd.cli.exit_codes import CONFIGURATION, INTERRUPTED, UNREACHABLE, USAGE
from seamarkd.cli.fail import fail
from seamarkd.cli.joblogs import logs
from seamarkd.cli.keys import keys_group
from seamarkd.cli.manifest import manifest
from seamarkd.cli.operator import UnreachableError
from seamarkd.cli.run import run
from seamarkd.cli.status import status
from seamarkd.cli.suite import down, restart, up
from seamarkd.cli.why import why
from seamarkd.errors import StateError
from seamarkd.settings import SettingsError

EXIT_CODES = """
\b
Exit codes:
  0    the job succeeded; all is well       64   the command line is wrong
  1    the job failed; something is not     78   a setting, file or directory can't be used
  2    nobody answers                       130  stopped by Ctrl-C
  3    ended by RestartAbort                143  stopped by SIGTERM
"""


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("seamark"), prog_name="seamark")
def cli() -> None:
    """Runs distributed PyTorch jobs that survive their faults.

    \b
    Examples:
      seamark run --standalone --nproc-per-node 4 train.py --steps 1000
      seamark up                      start the suite on this host
      seamark run --nproc-per-node 4 train.py
      seamark status                  who is there, what runs, what waits
      seamark why                     what happened to the last job, in ms
      seamark why train-3f2a --json   the same as data
      seamark keys init               before the suite leaves this host
    """


for command in (up, down, restart, run, status, logs, events, why, manifest, doctor, drain, undrain, fail, keys_group):
    cli.add_command(command)


def main() -> None:
    """Runs the command and exits with its code."""
    try:
        code = cli.main(standalone_mode=False)
    except click.UsageError as error:
        error.show()
        sys.exit(USAGE)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(INTERRUPTED)
    except UnreachableError as error:
        click.echo(f"seamark: {error}", err=True)
        sys.exit(UNREACHABLE)
    except ProtocolError as error:
        click.echo(f"seamark: {error}", err=True)
        sys.exit(UNREACHABLE)
    except (StateError, PermissionError, SettingsError) as error:
        click.echo(f"seamark: {error}", err=True)
        sys.exit(CONFIGURATION)
    sys.exit(code if isinstance(code, int) else 0)
