"""A suite under supervisord as ``seamark up`` brings it up, in directories and on ports of its own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from standalone import Run, descendants_of, wait_for

from seamarkd.cli.status import ask, assess
from seamarkd.cli.supervisor import Program, Supervisor
from seamarkd.settings import load


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, outside the ephemeral range's start so that no client gets one meanwhile."""
    found: list[int] = []
    with ExitStack() as taken:
        for port in range(21_000 + os.getpid() * 37 % 10_000, 32_000):
            probe = taken.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise AssertionError("no free port")


class Suite:
    """A lighthouse, a coordinator, and agents of one host.

    Args:
        home: its directories go here; short, for the path of a Unix socket has 107 bytes at most.
        agents, slots: how many agents, and worker places of each.
        keys: whether it uses keys; in a directory ``keys`` of its home.
        prefix: what its commands are run by, such as nsenter.
    """

    def __init__(
        self, home: Path, *, agents: int = 2, slots: int = 2, prefix: tuple[str, ...] = (), keys: bool = False
    ) -> None:
        self.home = home
        self.agents = agents
        self.prefix = prefix
        home.mkdir(parents=True, exist_ok=True)
        lighthouse, events, coordinator = free_ports(3)
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SEAMARK_")},
            "XDG_RUNTIME_DIR": str(home / "run"),
            "XDG_STATE_HOME": str(home / "state"),
            "SEAMARK_LIGHTHOUSE_ADDRESS": f"tcp://127.0.0.1:{lighthouse}",
            "SEAMARK_LIGHTHOUSE_EVENTS": f"tcp://127.0.0.1:{events}",
            "SEAMARK_COORDINATOR_ADDRESS": f"tcp://127.0.0.1:{coordinator}",
            "SEAMARK_AGENT_NODE": "host",
            # A daemon that a test keeps away comes back in its own time, also on a slow machine.
            "SEAMARK_LIGHTHOUSE_AGENT_GRACE": "60",
            "SEAMARK_AGENT_SLOTS": str(slots),
        }
        self.state = home / "state" / "seamark"
        self.keys = home / "keys"
        if keys:
            self.env["SEAMARK_SECURITY_KEYS"] = str(self.keys)
            self.command("keys", "init")
            for number in range(1, agents):
                self.command("keys", "add", f"host-{number}")

    def command(self, *arguments: str, code: int | None = 0, **env: str) -> str:
        """What ``seamark`` prints; it has to exit with this code, with any if None."""
        done = subprocess.run(
            [*self.prefix, sys.executable, "-m", "seamarkd.cli", *arguments],
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if code is not None:
            assert done.returncode == code, (
                f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
            )
        return done.stdout + done.stderr

    def up(self) -> None:
        self.command("up", "--agents", str(self.agents))

    def end(self) -> None:
        """Stops the daemons in whatever state they are: also of a coordinator that can't be asked to end its jobs."""
        self.command("down", code=None)
        self.command("down", "--keep-jobs", code=None)

    def run(self, home: Path, *options: str, **more: Any) -> Run:
        return Run(home, *options, env=self.env, prefix=self.prefix, **more)

    def keepers(self, name: str) -> list[psutil.Process]:
        """The keepers of a job, of this suite alone: another's beside it may have a job of this name."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                options = dict(itertools.pairwise(process.cmdline()))
                if options.get("--job") == name and options.get("--socket", "").startswith(f"{self.home}/"):
                    found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def status(self) -> dict[str, Any]:
        """What ``seamark status --json`` prints, whatever its exit code."""
        return dict(json.loads(self.command("status", "--json", code=None)))

    def healthy(self) -> bool:
        """Whether ``seamark status`` would exit with 0."""
        return assess(*ask(load(None, self.env, {}))).code == 0

    def wait_healthy(self) -> None:
        try:
            wait_for("a healthy suite", self.healthy, 30.0)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.command('status', code=None)}\n{self.logs()}") from None

    def programs(self) -> dict[str, Program]:
        with Supervisor(self.home / "run" / "seamark") as supervisor:
            return {program.name: program for program in supervisor.programs()}

    def kill(self, *names: str) -> None:
        """kill -9 of these daemons; returns once each has a successor."""
        before = self.programs()
        for name in names:
            _kill(before[name])
        self._wait_replaced(before, names)

    def _wait_replaced(self, before: dict[str, Program], names: tuple[str, ...]) -> None:
        def replaced() -> bool:
            now = self.programs()
            return all(now[name].pid not in (0, before[name].pid) for name in names)

        wait_for(f"another {', '.join(names)}", replaced)

    @contextmanager
    def without(self, *names: str) -> Iterator[None]:
        """These daemons are killed and stay away until the block ends, for supervisord is stopped meanwhile."""
        programs = self.programs()
        supervisord = self.supervisord()
        supervisord.suspend()
        try:
            for name in names:
                _kill(programs[name])
            yield
        finally:
            supervisord.resume()
        # Nobody misses a daemon that has been away for a moment: healthy alone says nothing of its successor.
        self._wait_replaced(programs, names)
        self.wait_healthy()

    def problems(self) -> str:
        """What ``seamark status`` finds wrong, a line for each; its exit code has to agree."""
        status = self.status()
        assert bool(status["problems"]) == bool(status["code"])
        return "\n".join(status["problems"])

    def kill_everything(self) -> None:
        """kill -9 of all daemons and of supervisord; returns once nothing of them is left."""
        programs = self.programs()
        supervisord = self.supervisord()
        supervisord.kill()
        for program in programs.values():
            with contextlib.suppress(ProcessLookupError):
                _kill(program)
        wait_for("them to end", lambda: not any(Path(f"/proc/{program.pid}").exists() for program in programs.values()))
        self.command("status", code=2)

    def follow(self, *arguments: str) -> Following:
        """A ``seamark`` command that goes on until it is closed and prints a JSON object per line."""
        return Following(self, arguments)

    def supervisord(self) -> psutil.Process:
        return psutil.Process(int((self.home / "run" / "seamark" / "supervisord.pid").read_text()))

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted((self.state / "log").glob("*.log"))
        )


class Following:
    """A command in the background, and what it prints."""

    def __init__(self, suite: Suite, arguments: tuple[str, ...]) -> None:
        self._path = suite.home / "followed"
        command = [sys.executable, "-m", "seamarkd.cli", *arguments]
        with self._path.open("w") as output:
            self.process = subprocess.Popen(command, env=suite.env, stdout=output)

    def printed(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._path.read_text().splitlines()]

    def close(self) -> None:
        self.process.terminate()
        assert self.process.wait(30.0) == -signal.SIGTERM


def _kill(program: Program) -> None:
    # One that is down has 0 for a process id, which would be this process's own group.
    if program.pid:
        os.kill(program.pid, signal.SIGKILL)


def watches(agent: int, worker: int) -> bool:
    """Whether an agent holds a pidfd of this process: what ended before nobody can tell the end of."""
    found = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for fd in Path(f"/proc/{agent}/fdinfo").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found |= {line for line in fd.read_text().splitlines() if line.startswith("Pid:")}
    return f"Pid:\t{worker}" in found


@contextmanager
def suite(home: Path, *, env: dict[str, str] | None = None, **more: Any) -> Iterator[Suite]:
    """A suite that leaves nothing behind; ``env`` are more settings."""
    made = Suite(home, **more)
    made.env |= env or {}
    try:
        made.up()
        yield made
    finally:
        made.end()
    wait_for("processes of the suite to end", lambda: not descendants_of(str(home)), 20.0)


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """A file system of this size (as tmpfs takes it) at this place, in a mount namespace of its own.

    Yields:
        The process that holds the namespace, and what a command has to be run by to be in it.
    """
    place.mkdir(parents=True)
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    mount = f"mount -t tmpfs -o size={size} tmpfs '{place}' && echo mounted && exec sleep infinity"
    holder = subprocess.Popen(["unshare", "--mount", *user, "sh", "-c", mount], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != "mounted\n":
            pytest.skip("this host allows no mount namespace")
        join = ["--user", "--preserve-credentials"] if user else []
        yield holder.pid, ("nsenter", "--target", str(holder.pid), "--mount", *join)
    finally:
        holder.kill()
        holder.wait()
