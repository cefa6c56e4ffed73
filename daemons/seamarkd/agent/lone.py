"""The agent of one process that a monitor started, where no coordinator is (``seamark.autorestart``, D1, D13).

Everything that an agent does about a worker it does for this one. What a coordinator would tell, the launcher's
environment says: the roster is as many slots as the world has ranks, the same from every rank's agent. Whether and when
the process is started again is its monitor's to decide. Pure, as ``core`` is.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from seamark.protocol.messages import (
    AbortJob,
    JobAborted,
    JobSpec,
    Join,
    Message,
    Refused,
    Roster,
    Slot,
    StopWorkers,
    StoreAddress,
)
from seamarkd.agent.core import Agent
from seamarkd.agent.effects import Effect, StartWorker, TellWorkers, ToLighthouse
from seamarkd.agent.job import Job, Worker

START_TIMEOUT = 300.0
"""Seconds from the first rank that is heard of to the last; launchers of many hosts take minutes."""
STOP_GRACE = 5.0
ENDLESS = 1_000_000
"""As many replacements as the monitor cares to start."""


class Launch(Struct, frozen=True):
    """What a launcher told a rank, and where its services are.

    Attributes:
        job: its name, the same on all ranks.
        rank, world_size: as torchrun sets them.
        generation: how often the launcher has started all ranks anew.
        master_addr, master_port: numeric address and port of rank 0's host.
        store_port: of the job's TCPStore there.
        join_timeout: seconds that the others wait for a process that is started again.
        incarnation: of the process that its monitor has started, or will.
    """

    job: str
    rank: int
    world_size: int
    generation: int
    master_addr: str
    master_port: int
    store_port: int
    join_timeout: float
    incarnation: str

    @property
    def member(self) -> str:
        """The rank's name in the roster, and its agent's as a node."""
        return f"{self.job}/{self.rank}"

    def roster(self) -> Roster:
        """The job's, as every rank's agent tells it."""
        slots = [
            # Which ranks share a host no launcher says to all: each knows its own local rank.
            Slot(f"{self.job}/{rank}", rank, 0, f"{self.job}/{rank}", rank)
            for rank in range(self.world_size)
        ]
        spec = JobSpec(
            name=self.job,
            argv=["-"],
            module=False,
            python="-",
            cwd="/",
            env={},
            min_nodes=1,
            max_nodes=self.world_size,
            nproc_per_node=1,
            policy="replace",
            max_restarts=ENDLESS,
            checkpoint_dir="",
            log_dir="-",
            join_timeout=self.join_timeout,
            start_timeout=START_TIMEOUT,
        )
        return Roster(
            request=0,
            job=self.job,
            generation=self.generation,
            policy="replace",
            min_members=1,
            slots=slots,
            store=StoreAddress(self.master_addr, self.store_port),
            master_addr=self.master_addr,
            master_port=self.master_port,
            base_iteration=-1,
            join_timeout=self.join_timeout,
            start_timeout=START_TIMEOUT,
            allowance=ENDLESS,
            spec=spec,
        )


class LoneAgent(Agent):
    """An agent of one worker, which is its own coordinator.

    Args:
        launch: what the launcher said.
        new_incarnation: gives a fresh random id.
        store_ready: whether the job's TCPStore serves already; until it does, this rank's joins are held back.
        again: an earlier agent of this process had told the lighthouse of it.
    """

    def __init__(self, launch: Launch, new_incarnation: Callable[[], str], *, store_ready: bool, again: bool) -> None:
        self._first = [launch.incarnation]
        super().__init__(
            launch.member, lambda: self._first.pop() if self._first else new_incarnation(), has_coordinator=False
        )
        self._launch = launch
        self._serves_store = store_ready
        self._held: Join | None = None
        self._told = again
        self.refused = ""
        """Why the lighthouse will not have this job."""

    @property
    def quiet(self) -> bool:
        """True if the lighthouse has acknowledged all that it was told."""
        return not self.reports

    @property
    def completed(self) -> bool:
        """True once the worker's wrapped call has completed on all ranks: however it ends, it is not started again."""
        job = self.node.jobs.get(self._launch.job)
        return job is not None and job.quorum is not None and job.quorum.completed

    def begin(self, now: float, remembered: Job | None = None) -> list[Effect]:
        """The process is there, or will be; ``remembered``: what an earlier agent of it has written down."""
        if remembered is not None:
            self.node.jobs[remembered.name] = remembered
            self._first.clear()
            self.started_anew(now, self._launch.incarnation)
            return []
        effects = self.places.roster(now, self._launch.roster())
        job = self.node.jobs[self._launch.job]
        # Its monitor starts it again in any case; what it does first is not this agent's to know.
        job.wrapped = True
        return [effect for effect in effects if not isinstance(effect, StartWorker | ToLighthouse)]

    def started_anew(self, now: float, incarnation: str) -> list[Effect]:
        """Its monitor has started it once more, under an incarnation that nobody has heard of."""
        job = self.node.jobs[self._launch.job]
        if incarnation in job.workers:
            return []
        worker = job.workers[incarnation] = Worker(self._launch.member, incarnation, self._launch.generation)
        return [self.places.announce(now, job, worker)]

    @property
    def stopping(self) -> bool:
        """The whole job is being ended."""
        job = self.node.jobs.get(self._launch.job)
        return job is None or job.stopping is not None

    def wraps(self, incarnation: str) -> list[Effect]:
        """The worker is in a wrapped call; an agent that came after its greeting knows it from its page."""
        return self.door.wraps(self._launch.job, incarnation)

    def last_life(self) -> None:
        """Its monitor will not start it again."""
        if self._launch.job in self.node.jobs:
            self.node.jobs[self._launch.job].allowance = 0

    def ended(self, now: float, incarnation: str, status: int, at: float, *, discarded: bool) -> list[Effect]:
        """The process has ended; ``status`` as in ``exited``."""
        effects = self.losses.exited(now, self._launch.job, incarnation, status, at, "", [], discarded=discarded)
        self.node.jobs[self._launch.job].exited.clear()
        return effects

    def left(self, now: float) -> list[Effect]:
        """The monitor is gone: whom the others expect will not come."""
        self.last_life()
        job = self.node.jobs.get(self._launch.job)
        if job is None:
            return []
        awaited = [worker.incarnation for worker in job.workers.values() if not worker.pid and worker.replaces]
        effects: list[Effect] = []
        for incarnation in awaited:
            effects += self.ended(now, incarnation, -signal.SIGKILL, now, discarded=False)
        return effects

    def store_serves(self) -> list[Effect]:
        """The job's TCPStore serves."""
        self._serves_store = True
        held, self._held = self._held, None
        return [ToLighthouse(held)] if held is not None else []

    def from_worker(self, now: float, incarnation: str, message: Message) -> list[Effect]:
        """As an agent's, but that the end of the job is asked of the lighthouse."""
        if isinstance(message, AbortJob):
            return [ToLighthouse(message)]
        if isinstance(message, Join) and not self._serves_store:
            self._held = message
            return self.door.wraps(message.job, incarnation)
        return super().from_worker(now, incarnation, message)

    def from_lighthouse(self, now: float, message: Message) -> list[Effect]:
        """As an agent's, and the word that somebody ended the job."""
        if isinstance(message, Refused) and message.code == "NAME_TAKEN":
            self.refused = message.reason
            return []
        if isinstance(message, JobAborted):
            job = self.node.jobs.get(message.job)
            if job is not None and job.stopping is not None:
                # To one that was started meanwhile, and asks.
                return [TellWorkers(message.job, message)]
            order = StopWorkers(0, message.job, self._launch.generation, STOP_GRACE, True, message.reason or "aborted")
            return self.ends.stop(order)
        return super().from_lighthouse(now, message)

    def registered(self, now: float) -> list[Effect]:
        """The roster first: whoever comes first makes the job known, to the others it is nothing new."""
        again, self._told = self._told, True
        known = super().registered(now)
        roster = replace(self._launch.roster(), request=self.reports.next_request(), running=again)
        return [self.reports.send(now, ToLighthouse(roster), first=True), *known]
