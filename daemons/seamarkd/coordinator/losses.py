"""What becomes of a job whose worker has ended or whose node is lost: the policy's verdict, carried out.

``policy.py`` is the table; here a job's standing is put to it, and restarts are charged to the job's budget.
"""

from __future__ import annotations

from seamark.protocol.messages import WorkerExited
from seamarkd.coordinator.cluster import Cluster
from seamarkd.coordinator.dispatch import Dispatch
from seamarkd.coordinator.effects import Effect, persist
from seamarkd.coordinator.job import Job, standing, success, unwrapped
from seamarkd.coordinator.policy import Happening, decide
from seamarkd.coordinator.starts import Starts
from seamarkd.coordinator.stops import Stops
from seamarkd.exits import ABORT_EXIT_CODE, UNKNOWN_STATUS, exit_cause


class Losses:
    """Decides on workers that have ended and on nodes that are lost.

    Args:
        cluster: nodes and jobs.
        dispatch: gives the shards of a lost node to others.
        starts, stops: carry the verdicts out.
    """

    def __init__(self, cluster: Cluster, dispatch: Dispatch, starts: Starts, stops: Stops) -> None:
        self._cluster = cluster
        self._dispatch = dispatch
        self._starts = starts
        self._stops = stops

    def worker_ended(self, now: float, job: Job, report: WorkerExited) -> list[Effect]:
        """A worker of the present generation has, in its place and not by an order."""
        rank = report.member.rpartition("/")[2]
        nothing_left = job.spec.independent and job.shards is not None and job.shards.finished
        if report.status in (0, UNKNOWN_STATUS) and (report.completed or nothing_left):
            job.finished.add(report.member)
            return self._carry_out(now, job, "worker-finished", "")
        if report.discarded:
            job.discarded.add(report.member)
            job.log_tail = report.log_tail
            why = f"the job's rank assignment discarded rank {rank}"
            return self._carry_out(now, job, "worker-discarded", why)
        how = exit_cause(report.status).text if report.status else "exited with code 0 before it had completed"
        job.log_tail = report.log_tail
        if report.status == ABORT_EXIT_CODE:
            return self._stops.end(now, job, "ABORTED", f"rank {rank} {how}: the job was aborted (RestartAbort)")
        if report.replacement:
            job.budget.spend(now)
            job.process_restarts += report.charged
            job.sentence = f"rank {rank} {how}; a replacement joins"
            return [persist(job)]
        if report.drains:
            node = next(slot.node for slot in job.slots if slot.member == report.member)
            return self.node_gone(now, job, node, drains=report.drains)
        job.failed.add(report.member)
        return self._carry_out(now, job, "worker-failed", f"rank {rank} {how}")

    def start_failed(self, now: float, job: Job, why: str) -> list[Effect]:
        """A keeper was killed before any worker of the job was there: all of it is started again, and charged."""
        return self._charged_restart(now, job, why)

    def node_gone(self, now: float, job: Job, node: str, drains: str = "") -> list[Effect]:
        """A node of the job is lost; ``drains``: it is only about to go, and why."""
        members = {slot.member for slot in job.slots if slot.node == node} - job.finished - job.failed
        known = self._cluster.nodes.get(node)
        draining = drains or (known.draining if known is not None else "")
        given: list[Effect] = []
        if not drains:
            for member in members:
                if member in job.processes:
                    job.processes[member].alive = False
            given = self._dispatch.node_lost(now, job, node, draining)
        # Else one of its ranks has ended, and the others have their time yet: what they still do counts.
        return [*given, *self._without_node(now, job, node, members, draining)]

    def _without_node(self, now: float, job: Job, node: str, members: set[str], draining: str) -> list[Effect]:
        if not draining:
            # It may be heard again at once: then it introduces itself.
            self._cluster.nodes.pop(node, None)
        if not members or job.state not in ("STARTING", "RUNNING"):
            return []
        job.left.add(node)
        job.failed |= members
        found = standing(job)
        if job.completed and (found.running == 0 or found.policy != "replace"):
            # Their function has returned on all ranks, and nobody is left who may call another.
            job.failed -= members
            job.finished |= members
            return self._carry_out(now, job, "worker-finished", "")
        if decide("node-lost", found) == "fill":
            job.slots = [slot for slot in job.slots if slot.node != node]
            job.failed -= members
            for member in members:
                if member in job.processes and not job.processes[member].alive:
                    del job.processes[member]
        why = f"node {node} drains: {draining}" if draining else f"node {node} is lost"
        return self._carry_out(now, job, "node-lost", why, charged=not draining)

    def _carry_out(self, now: float, job: Job, happening: Happening, why: str, *, charged: bool = True) -> list[Effect]:
        """What the job's policy says to what happened; ``why`` names it for people."""
        found = standing(job)
        match decide(happening, found):
            case "succeed":
                done = job.shards is None or job.shards.complete
                return self._stops.end(now, job, "SUCCEEDED" if done else "FAILED", success(job))
            case "fail":
                left = len(job.slots) - len(job.discarded)
                result = f"{why}: {left} ranks are left, fewer than {job.spec.min_ranks}"
                return self._stops.end(now, job, "FAILED", result)
            case "fill":
                return self._starts.fill(now, job, why)
            case "restart":
                if job.spec.policy == "min-healthy":
                    why += f"; {found.well} worker groups are well, fewer than {found.least}"
                if charged and not self._cluster.drains(job):
                    return self._charged_restart(now, job, why, notice=unwrapped(job))
                job.sentence = f"{why}; all workers are restarted"
                return self._stops.restart(now, job)
            case _:
                job.sentence = f"{why}; {found.well} worker groups go on" if why else job.sentence
                return [persist(job)]

    def _charged_restart(self, now: float, job: Job, why: str, *, notice: str = "") -> list[Effect]:
        if job.budget.spend(now):
            job.process_restarts += 1
            job.sentence = f"{why}; all workers are restarted"
            job.notice = notice or job.notice
            return self._stops.restart(now, job)
        tried = (
            f"the {job.spec.max_restarts} restarts of --max-restarts are used up"
            if job.spec.max_restarts
            else "--max-restarts 0 allows no restart"
        )
        return self._stops.end(now, job, "FAILED", f"{why}, and {tried}")
