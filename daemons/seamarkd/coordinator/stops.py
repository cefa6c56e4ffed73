"""Workers are stopped: for a restart of all, for good, or until there is a coordinator again.

A job that stops waits for the word of each of its nodes, and goes on to what comes then: it is placed anew, has ended,
or waits. Room that it leaves is given to the jobs that want it.
"""

from __future__ import annotations

from msgspec.structs import replace

from seamark.protocol.messages import JobEnded, StopWorkers, StoreAddress, WorkerExited, WorkersStopped
from seamarkd.coordinator.cluster import NODE_SILENT, STOP_GRACE, SUSPENDED, UNHEARD, Cluster
from seamarkd.coordinator.effects import Effect, ToLighthouse, persist
from seamarkd.coordinator.job import ENDED, Job, State, reached, standing, success
from seamarkd.coordinator.policy import decide
from seamarkd.coordinator.starts import Starts
from seamarkd.exits import ABORT_EXIT_CODE, PREEMPTION_GRACE


class Stops:
    """Restarts, ends and puts aside jobs.

    Args:
        cluster: nodes and jobs.
        starts: places what is started anew, or gets the room that has become free.
    """

    def __init__(self, cluster: Cluster, starts: Starts) -> None:
        self._cluster = cluster
        self._starts = starts

    def restart(self, now: float, job: Job) -> list[Effect]:
        """All workers are started anew."""
        job.state = "RESTARTING"
        job.moving = ""
        return self._stop_workers(now, job, final=False)

    def end(self, now: float, job: Job, outcome: State, result: str) -> list[Effect]:
        """The job ends; ``result`` says how, in a sentence."""
        job.outcome = outcome
        job.result = result
        job.state = "STOPPING"
        job.sentence = "stops the workers"
        job.ended_at = now
        return self._stop_workers(now, job, final=True)

    def put_all_aside(self, now: float) -> list[Effect]:
        """This host goes away: every worker is asked for a last checkpoint, and the next start goes on there (D12)."""
        effects: list[Effect] = []
        for job in self._cluster.jobs.values():
            if job.state in ("STARTING", "RUNNING", "RESTARTING"):
                job.outcome, job.state = "PENDING", "STOPPING"
                job.sentence = f"{SUSPENDED}: its workers are asked to save, and go on when there is one again"
                effects += self._stop_workers(now, job, final=True)
        return effects

    def _stop_workers(self, now: float, job: Job, *, final: bool) -> list[Effect]:
        cluster = self._cluster
        job.request = cluster.next_request()
        job.roster_request = 0
        job.stop_until = now + (PREEMPTION_GRACE if cluster.drains(job) else _grace(job)) + NODE_SILENT
        nodes = {slot.node for slot in job.slots}
        job.stopping = {node for node in nodes if node in cluster.nodes or now < cluster.settles_at}
        effects: list[Effect] = []
        if final:
            effects += [effect for node in sorted(job.left - nodes) for effect in cluster.leave(job, node)]
            # Those that can't hear it are told when they are there again.
            job.left |= nodes - job.stopping
        effects = [persist(job), *cluster.to_nodes(job, self.order(job)), *effects]
        if not job.stopping:
            effects += self._all_stopped(now, job)
        return [*effects, *cluster.tell(job)]

    @staticmethod
    def order(job: Job) -> StopWorkers:
        """What the nodes of a job that stops are told; told again, it is the same."""
        final = job.state == "STOPPING"
        abort = job.result if final and job.outcome == "ABORTED" else ""
        return StopWorkers(job.request, job.spec.name, max(job.generation, 0), _grace(job), final, abort)

    # --- nodes have stopped them ---------------------------------------------------------------------------

    def workers_stopped(self, now: float, route: bytes, report: WorkersStopped) -> list[Effect]:
        """A node has."""
        job = self._cluster.jobs.get(report.job)
        if job is None:
            return []
        here = {name for name, node in self._cluster.nodes.items() if node.route == route}
        if job.state in ENDED and here & job.left:
            # Nothing of it lives there any more, and nothing will.
            job.left -= here
            return [persist(job)]
        if report.request != job.request or job.state not in ("STOPPING", "RESTARTING"):
            return []
        job.stopping -= here
        return [] if job.stopping else self._all_stopped(now, job)

    def give_up(self, now: float, job: Job, gone: set[str]) -> list[Effect]:
        """Nodes that have said nothing in their time, or are ``gone``, are waited for no longer."""
        late = job.stopping if now >= job.stop_until else job.stopping & gone
        if not late:
            return []
        job.left |= late
        job.stopping -= late
        return [] if job.stopping else self._all_stopped(now, job)

    def _all_stopped(self, now: float, job: Job) -> list[Effect]:
        if job.state == "STOPPING" and job.outcome == "PENDING":
            return self._put_aside(now, job)
        if job.state == "STOPPING":
            job.state = job.outcome
            job.sentence = job.result
            # Nobody has a lease of it any more, whether its end was heard or not.
            job.datasets = [replace(one, leased=0) for one in reached(job)]
            ended = ToLighthouse(JobEnded(job.spec.name, job.submission))
            return [persist(job), ended, *self._cluster.tell(job), *self.use_room(now)]
        job.incidents.restarted()
        return self._starts.place(now, job)

    def _put_aside(self, now: float, job: Job) -> list[Effect]:
        """All workers of a job are gone, and it begins anew where it was, unless nothing is left to be done."""
        done = job.spec.independent and job.shards is not None and job.shards.finished
        if done or (job.slots and all(slot.member in job.finished for slot in job.slots)):
            good = job.shards is None or job.shards.complete
            job.outcome, job.result, job.ended_at = "SUCCEEDED" if good else "FAILED", success(job), now
            return self._all_stopped(now, job)
        job.state, job.outcome = "PENDING", "FAILED"
        job.left |= {slot.node for slot in job.slots}
        job.slots, job.store, job.store_node = [], StoreAddress(), ""
        job.processes.clear()
        job.sentence = SUSPENDED if self._cluster.suspended else UNHEARD
        return [persist(job), *self._cluster.tell(job), *self.use_room(now)]

    # --- what happens to a job that is put aside -----------------------------------------------------------

    def exited_meanwhile(self, now: float, job: Job, report: WorkerExited) -> list[Effect]:
        """A rank of a job that is put aside may have come to its end: an exit code alone doesn't say so."""
        if report.status == ABORT_EXIT_CODE:
            rank = report.member.rpartition("/")[2]
            return self.aborted_meanwhile(now, job, f"rank {rank} aborted the job (RestartAbort)")
        if report.wrapped and report.completed:
            job.finished.add(report.member)
        return [persist(job)]

    def aborted_meanwhile(self, now: float, job: Job, result: str) -> list[Effect]:
        """Its workers are being stopped already, but were to go on later: they are not."""
        if job.outcome != "PENDING":
            return []
        job.outcome, job.result, job.ended_at = "ABORTED", result, now
        return [persist(job)]

    # --- room ----------------------------------------------------------------------------------------------

    def use_room(self, now: float) -> list[Effect]:
        """Jobs get places in the order in which they were submitted; a small one may overtake."""
        if self._cluster.suspended:
            return []
        effects: list[Effect] = []
        for _, name in sorted((job.submitted_at, name) for name, job in self._cluster.jobs.items()):
            job = self._cluster.jobs[name]
            if job.state == "PENDING":
                effects += self._starts.place(now, job)
            elif job.state == "RUNNING":
                effects += self.take_room(now, job)
        return effects

    def take_room(self, now: float, job: Job) -> list[Effect]:
        """What a running job does about free places."""
        if not self._starts.has_room(now, job):
            return []
        match decide("node-new", standing(job)):
            case "fill":
                return self._starts.fill(now, job, "")
            case "grow":
                job.sentence = "another node is there: all workers are restarted, to run on it, too"
                return self.restart(now, job)
            case _:
                return []


def _grace(job: Job) -> float:
    """Seconds that its workers have to end: more where they go on later from what they save now."""
    return PREEMPTION_GRACE if job.state == "STOPPING" and job.outcome == "PENDING" else STOP_GRACE
