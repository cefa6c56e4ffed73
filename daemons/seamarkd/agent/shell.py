"""The agent's shell: its parts, put together, and to whom of them an effect goes; the thinking is in ``core.py``."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from seamark.environment import LIGHTHOUSE_ADDRESS, LIGHTHOUSE_EVENTS, SECURITY_KEYS
from seamark.protocol.keys import Key
from seamarkd.agent.core import Agent
from seamarkd.agent.effects import (
    Effect,
    EndWorker,
    ForgetExit,
    Introduce,
    Remember,
    SignalWorker,
    StartKeeper,
    StartStore,
    StartWorker,
    StopJobHere,
    WatchWorker,
)
from seamarkd.agent.endings import Endings
from seamarkd.agent.fitness import Fitness
from seamarkd.agent.ground import Ground
from seamarkd.agent.health import HealthChecks
from seamarkd.agent.keepers import Keepers
from seamarkd.agent.kept import KeptJobs
from seamarkd.agent.logfiles import LogLimits, LogWatch
from seamarkd.agent.lookout import Lookout
from seamarkd.agent.memory import Memory
from seamarkd.agent.oom import OomKills, own_counter
from seamarkd.agent.starts import Starts
from seamarkd.agent.stops import Stops
from seamarkd.agent.store_starts import StoreStarts
from seamarkd.agent.takeup import TakeUp
from seamarkd.agent.tasks import Tasks
from seamarkd.agent.wires import Wires
from seamarkd.exits import PREEMPTION_GRACE

ENDING_INTERVAL = 0.01
LAST_WORDS = 2.0
"""Seconds an agent that ends waits for the others to have heard that its workers have ended, as they were told."""


class AgentShell:
    """An agent that serves one node.

    Args:
        context: the process's ZeroMQ context.
        node: the node's name.
        slots: worker places of the node.
        run_directory: private directory of its sockets.
        lighthouse, events, coordinator: where the other daemons listen.
        host: the address under which other nodes reach this one.
        epoch: rises with every start of this node's agent; its keepers obey the highest.
        linger: seconds its keepers wait for another agent when this one is gone; None for ever.
        key: what it speaks with over TCP; None to speak in the clear.
        keys: the directory in which its workers find theirs, for a Manager or a listener; None where no keys are used.
        logs: how much of the workers' output is kept.
        health: what is checked before this node takes workers.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        *,
        node: str,
        slots: int,
        run_directory: Path,
        lighthouse: str,
        events: str,
        coordinator: str,
        host: str,
        epoch: int,
        linger: float | None,
        key: Key | None = None,
        keys: Path | None = None,
        logs: LogLimits = LogLimits(),  # noqa: B008 - frozen
        health: HealthChecks = HealthChecks(),  # noqa: B008 - frozen
    ) -> None:
        self.core = core = Agent(node, lambda: secrets.token_hex(8))
        self._host = host
        self._slots = slots
        self._memory = Memory(run_directory / "jobs")
        self._log_watch = LogWatch(logs.max_bytes)
        self._tasks = Tasks()
        self._jobs = KeptJobs(core.node, self._memory, self._log_watch)
        self._fitness = Fitness(core.node, self._perform, health, run_directory / "draining")
        self._wires = Wires(
            context,
            core,
            self._perform,
            address=f"ipc://{run_directory}/agent",
            lighthouse=lighthouse,
            events=events,
            coordinator=coordinator,
            key=key,
        )
        ground = Ground(core, self._jobs, self._tasks, self._perform)
        oom_kills = OomKills(own_counter(Path("/proc/self/cgroup").read_text()))
        self._endings = endings = Endings(ground, oom_kills)
        self._keepers = keepers = Keepers(ground, endings, directory=run_directory, epoch=epoch, linger=linger)
        self._starts = starts = Starts(
            ground,
            keepers,
            endings,
            limits=logs,
            door=self._wires.address,
            digests=self._memory.digests,
            # For a Manager or a listener in a worker; what the job's own environment says goes before it.
            before={LIGHTHOUSE_ADDRESS: lighthouse, LIGHTHOUSE_EVENTS: events},
            # This one goes before: the job's was written on the host of the person who submitted it.
            after={SECURITY_KEYS: str(keys)} if keys is not None else {},
        )
        self._store_starts = StoreStarts(ground, keepers, endings, host)
        self._stops = Stops(ground, endings)
        self._take_up = TakeUp(ground, keepers, endings, starts, self._store_starts)
        self._lookout = Lookout(ground, self._wires.tell_coordinator)

    async def start(self) -> None:
        """Takes up what an earlier start of this agent left, and introduces itself to the other daemons.

        Raises:
            NotThisHostError: nothing can listen on the host that it was given.
        """
        await asyncio.gather(*(self._take_up.adopt(remembered) for remembered in self._memory.read()))
        # Not before: a worker that nobody has read of yet would be refused, and end.
        await self._wires.start(self._host, self._slots)
        self._wires.repeat(self._lookout.report_progress)
        self._wires.repeat(self._lookout.look_for_hangs)
        if self._fitness.has_checks:
            self._tasks.spawn(self._fitness.check())

    async def leave(self, why: str) -> None:
        """This host goes away: its workers are asked to end, and as soon as they have, it serves no longer."""
        had_jobs = bool(self.core.node.jobs)
        self._perform(self.core.node.drain(why))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_until(lambda: not self.core.node.busy), PREEMPTION_GRACE)
        if had_jobs:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._say_last_words(), LAST_WORDS)
        self._fitness.forget()
        await self.shut_down(0.0)

    async def shut_down(self, grace: float) -> None:
        """Stops every job of this node, workers by SIGTERM and SIGKILL ``grace`` seconds later, and then serving."""
        stopping = [self._stops.end(name, kept, grace) for name, kept in list(self._jobs.items())]
        await asyncio.gather(*stopping)
        self._jobs.forget_all()
        self.close()

    def close(self) -> None:
        """Stops serving; workers and keepers live on, for the next start of this agent."""
        self._wires.close()
        self._log_watch.close()
        self._tasks.cancel()
        self._jobs.let_go()

    async def _say_last_words(self) -> None:
        """A coordinator that restarts a job waits for this node, too: it is to know that all has ended here."""
        await _until(lambda: not self.core.reports and not self.core.node.stopping)
        await _until(self._wires.ask_coordinator())

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            if self._wires.perform(effect):
                continue
            match effect:
                case WatchWorker(job, incarnation):
                    self._starts.watch_canaries(job, incarnation)
                case StartWorker():
                    self._tasks.spawn(self._starts.start(effect))
                case SignalWorker(job, _, incarnation, signum):
                    self._tasks.spawn(self._stops.signal(job, incarnation, signum))
                case EndWorker(job, incarnation, grace):
                    self._tasks.spawn(self._stops.end_worker(job, incarnation, grace))
                case Introduce():
                    self._fitness.changed()
                case StartKeeper():
                    self._tasks.spawn(self._keepers.start(effect))
                case StartStore():
                    self._tasks.spawn(self._store_starts.start(effect))
                case Remember(job):
                    self._jobs.remember(job)
                case ForgetExit(job, member, incarnation):
                    self._tasks.spawn(self._endings.forget(job, member, incarnation))
                case StopJobHere():
                    self._tasks.spawn(self._stops.stop(effect))


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(ENDING_INTERVAL)
