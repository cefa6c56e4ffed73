"""Who of a node's workers is lost, who takes its place (D3, D16), and how each has ended."""

from __future__ import annotations

import signal

from seamark.protocol.messages import Cause, MemberFaulted, MemberLost, MemberStuck, Message, Roster, WorkerExited
from seamarkd.agent.effects import (
    Effect,
    EndWorker,
    ForgetExit,
    Remember,
    SignalWorker,
    StartWorker,
    ToCoordinator,
    ToLighthouse,
)
from seamarkd.agent.ends import Ends
from seamarkd.agent.hang import Verdict
from seamarkd.agent.job import Job, Worker
from seamarkd.agent.node import Node
from seamarkd.agent.reports import Reports
from seamarkd.exits import ABORT_EXIT_CODE, UNKNOWN_STATUS, discarded_cause, exit_cause


class Losses:
    """The losses of one node's workers."""

    def __init__(self, node: Node, reports: Reports, ends: Ends) -> None:
        self._node = node
        self._reports = reports
        self._ends = ends

    def keeper_lost(self, job_name: str) -> list[Effect]:
        """The job's keeper was killed. Its workers live on, and no other keeper will ever know of them."""
        job = self._node.jobs.get(job_name)
        if job is None:
            return []
        for worker in job.workers.values():
            worker.orphan = worker.orphan or worker.pid != 0
        return [Remember(job_name)]

    def dying(self, now: float, job_name: str, incarnation: str, how: str, at: float) -> list[Effect]:
        """The kernel says that a worker is dying, before its exit status is known."""
        found = self._node.find(job_name, incarnation)
        if found is None:
            return []
        job, worker = found
        cause = Cause(kind="hang", text=worker.hang) if worker.hang else Cause(kind="signal", text="killed")
        return self.lose(now, job, worker, cause, at, how)

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
        found = self._node.find(job_name, incarnation)
        if found is None or found[1].lost or found[1].ordered:
            return []
        _, worker = found
        if verdict.kind == "soft":
            cause = Cause(kind="hang", text=verdict.text)
            return [ToLighthouse(MemberFaulted(job_name, worker.member, incarnation, iteration, cause, now))]
        worker.hang = verdict.text
        return [EndWorker(job_name, incarnation, 0.0 if verdict.kind == "stopped" else grace)]

    def stuck(self, now: float, incarnation: str, request: MemberStuck) -> list[Effect]:
        """A worker says of itself that nothing can free it."""
        found = self._node.find(request.job, incarnation)
        if found is None or incarnation != request.incarnation:
            return []
        job, worker = found
        cause = Cause(kind="stuck", text="blocked in a collective that could not be cut free; replaced")
        kill = SignalWorker(job.name, worker.member, incarnation, signal.SIGKILL)
        return [*self.lose(now, job, worker, cause, now, "wrapper"), kill]

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
        found = self._node.find(job_name, incarnation)
        if found is None:
            return []
        job, worker = found
        del job.workers[incarnation]
        worker.status = status
        if status == 0 and not worker.wrapped and not self._node.draining:
            # On a node that drains it ends because it was asked to.
            worker.completed = True
        effects: list[Effect] = []
        if not (status in (0, UNKNOWN_STATUS) and worker.completed):
            cause = discarded_cause(status) if discarded else exit_cause(status)
            if worker.hang:
                cause = Cause(kind="hang", status=cause.status, text=f"{worker.hang}; {cause.text}")
            effects = self.lose(now, job, worker, cause, at, "exit status")
        message = WorkerExited(
            self._reports.next_request(),
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
            self._node.name,
            job.quorum.iteration if job.quorum else -1,
            self._node.draining,
            oom_kill,
            worker.hang,
        )
        job.exited[incarnation] = worker
        return [Remember(job_name), *effects, self._reports.send(now, ToCoordinator(message)), *self._ends.leave(job)]

    def exit_known(self, report: Message | None) -> list[Effect]:
        """The coordinator has acknowledged a report: an exit need be kept by nobody any longer."""
        if not isinstance(report, WorkerExited):
            return []
        job = self._node.jobs.get(report.job)
        if job is None or job.exited.pop(report.incarnation, None) is None:
            return []
        # In this order: killed in between, an agent finds an exit that it need not know, and not a worker of whose end
        # nobody can tell it any more.
        return [Remember(report.job), ForgetExit(report.job, report.member, report.incarnation)]

    def lose(self, now: float, job: Job, worker: Worker, cause: Cause, at: float, how: str) -> list[Effect]:
        """A worker is lost: reported once, together with who takes its place, if somebody does."""
        roster = job.roster
        current = roster is not None and worker.generation == roster.generation
        if worker.lost or worker.ordered or roster is None or not current:
            return []
        if self._node.draining and not (cause.kind == "exit" and cause.status == ABORT_EXIT_CODE):
            why = f"node {self._node.name} drains: {self._node.draining}"
            cause = Cause(kind="node", status=cause.status, text=why)
        worker.lost = True
        self._reports.withdraw_announcement(worker.incarnation)
        if self._may_replace(job, roster, cause):
            job.allowance -= 1
            worker.replacement = self._node.new_incarnation()
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
            request=self._reports.next_request(),
            job=job.name,
            generation=worker.generation,
            member=worker.member,
            incarnation=worker.incarnation,
            cause=cause,
            occurred_at=-1.0,
            detected_at=at,
            detector=how,
            replacement=worker.replacement,
            node=self._node.name,
        )
        job.losses.append(report)
        return self._reports.send(now, ToLighthouse(report))

    def _may_replace(self, job: Job, roster: Roster, cause: Cause) -> bool:
        """Only a session that somebody's wrapper holds together can be entered again by a newcomer, or none at all."""
        aborted = cause.kind == "exit" and cause.status == ABORT_EXIT_CODE
        leaves = aborted or cause.kind == "discarded" or self._node.draining != ""
        session = job.wrapped or roster.spec.independent
        wanted = roster.policy == "replace" and session and not leaves
        return wanted and job.allowance > 0 and not job.ended and job.stopping is None
