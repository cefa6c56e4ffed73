"""What people ask of the coordinator: to run a job, to end one, and how things stand."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from seamark.protocol.codec import MAX_BODY
from seamark.protocol.messages import (
    CoordinatorStatus,
    FollowJob,
    Incident,
    Incidents,
    IncidentsRequest,
    NodeStatus,
    Refused,
    StopJob,
    SubmitJob,
)
from seamarkd.coordinator.budget import RestartBudget
from seamarkd.coordinator.cluster import SUSPENDED, Cluster
from seamarkd.coordinator.dispatch import unusable
from seamarkd.coordinator.effects import Effect, Forget, persist
from seamarkd.coordinator.job import ENDED, Job, forgotten, members, status
from seamarkd.coordinator.placement import larger_than, refusal
from seamarkd.coordinator.starts import Starts
from seamarkd.coordinator.stops import Stops
from seamarkd.effects import Send

FOLLOW_FOR = 10.0
"""Seconds a follower is told of changes without asking again."""
INCIDENTS_BYTES = MAX_BODY // 2
"""Of the incidents in one answer: of a large job's thousand the first are left out."""
ENDED_KEPT = 1_000
"""Ended jobs that are remembered; the oldest are forgotten first."""

_encoded = msgspec.msgpack.Encoder().encode


class Operators:
    """Answers people.

    Args:
        cluster: nodes and jobs.
        starts, stops: run and end the jobs.
    """

    def __init__(self, cluster: Cluster, starts: Starts, stops: Stops) -> None:
        self._cluster = cluster
        self._starts = starts
        self._stops = stops

    def submit(self, now: float, route: bytes, request: SubmitJob) -> list[Effect]:
        """A new job, or the one that was submitted under this id before."""
        cluster, spec = self._cluster, request.spec
        known = cluster.jobs.get(spec.name)
        if known is not None and known.submission == request.submission:
            known.followers[route] = now + FOLLOW_FOR
            return [Send(route, status(known, now, request.request))]
        refused = self._refusal(known, request)
        if refused is not None:
            return [Send(route, refused)]
        job = cluster.jobs[spec.name] = Job(spec, RestartBudget(spec.max_restarts), now, request.submission)
        # What an earlier job of this name has left on nodes that are away is ended when they come back.
        job.left = set(known.left) if known is not None else set()
        job.notice = forgotten(known)
        job.followers[route] = now + FOLLOW_FOR
        durable: list[Effect] = [*self._forget_oldest(), persist(job, fresh=True)]
        return [*durable, Send(route, status(job, now, request.request)), *self._starts.place(now, job)]

    def _refusal(self, known: Job | None, request: SubmitJob) -> Refused | None:
        cluster, spec = self._cluster, request.spec
        if cluster.trouble or cluster.suspended:
            why = cluster.trouble or SUSPENDED
            return Refused(request.request, "READ_ONLY", f"no new jobs now: {why}")
        if known is not None and known.state not in ENDED:
            sentence = f"a job named {spec.name} is running: give this one another name with --name"
            return Refused(request.request, "NAME_TAKEN", sentence)
        why_not = refusal(spec) or unusable(spec)
        if why_not:
            return Refused(request.request, "BAD_REQUEST", why_not)
        too_large = larger_than(spec, {name: node.slots for name, node in cluster.nodes.items()})
        return Refused(request.request, "NO_SLOTS", too_large) if too_large else None

    def _forget_oldest(self) -> list[Effect]:
        jobs = self._cluster.jobs
        ended = sorted((job.ended_at, name) for name, job in jobs.items() if job.state in ENDED)
        forgotten = [name for _, name in ended[:-ENDED_KEPT]]
        for name in forgotten:
            del jobs[name]
        return [Forget(name) for name in forgotten]

    def status(self, now: float, request: int) -> CoordinatorStatus:
        """What this coordinator knows; the shell adds what it knows of its process."""
        cluster = self._cluster
        used: dict[str, int] = {}
        for job in cluster.jobs.values():
            for slot in job.slots if job.state not in ENDED else ():
                used[slot.node] = used.get(slot.node, 0) + 1
        return CoordinatorStatus(
            request=request,
            epoch=cluster.epoch,
            software="",
            pid=0,
            uptime=0.0,
            trouble=cluster.trouble,
            nodes=[
                NodeStatus(
                    name,
                    node.slots,
                    used.get(name, 0),
                    node.draining,
                    node.refused,
                    node.unhealthy,
                    {reason: max(0.0, now - at) for reason, at in node.refused_at.items()},
                )
                for name, node in sorted(cluster.nodes.items())
            ],
            # Who wants to know how a job's log ended asks for that job: of a thousand they fit into no message.
            jobs=[replace(status(job, now), log_tail=[]) for job in cluster.jobs.values()],
            members={job.spec.name: members(job) for job in cluster.jobs.values() if job.state not in ENDED},
        )

    def follow(self, now: float, route: bytes, request: FollowJob) -> list[Effect]:
        """Who asks is told of every change for a while."""
        job = self._cluster.jobs.get(request.job)
        if job is None:
            return [Send(route, _unknown(request.request, request.job))]
        job.followers[route] = now + FOLLOW_FOR
        return [Send(route, status(job, now, request.request))]

    def incidents(self, now: float, route: bytes, request: IncidentsRequest) -> list[Effect]:
        """What happened to a job."""
        job = self._cluster.jobs.get(request.job)
        if job is None:
            return [Send(route, _unknown(request.request, request.job))]
        return [Send(route, Incidents(request.request, request.job, _latest(job.incidents.incidents)))]

    def stop(self, now: float, route: bytes, request: StopJob) -> list[Effect]:
        """Ends a job now. One that ends already ends as it was to: the same wish again gives its nodes no more time."""
        job = self._cluster.jobs.get(request.job)
        if job is None:
            return [Send(route, _unknown(request.request, request.job))]
        ends = job.state in ENDED or (job.state == "STOPPING" and job.outcome != "PENDING")
        effects = [] if ends else self._stops.end(now, job, "CANCELLED", f"stopped: {request.reason}")
        return [*effects, Send(route, status(job, now, request.request))]


def _latest(incidents: list[Incident]) -> list[Incident]:
    """As many as one answer holds; the last one at least."""
    room, first = INCIDENTS_BYTES, len(incidents)
    while first > 0 and (room := room - len(_encoded(incidents[first - 1]))) >= 0:
        first -= 1
    return incidents[min(first, len(incidents) - 1) :] if incidents else []


def _unknown(request: int, job: str) -> Refused:
    return Refused(request, "UNKNOWN_JOB", f"there is no job named {job}", job)
