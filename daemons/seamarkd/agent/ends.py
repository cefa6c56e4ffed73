"""Orders to stop a job's workers: what they end, and what is asked of the node once all is gone."""

from __future__ import annotations

from msgspec.structs import replace

from seamark.protocol.messages import JobAborted, Message, PrepareJob, Roster, StopWorkers, WorkersStopped
from seamarkd.agent.effects import Effect, Remember, StopJobHere, TellWorkers, ToCoordinator
from seamarkd.agent.job import Job
from seamarkd.agent.node import Node
from seamarkd.exits import PREEMPTION_GRACE

ABORT_PATIENCE = 3.0
"""Seconds that workers of an aborted job have to end by themselves, with the exit code that says why."""


class Ends:
    """How jobs end on this node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._afterwards: dict[str, PrepareJob | Roster] = {}
        """By job: what is asked of this node as soon as all of it is gone here. It has a place here again."""

    def defer(self, job_name: str, order: PrepareJob | Roster) -> None:
        """What is asked of this node while the job ends here: it waits for that."""
        self._afterwards[job_name] = order

    def stop(self, order: StopWorkers) -> list[Effect]:
        """All workers of a job are to end."""
        job = self._node.jobs.get(order.job)
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
        grace = PREEMPTION_GRACE if self._node.draining and job.workers else order.grace
        if order.abort and self._node.listening(job.name):
            told = TellWorkers(job.name, JobAborted(job.name, order.abort))
            stop = StopJobHere(job.name, order.generation, grace, order.final, ABORT_PATIENCE)
            return [Remember(job.name), told, stop]
        return [Remember(job.name), StopJobHere(job.name, order.generation, grace, order.final)]

    def leave(self, job: Job) -> list[Effect]:
        """The last worker of a node that drains has ended: the job's keeper and store end, too."""
        if not self._node.draining or job.workers or job.ended or job.roster is None:
            return []
        return self.stop(StopWorkers(0, job.name, job.roster.generation, 0.0, final=True))

    def stopped(self, job_name: str, *, final: bool) -> tuple[list[Effect], Message | None]:
        """All workers of the job are gone, as ordered; and what is asked of this node from now on."""
        job = self._node.jobs.get(job_name)
        if job is None or job.stopping is None or (job.stopping.final and not final):
            # In the last case the order to end all of it came while the workers ended, and is under way.
            return [], None
        order = job.stopping
        job.stopping = None
        afterwards = None
        if order.final:
            del self._node.jobs[job_name]
            afterwards = self._afterwards.pop(job_name, None)
        done = ToCoordinator(WorkersStopped(order.request, order.job, order.generation))
        return [Remember(job_name), done], afterwards
