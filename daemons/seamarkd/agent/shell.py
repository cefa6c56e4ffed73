"""The agent's shell: sockets, keepers, death watches, progress pages; the thinking is in ``core.py``."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from seamark.progress import ProgressPage
from seamark.protocol.messages import (
    Beat,
    BeatAnswer,
    CompletedEvent,
    EventBeat,
    FailureEvent,
    JobProgress,
    Message,
    NodeHello,
    QuorumEvent,
    Snapshot,
    SnapshotRequest,
    StoreAddress,
    Welcome,
    WorkerHello,
)
from seamark.protocol.sockets import check_address, make_socket
from seamarkd.agent.core import (
    Agent,
    Effect,
    SignalWorker,
    StartStore,
    StartWorker,
    StopJobHere,
    ToCoordinator,
    ToLighthouse,
    ToWorker,
)
from seamarkd.agent.keeper_client import Held, KeeperClient, KeeperError
from seamarkd.agent.keeper_client import Process as Exited
from seamarkd.agent.ports import STORE_OFFSET, PortsTaken, candidates
from seamarkd.agent.watch import DeathWatch, How
from seamarkd.agent.workers import environment, log_path, log_tail, threads_per_worker
from seamarkd.channel import Channel

log = logging.getLogger(__name__)

TICK = 0.1
PROGRESS_INTERVAL = 0.5
STORE_SLOT = "store"


@dataclass(slots=True)
class Process:
    """A living worker process as the shell holds it."""

    held: Held
    page: ProgressPage
    watch: DeathWatch

    def close(self) -> None:
        """Lets go of its descriptors."""
        self.watch.close()
        self.page.close()
        self.held.close()


@dataclass(slots=True)
class Kept:
    """A job's keeper and processes on this node."""

    keeper: asyncio.Task[KeeperClient]
    processes: dict[str, Process] = field(default_factory=dict)
    logs: dict[str, Path] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    """Exits that were reported before the answer to the start."""
    store: str = ""
    ending: bool = False
    steps: tuple[dict[str, int], dict[str, int]] = field(default_factory=lambda: ({}, {}))


class AgentShell:
    """An agent that serves one node.

    Args:
        context: the process's ZeroMQ context.
        node: the node's name.
        slots: worker places of the node.
        run_directory: private directory of its sockets.
        lighthouse, events, coordinator: where the other daemons listen.
        host: the address under which other nodes reach this one.
        linger: seconds its keepers wait for another agent when this one is gone; None for ever.
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
        linger: float | None,
    ) -> None:
        self.core = Agent(node, lambda: secrets.token_hex(8))
        self._run_directory = run_directory
        self._host = host
        self._linger = linger
        self._loop = asyncio.get_running_loop()
        self._incarnation = secrets.token_hex(8)
        self.address = check_address(f"ipc://{run_directory}/agent")
        self._kept: dict[str, Kept] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._beats = 0
        self._sequences: dict[str, int] = {}
        self._hello = NodeHello(node, self._incarnation, self.address, slots)
        router = make_socket(context, zmq.ROUTER)
        router.bind(self.address)
        self._workers = Channel(router, self._on_worker)
        self._lighthouse = Channel(self._connect(context, lighthouse), self._on_lighthouse)
        self._coordinator = Channel(self._connect(context, coordinator), self._on_coordinator)
        subscriber = make_socket(context, zmq.SUB)
        subscriber.subscribe(b"")
        subscriber.connect(check_address(events))
        self._events = Channel(subscriber, self._on_event)
        self._lighthouse.send(self._hello)
        self._coordinator.send(self._hello)
        self._timer = self._loop.call_later(TICK, self._tick)
        self._progress_timer = self._loop.call_later(PROGRESS_INTERVAL, self._report_progress)

    async def close(self) -> None:
        """Stops every job of this node and then serving."""
        self._timer.cancel()
        self._progress_timer.cancel()
        await asyncio.gather(*(self._end_job(kept, 0.0) for kept in list(self._kept.values())))
        for task in self._tasks:
            task.cancel()
        for channel in (self._workers, self._lighthouse, self._coordinator, self._events):
            channel.close()

    def _connect(self, context: zmq.Context[Any], address: str) -> zmq.Socket[Any]:
        socket = make_socket(context, zmq.DEALER, identity=self._incarnation.encode())
        socket.connect(check_address(address))
        return socket

    # --- messages ------------------------------------------------------------------------------------------

    def _on_worker(self, route: bytes, message: Message) -> None:
        incarnation = route.decode(errors="replace")
        self._perform(self.core.from_worker(time.monotonic(), incarnation, message))
        if isinstance(message, WorkerHello):
            kept = self._kept.get(message.job)
            process = kept.processes.get(message.incarnation) if kept else None
            if process is not None:
                process.watch.arm()

    def _on_lighthouse(self, route: bytes, message: Message) -> None:
        match message:
            case BeatAnswer(known=False):
                self._lighthouse.send(self._hello)
            case Welcome():
                self._perform(self.core.registered(time.monotonic()))
            case Snapshot():
                self._sequences[message.job] = message.sequence
                self._tell_workers(message.job, message)
            case _:
                self._perform(self.core.from_lighthouse(time.monotonic(), message))

    def _on_coordinator(self, route: bytes, message: Message) -> None:
        self._perform(self.core.from_coordinator(time.monotonic(), message))

    def _on_event(self, topic: bytes, message: Message) -> None:
        match message:
            case FailureEvent() | QuorumEvent() | CompletedEvent():
                if message.job not in self.core.jobs:
                    return
                seen = self._sequences.get(message.job, message.sequence - 1)
                self._sequences[message.job] = max(seen, message.sequence)
                if message.sequence > seen + 1:
                    self._lighthouse.send(SnapshotRequest(0, message.job))
                if isinstance(message, FailureEvent):
                    self._tell_workers(message.job, message)
            case EventBeat():
                for job, latest in message.latest.items():
                    if job in self.core.jobs and latest > self._sequences.get(job, latest):
                        self._lighthouse.send(SnapshotRequest(0, job))
            case _:
                pass

    def _tell_workers(self, job: str, message: Message) -> None:
        for incarnation in self.core.listening(job):
            self._workers.send(message, incarnation.encode())

    # --- effects -------------------------------------------------------------------------------------------

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case ToLighthouse(message):
                    self._lighthouse.send(message)
                case ToCoordinator(message):
                    self._coordinator.send(message)
                case ToWorker(incarnation, message):
                    self._workers.send(message, incarnation.encode())
                case StartWorker():
                    self._spawn(self._start_worker(effect))
                case SignalWorker(job, _, incarnation, signum):
                    self._spawn(self._signal(job, incarnation, signum))
                case StartStore():
                    self._spawn(self._start_store(effect))
                case StopJobHere():
                    self._spawn(self._stop_job(effect))

    def _spawn(self, work: Awaitable[None]) -> None:
        task = self._loop.create_task(_logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- keepers and processes -----------------------------------------------------------------------------

    def _keeper(self, job: str) -> Kept:
        kept = self._kept.get(job)
        if kept is None:
            spec = self.core.spec(job)
            kept = self._kept[job] = Kept(self._loop.create_task(self._spawn_keeper(job)))
            Path(spec.log_dir).mkdir(parents=True, exist_ok=True)
        return kept

    async def _spawn_keeper(self, job: str) -> KeeperClient:
        spec = self.core.spec(job)
        keeper = await KeeperClient.spawn(
            spec.python,
            str(self._run_directory / f"keeper-{secrets.token_hex(3)}"),
            job=job,
            env=spec.env,
            cwd=spec.cwd,
            log=str(Path(spec.log_dir) / "keeper.log"),
            epoch=1,
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
        path = kept.logs[order.incarnation] = log_path(roster.spec, slot)
        held = await keeper.start_worker(
            order.member,
            order.incarnation,
            roster.spec.argv,
            env=environment(roster, slot, order.incarnation, self.address),
            cwd=roster.spec.cwd,
            log=str(path),
            num_threads=threads_per_worker(roster.spec),
            module=roster.spec.module,
        )
        if held.process.status is not None or order.incarnation in kept.ended:
            kept.ended.discard(order.incarnation)
            held.close()
            return
        page = ProgressPage(held.page)
        watch = DeathWatch(
            held.process.pid,
            held.pidfd,
            page,
            lambda how, at: self._dying(order.job, order.incarnation, how, at),
        )
        kept.processes[order.incarnation] = Process(held, page, watch)
        pid, forked_at = held.process.pid, held.process.forked_at
        self._perform(self.core.worker_started(time.monotonic(), order.job, order.incarnation, pid, forked_at))

    def _dying(self, job: str, incarnation: str, how: How, at: float) -> None:
        # The end of the process itself tells nothing that its exit status, on its way, doesn't tell better.
        if how != "pidfd":
            self._perform(self.core.dying(time.monotonic(), job, incarnation, how, at))

    def _exited(self, job: str, ended: Exited) -> None:
        kept = self._kept.get(job)
        if kept is None or ended.status is None:
            return
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
            path = kept.logs.pop(ended.incarnation, None)
            tail = log_tail(path) if path is not None and ended.status != 0 else []
            now = time.monotonic()
            at = ended.at if ended.at is not None else now
            self._perform(self.core.exited(now, job, ended.incarnation, ended.status, at, str(path or ""), tail))
        if not kept.ending:
            self._spawn(self._acknowledge(kept, ended))

    async def _acknowledge(self, kept: Kept, ended: Exited) -> None:
        keeper = await kept.keeper
        await keeper.acknowledge(ended.slot, ended.incarnation)

    async def _signal(self, job: str, incarnation: str, signum: int) -> None:
        kept = self._kept.get(job)
        process = kept.processes.get(incarnation) if kept else None
        if kept is None or process is None:
            return
        keeper = await kept.keeper
        await keeper.signal(process.held.process.slot, incarnation, signum)

    # --- the store -----------------------------------------------------------------------------------------

    async def _start_store(self, order: StartStore) -> None:
        again = self.core.jobs[order.job].master_port != 0
        detected_at = time.monotonic()
        try:
            kept = self._keeper(order.job)
            keeper = await kept.keeper
            port = await self._listen(keeper, order)
        except (KeeperError, PortsTaken, OSError) as error:
            self._perform(self.core.store_failed(order.job, str(error)))
            return
        kept.store = order.incarnation
        if again:
            self._perform(self.core.store_restarted(time.monotonic(), order.job, detected_at))
        else:
            address = StoreAddress(self._host, port + STORE_OFFSET, order.incarnation)
            self._perform(self.core.store_started(order.job, address, port))

    async def _listen(self, keeper: KeeperClient, order: StartStore) -> int:
        """Starts the store on the first free pair of ports; returns MASTER_PORT."""
        spec = self.core.spec(order.job)
        again = self.core.jobs[order.job].master_port
        for port in [again] if again else candidates(self._host, order.fixed):
            try:
                held = await keeper.start_store(
                    STORE_SLOT,
                    order.incarnation,
                    host=self._host,
                    port=port + STORE_OFFSET,
                    env=spec.env,
                    log=str(Path(spec.log_dir) / "store.log"),
                )
            except KeeperError as error:
                if error.code != "port_in_use":
                    raise
                continue
            held.close()
            return port
        raise PortsTaken(order.fixed, self._host)

    # --- the end -------------------------------------------------------------------------------------------

    async def _stop_job(self, order: StopJobHere) -> None:
        kept = self._kept.get(order.job)
        if kept is not None:
            await self._end_job(kept, order.grace, final=order.final)
            if order.final:
                del self._kept[order.job]
        self._perform(self.core.stopped(order.job))

    async def _end_job(self, kept: Kept, grace: float, *, final: bool = True) -> None:
        if final and not kept.keeper.done():
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
            log.error("can't stop the workers: %s", error)
            return
        if left:
            log.error("processes that not even SIGKILL ended: %s", left)
        for process in kept.processes.values():
            process.close()
        kept.processes.clear()

    # --- time ----------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._beats += 1
        self._lighthouse.send(Beat(self.core.node, self._incarnation, self._beats))
        self._perform(self.core.tick(time.monotonic()))
        self._timer = self._loop.call_later(TICK, self._tick)

    def _report_progress(self) -> None:
        for name, kept in self._kept.items():
            members = {process.held.process.slot: process.page for process in kept.processes.values()}
            steps = {member: page.pings for member, page in members.items()}
            checkpoints = {member: page.checkpoint for member, page in members.items()}
            if (steps, checkpoints) != kept.steps:
                kept.steps = (steps, checkpoints)
                self._coordinator.send(JobProgress(name, steps, checkpoints))
        self._progress_timer = self._loop.call_later(PROGRESS_INTERVAL, self._report_progress)


async def _logged(work: Awaitable[None]) -> None:
    """A task's error is nobody's to await: it belongs in the log."""
    try:
        await work
    except (KeeperError, OSError) as error:
        log.error("%s", error)
