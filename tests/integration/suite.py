"""A suite under supervisord as ``seamark up`` brings it up, in directories and on ports of its own."""

from __future__ import annotations

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
from standalone import Run, descendants_of, wait_for

from seamarkd.cli.status import ask, assess
from seamarkd.cli.supervisor import Program, Supervisor
from seamarkd.settings import load

AGENTS = 2
SLOTS = 2


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, outside the ephemeral range's start so that no client gets one meanwhile."""
    found: list[int] = []
    with ExitStack() as taken:
        for port in range(21_000 + os.getpid() % 5_000, 32_000):
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
    """Two agents with two slots each, a lighthouse and a coordinator."""

    def __init__(self, home: Path) -> None:
        self.home = home
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
            "SEAMARK_AGENT_SLOTS": str(SLOTS),
        }
        self.state = home / "state" / "seamark"

    def command(self, *arguments: str, code: int | None = 0) -> str:
        """What ``seamark`` prints; it has to exit with this code, with any if None."""
        done = subprocess.run(
            [sys.executable, "-m", "seamarkd.cli", *arguments],
            env=self.env,
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
        self.command("up", "--agents", str(AGENTS))

    def run(self, home: Path, *options: str, **more: Any) -> Run:
        return Run(home, *options, env=self.env, **more)

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
            os.kill(before[name].pid, signal.SIGKILL)

        def replaced() -> bool:
            now = self.programs()
            return all(now[name].pid not in (0, before[name].pid) for name in names)

        wait_for(f"another {', '.join(names)}", replaced)

    def supervisord(self) -> psutil.Process:
        return psutil.Process(int((self.home / "run" / "seamark" / "supervisord.pid").read_text()))

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted((self.state / "log").glob("*.log"))
        )


@contextmanager
def suite(home: Path) -> Iterator[Suite]:
    """A suite that leaves nothing behind."""
    made = Suite(home)
    try:
        made.up()
        yield made
    finally:
        made.command("down", code=None)
    wait_for("processes of the suite to end", lambda: not descendants_of(str(home)), 20.0)
