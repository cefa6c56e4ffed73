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
import urllib.parse
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
HEALTH_CHECKS = ("disk", "shm", "gpu")
"""Those that come with Seamark (``seamarkd.agent.health``)."""
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
    """This node: its name (empty: the host's), its slots (0: automatic), the host under which others reach it.

    Its health checks (names of Seamark's own, or executables); seconds between two rounds, and for each check. A file
    that appears, or a page that says so, when this host is about to be taken away (empty: none).
    """

    node: str = ""
    slots: int = 0
    host: str = "127.0.0.1"
    health_checks: list[str] = []
    health_interval: float = 60.0
    health_timeout: float = 30.0
    preemption_notice: str = ""


class PathSettings(msgspec.Struct, frozen=True):
    """Directories; empty means the default of seamarkd.paths."""

    run: str = ""
    state: str = ""
    log: str = ""


class LogSettings(msgspec.Struct, frozen=True):
    """What the daemons log, and in which form; how much of the workers' output is kept."""

    level: str = "info"
    format: str = "text"
    worker_max_bytes: int = 67_108_864
    worker_generations: int = 4


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
LIMITS = {
    "lighthouse.beat_interval": (0.02, 10.0),
    "lighthouse.agent_grace": (1.0, 3_600.0),
    "agent.health_interval": (1.0, 86_400.0),
    "agent.health_timeout": (0.1, 3_600.0),
}
COUNTS = {
    "agent.slots": (0, 65_535, "0 (automatic) or a number of slots up to 65535"),
    "log.worker_max_bytes": (1 << 20, 1 << 40, "a number of bytes from 1048576 (1 MiB) to 1099511627776 (1 TiB)"),
    "log.worker_generations": (1, 1_000, "a number of generations from 1 to 1000"),
}
ADDRESSES = ("lighthouse.address", "lighthouse.events", "coordinator.address")
TYPE_NAMES = {
    str: "text in quotes",
    int: "a whole number",
    bool: "true or false",
    float: "a number of seconds",
    list[str]: "a list of texts in quotes",
}
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
    values = {key: found[key][1] if key in found else default(field) for key, field in KEYS.items()}
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


def default(field: msgspec.structs.FieldInfo) -> object:
    """What holds where nobody says anything."""
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()


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
    if kind == list[str]:
        return [part.strip() for part in text.split(",") if part.strip()]
    if kind is bool:
        return BOOLEANS.get(text.lower(), text)
    if kind is float:
        return float(text) if SECONDS.fullmatch(text) else text
    if kind is int and text.isascii() and text.isdigit() and len(text) < 16:
        return int(text)
    return text


def _wrong_values(values: Mapping[str, object]) -> list[tuple[str, str]]:
    wrong: list[tuple[str, str]] = []
    endpoints: dict[str, tuple[str, str]] = {}
    off_loopback: list[str] = []
    for key, value in values.items():
        if not _is_a(value, KEYS[key].type):
            wrong.append((key, f"must be {TYPE_NAMES[KEYS[key].type]}, not {value!r}"))
        elif isinstance(value, list):
            wrong += [(key, text) for text in map(_wrong_check, value) if text]
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
        elif key in COUNTS and not COUNTS[key][0] <= int(str(value)) <= COUNTS[key][1]:
            wrong.append((key, f"must be {COUNTS[key][2]}, not {value}"))
        elif key in LIMITS and not LIMITS[key][0] <= float(str(value)) <= LIMITS[key][1]:
            wrong.append((key, f"must be from {LIMITS[key][0]:g} to {LIMITS[key][1]:g} seconds, not {value}"))
        elif (key.startswith("paths.") or key == "security.keys") and value and not os.path.isabs(str(value)):
            wrong.append((key, f"must be an absolute path, not {value}"))
        elif key == "agent.preemption_notice" and value and not os.path.isabs(str(value)) and not is_url(str(value)):
            wrong.append((key, f"must be the absolute path of a file or an http:// address, not {value}"))
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


def is_url(text: str) -> bool:
    """Whether this is the address of a page: http or https, with a host."""
    try:
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # of the port, or of brackets
        return False


def _is_a(value: object, kind: Any) -> bool:
    if kind == list[str]:
        return isinstance(value, list) and all(type(one) is str for one in value)
    return type(value) is kind


def _wrong_check(check: str) -> str:
    """What is wrong with a health check's name, if anything; whether a file can be run is found where it is."""
    if check in HEALTH_CHECKS or (os.path.isabs(check) and check.isprintable()):
        return ""
    near = _nearest(check, list(HEALTH_CHECKS))
    return f"{check!r} is neither a check of Seamark's nor the absolute path of an executable file{near}"


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
