"""The agent's shell: sockets, keepers, death watches, progress pages; the thinking is in ``core.py``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import zmq
from msgspec import Struct, field

from seamark.environment import LIGHTHOUSE_ADDRESS, LIGHTHOUSE_EVENTS, STORE_OFFSET
from seamark.progress import ProgressPage
from seamark.protocol.messages import JobProgress, JobSpec, StoreAddress
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
)
from seamarkd.agent.hang import HangWatch, Reading
from seamarkd.agent.health import HealthChecks, probe, summary
from seamarkd.agent.keeper_client import Held, KeeperClient, KeeperError
from seamarkd.agent.keeper_client import Process as KeeperProcess
from seamarkd.agent.logfiles import LogLimits, LogWatch, log_path, log_tail, remove_outdated
from seamarkd.agent.memory import Memory, Remembered
from seamarkd.agent.oom import OomKills, own_counter
from seamarkd.agent.ports import PortsTaken, candidates
from seamarkd.agent.watch import DeathWatch, How, is_stopped
from seamarkd.agent.wires import Wires
from seamarkd.agent.workers import cpus, environment, runs_since, threads_per_worker
from seamarkd.exits import PREEMPTION_GRACE

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
    store: str = ""
    adopted: bool = False
    """An earlier agent started the keeper: it ends when it is told to, not when this agent gives up connecting."""
    ending: bool = False
    steps: tuple[dict[str, int], dict[str, int]] = field(default_factory=lambda: ({}, {}))
    emptied: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by each exit that leaves no process."""

    def let_go(self) -> None:
        """Closes the connection and all descriptors; the processes live on."""
        if self.keeper.done() and not self.keeper.cancelled() and self.keeper.exception() is None:
            self.keeper.result().close()
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
        kept = self._kept[job.name] = Kept(connecting, remembered.keeper, store=job.store_incarnation, adopted=True)
        work = self._take_up(job, kept)
        if any(worker.pid for worker in (*job.workers.values(), *job.exited.values())):
            await work
        else:
            # Its keeper may still import torch, for seconds in which the other jobs' workers want their agent.
            self._spawn(work)

    async def _take_up(self, job: Job, kept: Kept) -> None:
        try:
            keeper = await kept.keeper
            processes = await keeper.list_processes()
        except KeeperError as error:
            log.error("job %s: its keeper is gone (%s), and with it the exit statuses of its workers", job.name, error)
            del self._kept[job.name]
            self._without_keeper(job)
            return
        ended: list[Held] = []
        for held in processes:
            process = held.process
            if process.slot == STORE_SLOT or process.status is not None:
                ended.append(held)
                if process.incarnation == job.store_incarnation and process.status is None and not job.store.port:
                    self._store_listens(job.name, process)
                continue
            page = ProgressPage(held.page)
            watch = self._watch(job.name, held, page)
            watch.arm()
            kept.processes[process.incarnation] = Process(held, page, watch)
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
        self._perform(self.core.adopt(time.monotonic(), job, known))
        for held in ended:
            if held.process.status is not None:
                self._exited(job.name, held.process)
            held.close()
        log.info("job %s: took up %d workers", job.name, len(kept.processes))

    def _without_keeper(self, job: Job) -> None:
        """Nobody can tell how these workers end: they are ended, and their job goes on with others."""
        for worker in job.workers.values():
            if worker.pid and runs_since(worker.pid, worker.forked_at):
                os.kill(worker.pid, signal.SIGKILL)
        job.store = StoreAddress()
        if job.roster is not None:
            job.store_incarnation = ""
        known = {one.incarnation: (one.pid, one.forked_at) for one in (*job.workers.values(), *job.exited.values())}
        now = time.monotonic()
        self._perform(self.core.adopt(now, job, known))
        for incarnation in known:
            self._perform(self.core.exited(now, job.name, incarnation, -signal.SIGKILL, now, "", []))

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
            self._memory.write(Remembered(job, self._kept[name].socket if name in self._kept else ""))
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
        keeper = await KeeperClient.spawn(
            spec.python,
            socket,
            job=job,
            env=spec.env,
            cwd=spec.cwd,
            log=str(keeper_log),
            epoch=self._epoch,
            on_exited=lambda process: self._exited(job, process),
            on_closed=lambda why: self._lost_keeper(job, why),
            linger=self._linger,
            preload=spec.preload,
        )
        if not keeper.ready.forks:
            log.warning("job %s: workers are started by exec, not forked: %s", job, keeper.ready.reason)
        return keeper

    def _lost_keeper(self, job: str, why: str) -> None:
        kept = self._kept.get(job)
        if kept is None or not kept.ending:
            log.error("job %s: lost the keeper: %s", job, why)

    async def _start_worker(self, order: StartWorker) -> None:
        kept = self._keeper(order.job)
        keeper = await kept.keeper
        roster = self.core.jobs[order.job].roster
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
            | environment(roster, slot, order.incarnation, self._wires.address, digests),
            cwd=roster.spec.cwd,
            log=str(path),
            num_threads=threads_per_worker(roster.spec),
            module=roster.spec.module,
            cpus=cpus(roster, slot),
        )
        if held.process.status is not None or order.incarnation in kept.ended or order.incarnation in kept.processes:
            kept.ended.discard(order.incarnation)
            held.close()
            return
        page = ProgressPage(held.page)
        watch = self._watch(order.job, held, page)
        kept.processes[order.incarnation] = Process(held, page, watch)
        pid, forked_at = held.process.pid, held.process.forked_at
        self._perform(self.core.worker_started(time.monotonic(), order.job, order.incarnation, pid, forked_at))

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
        await keeper.acknowledge(slot, incarnation)

    async def _signal(self, job: str, incarnation: str, signum: int, *, group: bool = True) -> None:
        kept = self._kept.get(job)
        process = kept.processes.get(incarnation) if kept else None
        if kept is None or process is None:
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
        try:
            kept = self._keeper(order.job)
            keeper = await kept.keeper
            process = await self._listen(keeper, order)
        except (KeeperError, PortsTaken, OSError) as error:
            self._perform(self.core.prepare_failed(order.job, str(error)))
            return
        kept.store = order.incarnation
        if again:
            self._perform(self.core.store_restarted(time.monotonic(), order.job, detected_at))
        else:
            self._store_listens(order.job, process)

    def _store_listens(self, job: str, process: KeeperProcess) -> None:
        assert process.port is not None
        address = StoreAddress(self._host, process.port, process.incarnation)
        self._perform(self.core.store_started(job, address, process.port - STORE_OFFSET))

    async def _listen(self, keeper: KeeperClient, order: StartStore) -> KeeperProcess:
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
            held.close()
            return held.process
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
        if final and not kept.keeper.done() and not kept.adopted:
            # It imports torch, for seconds; it has no process yet.
            kept.ending = True
            kept.keeper.cancel()
            await asyncio.wait([kept.keeper])
            return
        try:
            keeper = await kept.keeper
            kept.ending = final
            left = await keeper.stop(grace, final=final)
        except KeeperError as error:
            log.error("job %s: can't stop the workers: %s", job, error)
            return
        if left:
            log.error("job %s: processes that not even SIGKILL ended: %s", job, left)
        for process in kept.processes.values():
            process.close()
        kept.processes.clear()

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
                reading = Reading.of(process.page, stopped=is_stopped(process.held.process.pid))
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
