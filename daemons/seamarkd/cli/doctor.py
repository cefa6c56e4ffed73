"""``seamark doctor``: whether this host is fit to run the suite, and what to do where it is not.

Each check looks at one thing and gives lines; nothing is changed. What can't be seen from here is not guessed.
"""

from __future__ import annotations

import errno
import os
import platform
import resource
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import click
import psutil
import zmq
from rich.console import Console
from rich.text import Text

from seamark.protocol.messages import CoordinatorStatus, LighthouseStatus
from seamarkd.cli.events import on_this_host
from seamarkd.cli.exit_codes import CONFIGURATION, FAILED, SUCCEEDED
from seamarkd.cli.status import ask_one, duration, plain
from seamarkd.settings import Settings, SettingsError, config_path, load

ASK_TIMEOUT = 0.5
CLOCK_TOLERANCE = 0.5
"""Seconds; only logs compare wall clocks between hosts, nothing is decided by them."""
FILES_WANTED = 4_096
"""Open files: a lighthouse holds one or two per node, a keeper several per worker."""
PROCESSES_WANTED = 1_024
KERNEL_WANTED = (6, 1)
KERNEL_EXIT_INFO = (6, 15)
"""From here on a pidfd offers the exit status of a process that is not its reader's child (PIDFD_GET_INFO)."""
PYTHON_WANTED = (3, 11)
PACKAGES = {"torch": (2, 6), "pyzmq": (26,)}
NETWORK_FILES = ("nfs", "lustre", "cifs", "smb", "gpfs", "beegfs", "ceph", "glusterfs", "fuse.sshfs", "afs", "9p")
MEMORY_FILES = ("tmpfs", "ramfs")

Level = Literal["ok", "warning", "problem"]
COLOURS: dict[Level, str] = {"ok": "green", "warning": "yellow", "problem": "red"}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the list. ``advice`` says what to do, where something is to be done."""

    level: Level
    text: str
    advice: str = ""


@click.command()
@click.option("--config", type=click.Path(path_type=Path), help="The configuration file.")
def doctor(config: Path | None) -> int:
    """Checks whether this host is fit to run the suite.

    \b
    Exit codes:
      0    nothing is wrong, or only warnings
      1    something is wrong; the line says what to do
      78   the configuration is invalid
    """
    console = Console()
    path = config_path(config, os.environ)
    try:
        settings = load(config, os.environ, {})
    except SettingsError as error:
        for problem in error.problems:
            show(console, Check("problem", f"configuration: {problem}"))
        return CONFIGURATION
    show(console, Check("ok", f"configuration: {path}" if path else "configuration: defaults, there is no file"))
    checks = [
        *addresses(settings),
        *directories(settings),
        keys(settings),
        files_limit(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        processes_limit(resource.getrlimit(resource.RLIMIT_NPROC)[0]),
        kernel(platform.release()),
        *versions(),
        supervisor(),
        gpus(Path("/dev")),
    ]
    for check in checks:
        show(console, check)
    return FAILED if any(check.level == "problem" for check in checks) else SUCCEEDED


def show(console: Console, check: Check) -> None:
    """Prints a check on one line, two with an advice."""
    console.print(Text.assemble((f"{check.level:8}", COLOURS[check.level]), plain(check.text)), soft_wrap=True)
    if check.advice:
        console.print(Text(f"        → {plain(check.advice)}"), soft_wrap=True)


def addresses(settings: Settings) -> list[Check]:
    """Each address: answered by a daemon of ours, free to be taken, or in somebody else's hands."""
    asked_at = time.time()
    try:
        key = settings.key("operator")
    except SettingsError:
        key = None  # the check of the keys says so
    lighthouse = ask_one(settings.lighthouse.address, LighthouseStatus, ASK_TIMEOUT, key)
    answered_at = time.time()
    coordinator = ask_one(settings.coordinator.address, CoordinatorStatus, ASK_TIMEOUT, key)
    checks = [
        address_check("lighthouse", settings.lighthouse.address, lighthouse, bind_error(settings.lighthouse.address)),
        events_check(settings.lighthouse.events, lighthouse, bind_error(settings.lighthouse.events)),
        address_check(
            "coordinator", settings.coordinator.address, coordinator, bind_error(settings.coordinator.address)
        ),
    ]
    if not isinstance(lighthouse, str) and not on_this_host(settings.lighthouse.address):
        checks.append(clock_check(lighthouse.wall_clock, asked_at, answered_at))
    return checks


def clock_check(head: float, asked_at: float, answered_at: float) -> Check:
    """Whether this host's clock agrees with the head's, as far as the time of the question allows to say.

    Args:
        head: the head's wall clock when it answered, seconds.
        asked_at, answered_at: this host's before and after.
    """
    early, late = asked_at - head, answered_at - head
    if early <= CLOCK_TOLERANCE and late >= -CLOCK_TOLERANCE:
        return Check("ok", f"clock: within {max(abs(early), abs(late), 0.001):.3f} s of the head's")
    ahead = early > 0
    seconds = early if ahead else -late
    return Check(
        "warning",
        f"clock: at least {seconds:.1f} s {'ahead of' if ahead else 'behind'} the head's",
        "times in their logs don't compare: let both hosts follow the same time source (chronyc tracking)",
    )


def bind_error(address: str) -> int | None:
    """Why this host could not listen at a tcp address: an errno, 0 if it could; None where it is not to be tried."""
    if not address.startswith("tcp://") or not on_this_host(address):
        return None
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    host = "" if host == "*" else host.strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As ZeroMQ binds: connections that a stopped daemon left in TIME_WAIT are in nobody's way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except socket.gaierror:
            return errno.EADDRNOTAVAIL
        except OSError as error:
            return error.errno
    return 0


def address_check(
    role: str, address: str, answer: CoordinatorStatus | LighthouseStatus | str, error: int | None
) -> Check:
    """What a daemon's address is worth, from its answer (or why there is none) and an attempt to bind."""
    if not isinstance(answer, str):
        return Check("ok", f"{role} at {address}: answers, pid {answer.pid}, up for {duration(answer.uptime)}")
    if error is None:
        if address.startswith("ipc://"):
            return Check("ok", f"{role} at {address}: does not run")
        return Check(
            "problem",
            f"{role} at {address}, on another host: {answer}",
            "start it there (seamark up), or look for a firewall between the hosts",
        )
    return _bound(role, address, error)


def events_check(address: str, lighthouse: LighthouseStatus | str, error: int | None) -> Check:
    """The same for the events' address, which answers nobody: it is judged by its lighthouse."""
    if not isinstance(lighthouse, str):
        if error == 0:
            return Check(
                "problem",
                f"events at {address}: nobody listens there, although the lighthouse answers",
                "compare lighthouse.events with the configuration that the lighthouse was started with",
            )
        return Check("ok", f"events at {address}: the lighthouse's")
    if error is None:
        return Check("ok", f"events at {address}: not to be seen from here")
    return _bound("events", address, error)


def _bound(role: str, address: str, error: int) -> Check:
    if error == 0:
        return Check("ok", f"{role} at {address}: free")
    if error == errno.EADDRINUSE:
        port = address.rpartition(":")[2]
        return Check(
            "problem",
            f"{role} at {address}: taken by something that does not answer as Seamark does",
            f"ss -ltnp 'sport = :{port}' names it; end it or configure another port",
        )
    return Check("problem", f"{role} at {address}: {os.strerror(error)}", "configure an address of this host")


def directories(settings: Settings) -> list[Check]:
    """The three directories: private, writable, and the state on a disk of this host."""
    mounts = [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]
    wanted: list[tuple[str, Callable[[], Path]]] = [
        ("run", lambda: settings.run_directory),
        ("state", lambda: settings.state_directory),
        ("log", lambda: settings.log_directory),
    ]
    checks = []
    for name, get in wanted:
        try:
            path = get()
        except OSError as error:
            advice = f"set paths.{name} to a directory of your own"
            checks.append(Check("problem", f"{name} directory: {error}", advice))
            continue
        kind = file_system(path.resolve(), mounts)
        checks.append(directory_check(name, path, path.stat().st_mode, os.access(path, os.W_OK | os.X_OK), kind))
    return checks


def keys(settings: Settings) -> Check:
    """The keys of this host: whether they are safe, and this host's people have one."""
    directory = settings.keys_directory
    if directory is None:
        if settings.security.insecure:
            return Check("warning", "keys: none, and --insecure: whoever reaches the daemons can command the jobs")
        return Check("ok", "keys: none, for nothing leaves this host")
    try:
        key = settings.key("operator")
    except SettingsError as error:
        return Check("problem", f"keys: {error}")
    assert key is not None
    return Check("ok", f"keys: {directory}, yours is {key.name}")


def file_system(path: Path, mounts: Iterable[tuple[str, str]]) -> str:
    """The type of the file system that holds a path: the deepest mount above it, the last of several there."""
    kind, deepest = "", -1
    for mountpoint, fstype in mounts:
        if path.is_relative_to(mountpoint) and len(Path(mountpoint).parts) >= deepest:
            kind, deepest = fstype, len(Path(mountpoint).parts)
    return kind


def directory_check(name: str, path: Path, mode: int, writable: bool, kind: str) -> Check:
    """What a directory is worth, from its mode and the file system it is on."""
    where = f"{name} directory {path}"
    if not writable:
        return Check("problem", f"{where}: not writable", f"chmod u+wx {path}, or set paths.{name} to another")
    if stat.S_IMODE(mode) & 0o077:
        return Check("problem", f"{where}: open to others (mode {stat.S_IMODE(mode):o})", f"chmod 700 {path}")
    if name == "state" and kind.startswith(NETWORK_FILES):
        return Check(
            "problem",
            f"{where}: on a network file system ({kind}), where locks and fsync can't be trusted",
            "set paths.state to a directory on a disk of this host",
        )
    if name == "state" and kind.startswith(MEMORY_FILES):
        return Check(
            "warning",
            f"{where}: in memory ({kind}), jobs are forgotten when the host starts anew",
            "set paths.state to a directory on a disk",
        )
    return Check("ok", f"{where}: private, writable, {kind or 'unknown file system'}")


def files_limit(soft: int, hard: int) -> Check:
    """Open files a process may have."""
    if soft == resource.RLIM_INFINITY or soft >= FILES_WANTED:
        return Check("ok", f"open files: {_limit(soft)}")
    if hard == resource.RLIM_INFINITY or hard >= FILES_WANTED:
        text = f"open files: {soft}, {FILES_WANTED} are wanted"
        return Check("warning", text, f"ulimit -n {FILES_WANTED} before seamark up (the hard limit allows it)")
    text = f"open files: {soft}, at most {hard}; {FILES_WANTED} are wanted"
    return Check("problem", text, "raise nofile in /etc/security/limits.conf, or LimitNOFILE= of the service")


def processes_limit(soft: int) -> Check:
    """Processes and threads a user may have."""
    if soft == resource.RLIM_INFINITY or soft >= PROCESSES_WANTED:
        return Check("ok", f"processes: {_limit(soft)}")
    text = f"processes: {soft}, threads included; {PROCESSES_WANTED} are wanted"
    return Check("warning", text, f"ulimit -u {PROCESSES_WANTED}, or nproc in /etc/security/limits.conf")


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def kernel(release: str) -> Check:
    """The kernel's version."""
    number = numbers(release)
    if number < KERNEL_WANTED:
        return Check(
            "warning", f"kernel {release}: not tried below 6.1", "use a newer kernel, or try seamark run --standalone"
        )
    if number < KERNEL_EXIT_INFO:
        return Check("ok", f"kernel {release} (no exit statuses through pidfds: those came with 6.15)")
    return Check("ok", f"kernel {release}")


def versions() -> list[Check]:
    """Python and the packages that matter, without importing the large ones."""
    python = platform.python_version()
    good = sys.version_info >= PYTHON_WANTED
    checks = [Check("ok", f"python {python}") if good else Check("problem", f"python {python}", "3.11 or newer")]
    for name, wanted in PACKAGES.items():
        try:
            found: str | None = version(name)
        except PackageNotFoundError:
            found = None
        checks.append(package_check(name, found, wanted))
    checks.append(Check("ok", f"libzmq {zmq.zmq_version()}"))
    return checks


def package_check(name: str, found: str | None, wanted: tuple[int, ...]) -> Check:
    """A package's version against the oldest one that will do."""
    least = ".".join(map(str, wanted))
    advice = f"{sys.executable} -m pip install '{name}>={least}'"
    if found is None:
        return Check("problem", f"{name}: not installed for {sys.executable}", advice)
    if numbers(found) < wanted:
        return Check("problem", f"{name} {found}: too old", advice)
    return Check("ok", f"{name} {found}")


def numbers(text: str) -> tuple[int, ...]:
    """The numbers a version begins with: (2, 6, 0) of ``2.6.0+cu124``."""
    found = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
        if digits != part:
            break
    return tuple(found)


def supervisor() -> Check:
    """Whether supervisord stands beside this interpreter, or in PATH."""
    beside = Path(sys.executable).parent / "supervisord"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("supervisord")
    if found:
        return Check("ok", f"supervisord: {found}")
    return Check("problem", "supervisord: not found", f"{sys.executable} -m pip install supervisor")


def gpus(devices: Path) -> Check:
    """The NVIDIA GPUs, by their device files."""
    count = sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob("nvidia*"))
    if not count:
        return Check("ok", "GPUs: none, workers use Gloo on the CPU")
    return Check("ok", f"GPUs: {count}")
