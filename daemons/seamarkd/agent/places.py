"""The roster on this node (D1): which workers are started here, and which end because their place is elsewhere."""

from __future__ import annotations

import signal

from seamark.protocol.messages import Acknowledged, Cause, MemberStarted, NodeLeft, Roster, WorkerStarted
from seamarkd.agent.effects import Effect, EndWorker, Remember, SignalWorker, StartWorker, ToCoordinator, ToLighthouse
from seamarkd.agent.ends import Ends
from seamarkd.agent.job import Job, Worker
from seamarkd.agent.losses import Losses
from seamarkd.agent.node import Node
from seamarkd.agent.reports import Reports
from seamarkd.agent.stores import Stores
from seamarkd.exits import PREEMPTION_GRACE


class Places:
    """The places of one node's workers."""

    def __init__(self, node: Node, reports: Reports, ends: Ends, stores: Stores, losses: Losses) -> None:
        self._node = node
        self._reports = reports
        self._ends = ends
        self._stores = stores
        self._losses = losses

    def roster(self, now: float, roster: Roster) -> list[Effect]:
        """Who is in the job, and where: what is new of it for this node is done."""
        job = self._node.jobs.setdefault(roster.job, Job(roster.job, roster.spec))
        effects: list[Effect] = [ToCoordinator(Acknowledged(roster.request))]
        if job.ended:
            self._ends.defer(job.name, roster)
            return effects
        known = job.roster
        here = any(slot.node == self._node.name for slot in roster.slots)
        same = known is not None and roster.generation == known.generation
        if self._node.draining and here and not job.workers and same:
            effects.append(ToCoordinator(NodeLeft(job.name, self._node.name)))
        if known is not None and roster.generation <= known.generation and roster.submission == known.submission:
            job.allowance = roster.allowance
            if roster.generation == known.generation and roster.store_node != known.store_node:
                effects += self._stores.elsewhere(job, roster)
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
        mine = [slot.member for slot in roster.slots if slot.node == self._node.name]
        return [*effects, *self._start(now, job, mine)]

    def worker_started(self, now: float, job_name: str, incarnation: str, pid: int, forked_at: float) -> list[Effect]:
        """The keeper started a worker."""
        found = self._node.find(job_name, incarnation)
        if found is None:
            return []
        _, worker = found
        worker.pid = pid
        worker.forked_at = forked_at
        effects: list[Effect] = [Remember(job_name), self.started(now, job_name, worker)]
        if worker.ordered:
            # It was on its way when it was to be killed, and could not be reached.
            effects.append(SignalWorker(job_name, worker.member, incarnation, signal.SIGKILL))
        elif self._node.draining and not worker.lost:
            # It was on its way when the others were asked.
            effects.append(EndWorker(job_name, incarnation, PREEMPTION_GRACE))
        return effects

    def announce(self, now: float, job: Job, worker: Worker) -> Effect:
        """The lighthouse is to expect this worker."""
        started = MemberStarted(
            request=self._reports.next_request(),
            job=job.name,
            generation=worker.generation,
            member=worker.member,
            incarnation=worker.incarnation,
            node=self._node.name,
            placement=job.roster.placement if job.roster else 0,
        )
        return self._reports.send(now, ToLighthouse(started))

    def started(self, now: float, job_name: str, worker: Worker) -> Effect:
        """The coordinator is to know of this process."""
        message = WorkerStarted(
            self._reports.next_request(),
            job_name,
            worker.generation,
            worker.member,
            worker.incarnation,
            worker.pid,
            worker.forked_at,
            worker.replaces,
            self._node.name,
        )
        return self._reports.send(now, ToCoordinator(message))

    def _start(self, now: float, job: Job, members: list[str]) -> list[Effect]:
        assert job.roster is not None
        if self._node.draining:
            # Who says so has not heard of it yet, or did not hear that there is nobody left to wait for.
            refusal = ToCoordinator(NodeLeft(job.name, self._node.name))
            return [Remember(job.name), *([refusal] if members and not job.workers else [])]
        fresh = [Worker(member, self._node.new_incarnation(), job.roster.generation) for member in members]
        job.workers |= {worker.incarnation: worker for worker in fresh}
        effects: list[Effect] = [Remember(job.name)]
        for worker in fresh:
            effects.append(self.announce(now, job, worker))
            effects.append(StartWorker(job.name, worker.member, worker.incarnation))
        return effects

    def _places(self, now: float, job: Job, known: Roster, roster: Roster) -> list[Effect]:
        """Places of the same generation changed nodes: what came here is started, and what went from here is ended."""
        job.roster = roster
        placed = {slot.member: slot.placed for slot in known.slots if slot.node == self._node.name}
        here = {slot.member: slot.placed for slot in roster.slots if slot.node == self._node.name}
        effects: list[Effect] = []
        new = {member for member, number in here.items() if number != placed.get(member)}
        for worker in list(job.workers.values()):
            if worker.ordered or (worker.member in here and worker.member not in new):
                continue
            if worker.member in new and not worker.lost:
                # The session went on without this place, and with it this process is at home in no iteration.
                cause = Cause(kind="gone", text="its node had lost its place in the job, and has it again")
                effects += self._losses.lose(now, job, worker, cause, now, "placement")
                new -= {worker.member} if worker.replacement else set()
            worker.ordered = True
            effects.append(SignalWorker(job.name, worker.member, worker.incarnation, signal.SIGKILL))
        coming = {worker.member for worker in job.workers.values() if not worker.ordered}
        return [*effects, *self._start(now, job, [member for member in here if member in new - coming])]
