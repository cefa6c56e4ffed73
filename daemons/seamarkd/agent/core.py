"""The agent as a state machine: what a host does about its workers.

Takes what the keeper, the death watch, the workers and the other daemons say; returns what to send, start,
signal and stop. The fast path of policy ``replace`` is here: a dying worker is reported together with the
incarnation that takes its place, out of an allowance that came with the roster (D3, D16), so that no other
daemon stands between a death and the fork of its replacement. Knows no socket, no process and no clock.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import TypeAlias

from msgspec import Struct, field
from msgspec.structs import replace

from seamark.protocol.messages import (
    AbortJob,
    Acknowledged,
    Cause,
    Complete,
    Completed,
    DrainNode,
    Event,
    EventBeat,
    FailureEvent,
    JobAborted,
    JobSpec,
    Join,
    LastQuorum,
    MemberFaulted,
    MemberLost,
    MemberStarted,
    MemberStuck,
    Message,
    NodeLeft,
    PrepareFailed,
    PrepareJob,
    QuorumAnswer,
    QuorumReset,
    Refused,
    ReportFailure,
    Roster,
    ShardAnswer,
    ShardRequest,
    ShardsPage,
    ShardsRequest,
    SharedState,
    Snapshot,
    SnapshotRequest,
    StopWorkers,
    StoreAddress,
    StoreLost,
    StoreReady,
    Timeline,
    Welcome,
    WorkerExited,
    WorkerHello,
    WorkerRegistered,
    WorkersStopped,
    WorkerStarted,
)
from seamarkd.agent.hang import Verdict
from seamarkd.cursor import EventCursor
from seamarkd.exits import ABORT_EXIT_CODE, PREEMPTION_GRACE, UNKNOWN_STATUS, discarded_cause, exit_cause

RESEND_INTERVAL = 0.5
"""Seconds between two sendings of a report that nobody acknowledged."""
UNCHECKED = "its health checks have not ended yet"
ABORT_PATIENCE = 3.0
"""Seconds that workers of an aborted job have to end by themselves, with the exit code that says why."""


class ToLighthouse(Struct, frozen=True):
    """Send to the lighthouse."""

    message: Message


class ToCoordinator(Struct, frozen=True):
    """Send to the coordinator."""

    message: Message


class ToWorker(Struct, frozen=True):
    """Send to the worker process with this incarnation."""

    incarnation: str
    message: Message


class TellWorkers(Struct, frozen=True):
    """Send to all workers of a job that listen; to those that can't be reached yet, as soon as they can."""

    job: str
    message: FailureEvent | Snapshot | JobAborted


class StartWorker(Struct, frozen=True):
    """Have the keeper start a worker process."""

    job: str
    member: str
    incarnation: str


class WatchWorker(Struct, frozen=True):
    """The worker has named its canaries by now: watch them, too."""

    job: str
    incarnation: str


class EndWorker(Struct, frozen=True):
    """Have the keeper end a worker: SIGTERM, and SIGKILL ``grace`` seconds later; at once with a grace of 0."""

    job: str
    incarnation: str
    grace: float


class SignalWorker(Struct, frozen=True):
    """Signal a worker's process group."""

    job: str
    member: str
    incarnation: str
    signum: int


class Introduce(Struct, frozen=True):
    """Tell the coordinator how this node is now: it drains, or serves again."""


class StartKeeper(Struct, frozen=True):
    """Have a keeper for this job, which imports torch ahead of the workers."""

    job: str


class StartStore(Struct, frozen=True):
    """Have the keeper start the TCPStore service; ``fixed`` is the port a person asked for, else 0."""

    job: str
    incarnation: str
    fixed: int


class Remember(Struct, frozen=True):
    """Write down what an agent started anew has to know of this job, before what follows happens."""

    job: str


class ForgetExit(Struct, frozen=True):
    """The coordinator knows of this exit: the keeper need not hold it any longer."""

    job: str
    member: str
    incarnation: str


class StopJobHere(Struct, frozen=True):
    """Stop all workers of a job; with ``final`` its store and keeper too. Answered by ``stopped``.

    ``patience``: seconds they have to end by themselves before they are asked.
    """

    job: str
    generation: int
    grace: float
    final: bool
    patience: float = 0.0


Effect: TypeAlias = (
    ToLighthouse
    | ToCoordinator
    | ToWorker
    | TellWorkers
    | StartWorker
    | WatchWorker
    | SignalWorker
    | EndWorker
    | Introduce
    | StartKeeper
    | StartStore
    | Remember
    | ForgetExit
    | StopJobHere
)


class Worker(Struct):
    """One worker process, from the order to start it until its exit was acknowledged."""

    member: str
    incarnation: str
    generation: int
    pid: int = 0
    forked_at: float = 0.0
    wrapped: bool = False
    completed: bool = False
    lost: bool = False
    replaces: str = ""
    replacement: str = ""
    ordered: bool = False
    hang: str = ""
    """Why it is being ended: it gave no sign of life."""
    orphan: bool = False
    """Its keeper was killed: its agent alone looks after it."""
    status: int | None = None
    """How it ended."""


class Job(Struct):
    """A job's part on this node; all of it is what an agent that is started anew has to know."""

    name: str
    spec: JobSpec
    roster: Roster | None = None
    workers: dict[str, Worker] = field(default_factory=dict)
    """By incarnation; the living and those whose exit isn't reported yet."""
    exited: dict[str, Worker] = field(default_factory=dict)
    """By incarnation; those whose exit was reported and isn't acknowledged."""
    quorum: LastQuorum | None = None
    losses: list[MemberLost] = field(default_factory=list)
    """Those that no answered quorum came after: a lighthouse started anew is told of them, whoever acknowledged."""
    store_loss: StoreLost | None = None
    """Likewise."""
    allowance: int = 0
    store: StoreAddress = field(default_factory=StoreAddress)
    prepare_request: int = 0
    store_incarnation: str = ""
    master_port: int = 0
    stopping: StopWorkers | None = None
    ended: bool = False
    wrapped: bool = False

    @property
    def has_store(self) -> bool:
        """Whether the job's TCPStore is on this node, and serves."""
        return bool(self.store.port) and bool(self.store_incarnation)


class Report(Struct):
    """A report that has to be acknowledged."""

    effect: ToLighthouse | ToCoordinator
    due: float


class Agent:
    """The state of one node.

    Args:
        node: its name.
        new_incarnation: gives a fresh random id.
    """

    def __init__(self, node: str, new_incarnation: Callable[[], str]) -> None:
        self.node = node
        self.jobs: dict[str, Job] = {}
        self.draining = ""
        """Why its workers leave and no others come; empty while it serves."""
        self.unhealthy = ""
        """Why no more jobs come; empty for a node whose checks pass."""
        self.has_checks = False
        self._new_incarnation = new_incarnation
        self._request = 0
        self._reports: dict[int, Report] = {}
        self._afterwards: dict[str, PrepareJob | Roster] = {}
        """By job: what is asked of this node as soon as all of it is gone here. It has a place here again."""
        self._cursor = EventCursor()

    # --- from the coordinator ------------------------------------------------------------------------------

    def from_coordinator(self, now: float, message: Message) -> list[Effect]:
        """What follows from a message of the coordinator."""
        match message:
            case Acknowledged():
                report = self._reports.pop(message.request, None)
                return self._exit_known(report.effect.message) if report else []
            case PrepareJob():
                return self._prepare(message)
            case Roster():
                return self._roster(now, message)
            case StopWorkers():
                return self._stop(message)
            case DrainNode():
                return self.serve() if message.undo else self.drain(message.reason)
            case ShardAnswer() | ShardsPage():
                return [ToWorker(message.consumer, message)]
            case Refused(incarnation=consumer) if consumer:
                return [ToWorker(consumer, message)]
            case _:
                pass
        return []

    # --- a host that goes away (D12) -----------------------------------------------------------------------

    def drain(self, reason: str) -> list[Effect]:
        """All workers are asked to end, and have ``PREEMPTION_GRACE`` for that; what they leave is another node's."""
        asked_before, self.draining = bool(self.draining), reason or "no reason was given"
        effects: list[Effect] = [Introduce()]
        if asked_before:
            # The first one's time goes on running.
            return effects
        for job in self.jobs.values():
            for worker in job.workers.values() if not job.ended else ():
                if not worker.lost and not worker.ordered:
                    effects.append(EndWorker(job.name, worker.incarnation, PREEMPTION_GRACE))
        return effects

    def serve(self) -> list[Effect]:
        """It takes workers again; one that is checked, once its checks have passed."""
        self.draining = ""
        if self.has_checks:
            self.unhealthy = UNCHECKED
        return [Introduce()]

    def begin_checks(self) -> None:
        """Before it introduces itself: it has health checks, and none has ended yet."""
        self.has_checks, self.unhealthy = True, UNCHECKED

    def checked(self, problem: str) -> list[Effect]:
        """Its health checks have ended: without a problem, or with this one. What runs here goes on."""
        if problem == self.unhealthy:
            return []
        self.unhealthy = problem
        return [Introduce()]

    @property
    def busy(self) -> bool:
        """Whether a worker of it lives."""
        return any(job.workers for job in self.jobs.values())

    @property
    def stopping(self) -> bool:
        """Whether workers of it are being stopped as ordered, and nobody has been told yet that they are."""
        return any(job.stopping is not None for job in self.jobs.values())

    @property
    def unheard(self) -> bool:
        """Whether nobody has acknowledged some report."""
        return bool(self._reports)

    def _leave(self, job: Job) -> list[Effect]:
        """The last worker of a node that drains has ended: the job's keeper and store end, too."""
        if not self.draining or job.workers or job.ended or job.roster is None:
            return []
        return self._stop(StopWorkers(0, job.name, job.roster.generation, 0.0, final=True))

    def _exit_known(self, report: Message) -> list[Effect]:
        if not isinstance(report, WorkerExited):
            return []
        job = self.jobs.get(report.job)
        if job is None or job.exited.pop(report.incarnation, None) is None:
            return []
        return [ForgetExit(report.job, report.member, report.incarnation), Remember(report.job)]

    def _prepare(self, order: PrepareJob) -> list[Effect]:
        """The same order of a coordinator that was started anew has another request number."""
        job = self.jobs.setdefault(order.spec.name, Job(order.spec.name, order.spec))
        if job.ended:
            self._afterwards[job.name] = order
            return []
        job.prepare_request = order.request
        if not order.store:
            return [StartKeeper(job.name)]
        if job.has_store:
            return [ToCoordinator(self._store_ready(job))]
        if job.store_incarnation:
            return []
        # What a roster named is another node's, or was.
        job.store, job.master_port = StoreAddress(), 0
        job.store_incarnation = self._new_incarnation()
        return [Remember(job.name), StartStore(job.name, job.store_incarnation, order.spec.master_port)]

    def _store_ready(self, job: Job) -> StoreReady:
        return StoreReady(job.prepare_request, job.name, job.store.host, job.master_port, job.store)

    def _roster(self, now: float, roster: Roster) -> list[Effect]:
        job = self.jobs.setdefault(roster.job, Job(roster.job, roster.spec))
        effects: list[Effect] = [ToCoordinator(Acknowledged(roster.request))]
        if job.ended:
            self._afterwards[job.name] = roster
            return effects
        known = job.roster
        here = any(slot.node == self.node for slot in roster.slots)
        if self.draining and here and not job.workers and known is not None and roster.generation == known.generation:
            effects.append(ToCoordinator(NodeLeft(job.name, self.node)))
        if known is not None and roster.generation <= known.generation and roster.submission == known.submission:
            job.allowance = roster.allowance
            if roster.generation == known.generation and roster.store_node != known.store_node:
                effects += self._store_is_elsewhere(job, roster)
            if roster.generation == known.generation and roster.placement > known.placement:
                effects += self._places(now, job, known, roster)
            return effects
        job.roster = roster
        job.store = roster.store
        job.allowance = roster.allowance
        job.wrapped = False
        job.quorum = None
        job.losses.clear()
        job.store_loss = None
        for worker in job.workers.values():
            worker.ordered = True
            effects.append(SignalWorker(job.name, worker.member, worker.incarnation, signal.SIGKILL))
        return [*effects, *self._start(now, job, [slot.member for slot in roster.slots if slot.node == self.node])]

    def _start(self, now: float, job: Job, members: list[str]) -> list[Effect]:
        assert job.roster is not None
        if self.draining:
            # Who says so has not heard of it yet, or did not hear that there is nobody left to wait for.
            refusal = ToCoordinator(NodeLeft(job.name, self.node))
            return [Remember(job.name), *([refusal] if members and not job.workers else [])]
        fresh = [Worker(member, self._new_incarnation(), job.roster.generation) for member in members]
        job.workers |= {worker.incarnation: worker for worker in fresh}
        effects: list[Effect] = [Remember(job.name)]
        for worker in fresh:
            effects.append(self._announce(now, job, worker))
            effects.append(StartWorker(job.name, worker.member, worker.incarnation))
        return effects

    def _places(self, now: float, job: Job, known: Roster, roster: Roster) -> list[Effect]:
        """Places of the same generation changed nodes: what came here is started, and what went from here is ended."""
        job.roster = roster
        placed = {slot.member: slot.placed for slot in known.slots if slot.node == self.node}
        here = {slot.member: slot.placed for slot in roster.slots if slot.node == self.node}
        effects: list[Effect] = []
        new = {member for member, number in here.items() if number != placed.get(member)}
        for worker in list(job.workers.values()):
            if worker.ordered or (worker.member in here and worker.member not in new):
                continue
            if worker.member in new and not worker.lost:
                # The session went on without this place, and with it this process is at home in no iteration.
                cause = Cause(kind="gone", text="its node had lost its place in the job, and has it again")
                effects += self._lose(now, job, worker, cause, now, "placement")
                new -= {worker.member} if worker.replacement else set()
            worker.ordered = True
            effects.append(SignalWorker(job.name, worker.member, worker.incarnation, signal.SIGKILL))
        coming = {worker.member for worker in job.workers.values() if not worker.ordered}
        return [*effects, *self._start(now, job, [member for member in here if member in new - coming])]

    def _store_is_elsewhere(self, job: Job, roster: Roster) -> list[Effect]:
        """The store's host was lost, and the coordinator has had another one started; perhaps here."""
        job.roster = roster
        if job.store.incarnation != roster.store.incarnation:
            job.store = roster.store
            job.store_incarnation, job.master_port = "", 0
        return [Remember(job.name)]

    def _announce(self, now: float, job: Job, worker: Worker) -> Effect:
        started = MemberStarted(
            request=self._next(),
            job=job.name,
            generation=worker.generation,
            member=worker.member,
            incarnation=worker.incarnation,
            node=self.node,
            placement=job.roster.placement if job.roster else 0,
        )
        return self._report(now, ToLighthouse(started))

    def _stop(self, order: StopWorkers) -> list[Effect]:
        job = self.jobs.get(order.job)
        if job is None:
            return [ToCoordinator(WorkersStopped(order.request, order.job, order.generation))]
        if order.final:
            # What was asked of this node before that is no longer asked.
            self._afterwards.pop(order.job, None)
        under_way = job.stopping is not None and (job.stopping.final or not order.final)
        job.ended = job.ended or order.final
        # What ends for good is not spared by a later order to stop that does not.
        job.stopping = order = replace(order, final=job.ended)
        for worker in job.workers.values():
            worker.ordered = True
        if under_way:
            # The same order of a coordinator that was started anew, or met this agent anew: answered once it is done.
            return [Remember(job.name)]
        # Who was asked already, because the host goes away, keeps the time for it.
        grace = PREEMPTION_GRACE if self.draining and job.workers else order.grace
        if order.abort and self.listening(job.name):
            told = TellWorkers(job.name, JobAborted(job.name, order.abort))
            stop = StopJobHere(job.name, order.generation, grace, order.final, ABORT_PATIENCE)
            return [Remember(job.name), told, stop]
        return [Remember(job.name), StopJobHere(job.name, order.generation, grace, order.final)]

    # --- from the keeper and the death watch ---------------------------------------------------------------

    def store_started(self, job_name: str, address: StoreAddress, master_port: int) -> list[Effect]:
        """The TCPStore service listens."""
        job = self.jobs[job_name]
        job.store = address
        job.master_port = master_port
        return [Remember(job_name), ToCoordinator(self._store_ready(job))]

    def prepare_failed(self, job_name: str, reason: str) -> list[Effect]:
        """The keeper or the TCPStore service could not be started; tried again if the order is repeated."""
        job = self.jobs.get(job_name)
        if job is None:
            return []
        job.store_incarnation = ""
        return [
            Remember(job_name),
            ToCoordinator(PrepareFailed(job.prepare_request, job_name, f"node {self.node}: {reason}")),
        ]

    def store_exited(self, job_name: str) -> list[Effect]:
        """The TCPStore service died: a new one on the same port, at once."""
        job = self.jobs[job_name]
        if job.ended or job.roster is None or not job.has_store:
            return []
        job.store_incarnation = self._new_incarnation()
        return [Remember(job_name), StartStore(job.name, job.store_incarnation, job.master_port)]

    def store_restarted(self, now: float, job_name: str, detected_at: float) -> list[Effect]:
        """The new TCPStore service listens: everybody's groups have to be made anew on it."""
        job = self.jobs[job_name]
        if job.roster is None:
            return []
        job.store = StoreAddress(job.store.host, job.store.port, job.store_incarnation)
        report = StoreLost(self._next(), job.name, job.roster.generation, job.store, detected_at)
        job.store_loss = report
        return [Remember(job_name), self._report(now, ToLighthouse(report))]

    def worker_started(self, now: float, job_name: str, incarnation: str, pid: int, forked_at: float) -> list[Effect]:
        """The keeper started a worker."""
        job = self.jobs.get(job_name)
        worker = job.workers.get(incarnation) if job else None
        if worker is None:
            return []
        worker.pid = pid
        worker.forked_at = forked_at
        effects: list[Effect] = [Remember(job_name), self._started(now, job_name, worker)]
        if self.draining and not worker.lost and not worker.ordered:
            # It was on its way when the others were asked.
            effects.append(EndWorker(job_name, incarnation, PREEMPTION_GRACE))
        return effects

    def _started(self, now: float, job_name: str, worker: Worker) -> Effect:
        message = WorkerStarted(
            self._next(),
            job_name,
            worker.generation,
            worker.member,
            worker.incarnation,
            worker.pid,
            worker.forked_at,
            worker.replaces,
            self.node,
        )
        return self._report(now, ToCoordinator(message))

    def keeper_lost(self, job_name: str) -> list[Effect]:
        """The job's keeper was killed. Its workers live on, and no other keeper will ever know of them."""
        job = self.jobs.get(job_name)
        if job is None:
            return []
        for worker in job.workers.values():
            worker.orphan = worker.orphan or worker.pid != 0
        return [Remember(job_name)]

    def dying(self, now: float, job_name: str, incarnation: str, how: str, at: float) -> list[Effect]:
        """The kernel says that a worker is dying, before its exit status is known."""
        job = self.jobs.get(job_name)
        worker = job.workers.get(incarnation) if job else None
        if job is None or worker is None:
            return []
        cause = Cause(kind="hang", text=worker.hang) if worker.hang else Cause(kind="signal", text="killed")
        return self._lose(now, job, worker, cause, at, how)

    def hangs(
        self, now: float, job_name: str, incarnation: str, iteration: int, verdict: Verdict, grace: float
    ) -> list[Effect]:
        """A worker gives no sign of life: it is interrupted with everybody else, or ended.

        Args:
            now: seconds.
            job_name, incarnation: who.
            iteration: which one it is in.
            verdict: what its watch says.
            grace: seconds between SIGTERM and SIGKILL.
        """
        job = self.jobs.get(job_name)
        worker = job.workers.get(incarnation) if job else None
        if job is None or worker is None or worker.lost or worker.ordered:
            return []
        if verdict.kind == "soft":
            cause = Cause(kind="hang", text=verdict.text)
            return [ToLighthouse(MemberFaulted(job_name, worker.member, incarnation, iteration, cause, now))]
        worker.hang = verdict.text
        return [EndWorker(job_name, incarnation, 0.0 if verdict.kind == "stopped" else grace)]

    def exited(
        self,
        now: float,
        job_name: str,
        incarnation: str,
        status: int,
        at: float,
        log_path: str,
        tail: list[str],
        *,
        discarded: bool = False,
        oom_kill: bool = False,
    ) -> list[Effect]:
        """A worker's exit status: code, or minus the signal; and whether the rank assignment had dropped it.

        ``oom_kill``: the kernel has ended a process here for want of memory since the exit before.
        """
        job = self.jobs.get(job_name)
        worker = job.workers.pop(incarnation, None) if job else None
        if job is None or worker is None:
            return []
        worker.status = status
        if status == 0 and not worker.wrapped and not self.draining:
            # On a node that drains it ends because it was asked to.
            worker.completed = True
        effects: list[Effect] = []
        if not (status in (0, UNKNOWN_STATUS) and worker.completed):
            cause = discarded_cause(status) if discarded else exit_cause(status)
            if worker.hang:
                cause = Cause(kind="hang", status=cause.status, text=f"{worker.hang}; {cause.text}")
            effects = self._lose(now, job, worker, cause, at, "exit status")
        message = WorkerExited(
            self._next(),
            job_name,
            worker.generation,
            worker.member,
            incarnation,
            status,
            worker.wrapped,
            worker.completed,
            worker.ordered,
            worker.replacement,
            log_path,
            tail,
            1 if worker.replacement else 0,
            discarded,
            self.node,
            job.quorum.iteration if job.quorum else -1,
            self.draining,
            oom_kill,
            worker.hang,
        )
        job.exited[incarnation] = worker
        return [Remember(job_name), *effects, self._report(now, ToCoordinator(message)), *self._leave(job)]

    def _lose(self, now: float, job: Job, worker: Worker, cause: Cause, at: float, how: str) -> list[Effect]:
        roster = job.roster
        current = roster is not None and worker.generation == roster.generation
        if worker.lost or worker.ordered or roster is None or not current:
            return []
        if self.draining and not (cause.kind == "exit" and cause.status == ABORT_EXIT_CODE):
            cause = Cause(kind="node", status=cause.status, text=f"node {self.node} drains: {self.draining}")
        worker.lost = True
        self._withdraw_announcement(worker.incarnation)
        if self._may_replace(job, roster, cause):
            job.allowance -= 1
            worker.replacement = self._new_incarnation()
        report = self._report_loss(now, job, worker, cause, at, how)
        if not worker.replacement:
            return [report]
        # Announced by the report itself: one message less between the death and the fork. Remembered before it: an
        # agent started anew in between would announce another replacement, and the lighthouse expect the first.
        job.workers[worker.replacement] = Worker(
            worker.member, worker.replacement, worker.generation, replaces=worker.incarnation
        )
        return [Remember(job.name), report, StartWorker(job.name, worker.member, worker.replacement)]

    def _report_loss(self, now: float, job: Job, worker: Worker, cause: Cause, at: float, how: str) -> Effect:
        report = MemberLost(
            request=self._next(),
            job=job.name,
            generation=worker.generation,
            member=worker.member,
            incarnation=worker.incarnation,
            cause=cause,
            occurred_at=-1.0,
            detected_at=at,
            detector=how,
            replacement=worker.replacement,
            node=self.node,
        )
        job.losses.append(report)
        return self._report(now, ToLighthouse(report))

    def _withdraw_announcement(self, incarnation: str) -> None:
        """Repeated after the news of the worker's end it would raise it from the dead."""
        for request, report in list(self._reports.items()):
            message = report.effect.message
            if isinstance(message, MemberStarted) and message.incarnation == incarnation:
                del self._reports[request]

    def _may_replace(self, job: Job, roster: Roster, cause: Cause) -> bool:
        """Only a session that somebody's wrapper holds together can be entered again by a newcomer, or none at all."""
        aborted = cause.kind == "exit" and cause.status == ABORT_EXIT_CODE
        leaves = aborted or cause.kind == "discarded" or self.draining != ""
        session = job.wrapped or roster.spec.independent
        wanted = roster.policy == "replace" and session and not leaves
        return wanted and job.allowance > 0 and not job.ended and job.stopping is None

    def stopped(self, now: float, job_name: str) -> list[Effect]:
        """All workers of the job are gone, as ordered."""
        job = self.jobs.get(job_name)
        if job is None or job.stopping is None:
            return []
        order = job.stopping
        job.stopping = None
        effects: list[Effect] = []
        if order.final:
            del self.jobs[job_name]
            afterwards = self._afterwards.pop(job_name, None)
            effects += self.from_coordinator(now, afterwards) if afterwards is not None else []
        done = ToCoordinator(WorkersStopped(order.request, order.job, order.generation))
        return [Remember(job_name), done, *effects]

    # --- from workers --------------------------------------------------------------------------------------

    def from_worker(self, now: float, incarnation: str, message: Message) -> list[Effect]:
        """What follows from a message of a worker: most of it is forwarded."""
        match message:
            case WorkerHello():
                return self._worker_hello(incarnation, message)
            case Join() | Complete():
                # Its greeting may have ended with the agent that heard it.
                return [*self._wraps(message.job, incarnation), ToLighthouse(message)]
            case MemberFaulted() | SnapshotRequest():
                return [ToLighthouse(message)]
            case MemberStuck():
                return self._stuck(now, incarnation, message)
            case Timeline() | AbortJob() | SharedState():
                return [ToCoordinator(message)]
            case ShardRequest() | ShardsRequest() | ReportFailure():
                return self._about_shards(incarnation, message)
            case _:
                sentence = f"{type(message).__name__} is not a worker's message"
                return [ToWorker(incarnation, Refused(0, "BAD_REQUEST", sentence))]

    def _about_shards(self, route: str, message: ShardRequest | ShardsRequest | ReportFailure) -> list[Effect]:
        """Forwarded for the workers that this agent started, whoever they say they are."""
        job = self.jobs.get(message.job)
        incarnation, _, consumer = route.partition("#")
        worker = job.workers.get(incarnation) if job else None
        named = message.incarnation if isinstance(message, ReportFailure) else message.consumer
        said = route if consumer and not isinstance(message, ReportFailure) else incarnation
        if worker is not None and named == said:
            return [ToCoordinator(message)]
        if isinstance(message, ShardRequest):
            why = f"{message.member} ({incarnation}) is not a worker that this agent started"
            answer = ShardAnswer(message.request, message.job, message.consumer, "refused", reason=why)
            return [ToWorker(route, answer)]
        return []

    def _stuck(self, now: float, incarnation: str, request: MemberStuck) -> list[Effect]:
        job = self.jobs.get(request.job)
        worker = job.workers.get(incarnation) if job else None
        if job is None or worker is None or incarnation != request.incarnation:
            return []
        cause = Cause(kind="stuck", text="blocked in a collective that could not be cut free; replaced")
        kill = SignalWorker(job.name, worker.member, incarnation, signal.SIGKILL)
        return [*self._lose(now, job, worker, cause, now, "wrapper"), kill]

    def _worker_hello(self, incarnation: str, hello: WorkerHello) -> list[Effect]:
        job = self.jobs.get(hello.job)
        worker = job.workers.get(hello.incarnation) if job else None
        if job is None or worker is None or incarnation != hello.incarnation or worker.member != hello.member:
            sentence = f"{hello.member} ({hello.incarnation}) is not a worker that this agent started"
            return [ToWorker(incarnation, Refused(0, "UNKNOWN_MEMBER", sentence, hello.job, hello.member))]
        wraps = self._wraps(hello.job, incarnation) if hello.wrapped else []
        return [*wraps, WatchWorker(hello.job, incarnation), ToWorker(incarnation, Welcome(0))]

    def _wraps(self, name: str, incarnation: str) -> list[Effect]:
        """This worker is in the wrapper: it is told of failures, and the coordinator of it."""
        job = self.jobs.get(name)
        worker = job.workers.get(incarnation) if job else None
        if job is None or worker is None or worker.wrapped:
            return []
        worker.wrapped = True
        job.wrapped = True
        return [Remember(name), ToCoordinator(WorkerRegistered(name, worker.member, incarnation))]

    # --- from the lighthouse -------------------------------------------------------------------------------

    def from_lighthouse(self, now: float, message: Message) -> list[Effect]:
        """What follows from a message of the lighthouse: answers go to the workers they are for."""
        match message:
            case Acknowledged():
                self._reports.pop(message.request, None)
            case QuorumReset():
                return [ToWorker(one.incarnation, message) for one in message.recipients]
            case QuorumAnswer():
                # Remembered first: the workers' iteration may not be newer than what a lighthouse started anew is told.
                return [*self._quorum(message), *(ToWorker(one.incarnation, message) for one in message.recipients)]
            case Completed():
                return self._completed(message)
            case Refused(member=member) if member:
                job = self.jobs.get(message.job)
                workers = job.workers.values() if job else ()
                # Its successor has asked for nothing yet that could be refused.
                mine = [one.incarnation for one in workers if one.member == member]
                return [ToWorker(one, message) for one in mine if message.incarnation in ("", one)]
            case _:
                pass
        return []

    def _quorum(self, answer: QuorumAnswer) -> list[Effect]:
        job = self.jobs.get(answer.job)
        if job is None:
            return []
        job.quorum = LastQuorum(
            request=0,
            job=job.name,
            generation=answer.generation,
            quorum_id=answer.quorum_id,
            iteration=answer.iteration,
            restarts=answer.restarts,
            members=[member.member for member in answer.members],
            completed=False,
            node=self.node,
            call=answer.call,
        )
        for one in answer.recipients:
            worker = job.workers.get(one.incarnation)
            if worker is not None:
                # What it had completed was the call before.
                worker.completed = False
        present = {member.incarnation for member in answer.members}
        job.losses = [report for report in job.losses if report.incarnation in present]
        if job.store_loss is not None and job.store_loss.store == answer.store:
            job.store_loss = None
        return [Remember(job.name)]

    def _completed(self, message: Completed) -> list[Effect]:
        job = self.jobs.get(message.job)
        effects: list[Effect] = []
        if job is not None:
            for one in message.recipients:
                worker = job.workers.get(one.incarnation)
                if worker is not None:
                    worker.completed = True
            if job.quorum is not None and message.call == job.quorum.call:
                job.quorum = replace(job.quorum, completed=True)
            # Sticky: a worker that ends now must not be taken for lost by an agent started anew.
            effects.append(Remember(job.name))
        return [*effects, *(ToWorker(one.incarnation, message) for one in message.recipients)]

    def heard(self, message: Event | EventBeat | Snapshot) -> list[Effect]:
        """What follows from what the lighthouse publishes: failures go to the workers at once, gaps are filled."""
        if self._cursor.turn(message.epoch) == "old":
            return []
        if isinstance(message, EventBeat):
            behind = self._cursor.behind(message.latest)
            return [ToLighthouse(SnapshotRequest(0, job)) for job in behind if job in self.jobs]
        if message.job not in self.jobs:
            return []
        effects: list[Effect] = []
        if isinstance(message, FailureEvent | Snapshot):
            effects.append(TellWorkers(message.job, message))
        if not isinstance(message, Snapshot) and message.sequence > self._cursor.position(message.job) + 1:
            effects.append(ToLighthouse(SnapshotRequest(0, message.job)))
        else:
            self._cursor.advance(message.job, message.sequence)
        return effects

    def registered(self, now: float) -> list[Effect]:
        """The lighthouse is a new one, or new to us: tell what it has to know, and repeat what it may not know."""
        self._reports = {
            request: report for request, report in self._reports.items() if isinstance(report.effect, ToCoordinator)
        }
        effects: list[Effect] = []
        for job in self.jobs.values():
            if job.roster is None:
                continue
            unknown = LastQuorum(0, job.name, job.roster.generation, 0, -1, 0, [], False, self.node)
            for message in (job.quorum or unknown, *job.losses, job.store_loss):
                if message is None:
                    continue
                effects.append(self._report(now, ToLighthouse(replace(message, request=self._next()))))
            effects += [self._announce(now, job, worker) for worker in job.workers.values() if not worker.lost]
        return effects

    def welcomed(self, now: float) -> list[Effect]:
        """The coordinator is a new one, or new to us: tell which workers run."""
        effects: list[Effect] = []
        for job in self.jobs.values():
            for worker in job.workers.values():
                if worker.pid:
                    effects.append(self._started(now, job.name, worker))
                if worker.wrapped:
                    effects.append(ToCoordinator(WorkerRegistered(job.name, worker.member, worker.incarnation)))
        return effects

    # --- a new start of the agent --------------------------------------------------------------------------

    def adopt(self, now: float, job: Job, known: Mapping[str, tuple[int, float]]) -> list[Effect]:
        """Take up a job of an earlier start of this agent.

        Args:
            job: what that one remembered.
            known: of which incarnations its keeper knows, with process id and the time of the fork, alive or ended: the
                ended ones are reported by ``exited``.
        """
        self.jobs[job.name] = job
        # An exit that the keeper told of while it was being asked is being reported already.
        reporting = {
            report.effect.message.incarnation
            for report in self._reports.values()
            if isinstance(report.effect.message, WorkerExited)
        }
        again = {one: worker for one, worker in job.exited.items() if one not in reporting}
        job.workers |= again
        job.exited = {one: worker for one, worker in job.exited.items() if one not in again}
        effects: list[Effect] = []
        for worker in list(job.workers.values()):
            worker.pid, worker.forked_at = known.get(worker.incarnation, (worker.pid, worker.forked_at))
            if worker.ordered or worker.lost:
                continue
            if worker.incarnation not in known:
                effects += self._start_again(now, job, worker)
            elif self.draining:
                effects.append(EndWorker(job.name, worker.incarnation, PREEMPTION_GRACE))
        if job.store_incarnation and not job.store.port and job.store_incarnation not in known:
            effects.append(StartStore(job.name, job.store_incarnation, job.spec.master_port))
        if job.stopping is not None:
            order = job.stopping
            effects.append(StopJobHere(job.name, order.generation, order.grace, order.final))
        return effects

    def _start_again(self, now: float, job: Job, worker: Worker) -> list[Effect]:
        if not self.draining:
            return [StartWorker(job.name, worker.member, worker.incarnation)]
        del job.workers[worker.incarnation]
        return self._lose(now, job, worker, Cause(kind="node"), now, "drain")

    # --- what the shell asks -------------------------------------------------------------------------------

    def spec(self, job: str) -> JobSpec:
        """What the job was submitted with."""
        return self.jobs[job].spec

    def runs(self, job: str, incarnation: str) -> bool:
        """True for a worker whose exit is to be reported, or was and is not known to have been taken."""
        known = self.jobs.get(job)
        return known is not None and (incarnation in known.workers or incarnation in known.exited)

    def is_to_end(self, job: str, incarnation: str) -> bool:
        """Whether a worker that was asked to end, and had its time, is still to: its node may serve again."""
        known = self.jobs.get(job)
        worker = known.workers.get(incarnation) if known else None
        return worker is not None and (bool(worker.hang) or worker.ordered or self.draining != "")

    def listening(self, job: str) -> list[str]:
        """The workers that are told of the job's failures."""
        known = self.jobs.get(job)
        return [worker.incarnation for worker in known.workers.values() if worker.wrapped] if known else []

    # --- reports until acknowledged ------------------------------------------------------------------------

    def tick(self, now: float) -> list[Effect]:
        """Reports to send again."""
        effects: list[Effect] = []
        for report in self._reports.values():
            if now >= report.due:
                report.due = now + RESEND_INTERVAL
                effects.append(report.effect)
        return effects

    def _next(self) -> int:
        self._request += 1
        return self._request

    def _report(self, now: float, effect: ToLighthouse | ToCoordinator) -> ToLighthouse | ToCoordinator:
        request: int = getattr(effect.message, "request")  # noqa: B009 - every report has one
        self._reports[request] = Report(effect, now + RESEND_INTERVAL)
        return effect
