"""The agent as a state machine: what a host does about its workers.

Takes what the keeper, the death watch, the workers and the other daemons say; returns what to send, start,
signal and stop. The fast path of policy ``replace`` is here: a dying worker is reported together with the
incarnation that takes its place, out of an allowance that came with the roster (D3, D16), so that no other
daemon stands between a death and the fork of its replacement. Knows no socket, no process and no clock.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping

from msgspec.structs import replace

from seamark.protocol.messages import (
    AbortJob,
    Acknowledged,
    Cause,
    Complete,
    Completed,
    DrainNode,
    Join,
    LastQuorum,
    MemberFaulted,
    MemberStuck,
    Message,
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
    SnapshotRequest,
    StopWorkers,
    Timeline,
    WorkerHello,
    WorkerRegistered,
)
from seamarkd.agent.door import Door
from seamarkd.agent.effects import (
    Effect,
    EndWorker,
    SignalWorker,
    StartStore,
    StartWorker,
    StopJobHere,
    ToCoordinator,
    ToLighthouse,
    ToWorker,
)
from seamarkd.agent.ends import Ends
from seamarkd.agent.job import Job, Worker
from seamarkd.agent.losses import Losses
from seamarkd.agent.node import Node
from seamarkd.agent.places import Places
from seamarkd.agent.reports import Reports
from seamarkd.agent.sessions import Sessions
from seamarkd.agent.stores import Stores
from seamarkd.exits import PREEMPTION_GRACE


class Agent:
    """The agent of one node: its parts, and to whom of them a message goes.

    Args:
        node: its name.
        new_incarnation: gives a fresh random id.
        has_coordinator: False where nobody acknowledges what a coordinator would be told.
    """

    def __init__(self, node: str, new_incarnation: Callable[[], str], *, has_coordinator: bool = True) -> None:
        self.node = Node(node, new_incarnation)
        self.reports = Reports(has_coordinator=has_coordinator)
        self.ends = Ends(self.node)
        self.losses = Losses(self.node, self.reports, self.ends)
        self.stores = Stores(self.node, self.reports, self.ends)
        self.places = Places(self.node, self.reports, self.ends, self.stores, self.losses)
        self.door = Door(self.node)
        self.sessions = Sessions(self.node)

    def from_coordinator(self, now: float, message: Message) -> list[Effect]:
        """What follows from a message of the coordinator."""
        match message:
            case Acknowledged():
                return self.losses.exit_known(self.reports.acknowledged(message.request))
            case PrepareJob():
                return self.stores.prepare(message)
            case Roster():
                return self.places.roster(now, message)
            case StopWorkers():
                return self.ends.stop(message)
            case DrainNode():
                return self.node.serve() if message.undo else self.node.drain(message.reason)
            case ShardAnswer() | ShardsPage():
                return [ToWorker(message.consumer, message)]
            case Refused(incarnation=consumer) if consumer:
                return [ToWorker(consumer, message)]
            case _:
                pass
        return []

    def from_lighthouse(self, now: float, message: Message) -> list[Effect]:
        """What follows from a message of the lighthouse: answers go to the workers they are for."""
        match message:
            case Acknowledged():
                self.reports.acknowledged(message.request)
            case QuorumReset():
                return [ToWorker(one.incarnation, message) for one in message.recipients]
            case QuorumAnswer():
                # Remembered first: the workers' iteration may not be newer than what a lighthouse started anew is told.
                return [
                    *self.sessions.quorum(message),
                    *(ToWorker(one.incarnation, message) for one in message.recipients),
                ]
            case Completed():
                return self.sessions.completed(message)
            case Refused(member=member) if member:
                return self.sessions.refused(message)
            case _:
                pass
        return []

    def from_worker(self, now: float, incarnation: str, message: Message) -> list[Effect]:
        """What follows from a message of a worker: most of it is forwarded."""
        match message:
            case WorkerHello():
                return self.door.hello(incarnation, message)
            case Join() | Complete():
                # Its greeting may have ended with the agent that heard it.
                return [*self.door.wraps(message.job, incarnation), ToLighthouse(message)]
            case MemberFaulted() | SnapshotRequest():
                return [ToLighthouse(message)]
            case MemberStuck():
                return self.losses.stuck(now, incarnation, message)
            case Timeline() | AbortJob() | SharedState():
                return [ToCoordinator(message)]
            case ShardRequest() | ShardsRequest() | ReportFailure():
                return self.door.about_shards(incarnation, message)
            case _:
                sentence = f"{type(message).__name__} is not a worker's message"
                return [ToWorker(incarnation, Refused(0, "BAD_REQUEST", sentence))]

    def stopped(self, now: float, job_name: str, *, final: bool) -> list[Effect]:
        """All workers of the job are gone, as ordered; with ``final`` its store and keeper, too."""
        done, afterwards = self.ends.stopped(job_name, final=final)
        return [*done, *(self.from_coordinator(now, afterwards) if afterwards is not None else [])]

    def registered(self, now: float) -> list[Effect]:
        """The lighthouse is a new one, or new to us: tell what it has to know, and repeat what it may not know."""
        self.reports.forget_lighthouse()
        effects: list[Effect] = []
        for job in self.node.jobs.values():
            if job.roster is None:
                continue
            unknown = LastQuorum(0, job.name, job.roster.generation, 0, -1, 0, [], False, self.node.name)
            for message in (job.quorum or unknown, *job.losses, job.store_loss):
                if message is None:
                    continue
                report = ToLighthouse(replace(message, request=self.reports.next_request()))
                effects.append(self.reports.send(now, report))
            effects += [self.places.announce(now, job, worker) for worker in job.workers.values() if not worker.lost]
        return effects

    def welcomed(self, now: float) -> list[Effect]:
        """The coordinator is a new one, or new to us: tell which workers run."""
        effects: list[Effect] = []
        for job in self.node.jobs.values():
            for worker in job.workers.values():
                if worker.pid:
                    effects.append(self.places.started(now, job.name, worker))
                if worker.wrapped:
                    effects.append(ToCoordinator(WorkerRegistered(job.name, worker.member, worker.incarnation)))
        return effects

    def adopt(
        self, now: float, job: Job, known: Mapping[str, tuple[int, float]], *, stopping: bool = False
    ) -> list[Effect]:
        """Take up a job of an earlier start of this agent.

        Args:
            job: what that one remembered.
            known: of which incarnations its keeper knows, with process id and the time of the fork, alive or ended: the
                ended ones are reported by ``exited``.
            stopping: its stop was ordered to this agent, and is under way.
        """
        self.node.jobs[job.name] = job
        # An exit that the keeper told of while it was being asked is being reported already.
        reporting = self.reports.exits()
        again = {one: worker for one, worker in job.exited.items() if one not in reporting}
        job.workers |= again
        job.exited = {one: worker for one, worker in job.exited.items() if one not in again}
        effects: list[Effect] = []
        for worker in list(job.workers.values()):
            worker.pid, worker.forked_at = known.get(worker.incarnation, (worker.pid, worker.forked_at))
            if worker.ordered:
                effects += self._end_again(job, worker, there=worker.incarnation in known)
            elif worker.lost:
                continue
            elif worker.incarnation not in known:
                effects += self._start_again(now, job, worker)
            elif self.node.draining:
                effects.append(EndWorker(job.name, worker.incarnation, PREEMPTION_GRACE))
        if job.store_incarnation and not job.store.port and job.store_incarnation not in known:
            effects.append(StartStore(job.name, job.store_incarnation, job.spec.master_port))
        if job.stopping is not None and not stopping:
            order = job.stopping
            effects.append(StopJobHere(job.name, order.generation, order.grace, order.final))
        return effects

    def _end_again(self, job: Job, worker: Worker, *, there: bool) -> list[Effect]:
        """It was to end, and the order may have ended with the agent that had it."""
        if not there:
            del job.workers[worker.incarnation]
        elif job.stopping is None:
            return [SignalWorker(job.name, worker.member, worker.incarnation, signal.SIGKILL)]
        return []

    def _start_again(self, now: float, job: Job, worker: Worker) -> list[Effect]:
        if not self.node.draining:
            return [StartWorker(job.name, worker.member, worker.incarnation)]
        del job.workers[worker.incarnation]
        return self.losses.lose(now, job, worker, Cause(kind="node"), now, "drain")
