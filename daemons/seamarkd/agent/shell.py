"""The agent's shell: sockets, keepers, death watches, progress pages; the thinking is in ``core.py``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import zmq
from msgspec import Struct, field
from msgspec.structs import replace

from seamark.environment import LIGHTHOUSE_ADDRESS, LIGHTHOUSE_EVENTS, SECURITY_KEYS, STORE_OFFSET
from seamark.progress import ProgressPage
from seamark.protocol.keys import Key
from seamark.protocol.messages import JobProgress, JobSpec, StoreAddress
from seamarkd.agent import orphans
from seamarkd.agent.core import (
    UNCHECKED,
    Agent,
    Effect,
    EndWorker,
    ForgetExit,
    Introduce,
    Job,
    Remember,
    SignalWorker,
    StartKeeper,
    StartStore,
    StartWorker,
    StopJobHere,
    WatchWorker,
    Worker,
)
from seamarkd.agent.hang import HangWatch, Reading
from seamarkd.agent.health import HealthChecks, probe, summary
from seamarkd.agent.keeper_client import Held, KeeperClient, KeeperError
from seamarkd.agent.keeper_client import Process as KeeperProcess
from seamarkd.agent.logfiles import LogLimits, LogWatch, log_path, log_tail, remove_outdated
from seamarkd.agent.memory import Memory, Remembered
from seamarkd.agent.oom import OomKills, own_counter
from seamarkd.agent.orphans import Orphan
from seamarkd.agent.ports import PortsTaken, candidates
from seamarkd.agent.watch import DeathWatch, How
from seamarkd.agent.wires import Wires
from seamarkd.agent.workers import cpus, environment, threads_per_worker
from seamarkd.exits import NOT_STARTED, PREEMPTION_GRACE, UNKNOWN_STATUS

log = logging.getLogger(__name__)

ENDING_INTERVAL = 0.01
LAST_WORDS = 2.0
"""Seconds an agent that ends waits for the others to have heard that its workers have ended, as they were told."""
PROGRESS_INTERVAL = 0.5
HANG_INTERVAL = 0.25
STORE_SLOT = "store"


class Process(Struct):
    """A living worker process as the shell holds it."""

    held: Held
    page: ProgressPage
    watch: DeathWatch
    hang: HangWatch = field(default_factory=HangWatch)

    def close(self) -> None:
        """Lets go of its descriptors."""
        self.watch.close()
        self.page.close()
        self.held.close()


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
        self.core = Agent(node, lambda: secrets.token_hex(8))
        self._run_directory = run_directory
        self._host = host
        self._epoch = epoch
        self._linger = linger
        self._memory = Memory(run_directory / "jobs")
        self._log_limits = logs
        self._log_watch = LogWatch(logs.max_bytes)
        self._draining = run_directory / "draining"
        self._health = health
        self._check_now = asyncio.Event()
        if health.checks:
            self.core.begin_checks()
        if self._draining.exists():
            self.core.drain(self._draining.read_text())
        self._loop = asyncio.get_running_loop()
        # For a Manager or a listener in a worker; what the job's own environment says goes before it.
        self._lighthouse_environment = {LIGHTHOUSE_ADDRESS: lighthouse, LIGHTHOUSE_EVENTS: events}
        # This one goes before: the job's was written on the host of the person who submitted it.
        self._keys_environment = {SECURITY_KEYS: str(keys)} if keys is not None else {}
        self._kept: dict[str, Kept] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = slots
        self._oom_kills = OomKills(own_counter(Path("/proc/self/cgroup").read_text()))
        self._wires = Wires(
            context,
            self.core,
            self._perform,
            address=f"ipc://{run_directory}/agent",
            lighthouse=lighthouse,
            events=events,
            coordinator=coordinator,
            key=key,
        )

    async def start(self) -> None:
        """Takes up what an earlier start of this agent left, and introduces itself to the other daemons.

        Raises:
            NotThisHostError: nothing can listen on the host that it was given.
        """
        await asyncio.gather(*(self._adopt(remembered) for remembered in self._memory.read()))
        # Not before: a worker that is not known yet would be refused, and end.
        await self._wires.start(self._host, self._slots)
        self._wires.repeat(self._report_progress)
        self._wires.repeat(self._look_for_hangs)
        if self._health.checks:
            self._spawn(self._check_health())

    async def leave(self, why: str) -> None:
        """This host goes away: its workers are asked to end, and as soon as they have, it serves no longer."""
        had_jobs = bool(self.core.jobs)
        self._perform(self.core.drain(why))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_until(lambda: not self.core.busy), PREEMPTION_GRACE)
        if had_jobs:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._say_last_words(), LAST_WORDS)
        self._draining.unlink(missing_ok=True)
        await self.shut_down(0.0)

    async def _say_last_words(self) -> None:
        """A coordinator that restarts a job waits for this node, too: it is to know that all has ended here."""
        await _until(lambda: not self.core.unheard and not self.core.stopping)
        await _until(self._wires.ask_coordinator())

    async def shut_down(self, grace: float) -> None:
        """Stops every job of this node, workers by SIGTERM and SIGKILL ``grace`` seconds later, and then serving."""
        stopping = [self._end_job(name, kept, grace) for name, kept in list(self._kept.items())]
        await asyncio.gather(*stopping)
        for name in list(self._kept):
            self._memory.forget(name)
        self.close()

    def close(self) -> None:
        """Stops serving; workers and keepers live on, for the next start of this agent."""
        self._wires.close()
        self._log_watch.close()
        for task in self._tasks:
            task.cancel()
        for kept in self._kept.values():
            kept.let_go()

    async def _adopt(self, remembered: Remembered) -> None:
        job = self.core.jobs[remembered.job.name] = remembered.job
        connecting = self._loop.create_task(
            KeeperClient.connect(
                remembered.keeper,
                epoch=self._epoch,
                on_exited=lambda process: self._exited(job.name, process),
                on_closed=lambda why: self._lost_keeper(job.name, why),
            )
        )
        kept = self._kept[job.name] = Kept(
            connecting, remembered.keeper, store=job.store_incarnation, store_born=remembered.store, adopted=True
        )
        for worker in [one for one in job.workers.values() if one.orphan]:
            self._take_up_orphan(job, kept, worker)
        work = self._take_up(job, kept)
        if any(worker.pid and not worker.orphan for worker in (*job.workers.values(), *job.exited.values())):
            await work
        else:
            # Its keeper may still import torch, for seconds in which the other jobs' workers want their agent.
            self._spawn(work)

    async def _take_up(self, job: Job, kept: Kept) -> None:
        connecting = kept.keeper
        processes: list[Held] = []
        try:
            keeper = await connecting
            processes = await keeper.list_processes()
        except KeeperError as error:
            log.error("job %s: its keeper is gone (%s): its workers live on without one", job.name, error)
            self._perform(self.core.keeper_lost(job.name))
            self._replace_keeper(job.name, kept, connecting)
        if self._kept.get(job.name) is not kept or kept.ending:
            # It was told meanwhile to end all of it.
            for held in processes:
                held.close()
            return
        ended: list[Held] = []
        for held in processes:
            if held.process.slot == STORE_SLOT and held.process.status is None:
                kept.keep_store(held)
                if held.process.incarnation == job.store_incarnation and not job.store.port:
                    self._store_listens(job.name, held.process)
            elif held.process.status is not None:
                ended.append(held)
            else:
                self._take_in(job, kept, held)
        roster = job.roster
        if roster is not None:
            kept.logs = {
                worker.incarnation: log_path(roster.spec, slot, worker.generation)
                for worker in (*job.workers.values(), *job.exited.values())
                for slot in roster.slots
                if slot.member == worker.member
            }
            self._watch_logs(job.name)
        known = {held.process.incarnation: (held.process.pid, held.process.forked_at) for held in processes}
        others = [one for one in (*job.workers.values(), *job.exited.values()) if one.incarnation not in known]
        # Of these no keeper knows: they live without one, or have ended.
        unknown = [one for one in others if one.pid or one.incarnation in job.exited]
        for worker in unknown:
            if worker.incarnation in job.workers and worker.incarnation not in kept.processes:
                self._take_up_orphan(job, kept, worker)
            known[worker.incarnation] = (worker.pid, worker.forked_at)
        store_lost = kept.store_process is None and job.has_store and not self._take_up_store(job, kept)
        if store_lost and roster is None:
            job.store = StoreAddress()
        self._perform(self.core.adopt(time.monotonic(), job, known))
        for held in ended:
            self._exited(job.name, held.process)
            held.close()
        for worker in unknown:
            if worker.incarnation in job.workers and worker.incarnation not in kept.processes:
                self._ended_unseen(job.name, worker)
        if store_lost and roster is not None:
            self._perform(self.core.store_exited(job.name))
        self._remember(job.name)
        for held in processes:
            if held.process.kind == "worker" and held.process.status is None:
                self._spawn(self._release(keeper, held.process))
        log.info("job %s: took up %d workers", job.name, len(kept.processes))

    def _take_in(self, job: Job, kept: Kept, held: Held) -> None:
        page = ProgressPage(held.page)
        watch = self._watch(job.name, held, page)
        watch.arm()
        kept.processes[held.process.incarnation] = Process(held, page, watch)

    # --- without a keeper ----------------------------------------------------------------------------------

    def _take_up_orphan(self, job: Job, kept: Kept, worker: Worker) -> None:
        """Nothing happens if it has ended."""
        held = orphans.take_up(worker.member, worker.incarnation, worker.pid, worker.forked_at)
        if held is not None:
            self._take_in(job, kept, held)
            self._keep_orphan(job.name, kept, held)

    def _take_up_store(self, job: Job, kept: Kept) -> bool:
        """Whether it lives."""
        pid, forked_at = kept.store_born
        held = orphans.take_up(STORE_SLOT, job.store_incarnation, pid, forked_at) if pid else None
        kept.keep_store(held)
        if held is not None:
            self._keep_orphan(job.name, kept, held)
        return held is not None

    def _ended_unseen(self, job: str, worker: Worker) -> None:
        status = UNKNOWN_STATUS if worker.status is None else worker.status
        path = self._kept[job].logs.pop(worker.incarnation, None)
        tail = log_tail(path) if path is not None and status != 0 else []
        now = time.monotonic()
        self._perform(self.core.exited(now, job, worker.incarnation, status, now, str(path or ""), tail))

    def _keep_orphan(self, job: str, kept: Kept, held: Held) -> None:
        incarnation = held.process.incarnation

        def exited(status: int) -> None:
            del kept.orphans[incarnation]
            process = kept.processes.get(incarnation)
            discarded = process is not None and process.page.discarded
            self._exited(job, replace(held.process, status=status, at=time.monotonic(), discarded=discarded))

        kept.orphans[incarnation] = Orphan(held, exited)

    def _orphan_all(self, job: str, kept: Kept) -> None:
        living = [process.held for process in kept.processes.values()]
        living += [kept.store_process] if kept.store_process is not None else []
        for held in living:
            if held.process.incarnation not in kept.orphans:
                self._keep_orphan(job, kept, held)

    def _replace_keeper(self, job: str, kept: Kept, lost: asyncio.Future[KeeperClient]) -> None:
        """Another one imports torch from now on, for those that may have to be replaced."""
        if kept.keeper is lost and not kept.ending:
            kept.adopted = False
            kept.keeper = self._loop.create_task(self._spawn_keeper(job, kept.socket))

    # --- effects -------------------------------------------------------------------------------------------

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            if self._wires.perform(effect):
                continue
            match effect:
                case WatchWorker(job, incarnation):
                    self._watch_canaries(job, incarnation)
                case StartWorker():
                    self._spawn(self._start_worker(effect))
                case SignalWorker(job, _, incarnation, signum):
                    self._spawn(self._signal(job, incarnation, signum))
                case EndWorker(job, incarnation, grace):
                    self._spawn(self._end_worker(job, incarnation, grace))
                case Introduce():
                    self._keep_draining()
                    if self.core.unhealthy == UNCHECKED:
                        self._check_now.set()
                case StartKeeper():
                    self._spawn(self._start_keeper(effect))
                case StartStore():
                    self._spawn(self._start_store(effect))
                case Remember(job):
                    self._remember(job)
                case ForgetExit(job, member, incarnation):
                    self._spawn(self._forget_exit(job, member, incarnation))
                case StopJobHere():
                    self._spawn(self._stop_job(effect))

    def _keep_draining(self) -> None:
        """An agent that is started anew on this node drains it on."""
        try:
            if self.core.draining:
                self._draining.write_text(self.core.draining)
            else:
                self._draining.unlink(missing_ok=True)
        except OSError as error:
            log.error("can't write down that this node drains: %s", error)

    async def _check_health(self) -> None:
        """At the start, after each ``undrain``, and from time to time."""
        while True:
            self._check_now.clear()
            try:
                problem = summary(await probe(self._health.checks, self._health.directories, self._health.timeout))
            except OSError as error:
                problem = f"its health checks can't be run: {error}"
            if not self._check_now.is_set():
                before = self.core.unhealthy
                self._perform(self.core.checked(problem))
                if problem and problem != before:
                    log.error("this node takes no more jobs: %s", problem)
                elif before and not problem:
                    log.info("this node's health checks pass")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._check_now.wait(), self._health.interval)

    def _remember(self, name: str) -> None:
        job = self.core.jobs.get(name)
        if job is None:
            self._memory.forget(name)
            return
        try:
            kept = self._kept.get(name)
            self._memory.write(Remembered(job, kept.socket, kept.store_born) if kept else Remembered(job, ""))
        except OSError as error:
            log.error("job %s: can't write down what this node has to do for it: %s", name, error)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = self._loop.create_task(_logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- keepers and processes -----------------------------------------------------------------------------

    def _keeper(self, job: str) -> Kept:
        kept = self._kept.get(job)
        if kept is None:
            Path(self.core.spec(job).log_dir).mkdir(parents=True, exist_ok=True)
            socket = str(self._run_directory / f"keeper-{secrets.token_hex(3)}")
            kept = self._kept[job] = Kept(self._loop.create_task(self._spawn_keeper(job, socket)), socket)
            self._remember(job)
        elif kept.keeper.done() and (kept.keeper.cancelled() or kept.keeper.exception() is not None):
            self._replace_keeper(job, kept, kept.keeper)
        return kept

    async def _start_keeper(self, order: StartKeeper) -> None:
        try:
            await self._keeper(order.job).keeper
        except (KeeperError, OSError) as error:
            self._perform(self.core.prepare_failed(order.job, str(error)))

    async def _spawn_keeper(self, job: str, socket: str) -> KeeperClient:
        spec = self.core.spec(job)
        keeper_log, _ = _other_logs(spec)
        self._watch_logs(job)
        hears: dict[str, Any] = {
            "epoch": self._epoch,
            "on_exited": lambda process: self._exited(job, process),
            "on_closed": lambda why: self._lost_keeper(job, why),
        }
        try:
            keeper = await KeeperClient.spawn(
                spec.python,
                socket,
                job=job,
                env=spec.env,
                cwd=spec.cwd,
                log=str(keeper_log),
                linger=self._linger,
                preload=spec.preload,
                **hears,
            )
        except KeeperError as error:
            try:
                # One that an earlier start of this agent has started may have come first.
                keeper = await KeeperClient.connect(socket, **hears)
            except KeeperError:
                raise error from None
        if not keeper.ready.forks:
            log.warning("job %s: workers are started by exec, not forked: %s", job, keeper.ready.reason)
        return keeper

    def _lost_keeper(self, job: str, why: str) -> None:
        kept = self._kept.get(job)
        if kept is None or kept.ending:
            return
        log.error("job %s: lost the keeper: %s", job, why)
        lost = kept.keeper
        # One that was never ready has no process, and is awaited by whoever wanted it.
        if lost.done() and not lost.cancelled() and lost.exception() is None and not lost.result().superseded:
            self._orphan_all(job, kept)
            self._perform(self.core.keeper_lost(job))
            self._replace_keeper(job, kept, lost)

    async def _start_worker(self, order: StartWorker) -> None:
        kept = connecting = None
        try:
            kept = self._keeper(order.job)
            connecting = kept.keeper
            held = await self._fork(await connecting, kept, order)
        except (KeeperError, OSError) as error:
            if kept is None or kept.keeper is connecting:
                self._not_started(order, str(error))
            elif not kept.ending:
                # Its keeper was killed, and what that may have forked meanwhile has ended unreleased.
                self._spawn(self._start_worker(order))
            return
        if held is not None and kept.keeper is not connecting:
            self._keep_orphan(order.job, kept, held)
            self._perform(self.core.keeper_lost(order.job))

    def _not_started(self, order: StartWorker, why: str) -> None:
        """For policy and budget it has a place and has ended."""
        kept = self._kept.get(order.job)
        if kept is None or kept.ending:
            return
        log.error("job %s: can't start %s: %s", order.job, order.member, why)
        path, now = kept.logs.pop(order.incarnation, None), time.monotonic()
        tail = [f"node {self.core.node}: {why}"]
        self._perform(self.core.exited(now, order.job, order.incarnation, NOT_STARTED, now, str(path or ""), tail))

    async def _fork(self, keeper: KeeperClient, kept: Kept, order: StartWorker) -> Held | None:
        """The new process; None if it has ended already, or is wanted no more."""
        job = self.core.jobs.get(order.job)
        worker = job.workers.get(order.incarnation) if job is not None else None
        if job is None or worker is None:
            return None
        if worker.ordered:
            raise KeeperError("stopping", "it was to end before it had begun")
        roster = job.roster
        assert roster is not None
        slot = next(slot for slot in roster.slots if slot.member == order.member)
        path = kept.logs[order.incarnation] = log_path(roster.spec, slot, roster.generation)
        if roster.generation >= self._log_limits.generations:
            remove_outdated(path, self._log_limits.generations)
        self._watch_logs(order.job)
        digests = self._memory.digests(order.job)
        held = await keeper.start_worker(
            order.member,
            order.incarnation,
            roster.spec.argv,
            env=self._lighthouse_environment
            | environment(roster, slot, order.incarnation, self._wires.address, digests)
            | self._keys_environment,
            cwd=roster.spec.cwd,
            log=str(path),
            num_threads=threads_per_worker(roster.spec),
            module=roster.spec.module,
            cpus=cpus(roster, slot),
            held=True,
        )
        if held.process.status is not None or order.incarnation in kept.ended or order.incarnation in kept.processes:
            kept.ended.discard(order.incarnation)
            held.close()
            return None
        page = ProgressPage(held.page)
        watch = self._watch(order.job, held, page)
        kept.processes[order.incarnation] = Process(held, page, watch)
        pid, forked_at = held.process.pid, held.process.forked_at
        self._perform(self.core.worker_started(time.monotonic(), order.job, order.incarnation, pid, forked_at))
        await self._release(keeper, held.process)
        return held

    async def _release(self, keeper: KeeperClient, process: KeeperProcess) -> None:
        """It is written down, with its process id: from now on it may do something."""
        # It ends unreleased where its keeper was killed, or was told to end it.
        with contextlib.suppress(KeeperError):
            await keeper.release(process.slot, process.incarnation)

    def _watch_logs(self, job: str) -> None:
        self._log_watch.watch(job, (*_other_logs(self.core.spec(job)), *self._kept[job].logs.values()))

    def _watch(self, job: str, held: Held, page: ProgressPage) -> DeathWatch:
        incarnation = held.process.incarnation

        def dying(how: How, at: float) -> None:
            if not page.discarded:
                self._dying(job, incarnation, how, at)

        return DeathWatch(held.process.pid, held.pidfd, page, dying)

    def _watch_canaries(self, job: str, incarnation: str) -> None:
        kept = self._kept.get(job)
        process = kept.processes.get(incarnation) if kept else None
        if process is not None:
            process.watch.arm()

    def _dying(self, job: str, incarnation: str, how: How, at: float) -> None:
        # The end of the process itself tells nothing that its exit status, on its way, doesn't tell better.
        if how != "pidfd":
            self._perform(self.core.dying(time.monotonic(), job, incarnation, how, at))

    def _exited(self, job: str, ended: KeeperProcess) -> None:
        kept = self._kept.get(job)
        if kept is None or ended.status is None:
            return
        reported = self.core.runs(job, ended.incarnation)
        if ended.slot == STORE_SLOT:
            if kept.store_process is not None and kept.store_process.process.incarnation == ended.incarnation:
                kept.store_process.close()
                kept.keep_store(None)
            if ended.incarnation == kept.store and not kept.ending:
                log.warning("job %s: the TCPStore service ended with status %d, starting another", job, ended.status)
                self._perform(self.core.store_exited(job))
        else:
            process = kept.processes.pop(ended.incarnation, None)
            if process is None:
                kept.ended.add(ended.incarnation)
            else:
                process.close()
            if not kept.processes:
                kept.emptied.set()
            path = kept.logs.pop(ended.incarnation, None)
            tail = log_tail(path) if path is not None and ended.status != 0 else []
            now = time.monotonic()
            at = ended.at if ended.at is not None else now
            effects = self.core.exited(
                now,
                job,
                ended.incarnation,
                ended.status,
                at,
                str(path or ""),
                tail,
                discarded=ended.discarded,
                oom_kill=ended.status == -signal.SIGKILL and self._oom_kills.rose(),
            )
            self._perform(effects)
        if (ended.slot == STORE_SLOT or not reported) and not kept.ending:
            self._spawn(self._forget_exit(job, ended.slot, ended.incarnation))

    async def _forget_exit(self, job: str, slot: str, incarnation: str) -> None:
        kept = self._kept.get(job)
        if kept is None or kept.ending:
            return
        keeper = await kept.keeper
        try:
            await keeper.acknowledge(slot, incarnation)
        except KeeperError as error:
            if error.code != "unknown_process":
                raise
            # It was another keeper's, which was killed.

    async def _signal(self, job: str, incarnation: str, signum: int, *, group: bool = True) -> None:
        kept = self._kept.get(job)
        process = kept.processes.get(incarnation) if kept else None
        if kept is None or process is None:
            return
        if incarnation in kept.orphans:
            kept.orphans[incarnation].signal(signum, group=group)
            return
        keeper = await kept.keeper
        await keeper.signal(process.held.process.slot, incarnation, signum, group=group)

    async def _end_worker(self, job: str, incarnation: str, grace: float) -> None:
        if grace:
            # Not to its children: a DataLoader's workers that die of it would fail the training before it has saved.
            await self._signal(job, incarnation, signal.SIGTERM, group=False)
            await asyncio.sleep(grace)
            if not self.core.is_to_end(job, incarnation):
                return
        # It has no effect on who has ended meanwhile: the keeper goes by the incarnation.
        await self._signal(job, incarnation, signal.SIGKILL)

    # --- the store -----------------------------------------------------------------------------------------

    async def _start_store(self, order: StartStore) -> None:
        again = self.core.jobs[order.job].master_port != 0
        detected_at = time.monotonic()
        kept = connecting = None
        try:
            kept = self._keeper(order.job)
            connecting = kept.keeper
            held = await self._listen(await connecting, order)
        except (KeeperError, PortsTaken, OSError) as error:
            if kept is not None and kept.keeper is not connecting and not kept.ending:
                # Its keeper was killed; the next one knows of no store.
                self._spawn(self._start_store(order))
                return
            self._perform(self.core.prepare_failed(order.job, str(error)))
            return
        kept.store = order.incarnation
        kept.keep_store(held)
        if kept.keeper is not connecting:
            self._keep_orphan(order.job, kept, held)
        if again:
            self._perform(self.core.store_restarted(time.monotonic(), order.job, detected_at))
        else:
            self._store_listens(order.job, held.process)

    def _store_listens(self, job: str, process: KeeperProcess) -> None:
        assert process.port is not None
        address = StoreAddress(self._host, process.port, process.incarnation)
        self._perform(self.core.store_started(job, address, process.port - STORE_OFFSET))

    async def _listen(self, keeper: KeeperClient, order: StartStore) -> Held:
        """Starts the store on the first free pair of ports."""
        spec = self.core.spec(order.job)
        _, store_log = _other_logs(spec)
        again = self.core.jobs[order.job].master_port
        for port in [again] if again else candidates(self._host, order.fixed):
            try:
                held = await keeper.start_store(
                    STORE_SLOT,
                    order.incarnation,
                    host=self._host,
                    port=port + STORE_OFFSET,
                    env=spec.env,
                    log=str(store_log),
                )
            except KeeperError as error:
                if error.code != "port_in_use":
                    raise
                continue
            return held
        raise PortsTaken(order.fixed, self._host)

    # --- the end -------------------------------------------------------------------------------------------

    async def _stop_job(self, order: StopJobHere) -> None:
        kept = self._kept.get(order.job)
        if kept is not None:
            if order.patience and kept.processes:
                kept.emptied.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(kept.emptied.wait(), order.patience)
            await self._end_job(order.job, kept, order.grace, final=order.final)
            if order.final:
                self._kept.pop(order.job, None)
                self._log_watch.watch(order.job, ())
        self._perform(self.core.stopped(time.monotonic(), order.job))

    async def _end_job(self, job: str, kept: Kept, grace: float, *, final: bool = True) -> None:
        await asyncio.gather(self._stop_keeper(job, kept, grace, final=final), self._stop_orphans(kept, grace))
        # Its keeper may have been killed while it stopped them; and the store goes last.
        await self._stop_orphans(kept, grace)
        # It heeds nothing less than SIGKILL, and has nothing to save.
        await self._stop_orphans(kept, 0.0, store=final)
        if final:
            kept.let_go()
        else:
            kept.close_processes()

    async def _stop_orphans(self, kept: Kept, grace: float, *, store: bool = False) -> None:
        left = [one for one in kept.orphans.values() if store or one.held is not kept.store_process]
        await asyncio.gather(*(one.stop(grace) for one in left))

    async def _stop_keeper(self, job: str, kept: Kept, grace: float, *, final: bool) -> None:
        connecting = kept.keeper
        if final and not connecting.done() and not kept.adopted:
            # It imports torch, for seconds; it has no process yet.
            kept.ending = True
            connecting.cancel()
            await asyncio.wait([connecting])
            return
        try:
            keeper = await connecting
            kept.ending = final
            left = await keeper.stop(grace, final=final)
        except KeeperError as error:
            if kept.over:
                # Its end was asked for twice (the job's, the agent's own), and the other was sooner.
                return
            log.error("job %s: can't stop the workers: %s", job, error)
            kept.ending = final
            self._orphan_all(job, kept)
            return
        kept.over = final
        if left:
            log.error("job %s: processes that not even SIGKILL ended: %s", job, left)

    # --- time ----------------------------------------------------------------------------------------------

    def _report_progress(self) -> float:
        for name, kept in self._kept.items():
            members = {process.held.process.slot: process.page for process in kept.processes.values()}
            steps = {member: page.pings for member, page in members.items()}
            checkpoints = {member: page.checkpoint for member, page in members.items()}
            if (steps, checkpoints) != kept.steps:
                kept.steps = (steps, checkpoints)
                self._wires.tell_coordinator(JobProgress(name, steps, checkpoints))
        return PROGRESS_INTERVAL

    def _look_for_hangs(self) -> float:
        now = time.monotonic()
        for name, kept in self._kept.items():
            for incarnation, process in list(kept.processes.items()):
                reading = Reading.of(process.page, stopped=process.watch.stopped)
                verdict = process.hang.look(now, reading)
                if verdict is not None:
                    log.warning("job %s: %s: %s", name, process.held.process.slot, verdict.text)
                    grace = reading.timeouts.grace
                    self._perform(self.core.hangs(now, name, incarnation, reading.iteration, verdict, grace))
        return HANG_INTERVAL


def _other_logs(spec: JobSpec) -> tuple[Path, Path]:
    """Of a job's keeper and of its TCPStore service."""
    return Path(spec.log_dir) / "keeper.log", Path(spec.log_dir) / "store.log"


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(ENDING_INTERVAL)


async def _logged(work: Awaitable[None]) -> None:
    """A task's error is nobody's to await: it belongs in the log."""
    try:
        await work
    except (KeeperError, OSError) as error:
        log.error("%s", error)
