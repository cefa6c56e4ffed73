"""``seamark keys``: who may speak to a suite. Makes, lists and revokes the files of ``seamark.protocol.keys``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from seamark.protocol.authority import KEY_ROLES, KeyRole
from seamark.protocol.keys import KEY, NAME, REVOKED, AllowList, Key, KeysError, check_directory, read, revoke, write
from seamark.protocol.sockets import new_pair
from seamarkd.errors import StateError
from seamarkd.settings import Settings, load

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT = "keys"
"""In the state directory."""
ADDED: tuple[KeyRole, ...] = tuple(role for role in KEY_ROLES if role != "daemon")
EXIT_CODES = """
\b
Exit codes:
  0    done, or it was so already      64   the command line is wrong
                                       78   a file or directory can't be used
"""


def options(function: F) -> F:
    """The options of all sub-commands, and sentences for what is wrong with the files."""

    @wraps(function)
    def reported(*arguments: Any, keys: Path | None, config: Path | None, **more: Any) -> Any:
        settings = load(config, os.environ, {})
        directory = (keys or settings.keys_directory or settings.state_directory / DEFAULT).absolute()
        try:
            return function(settings, directory, *arguments, **more)
        except KeysError as error:
            raise StateError(str(error)) from None
        except OSError as error:
            raise StateError(f"{directory}: {error.strerror}") from None

    for option in (
        click.option("--config", type=click.Path(path_type=Path), help="The configuration file."),
        click.option(
            "--keys",
            type=click.Path(path_type=Path),
            help="The directory of the keys; by default security.keys, else 'keys' in the state directory.",
        ),
    ):
        reported = option(reported)
    return reported  # type: ignore[return-value]


@click.group("keys", epilog=EXIT_CODES)
def keys_group() -> None:
    """Makes, lists and revokes the keys of a suite.

    With keys every TCP connection of the daemons is encrypted, and each message is held against the role of the key
    that it came with: an agent speaks for its own node only, and commands are an operator's. A suite needs them as soon
    as it leaves one host.

    \b
    Two hosts, head and gpu-07, as one user on both:
      head$   seamark keys init                     the daemons', yours, and the one of node head
      head$   seamark keys add gpu-07               the one of node gpu-07
      head$   seamark keys list                     says where they are: DIR
      gpu-07$ install -d -m 700 DIR
      head$   scp -p DIR/gpu-07.key DIR/client.key gpu-07:DIR/
      both:   seamark.toml names the directory, [security] keys = "DIR", and the head, as in
              [lighthouse] address = "tcp://head:29710"; agent.host is each host's own name
      head$   seamark up
      gpu-07$ seamark up --roles agent
    scripts/cluster-up.sh --keys DIR HOSTFILE does all of that over ssh.

    \b
    A colleague, and a host that was given away:
      head$   seamark keys add alice --role operator      alice.key is hers to copy
      head$   seamark keys revoke gpu-07                  within a second, nothing is restarted
    """


@keys_group.command()
@options
def init(settings: Settings, directory: Path) -> int:
    """Makes the keys of a new suite, once, on its head.

    daemon (lighthouse and coordinator), operator (you), client (managers and listeners in training scripts), and the
    one of this host's node. What is there already stays as it is: no key is ever overwritten.

    \b
    Example:
      seamark keys init
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_directory(directory)
    if not (directory / f"daemon{KEY}").exists():
        public, secret = new_pair()
        _report(directory, write(directory, Key("daemon", "daemon", public, secret, public)), "daemon", "daemon")
    else:
        _report(directory, False, "daemon", "daemon")
    for role, name in (("operator", "operator"), ("client", "client"), ("node", settings.node)):
        _make(directory, role, name)  # type: ignore[arg-type]
    if settings.keys_directory != directory:
        click.echo(f'now name it to the daemons: [security] keys = "{directory}", or SEAMARK_SECURITY_KEYS={directory}')
    return 0


@keys_group.command()
@click.argument("name")
@click.option("--role", type=click.Choice(ADDED), default="node", show_default=True, help="What NAME is.")
@options
def add(settings: Settings, directory: Path, name: str, role: KeyRole) -> int:
    """Makes a key and lets its owner in.

    NAME of a node is its agent's node name (by default the host's name; the second agent of a host has -1 behind it).
    The file that is printed holds the secret: copy it to its owner's directory of keys, mode 0600, and nowhere else.
    Daemons that run take it within a second.

    \b
    Examples:
      seamark keys add gpu-07
      seamark keys add alice --role operator
    """
    check_directory(directory)
    _make(directory, role, name)
    return 0


@keys_group.command("list")
@options
def list_keys(settings: Settings, directory: Path) -> int:
    """Shows who may speak, and who no longer.

    \b
    Example:
      seamark keys list
    """
    check_directory(directory)
    allowed = AllowList(directory)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("name", "role", "", "public half"):
        table.add_column(column, overflow="fold")
    for path in sorted([*directory.glob(f"*{KEY}"), *directory.glob(f"*{REVOKED}")]):
        try:
            key = read(path)
        except KeysError as error:
            table.add_row(path.name, "", Text(str(error)), "", style="red")
            continue
        may = allowed.find(key.public) is not None
        half = Text(key.public)  # not as markup: it may have brackets
        table.add_row(key.name, key.role, "allowed" if may else "revoked", half, style=None if may else "dim")
    console = Console(soft_wrap=True)
    console.print(Text(f"keys in {directory}"))
    console.print(table)
    return 0


@keys_group.command("revoke")
@click.argument("name")
@options
def revoke_key(settings: Settings, directory: Path, name: str) -> int:
    """Lets the owner of a key in no more.

    The daemons of this host find it within a second and are not restarted: messages on its standing connections are
    refused, too. A lighthouse or coordinator elsewhere needs the .revoked file that is printed, in its own directory.
    The name can be added again; that is another key.

    \b
    Example:
      seamark keys revoke gpu-07
    """
    check_directory(directory)
    names = sorted(path.stem for path in directory.glob(f"*{KEY}"))
    if name not in names:
        raise click.UsageError(f"there is no key {name} in {directory}; there are: {', '.join(names) or 'none'}")
    if name == "daemon":
        raise click.UsageError(
            "everybody knows the daemons by this key: to change it, stop the suite, make another directory with "
            "seamark keys init, and give every host its new key"
        )
    click.echo(f"{name} is revoked: {revoke(directory, name)}")
    return 0


def _make(directory: Path, role: KeyRole, name: str) -> None:
    if not re.fullmatch(NAME, name):
        raise click.UsageError(
            f"{name!r} is no name for a key: up to 100 letters, digits, dots, dashes and underscores. "
            "A node whose name has others needs agent.node"
        )
    if (directory / f"{name}{KEY}").exists():
        there = read(directory / f"{name}{KEY}")
        if there.role != role:
            raise click.UsageError(f"there is a key {name} of the role {there.role}: give this {role} another name")
        _report(directory, False, role, name)
        return
    if not (directory / f"daemon{KEY}").exists():
        raise KeysError(f"{directory}: this is no suite's directory (daemon{KEY} is missing): seamark keys init, once")
    public, secret = new_pair()
    daemon = read(directory / f"daemon{KEY}").public
    _report(directory, write(directory, Key(name, role, public, secret, daemon)), role, name)


def _report(directory: Path, made: bool, role: str, name: str) -> None:
    click.echo(f"{'made' if made else 'kept'}  {role:<9} {directory / f'{name}{KEY}'}")
