"""A head, and nodes with an agent each, on hosts of their own: daemons as they run on many machines."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from harness.network import Host, Network
from harness.processes import SystemFailed
from lighthouses.children import Child, environment

LIGHTHOUSE, EVENTS, COORDINATOR = 29710, 29711, 29712
BIN = Path(sys.executable).parent
SILENT = 0.5
PATIENCE, ENDING = 60.0, 20.0
IDLE = "import time\nwhile True: time.sleep(3_600)\n"


class Hosts:
    """The first host is the head, the others are nodes ``b``, ``c``, ...

    Args:
        home: their directories go here; short, for the path of a Unix socket has 107 bytes at most.
        network: the hosts.
        slots: worker places of each node.
        agents: how many of the nodes have an agent from the beginning; all by default.
    """

    def __init__(self, home: Path, network: Network, slots: int = 64, agents: int | None = None) -> None:
        self.home = home
        self.network = network
        self.head, *nodes = network.hosts
        self.nodes = {chr(ord("b") + number): host for number, host in enumerate(nodes)}
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        self.losses: list[dict[str, Any]] = []
        """What the subscribers said so far."""
        self._slots = slots
        self._first = list(self.nodes)[:agents]
        self._running = ExitStack()
        self._subscribers: Child | None = None
        (home / "idle.py").write_text(IDLE)

    def __enter__(self) -> Self:
        with self._running as running:
            self.start(self.head, "lighthouse", str(BIN / "seamark-lighthouse"))
            # By SIGHUP it leaves its jobs alone: those end with their agents, before it, and it would wait for them.
            self.start(self.head, "coordinator", str(BIN / "seamark-coordinator"), end=signal.SIGHUP)
            for node in self._first:
                self.start_agent(node)
            self.wait("a healthy suite", self.healthy)
            self._running = running.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        for node, agent in self.agents.items():
            if agent.poll() is not None:
                # Its keeper and its workers end with an agent, not without one.
                self.start_agent(node)
        self._running.close()

    def environment(self, host: Host, name: str) -> dict[str, str]:
        """What a process under this name has on this host."""
        address = self.head.address
        return environment(
            XDG_RUNTIME_DIR=str(self.home / name / "run"),
            XDG_STATE_HOME=str(self.home / name / "state"),
            SEAMARK_LIGHTHOUSE_ADDRESS=f"tcp://{address}:{LIGHTHOUSE}",
            SEAMARK_LIGHTHOUSE_EVENTS=f"tcp://{address}:{EVENTS}",
            SEAMARK_COORDINATOR_ADDRESS=f"tcp://{address}:{COORDINATOR}",
            SEAMARK_AGENT_HOST=host.address,
            SEAMARK_AGENT_NODE=name,
            SEAMARK_AGENT_SLOTS=str(self._slots),
            SEAMARK_SECURITY_INSECURE="true",
        )

    def start(
        self, host: Host, name: str, *command: str, end: signal.Signals = signal.SIGTERM
    ) -> subprocess.Popen[bytes]:
        """A process on this host, until the end, which comes by that signal."""
        for directory in ("run", "state"):
            (self.home / name / directory).mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.home / name / "output").open("ab") as output:
            own = self.environment(host, name)
            process = subprocess.Popen([*host.prefix, *command], env=own, stdout=output, stderr=output)
        self._running.callback(_end, process, end)
        return process

    def start_agent(self, node: str) -> None:
        """An agent for this node; it takes up what another left there."""
        self.agents[node] = self.start(self.nodes[node], node, str(BIN / "seamark-agent"))

    def submit(self, name: str) -> None:
        """A job of one sleeping worker on each node, which ends with the first of them; returns once they run."""
        once = ("--max-restarts", "0", "--preload", "none")
        self.run(name, "--nnodes", str(len(self.nodes)), *once, str(self.home / "idle.py"))

        def runs() -> bool:
            jobs = (self.status()["coordinator"] or {}).get("jobs", [])
            return any(job["job"] == name and len(job["pids"]) == job["alive"] == len(self.nodes) for job in jobs)

        self.wait(f"job {name}", runs)

    def run(self, name: str, *arguments: str) -> None:
        """A job under this name, with these arguments of ``seamark run``."""
        # Its agents end the job, as they do where a terminal is closed: the command would wait for lost ranks.
        self.start(self.head, "run", str(BIN / "seamark"), "run", "--name", name, *arguments, end=signal.SIGKILL)

    def subscribe(self, count: int = 1) -> None:
        """That many subscribers on the head; what they are told goes to ``losses``."""
        command = [*self.head.prefix, sys.executable, "-m", "lighthouses.subscribers"]
        child = Child("subscribers", command, self.home, self.environment(self.head, "lighthouse"))
        self._subscribers = self._running.enter_context(child)
        address = f"tcp://{self.head.address}"
        child.tell(lighthouse=f"{address}:{LIGHTHOUSE}", events=f"{address}:{EVENTS}", subscribers=count)
        child.hear(PATIENCE)

    def listen(self, timeout: float) -> dict[str, Any] | None:
        """The next failure of which all subscribers were told, if it comes within so many seconds."""
        assert self._subscribers is not None, "subscribe() comes first"
        told = self._subscribers.heard(timeout)
        if told is not None:
            self.losses.append(told)
        return told

    def command(self, *arguments: str) -> str:
        """What ``seamark`` prints on the head, whatever its exit code."""
        done = subprocess.run(
            [*self.head.prefix, str(BIN / "seamark"), *arguments],
            env=self.environment(self.head, "lighthouse"),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        return done.stdout + done.stderr

    def status(self) -> dict[str, Any]:
        """What ``seamark status`` says on the head."""
        return dict(json.loads(self.command("status", "--json")))

    def hears(self, node: str) -> bool:
        """Whether the lighthouse hears this node's heartbeats."""
        nodes = (self.status()["lighthouse"] or {}).get("nodes", [])
        return any(one["node"] == node and one["beat_age"] < SILENT for one in nodes)

    def healthy(self) -> bool:
        """Whether nothing is wrong, and the lighthouse hears every node."""
        return not self.status()["problems"] and all(map(self.hears, self.agents))

    def wait(self, what: str, condition: Callable[[], bool], patience: float = PATIENCE) -> None:
        """Until it is so."""
        until = time.monotonic() + patience
        while not condition():
            if time.monotonic() > until:
                raise SystemFailed(f"{what}: not within {patience:g} s\n{self.command('status')}\n{self.logs()}")
            time.sleep(0.01)

    def logs(self) -> str:
        """The end of all that was printed."""
        return "\n".join(f"--- {path}\n{path.read_text()[-2000:]}" for path in sorted(self.home.glob("*/output")))


def _end(process: subprocess.Popen[bytes], end: signal.Signals) -> None:
    process.send_signal(end)
    try:
        process.wait(ENDING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
