"""What an agent holds of its jobs: keepers, processes, descriptors; and what it writes down of them."""

from __future__ import annotations

import asyncio
from collections.abc import ItemsView
from pathlib import Path

from msgspec import Struct, field

from seamark.protocol.messages import JobSpec
from seamarkd.agent.keeper_answers import Held
from seamarkd.agent.keeper_client import KeeperClient
from seamarkd.agent.logfiles import LogWatch
from seamarkd.agent.memory import Memory, Remembered
from seamarkd.agent.node import Node
from seamarkd.agent.orphans import Orphan
from seamarkd.agent.watched import Watched


class Process(Struct):
    """A living worker process."""

    held: Held
    watched: Watched

    def close(self) -> None:
        """Lets go of its descriptors."""
        self.watched.close()
        self.held.close()


def _set() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


class Kept(Struct):
    """A job's keeper and processes on this node."""

    keeper: asyncio.Future[KeeperClient]
    socket: str
    processes: dict[str, Process] = field(default_factory=dict)
    logs: dict[str, Path] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    """Exits that were reported before the answer to the start."""
    orphans: dict[str, Orphan] = field(default_factory=dict)
    """By incarnation: whose keeper was killed; the store's service, too."""
    store: str = ""
    store_process: Held | None = None
    store_born: tuple[int, float] = (0, 0.0)
    """Its process id and the time of its fork, also before this agent has it."""
    adopted: bool = False
    """An earlier agent started the keeper: it ends when it is told to, not when this agent gives up connecting."""
    ending: bool = False
    settled: asyncio.Event = field(default_factory=_set)
    """Not set while it is not known which of its processes live: what an earlier agent left is being taken up."""
    over: bool = False
    """Its keeper and all that was its have ended, as they were told."""
    steps: tuple[dict[str, int], dict[str, int]] = field(default_factory=lambda: ({}, {}))
    emptied: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by each exit that leaves no process."""

    def let_go(self) -> None:
        """Closes the connection and all descriptors; the processes live on."""
        if self.keeper.done() and not self.keeper.cancelled() and self.keeper.exception() is None:
            self.keeper.result().close()
        for orphan in self.orphans.values():
            orphan.close()
        self.orphans.clear()
        self.close_processes()
        if self.store_process is not None:
            self.store_process.close()
            self.store_process = None

    def keep_store(self, held: Held | None) -> None:
        """From now on that is the store's process."""
        self.store_process = held
        self.store_born = (held.process.pid, held.process.forked_at) if held is not None else (0, 0.0)

    def close_processes(self) -> None:
        """Closes the workers' descriptors."""
        for process in self.processes.values():
            process.close()
        self.processes.clear()


class KeptJobs:
    """All of them, by name.

    Args:
        node: what the agent knows of its jobs.
        memory: where it is written down.
        log_watch: bounds the files that the jobs write.
    """

    def __init__(self, node: Node, memory: Memory, log_watch: LogWatch) -> None:
        self._node = node
        self._memory = memory
        self._log_watch = log_watch
        self._kept: dict[str, Kept] = {}

    def __getitem__(self, job: str) -> Kept:
        return self._kept[job]

    def get(self, job: str) -> Kept | None:
        """None for a job of which nothing is held."""
        return self._kept.get(job)

    def items(self) -> ItemsView[str, Kept]:
        """Each job's name, and what is held of it."""
        return self._kept.items()

    def add(self, job: str, kept: Kept) -> Kept:
        """From now on that is held of the job."""
        self._kept[job] = kept
        return kept

    def drop(self, job: str) -> None:
        """All of it is gone here."""
        self._kept.pop(job, None)
        self._log_watch.watch(job, ())

    def remember(self, name: str) -> None:
        """Writes down what an agent started anew has to know of the job; of one that is gone nothing."""
        job = self._node.jobs.get(name)
        if job is None:
            self._memory.forget(name)
            return
        kept = self._kept.get(name)
        self._memory.write(Remembered(job, kept.socket, kept.store_born) if kept else Remembered(job, ""))

    def watch_logs(self, job: str) -> None:
        """What the job writes here now is bounded."""
        self._log_watch.watch(job, (*other_logs(self._node.spec(job)), *self._kept[job].logs.values()))

    def let_go(self) -> None:
        """Closes all connections and descriptors; keepers and processes live on."""
        for kept in self._kept.values():
            kept.let_go()

    def forget_all(self) -> None:
        """All of them have ended for good."""
        for name in list(self._kept):
            self._memory.forget(name)


def other_logs(spec: JobSpec) -> tuple[Path, Path]:
    """Of a job's keeper and of its TCPStore service."""
    return Path(spec.log_dir) / "keeper.log", Path(spec.log_dir) / "store.log"
