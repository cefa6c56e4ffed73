"""What a node's agent knows, shared by the parts that rule over it; and whether the node takes workers (D12)."""

from __future__ import annotations

from collections.abc import Callable

from seamark.protocol.messages import JobSpec
from seamarkd.agent.effects import Effect, EndWorker, Introduce
from seamarkd.agent.job import Job, Worker
from seamarkd.exits import PREEMPTION_GRACE

UNCHECKED = "its health checks have not ended yet"


class Node:
    """One node.

    Args:
        name: its name.
        new_incarnation: gives a fresh random id.
    """

    def __init__(self, name: str, new_incarnation: Callable[[], str]) -> None:
        self.name = name
        self.new_incarnation = new_incarnation
        self.jobs: dict[str, Job] = {}
        self.draining = ""
        """Why its workers leave and no others come; empty while it serves."""
        self.unhealthy = ""
        """Why no more jobs come; empty for a node whose checks pass."""
        self._has_checks = False

    def find(self, job_name: str, incarnation: str) -> tuple[Job, Worker] | None:
        """A worker of this node, and its job."""
        job = self.jobs.get(job_name)
        worker = job.workers.get(incarnation) if job else None
        return (job, worker) if job is not None and worker is not None else None

    def spec(self, job: str) -> JobSpec:
        """What the job was submitted with."""
        return self.jobs[job].spec

    def runs(self, job: str, incarnation: str) -> bool:
        """True for a worker whose exit is to be reported, or was and is not known to have been taken."""
        known = self.jobs.get(job)
        return known is not None and (incarnation in known.workers or incarnation in known.exited)

    def is_to_end(self, job: str, incarnation: str) -> bool:
        """Whether a worker that was asked to end, and had its time, is still to: its node may serve again."""
        found = self.find(job, incarnation)
        return found is not None and (bool(found[1].hang) or found[1].ordered or self.draining != "")

    def listening(self, job: str) -> list[str]:
        """The workers that are told of the job's failures."""
        known = self.jobs.get(job)
        return [worker.incarnation for worker in known.workers.values() if worker.wrapped] if known else []

    @property
    def busy(self) -> bool:
        """Whether a worker of it lives."""
        return any(job.workers for job in self.jobs.values())

    @property
    def stopping(self) -> bool:
        """Whether workers of it are being stopped as ordered, and nobody has been told yet that they are."""
        return any(job.stopping is not None for job in self.jobs.values())

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
        if self._has_checks:
            self.unhealthy = UNCHECKED
        return [Introduce()]

    def begin_checks(self) -> None:
        """Before it introduces itself: it has health checks, and none has ended yet."""
        self._has_checks, self.unhealthy = True, UNCHECKED

    def checked(self, problem: str) -> list[Effect]:
        """Its health checks have ended: without a problem, or with this one. What runs here goes on."""
        if problem == self.unhealthy:
            return []
        self.unhealthy = problem
        return [Introduce()]
