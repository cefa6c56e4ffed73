"""The settings of the daemon suite: one schema, four sources, every mistake said at once.

A flag goes before the environment, the environment before the file, the file before the default. Nothing here
knows daemons, command lines or sockets; it only knows what a valid value looks like.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from seamark.protocol.authority import KeyRole
from seamark.protocol.keys import Key, KeysError, own
from seamark.protocol.sockets import check_address
from seamarkd.paths import private, run_directory, state_directory

SYSTEM_FILE = Path("/etc/seamark/seamark.toml")
LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
MINIMUM_SLOTS = 8
"""Slots of a node without GPUs are at least this many (D16)."""
OFF_LOOPBACK = (
    "can be reached from other machines, and without keys whoever reaches it can command the jobs. Make keys "
    "(seamark keys init) and name their directory in security.keys; or use 127.0.0.1; or accept this on a network "
    "that you trust with --insecure (security.insecure = true), which sends everything in the clear and believes every "
    "sender"
)


class SettingsError(Exception):
    """Every problem of the configuration, one line each: where it was written, which key, what is wrong."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class LighthouseSettings(msgspec.Struct, frozen=True):
    """Where the lighthouse answers and publishes; seconds between nodes' beats, and of patience with lost agents."""

    address: str = "tcp://127.0.0.1:29710"
    events: str = "tcp://127.0.0.1:29711"
    beat_interval: float = 0.1
    agent_grace: float = 10.0


class CoordinatorSettings(msgspec.Struct, frozen=True):
    """Where the coordinator answers."""

    address: str = "tcp://127.0.0.1:29712"


class AgentSettings(msgspec.Struct, frozen=True):
    """This node: its name (empty: the host's), its slots (0: automatic), the host under which others reach it."""

    node: str = ""
    slots: int = 0
    host: str = "127.0.0.1"


class PathSettings(msgspec.Struct, frozen=True):
    """Directories; empty means the default of seamarkd.paths."""

    run: str = ""
    state: str = ""
    log: str = ""


class LogSettings(msgspec.Struct, frozen=True):
    """What the daemons log, and in which form."""

    level: str = "info"
    format: str = "text"


class SecuritySettings(msgspec.Struct, frozen=True):
    """The directory of this host's keys (empty: none); whether addresses off loopback are accepted without them."""

    keys: str = ""
    insecure: bool = False


class Settings(msgspec.Struct, frozen=True):
    """Everything that can be configured."""

    lighthouse: LighthouseSettings = LighthouseSettings()
    coordinator: CoordinatorSettings = CoordinatorSettings()
    agent: AgentSettings = AgentSettings()
    paths: PathSettings = PathSettings()
    log: LogSettings = LogSettings()
    security: SecuritySettings = SecuritySettings()

    @property
    def run_directory(self) -> Path:
        """Sockets and process ids; made private. Raises PermissionError if it belongs to somebody else."""
        return private(Path(self.paths.run)) if self.paths.run else run_directory()

    @property
    def state_directory(self) -> Path:
        """Durable state; made private. Raises PermissionError if it belongs to somebody else."""
        return private(Path(self.paths.state)) if self.paths.state else state_directory()

    @property
    def log_directory(self) -> Path:
        """Logs of the daemons; made private. Raises PermissionError if it belongs to somebody else."""
        return private(Path(self.paths.log) if self.paths.log else self.state_directory / "log")

    @property
    def keys_directory(self) -> Path | None:
        """The directory of this host's keys; None where none are used."""
        return Path(self.security.keys) if self.security.keys else None

    def key(self, role: KeyRole, name: str = "") -> Key | None:
        """This process's own key; None where none are used.

        Args:
            role: what it has to be for.
            name: its name; by default the only one of that role, or that of the role's name.

        Raises:
            SettingsError: it is not there, or can't be used.
        """
        if self.keys_directory is None:
            return None
        try:
            return own(self.keys_directory, role, name)
        except KeysError as error:
            raise SettingsError([f"security.keys: {error}"]) from None

    @property
    def node(self) -> str:
        """The node's name: the configured one, else the host's."""
        return self.agent.node or socket.gethostname()

    def node_of(self, instance: int) -> str:
        """The node's name of one of several agents on this host, counted from 0."""
        return f"{self.node}-{instance}" if instance else self.node

    @property
    def slots(self) -> int:
        """The node's slots: as configured, else one per core and at least eight."""
        return self.agent.slots or max(MINIMUM_SLOTS, os.cpu_count() or 1)


SECTIONS: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(Settings)}
KEYS: dict[str, msgspec.structs.FieldInfo] = {
    f"{section}.{field.name}": field for section, kind in SECTIONS.items() for field in msgspec.structs.fields(kind)
}
LIMITS = {"lighthouse.beat_interval": (0.02, 10.0), "lighthouse.agent_grace": (1.0, 3_600.0)}
ADDRESSES = ("lighthouse.address", "lighthouse.events", "coordinator.address")
TYPE_NAMES = {str: "text in quotes", int: "a whole number", bool: "true or false", float: "a number of seconds"}
SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?", re.ASCII)
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def config_path(config: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The file to read: the given one, else ``$SEAMARK_CONFIG``, else the system's if it exists, else none."""
    if config is not None:
        return config
    if named := environ.get("SEAMARK_CONFIG"):
        return Path(named)
    return SYSTEM_FILE if SYSTEM_FILE.exists() else None


def load(config: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> Settings:
    """The settings in force.

    Args:
        config: the file named on the command line, if any.
        environ: the environment; ``SEAMARK_<SECTION>_<KEY>`` counts, other names are not looked at.
        flags: ``{"section.key": value}`` from the command line; None means not given.

    Raises:
        SettingsError: with all problems of all sources.
    """
    problems: list[str] = []
    found: dict[str, tuple[str, object]] = {}
    path = config_path(config, environ)
    if path is not None:
        found.update(_from_file(path, problems))
    for key in KEYS:
        name = "SEAMARK_" + key.replace(".", "_").upper()
        if name in environ:
            found[key] = (name, _parsed(key, environ[name]))
    for key, value in flags.items():
        if value is None:
            continue
        flag = "--" + key.replace(".", "-")
        if key not in KEYS:
            problems.append(f"{flag}: {key}: no such setting{_nearest(key, KEYS)}")
        else:
            found[key] = (flag, _parsed(key, value) if isinstance(value, str) else value)
    values = {key: found[key][1] if key in found else field.default for key, field in KEYS.items()}
    values = {
        key: float(value) if KEYS[key].type is float and type(value) is int else value for key, value in values.items()
    }
    wrong = _wrong_values(values)
    problems += [f"{found[key][0] if key in found else 'default'}: {key}: {text}" for key, text in wrong]
    if problems:
        raise SettingsError(problems)
    return Settings(
        **{
            section: kind(**{field.name: values[f"{section}.{field.name}"] for field in msgspec.structs.fields(kind)})
            for section, kind in SECTIONS.items()
        }
    )


def _from_file(path: Path, problems: list[str]) -> dict[str, tuple[str, object]]:
    """The known keys of this file; its other contents become problems."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"{path}: can't be read: {error.strerror}")
        return {}
    except ValueError as error:  # TOMLDecodeError, which names the line, or UnicodeDecodeError
        problems.append(f"{path}: is not TOML: {error}")
        return {}
    found: dict[str, tuple[str, object]] = {}
    for section, content in document.items():
        if section not in SECTIONS:
            problems.append(f"{path}: {section}: no such section{_nearest(section, SECTIONS)}")
        elif not isinstance(content, dict):
            problems.append(f"{path}: {section}: is a section, to be written [{section}]")
        else:
            known = [field.name for field in msgspec.structs.fields(SECTIONS[section])]
            for key, value in content.items():
                if key in known:
                    found[f"{section}.{key}"] = (str(path), value)
                else:
                    problems.append(f"{path}: {section}.{key}: no such key{_nearest(key, known)}")
    return found


def _nearest(name: str, valid: Mapping[str, object] | list[str]) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(valid)}"


def _parsed(key: str, text: str) -> object:
    """A text of the environment as the key's type; left as text if it is none, for the check to find."""
    kind = KEYS[key].type
    if kind is bool:
        return BOOLEANS.get(text.lower(), text)
    if kind is float:
        return float(text) if SECONDS.fullmatch(text) else text
    if kind is int and text.isascii() and text.isdigit() and len(text) < 10:
        return int(text)
    return text


def _wrong_values(values: Mapping[str, object]) -> list[tuple[str, str]]:
    wrong: list[tuple[str, str]] = []
    endpoints: dict[str, tuple[str, str]] = {}
    off_loopback: list[str] = []
    for key, value in values.items():
        if type(value) is not KEYS[key].type:
            wrong.append((key, f"must be {TYPE_NAMES[KEYS[key].type]}, not {value!r}"))
        elif isinstance(value, str) and ("\0" in value or not value.isprintable()):
            wrong.append((key, f"holds a character that can't be printed: {value!r}"))
        elif key in ADDRESSES:
            try:
                endpoints[key] = _endpoint(str(value))
            except ValueError as error:
                wrong.append((key, str(error)))
            else:
                if endpoints[key][1] and not _is_loopback(endpoints[key][0]):
                    off_loopback.append(key)
        elif key == "agent.host":
            if not value:
                wrong.append((key, "must not be empty: the name or address under which others reach this host"))
            elif not _is_loopback(str(value)):
                off_loopback.append(key)
        elif key == "agent.slots" and not 0 <= int(str(value)) <= 65_535:
            wrong.append((key, f"must be 0 (automatic) or a number of slots up to 65535, not {value}"))
        elif key in LIMITS and not LIMITS[key][0] <= float(str(value)) <= LIMITS[key][1]:
            wrong.append((key, f"must be from {LIMITS[key][0]:g} to {LIMITS[key][1]:g} seconds, not {value}"))
        elif (key.startswith("paths.") or key == "security.keys") and value and not os.path.isabs(str(value)):
            wrong.append((key, f"must be an absolute path, not {value}"))
        elif key in ("log.level", "log.format"):
            choices = LEVELS if key == "log.level" else FORMATS
            if value not in choices:
                wrong.append((key, f"must be one of {', '.join(choices)}, not {value!r}"))
    named = list(endpoints)
    wrong += [
        (second, f"is the same address as {first} ({values[second]}): each needs its own")
        for index, second in enumerate(named)
        for first in named[:index]
        if _collide(endpoints[first], endpoints[second])
    ]
    if values["security.insecure"] is not True and not values["security.keys"]:
        wrong += [(key, f"{values[key]} {OFF_LOOPBACK}") for key in off_loopback]
    return wrong


def _endpoint(address: str) -> tuple[str, str]:
    """(host, port) of a tcp address, (path, "") of an ipc one.

    Raises:
        ValueError: ZeroMQ can't use it.
    """
    check_address(address)
    scheme, _, rest = address.partition("://")
    if scheme == "ipc":
        if not rest.startswith("/"):
            raise ValueError(f"{address}: ipc:// needs an absolute path")
        return rest, ""
    host, colon, port = rest.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or set(host) & set(" ;/?#@") or (":" in host and not bracketed):
        raise ValueError(f"{address}: must look like tcp://HOST:PORT, an IPv6 host in brackets")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65_536):
        raise ValueError(f"{address}: the port must be a number from 1 to 65535")
    return ("127.0.0.1" if host == "localhost" else host), str(int(port))


def _collide(first: tuple[str, str], second: tuple[str, str]) -> bool:
    wildcards = {"*", "0.0.0.0", "[::]"}
    return first == second or (first[1] == second[1] != "" and bool(wildcards & {first[0], second[0]}))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
