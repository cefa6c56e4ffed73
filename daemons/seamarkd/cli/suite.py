"""``seamark up``, ``down`` and ``restart``: the daemons of this host, under supervisord.

Knows which programs a role has and when they count as up; what the daemons do is theirs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
import psutil

import seamarkd
from seamark.protocol.authority import KeyRole
from seamark.protocol.messages import CoordinatorStatus, JobStatus, StatusRequest, StopJob
from seamarkd.cli.exit_codes import CONFIGURATION, FAILED, UNREACHABLE
from seamarkd.cli.greeting import Mechanism, mechanism
from seamarkd.cli.operator import Operator, RefusedError, UnreachableError
from seamarkd.cli.status import connectable
from seamarkd.cli.supervisor import SOCKET, NotRunningError, Program, Supervisor
from seamarkd.coordinator.job import ENDED
from seamarkd.settings import Settings, SettingsError, config_path, load

ROLES = ("lighthouse", "coordinator", "agent")
UP_TIMEOUT = 15.0
RESTART_TIMEOUT = 15.0
STARTING_TIMEOUT = 10.0
"""How long supervisord itself may take to read its configuration and become a daemon."""
DOWN_TIMEOUT = 130.0
"""supervisord stops agents, coordinator and lighthouse one after the other, up to 40 s each (stopwaitsecs)."""
SETTLED = 1.0
"""A program counts as running once its process id has stayed the same for so long: with startsecs=0 supervisord
calls a program RUNNING before its first instruction."""
CRASHES = 2
"""A program seen with this many further process ids while it comes up is not going to."""
LOG_LINES = 10
ASK_TIMEOUT = 5.0
POLL = 0.05


class SuiteError(Exception):
    """The sentence for the person, and the exit code."""

    def __init__(self, text: str, code: int = FAILED) -> None:
        super().__init__(text)
        self.code = code


def conf_directory() -> Path:
    """supervisord.conf and the program files: the checkout's, else the installation's.

    Raises:
        SuiteError: neither is there.
    """
    for place in (Path(str(seamarkd.__file__)).parents[2] / "conf", Path(sys.prefix) / "share/seamark/conf"):
        if (place / "supervisord.conf").is_file():
            return place
    raise SuiteError("supervisord.conf was not found: install Seamark again", CONFIGURATION)


def _roles(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    asked = [role.strip() for role in value.split(",")]
    if unknown := [role for role in asked if role not in ROLES]:
        raise click.BadParameter(f"{unknown[0]!r} is no role: there are {', '.join(ROLES)}")
    return tuple(role for role in ROLES if role in asked)


config_option = click.option("--config", type=click.Path(path_type=Path), help="The configuration file.")


@click.command()
@click.option("--roles", default=",".join(ROLES), show_default=True, callback=_roles, help="What this host runs.")
@click.option("--agents", type=click.IntRange(1, 64), default=1, show_default=True, help="Several try several nodes.")
@click.option("--insecure", is_flag=True, help="Accept addresses off loopback, in the clear and without keys.")
@config_option
def up(roles: tuple[str, ...], agents: int, insecure: bool, config: Path | None) -> int:
    """Starts the daemons of this host and waits until they answer.

    \b
    Exit codes:
      0    they run
      1    one does not come up; the end of its log follows
      78   a setting, file or directory can't be used; what runs already has other keys

    \b
    Examples:
      seamark up
      seamark up --roles agent       on every host but the head
    """
    return _reported(lambda: _up(roles, agents, insecure, config))


@click.command()
@click.option(
    "--keep-jobs", is_flag=True, help="Jobs are not ended: their workers save, and go on after the next seamark up."
)
@config_option
def down(keep_jobs: bool, config: Path | None) -> int:
    """Stops the daemons of this host. Where the coordinator runs it ends all jobs first.

    If it can't be asked (other keys, no answer), nothing is stopped: --keep-jobs stops the daemons all the same.

    \b
    Exit codes:
      0    the daemons are stopped, or none ran
      1    a daemon does not end
      2    the coordinator runs and does not answer
      78   a setting, file or directory can't be used; the keys are not the suite's

    \b
    Examples:
      seamark down                 ends the jobs, then the daemons
      seamark down --keep-jobs     before the host is rebooted: the jobs go on afterwards
    """
    return _reported(lambda: _down(_settings_of_running(config), keep_jobs))


@click.command()
@click.argument("role", type=click.Choice(ROLES))
@config_option
def restart(role: str, config: Path | None) -> int:
    """Replaces the daemons of a role; jobs go on."""
    return _reported(lambda: _restart(role, _settings_of_running(config)))


def _reported(action: Callable[[], None]) -> int:
    try:
        action()
    except SettingsError as error:
        click.echo(str(error), err=True)
        return CONFIGURATION
    except SuiteError as error:
        click.echo(f"seamark: {error}", err=True)
        return error.code
    except NotRunningError as error:
        click.echo(f"seamark: {error}", err=True)
        return FAILED
    except xmlrpc.client.Fault as error:
        click.echo(f"seamark: supervisord refused: {error.faultString}", err=True)
        return FAILED
    return 0


def _settings(config: Path | None, insecure: bool) -> Settings:
    return load(config, os.environ, {"security.insecure": insecure or None})


def _settings_of_running(config: Path | None) -> Settings:
    """What was accepted by ``up --insecure`` must not keep anybody from stopping it."""
    return _settings(config, insecure=True)


@contextlib.contextmanager
def _directories(settings: Settings) -> Iterator[Path]:
    """The run directory, held against a second call at the same time.

    Raises:
        SuiteError: a directory can't be used, or another call is at work.
    """
    try:
        run, _, _ = settings.run_directory, settings.state_directory, settings.log_directory
        lock = os.open(run / "suite.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SuiteError(f"a directory can't be used: {error}", CONFIGURATION) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SuiteError(f"another `seamark up`, `down` or `restart` is at work in {run}: wait for it") from None
        yield run
    finally:
        os.close(lock)


def _addresses(settings: Settings) -> dict[str, list[str]]:
    return {
        "lighthouse": [settings.lighthouse.address, settings.lighthouse.events],
        "coordinator": [settings.coordinator.address],
        "agent": [],
    }


def _answers(address: str) -> bool:
    """Whether somebody accepts connections there; a wildcard is asked on loopback."""
    scheme, _, place = address.partition("://")
    try:
        if scheme == "ipc":
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(0.5)
                connection.connect(place)
        else:
            host, _, port = place.rpartition(":")
            host = "127.0.0.1" if host == "*" else host.removeprefix("[").removesuffix("]")
            socket.create_connection((host, int(port)), timeout=0.5).close()
    except (OSError, UnicodeError):  # UnicodeError: a name that can't be one of a host
        return False
    return True


def _up(roles: tuple[str, ...], agents: int, insecure: bool, config: Path | None) -> None:
    settings = _settings(config, insecure)
    _check_keys(settings, roles, agents)
    addresses = _addresses(settings)
    with _directories(settings) as run:
        if len(os.fsencode(run / SOCKET)) > 99:  # supervisord binds NAME.PID first; the kernel takes 107 bytes
            raise SuiteError(f"{run}: this path is too long for a socket: set paths.run", CONFIGURATION)
        with Supervisor(run) as supervisor:
            try:
                pid = supervisor.pid()
            except NotRunningError:
                for address in (address for role in roles for address in addresses[role]):
                    if _answers(address):
                        raise SuiteError(
                            f"something else already answers at {address}: stop it, or choose another address"
                        ) from None
                _start_supervisord(_environment(settings, roles, agents, insecure, config))
                started = None
            else:
                click.echo(f"already running: supervisord, pid {pid}")
                _check_the_running(settings, roles)
                started = _start_missing(supervisor, roles, agents)
            try:
                programs = _wait_until_up(supervisor, roles, addresses)
            except BaseException:
                _take_down(supervisor, started)
                raise
            for program in programs:
                where = " ".join(addresses[program.group]) or settings.agent.host
                click.echo(f"{program.name:<12} pid {program.pid:<8} {where}")


def _check_keys(settings: Settings, roles: tuple[str, ...], agents: int) -> None:
    """Whether each daemon will find its key.

    Raises:
        SettingsError: all that are missing or can't be used.
    """
    wanted: list[tuple[KeyRole, str]] = []
    if "lighthouse" in roles or "coordinator" in roles:
        wanted.append(("daemon", ""))
    if "agent" in roles:
        wanted += [("node", settings.node_of(instance)) for instance in range(agents)]
    problems: list[str] = []
    for role, name in wanted:
        try:
            settings.key(role, name)
        except SettingsError as error:
            problems += error.problems
    if problems:
        raise SettingsError(list(dict.fromkeys(problems)))


def _check_the_running(settings: Settings, roles: tuple[str, ...]) -> None:
    """Whether the daemons that run already speak as this configuration says.

    Raises:
        SuiteError: one has keys and the configuration names none, or the other way about.
    """
    keys = settings.keys_directory is not None
    for role in roles:
        for address in map(connectable, _addresses(settings)[role]):
            problem = unlike(role, address, keys, mechanism(address))
            if problem:
                raise SuiteError(problem, CONFIGURATION)


def unlike(role: str, address: str, keys: bool, spoken: Mechanism) -> str:
    """How a running daemon differs from the configuration, and what to do about it; empty if it doesn't.

    Args:
        role: the daemon's.
        address: where it listens.
        keys: whether the configuration names any.
        spoken: what the daemon says; nothing is said of who says nothing.
    """
    if keys and spoken == "NULL":
        return (
            f"the running {role} at {address} has no keys, and security.keys names some: seamark down, then seamark up "
            "(with seamark down --keep-jobs the jobs go on afterwards)"
        )
    if not keys and spoken == "CURVE":
        return (
            f"the running {role} at {address} has keys, and this configuration names none: set security.keys to the "
            "directory that it was started with (--config, SEAMARK_SECURITY_KEYS)"
        )
    return ""


def _environment(
    settings: Settings, roles: tuple[str, ...], agents: int, insecure: bool, config: Path | None
) -> dict[str, str]:
    environment = dict(os.environ) | {
        "SEAMARK_RUN": str(settings.run_directory),
        "SEAMARK_STATE": str(settings.state_directory),
        "SEAMARK_LOG": str(settings.log_directory),
        "SEAMARK_BIN": str(Path(sys.executable).parent),
        "SEAMARK_AGENTS": str(agents),
        "SEAMARK_PROGRAMS": " ".join(f"programs/{role}.conf" for role in roles),
    }
    path = config_path(config, os.environ)
    if path is not None:
        environment["SEAMARK_CONFIG"] = str(path.absolute())
    if insecure:
        environment["SEAMARK_SECURITY_INSECURE"] = "true"
    return environment


def _start_supervisord(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(conf_directory() / "supervisord.conf")]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=STARTING_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise SuiteError(f"supervisord did not become a daemon within {STARTING_TIMEOUT:g} s") from None
    if done.returncode:
        raise SuiteError(f"supervisord did not start: {(done.stderr or done.stdout).strip()}", CONFIGURATION)


def _start_missing(supervisor: Supervisor, roles: tuple[str, ...], agents: int) -> list[Program]:
    """Starts those of the wanted programs that ended; returns them."""
    programs = supervisor.programs()
    wanted = {role: agents if role == "agent" else 1 for role in roles}
    for role, number in wanted.items():
        there = sum(program.group == role for program in programs)
        if there < number:
            raise SuiteError(f"the running suite has {there} {role}(s), not {number}: `seamark down` first")
    started = [p for p in programs if p.group in roles and p.ended]
    for program in started:
        supervisor.start(program)
    return started


def _take_down(supervisor: Supervisor, started: list[Program] | None) -> None:
    """Undoes what a failed ``up`` started: these programs, or (None) supervisord itself."""
    with contextlib.suppress(NotRunningError):
        if started is None:
            _shut_down(supervisor)
            return
        for program in started:
            with contextlib.suppress(xmlrpc.client.Fault):  # it is not running, which is what is wanted
                supervisor.stop(program)


def _wait_until_up(supervisor: Supervisor, roles: tuple[str, ...], addresses: dict[str, list[str]]) -> list[Program]:
    """The programs, once each has run for a while and answers.

    Raises:
        SuiteError: one ended for good, crashes again and again, or does not answer in time.
    """
    deadline = time.monotonic() + UP_TIMEOUT
    seen: dict[str, dict[int, float]] = {}
    answered: set[int] = set()
    while True:
        now = time.monotonic()
        try:
            programs = [program for program in supervisor.programs() if program.group in roles]
        except NotRunningError:
            raise SuiteError("supervisord ended while its programs were coming up") from None
        waiting: list[Program] = []
        for program in programs:
            pids = seen.setdefault(program.full_name, {})
            if program.ended or len(pids) > CRASHES:
                raise SuiteError(_failure(program), CONFIGURATION if _badly_configured(program) else FAILED)
            settled = program.state == "RUNNING" and now - pids.setdefault(program.pid, now) >= SETTLED
            if settled and program.pid not in answered and all(map(_answers, addresses[program.group])):
                answered.add(program.pid)
            if program.pid not in answered:
                waiting.append(program)
        if programs and not waiting:
            return programs
        if now > deadline:
            late = waiting[0] if waiting else None
            raise SuiteError(_failure(late) if late else "supervisord has no programs", FAILED)
        time.sleep(POLL)


def _badly_configured(program: Program) -> bool:
    return program.state == "EXITED" and program.exitstatus == CONFIGURATION


def _failure(program: Program) -> str:
    if program.state == "EXITED":
        what = f"exited with code {program.exitstatus}"
    elif program.state == "RUNNING":
        what = f"(pid {program.pid}) crashes again and again, or does not answer within {UP_TIMEOUT:g} s"
    else:
        return f"{program.name} is {program.state}: {program.spawnerr or 'it does not stay up'}"
    try:
        lines = Path(program.log).read_text(errors="replace").splitlines()[-LOG_LINES:]
    except OSError:
        lines = []
    return "\n".join([f"{program.name} {what}; the end of {program.log}:", *(f"  {line}" for line in lines)])


def _down(settings: Settings, keep_jobs: bool) -> None:
    with _directories(settings) as run, Supervisor(run) as supervisor:
        try:
            coordinators = [program for program in supervisor.programs() if program.group == "coordinator"]
            if not keep_jobs and coordinators:
                _end_jobs(settings, coordinators[0])
            pid = _shut_down(supervisor)
        except NotRunningError:
            click.echo("nothing is running")
        else:
            click.echo(f"stopped: supervisord, pid {pid}, and its programs")


def _end_jobs(settings: Settings, coordinator: Program) -> None:
    """Every job that runs is stopped, and waited for.

    Raises:
        SuiteError: the coordinator runs, and can't be asked: its jobs would lose their daemons, and go on.
    """
    try:
        _stop_all(_begun_with(coordinator) or settings)
    except (UnreachableError, RefusedError, SettingsError) as error:
        if coordinator.state != "RUNNING":
            click.echo(f"{error}: its jobs are left as they are")
            return
        code = UNREACHABLE if isinstance(error, UnreachableError) else CONFIGURATION
        raise SuiteError(
            f"{error}\nThe daemons were not stopped, for jobs may run that could not be ended: "
            "seamark down --keep-jobs stops the daemons without ending them",
            code,
        ) from None


def _begun_with(program: Program) -> Settings | None:
    """The settings that a daemon was started with, by ``cluster-up.sh`` perhaps, or before the file was changed."""
    try:
        return load(None, psutil.Process(program.pid).environ(), {})
    except (psutil.Error, SettingsError):
        return None


def _stop_all(settings: Settings) -> None:
    with Operator(connectable(settings.coordinator.address), settings.key("operator")) as operator:
        known = operator.ask(StatusRequest, CoordinatorStatus, ASK_TIMEOUT)
        jobs = [job.job for job in known.jobs if job.state not in ENDED]
        for job in jobs:
            click.echo(f"stopping job {job}")
            operator.ask(partial(StopJob, job=job, reason="seamark down"), JobStatus, ASK_TIMEOUT)
        deadline = time.monotonic() + DOWN_TIMEOUT
        while jobs and time.monotonic() < deadline:
            time.sleep(POLL)
            found = operator.ask(StatusRequest, CoordinatorStatus, ASK_TIMEOUT)
            jobs = [job.job for job in found.jobs if job.state not in ENDED]


def _shut_down(supervisor: Supervisor) -> int:
    """Ends supervisord and waits until it is gone; returns its former process id.

    Raises:
        NotRunningError: there is none.
        SuiteError: it does not end.
    """
    pid = supervisor.pid()
    try:
        process = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return pid
    try:
        supervisor.shut_down()
    except xmlrpc.client.Fault:  # it is shutting down already: only wait for it
        click.echo("supervisord is stopping already")
    try:
        process.wait(DOWN_TIMEOUT)
    except psutil.TimeoutExpired:
        raise SuiteError(f"supervisord, pid {pid}, did not end within {DOWN_TIMEOUT:g} s: see its log") from None
    return pid


def _restart(role: str, settings: Settings) -> None:
    with _directories(settings) as run, Supervisor(run) as supervisor:
        try:
            before = [program for program in supervisor.programs() if program.group == role]
            if not before:
                raise SuiteError(f"this host runs no {role}")
            for program in before:
                supervisor.hang_up(program)
                new = _wait_for_successor(supervisor, program, _addresses(settings)[role])
                click.echo(f"{program.name:<12} pid {program.pid} -> {new.pid}")
        except NotRunningError:
            raise SuiteError("nothing is running: `seamark up` starts the daemons") from None


def _wait_for_successor(supervisor: Supervisor, old: Program, addresses: list[str]) -> Program:
    deadline = time.monotonic() + RESTART_TIMEOUT
    while True:
        program = next(p for p in supervisor.programs() if p.full_name == old.full_name)
        if program.ended:
            raise SuiteError(_failure(program), CONFIGURATION if _badly_configured(program) else FAILED)
        if program.state == "RUNNING" and program.pid != old.pid and all(map(_answers, addresses)):
            return program
        if time.monotonic() > deadline:
            raise SuiteError(_failure(program))
        time.sleep(POLL)
