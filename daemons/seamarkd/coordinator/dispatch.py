"""Which job's shards a message or an event is about, and who is told what follows from it.

Between the coordinator, which knows nodes and processes, and ``shards.py``, which knows consumers and leases. A process
that was replaced, or whose node was lost, asks in vain.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from functools import partial

from seamark.protocol.messages import (
    Cause,
    Decisions,
    DecisionsRequest,
    JobSpec,
    Message,
    Refused,
    ReportFailure,
    ShardAnswer,
    ShardDecision,
    ShardRequest,
    WorkerExited,
    WorkerStarted,
)
from seamark.runtime_config import RuntimeConfig
from seamarkd.coordinator.classification import Evidence, job_patterns
from seamarkd.coordinator.effects import Effect
from seamarkd.coordinator.job import ENDED, Job
from seamarkd.coordinator.node import Node
from seamarkd.coordinator.shards import Answer, JobShards, Numbers
from seamarkd.effects import Send
from seamarkd.exits import NOT_STARTED, UNKNOWN_STATUS

DECISIONS_SHOWN = 1_000
FAULTS = frozenset({"exception", "hang", "stuck"})
"""Causes of a fault that are the worker's own: it goes on in its process, and what it was doing has failed."""


class Dispatch:
    """The shards of all jobs.

    Args:
        epoch: of the coordinator's start.
        jobs, nodes: the coordinator's; looked at, and of a job its ``shards`` are set.
        rng: draws the jitter of back-offs.
    """

    def __init__(self, epoch: int, jobs: Mapping[str, Job], nodes: Mapping[str, Node], rng: random.Random) -> None:
        self._jobs = jobs
        self._nodes = nodes
        self._rng = rng
        self._numbers = Numbers(epoch)
        self.hold = ""
        """Why nothing is given out just now."""

    def of(self, job: Job) -> JobShards:
        """The shards of a job."""
        if job.shards is None:
            patterns = job_patterns((one.regex, one.kind) for one in job.spec.failure_patterns)
            job.shards = JobShards(job.spec.name, _config(job.spec), self._numbers, self._rng, patterns)
        job.shards.held = bool(self._hold(job))
        return job.shards

    def _hold(self, job: Job) -> str:
        # Of a job that ends what is done is done; the rest is another time's.
        return self.hold or ("the job ends" if job.state == "STOPPING" else "")

    # --- messages ------------------------------------------------------------------------------------------

    def request(self, now: float, route: bytes, request: ShardRequest) -> list[Effect]:
        """A consumer asks, through its agent."""
        job = self._jobs.get(request.job)
        if job is None or job.state in ENDED:
            why = f"there is no job named {request.job}" if job is None else f"job {request.job} has ended"
            return [Send(route, ShardAnswer(request.request, request.job, request.consumer, "refused", reason=why))]
        process = job.processes.get(request.member)
        node = self._nodes.get(process.node) if process is not None else None
        if process is None or node is None or node.route != route:
            # It is asked again, and then its agent has introduced it.
            return []
        if process.incarnation != request.incarnation or not process.alive:
            why = "this process has been replaced: what it says counts no longer"
            return [Send(route, ShardAnswer(request.request, request.job, request.consumer, "refused", reason=why))]
        hold = "drain" if node.draining else self._hold(job)
        return self._tell(job, self.of(job).handle(now, request, process.node, partial(_nodes, job), hold))

    def reported(self, report: ReportFailure) -> None:
        """A worker says what it knows of its own failure."""
        job = self._jobs.get(report.job)
        if job is not None and job.state not in ENDED:
            self.of(job).reported(report)

    def decisions(self, now: float, request: DecisionsRequest) -> Message:
        """What was decided about a job's shards."""
        job = self._jobs.get(request.job)
        if job is None:
            return Refused(request.request, "UNKNOWN_JOB", f"there is no job named {request.job}", request.job)
        return decisions_asked(now, request, job.shards.decisions if job.shards is not None else ())

    # --- what becomes of workers ---------------------------------------------------------------------------

    def started(self, now: float, job: Job, report: WorkerStarted) -> list[Effect]:
        """A worker runs, or is known to run again."""
        if job.shards is None:
            return []
        return self._tell(job, self.of(job).seen(now, report.member, report.incarnation, partial(_nodes, job)))

    def exited(self, now: float, job: Job, report: WorkerExited) -> list[Effect]:
        """A worker has ended."""
        evidence = Evidence(
            oom_kill=report.oom_kill,
            notice=report.drains,
            timed_out=bool(report.hang),
            status=None if report.status in (UNKNOWN_STATUS, NOT_STARTED) else report.status,
            completed=report.completed,
            text=report.hang or "\n".join(report.log_tail),
        )
        if report.ordered or report.discarded:
            return self.lost(now, job, [report.incarnation], None)
        return self.lost(now, job, [report.incarnation], evidence)

    def faulted(self, now: float, job: Job, incarnation: str, cause: Cause) -> list[Effect]:
        """A worker has left its function by a failure of its own, and will enter it again."""
        if job.shards is None or cause.communication or cause.kind not in FAULTS:
            return []
        evidence = Evidence(text=cause.text, timed_out=cause.kind != "exception")
        return self._tell(job, self.of(job).failed(now, incarnation, evidence, partial(_nodes, job)))

    def lost(self, now: float, job: Job, incarnations: Iterable[str], evidence: Evidence | None) -> list[Effect]:
        """Workers are gone; without ``evidence`` they were stopped."""
        if job.shards is None:
            return []
        return self._tell(job, self.of(job).lost(now, incarnations, evidence, partial(_nodes, job)))

    def node_lost(self, now: float, job: Job, node: str, draining: str) -> list[Effect]:
        """A node is gone, with all that its workers had."""
        if job.shards is None:
            return []
        evidence = Evidence(notice=draining, node_lost=not draining)
        return self.lost(now, job, job.shards.holders(node), evidence)

    def all_lost(self, now: float, job: Job) -> list[Effect]:
        """All workers were ended, to be started anew."""
        if job.shards is None:
            return []
        return self.lost(now, job, job.shards.holders(), None)

    def drain(self, now: float, node: str) -> list[Effect]:
        """A host goes away."""
        effects: list[Effect] = []
        for job in self._jobs.values():
            if job.shards is not None:
                effects += self._tell(job, self.of(job).drain(node))
        return effects

    # --- time ----------------------------------------------------------------------------------------------

    def tick(self, now: float, *, settled: bool) -> list[Effect]:
        """What is due.

        Args:
            now: seconds.
            settled: the time is over in which holders from before this coordinator's start had to be heard of.
        """
        effects: list[Effect] = []
        for job in self._jobs.values():
            if job.shards is None or job.state in ENDED:
                continue
            if settled and job.state != "STOPPING":
                effects += self._tell(job, self.of(job).settle(now, partial(_nodes, job)))
            effects += self._tell(job, self.of(job).serve(now, partial(_nodes, job)))
        return effects

    def due(self) -> float | None:
        """When a back-off that somebody waits for is over; None if nobody does, or nothing may be given out."""
        if self.hold:
            return None
        found = [job.shards.due() for job in self._jobs.values() if job.shards is not None and job.state not in ENDED]
        return min((at for at in found if at is not None), default=None)

    def _tell(self, job: Job, answers: list[Answer]) -> list[Effect]:
        record = self.of(job).take_record()
        effects: list[Effect] = [] if record is None else [record]
        for answer in answers:
            node = self._nodes.get(answer.node)
            if node is not None:
                effects.append(Send(node.route, answer.message))
        return effects


def _nodes(job: Job) -> frozenset[str]:
    return frozenset(process.node for process in job.processes.values() if process.alive)


def decisions_asked(now: float, request: DecisionsRequest, decisions: Iterable[ShardDecision]) -> Decisions:
    """The latest of a job's decisions that are about what was asked for."""
    wanted = [one for one in decisions if request.dataset in ("", one.dataset) and request.shard in (-1, one.shard)]
    return Decisions(request.request, request.job, now, wanted[-DECISIONS_SHOWN:])


def unusable(spec: JobSpec) -> str:
    """Why a job's operational parameters can't be used; empty if they can."""
    try:
        _config(spec)
        job_patterns((one.regex, one.kind) for one in spec.failure_patterns)
    except ValueError as error:
        return str(error)
    return ""


def _config(spec: JobSpec) -> RuntimeConfig:
    return RuntimeConfig.from_dict(json.loads(spec.runtime)) if spec.runtime else RuntimeConfig()
