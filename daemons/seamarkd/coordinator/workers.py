"""What is reported of a job's workers: started, registered, ended, on their way, asking for the end of the job.

A report counts once, for the present generation, and from the node that has the worker's place. What an end means for
the job is ``losses.py``'s.
"""

from __future__ import annotations

from seamark.protocol.messages import (
    AbortJob,
    Acknowledged,
    JobProgress,
    SharedState,
    Timeline,
    WorkerExited,
    WorkerRegistered,
    WorkerStarted,
)
from seamarkd.coordinator.cluster import UNHEARD, Cluster
from seamarkd.coordinator.dispatch import Dispatch
from seamarkd.coordinator.effects import Effect, persist
from seamarkd.coordinator.job import ENDED, Job, Process, has_place
from seamarkd.coordinator.losses import Losses
from seamarkd.coordinator.stops import Stops
from seamarkd.effects import Send
from seamarkd.exits import NOT_STARTED

EXITS_KEPT = 1_000
"""Exits of a job, or two per rank, that are known again: an agent repeats each until it hears that it was taken."""


class Workers:
    """Takes the reports.

    Args:
        cluster: nodes and jobs.
        dispatch: is told who works, and who does no more.
        losses: decides what an end means.
        stops: ends a job whose workers ask for it, or don't suit its policy.
    """

    def __init__(self, cluster: Cluster, dispatch: Dispatch, losses: Losses, stops: Stops) -> None:
        self._cluster = cluster
        self._dispatch = dispatch
        self._losses = losses
        self._stops = stops

    def started(self, now: float, route: bytes, report: WorkerStarted) -> list[Effect]:
        """A worker process runs."""
        effects: list[Effect] = [Send(route, Acknowledged(report.request))]
        job = self._cluster.jobs.get(report.job)
        if job is None or report.generation != job.generation or job.state not in ("STARTING", "RUNNING"):
            return effects
        known = job.processes.get(report.member)
        if known is not None and known.incarnation == report.incarnation:
            return effects
        if known is not None and known.node == report.node and report.forked_at < known.forked_at:
            # Repeated by an agent whose news of the successor was quicker.
            return effects
        if not job.store.port or not has_place(job, report):
            # Of an earlier generation, or on a node that it was taken from: that is about to be told so.
            return effects
        job.processes[report.member] = Process(
            report.incarnation, report.pid, alive=True, node=report.node, forked_at=report.forked_at
        )
        job.incidents.started(report)
        effects += self._dispatch.started(now, job, report)
        if job.state == "STARTING" and len(job.processes) == len(job.slots):
            job.state = "RUNNING"
            job.sentence = "runs"
            effects.insert(0, persist(job))
        elif len(job.processes) == len(job.slots) and job.sentence == UNHEARD:
            job.sentence = "runs"
        return [*effects, *self._cluster.tell(job)]

    def registered(self, now: float, route: bytes, report: WorkerRegistered) -> list[Effect]:
        """A worker uses the restart wrapper."""
        job = self._cluster.jobs.get(report.job)
        if job is None or job.state in ENDED:
            return []
        first, job.wrapped = not job.wrapped, True
        if job.spec.policy == "any-failed" and job.state != "STOPPING":
            return self._stops.end(
                now,
                job,
                "FAILED",
                "--restart-policy any-failed restarts every process at any failure, which leaves nothing to "
                "seamark.Wrapper's restart in process: use --restart-policy replace or min-healthy, or remove it",
            )
        # Nodes that came before this was known: only now can they be taken in without a restart of all.
        return self._stops.take_room(now, job) if first and job.state == "RUNNING" else []

    def exited(self, now: float, route: bytes, report: WorkerExited) -> list[Effect]:
        """A worker process has ended. Acknowledged once what follows is durable: it is repeated until then."""
        acknowledged: list[Effect] = [Send(route, Acknowledged(report.request))]
        job = self._cluster.jobs.get(report.job)
        if job is not None:
            acknowledged = [*self._dispatch.exited(now, job, report), *acknowledged]
        if job is None or report.generation != job.generation or job.state in ENDED:
            return acknowledged
        if report.incarnation in job.exited:
            return acknowledged
        job.exited[report.incarnation] = report.member
        if len(job.exited) > max(EXITS_KEPT, 2 * len(job.slots)):
            del job.exited[next(iter(job.exited))]
        # A lighthouse that ended with its answer has told nobody else: the number must not be given again.
        job.iteration = max(job.iteration, report.iteration)
        current = _is_current(job, report)
        job.incidents.exited(report)
        if job.state == "STOPPING" and job.outcome == "PENDING":
            return [*self._stops.exited_meanwhile(now, job, report), *acknowledged]
        if job.state in ("STOPPING", "RESTARTING") or report.ordered or not has_place(job, report):
            return acknowledged
        if not current and not report.replacement:
            # Its place was given to another node meanwhile.
            return acknowledged
        return [*self._losses.worker_ended(now, job, report), *acknowledged, *self._cluster.tell(job)]

    def asked_to_end(self, now: float, route: bytes, report: AbortJob) -> list[Effect]:
        """A worker asks for the end of the whole job."""
        job = self._cluster.jobs.get(report.job)
        if job is None or job.state in ENDED:
            return []
        rank = report.member.rpartition("/")[2]
        result = f"rank {rank} asked for the end of the job: {report.reason}"
        if job.state == "STOPPING":
            return self._stops.aborted_meanwhile(now, job, result)
        return self._stops.end(now, job, "ABORTED", result)

    def progressed(self, now: float, route: bytes, report: JobProgress) -> list[Effect]:
        """Steps and checkpoints: these give the job its restarts back."""
        job = self._cluster.jobs.get(report.job)
        if job is None or job.state in ENDED:
            return []
        if any(step and step != job.step.get(member) for member, step in report.step.items()):
            job.fruitless.renew()
        job.step.update(report.step)
        checkpoint = max(report.checkpoint.values(), default=0)
        effects: list[Effect] = []
        if checkpoint > job.checkpoint:
            job.checkpoint = checkpoint
            if job.budget.renew() and job.state == "RUNNING":
                effects += self._cluster.to_nodes(job, self._cluster.roster(now, job))
        return [*effects, *self._cluster.tell(job)]

    def timeline(self, now: float, route: bytes, report: Timeline) -> list[Effect]:
        """What a worker saw of an incident."""
        job = self._cluster.jobs.get(report.job)
        if job is None or not job.incidents.timeline(report):
            return []
        return [persist(job)]

    def shared_state(self, now: float, route: bytes, report: SharedState) -> list[Effect]:
        """What the job's workers share has changed."""
        job = self._cluster.jobs.get(report.job)
        if job is None or job.state in ENDED or report.version <= job.state_version:
            return []
        job.state_version, job.state_text = report.version, report.text
        return [persist(job)]


def _is_current(job: Job, report: WorkerExited) -> bool:
    """Whether it was the last process known in its place, which is marked as gone then."""
    process = job.processes.get(report.member)
    # Of one that could not be started nobody has said that it was.
    current = process is None or process.incarnation == report.incarnation or report.status == NOT_STARTED
    if process is not None and current:
        process.alive = False
    return current
