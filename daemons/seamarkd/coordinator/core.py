"""The coordinator as a state machine: who should be in each job, and how each job ends.

It owns rosters, generations and restart budgets. The restart of a single worker is the agent's (out of an
allowance); a restart of all workers, and the end of the job, are decided here. Pure: (message, now) in, effects
out; ``Persist`` stands before the sends that announce what it makes durable, and the shell keeps that order.

Each duty is a part of its own, and what they share is ``cluster.py``: nodes come (``sessions.py``), people ask
(``operators.py``), jobs are placed (``starts.py``), their workers report (``workers.py``), the lighthouse says who
lives (``liveness.py``), what is lost is decided on (``losses.py``), jobs are restarted and end (``stops.py``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

from seamark.protocol.messages import (
    AbortJob,
    Acknowledged,
    Beat,
    CheckpointShard,
    CompleteShard,
    DecisionsRequest,
    DrainNode,
    FailShard,
    FollowJob,
    Incident,
    IncidentsRequest,
    JobProgress,
    LeaseShard,
    Message,
    NodeHello,
    NodeLeft,
    NodeRefusals,
    OpenShards,
    PrepareFailed,
    Refused,
    ReleaseShard,
    ReportFailure,
    ShardRequest,
    SharedState,
    StopJob,
    StoreReady,
    SubmitJob,
    Timeline,
    WorkerExited,
    WorkerRegistered,
    WorkersStopped,
    WorkerStarted,
)
from seamarkd.coordinator.cluster import NODE_SILENT, STOP_GRACE, SUSPENDED, UNHEARD, Cluster
from seamarkd.coordinator.dispatch import Dispatch
from seamarkd.coordinator.effects import Effect
from seamarkd.coordinator.job import ENDED, JobRecord, restored
from seamarkd.coordinator.liveness import Liveness
from seamarkd.coordinator.losses import Losses
from seamarkd.coordinator.operators import Operators
from seamarkd.coordinator.sessions import Sessions
from seamarkd.coordinator.shards import Saved
from seamarkd.coordinator.starts import Starts
from seamarkd.coordinator.stops import Stops
from seamarkd.coordinator.stores import StoreMoves
from seamarkd.coordinator.workers import Workers
from seamarkd.effects import Send

LEASE_TIMEOUT = 60.0
"""Seconds without a beat after which what a node's workers hold is given to others, whatever the lighthouse says."""
LATE = 5.0
"""Seconds between two ticks that say that this daemon, or its host, stood still."""
OF_A_JOB = (AbortJob, PrepareFailed, ReportFailure, ShardRequest, SharedState, StoreReady, WorkerRegistered)
"""What names a job and no node, and changes it; reports that have to be acknowledged name their node."""


class Coordinator:
    """All jobs and nodes.

    Args:
        epoch: rises with every start of the daemon; the upper half of its request numbers.
        rng: draws the jitter of back-offs.

    Attributes:
        cluster: what is known.
        jobs, nodes: all of the cluster.
        from_lighthouse: (now, message) to what follows from an answer or an event of the lighthouse.
        status: (now, request) to what people are told of all; the shell adds what it knows of its process.
    """

    def __init__(self, epoch: int, rng: random.Random | None = None) -> None:
        cluster = self.cluster = Cluster(epoch)
        self.jobs, self.nodes = cluster.jobs, cluster.nodes
        self._ticked_at = self._awake_since = 0.0
        dispatch = self._dispatch = Dispatch(epoch, cluster.jobs, cluster.nodes, rng or random.Random())
        self._starts = Starts(cluster, dispatch)
        self._stores = StoreMoves(cluster)
        stops = self._stops = Stops(cluster, self._starts)
        self._losses = Losses(cluster, dispatch, self._starts, stops)
        workers = Workers(cluster, dispatch, self._losses, stops)
        sessions = self._sessions = Sessions(cluster, dispatch, self._losses, self._starts, stops)
        operators = Operators(cluster, self._starts, stops)
        self.from_lighthouse = Liveness(cluster, dispatch, self._losses, stops, self._stores).heard
        self.status = operators.status
        requests = (OpenShards, LeaseShard, CompleteShard, CheckpointShard, FailShard, ReleaseShard)
        self._handlers: dict[type[Message], Callable[[float, bytes, Any], list[Effect]]] = {
            NodeHello: sessions.hello,
            Beat: sessions.beat,
            DrainNode: sessions.drain,
            NodeLeft: sessions.left,
            NodeRefusals: sessions.refusals,
            SubmitJob: operators.submit,
            FollowJob: operators.follow,
            StopJob: operators.stop,
            IncidentsRequest: operators.incidents,
            StoreReady: self._store_ready,
            PrepareFailed: self._prepare_failed,
            WorkerStarted: workers.started,
            WorkerRegistered: workers.registered,
            WorkerExited: workers.exited,
            JobProgress: workers.progressed,
            Timeline: workers.timeline,
            SharedState: workers.shared_state,
            AbortJob: workers.asked_to_end,
            WorkersStopped: stops.workers_stopped,
            Acknowledged: lambda now, route, message: [],
            ReportFailure: self._reported,
            DecisionsRequest: lambda now, route, message: [Send(route, dispatch.decisions(now, message))],
            **dict.fromkeys(requests, dispatch.request),
        }

    def handle(self, now: float, route: bytes, message: Message) -> list[Effect]:
        """What follows from a message of an agent or an operator."""
        handler = self._handlers.get(type(message))
        if handler is None:
            sentence = f"{type(message).__name__} is not for a coordinator"
            return [Send(route, Refused(getattr(message, "request", 0), "BAD_REQUEST", sentence))]
        return handler(now, route, message)

    def foreign(self, node: str, message: Message) -> bool:
        """Whether a message speaks for a job that this node has no part in, although it names no node."""
        if not isinstance(message, OF_A_JOB):
            return False
        job = self.jobs.get(message.job)
        return job is not None and node not in {*(slot.node for slot in job.slots), *job.left, job.moving}

    # --- reports that two duties wait for ------------------------------------------------------------------

    def _store_ready(self, now: float, route: bytes, report: StoreReady) -> list[Effect]:
        job = self.jobs.get(report.job)
        if job is None or report.request != job.request:
            return []
        if job.moving and job.state == "RUNNING":
            return self._stores.moved(now, job, report)
        return self._starts.store_ready(now, job, report)

    def _prepare_failed(self, now: float, route: bytes, report: PrepareFailed) -> list[Effect]:
        job = self.jobs.get(report.job)
        if job is None or report.request != job.request:
            return []
        if job.moving and job.state == "RUNNING":
            return self._stores.refused(now, job, report)
        if job.state != "STARTING":
            return []
        if report.killed:
            return self._losses.start_failed(now, job, report.reason)
        return self._stops.end(now, job, "FAILED", report.reason)

    def _reported(self, now: float, route: bytes, report: ReportFailure) -> list[Effect]:
        self._dispatch.reported(report)
        return []

    # --- a new start ---------------------------------------------------------------------------------------

    def restore(self, now: float, records: Iterable[tuple[JobRecord, list[Incident]]]) -> None:
        """Take up the jobs of an earlier start. Nobody is told anything: nodes and the lighthouse will ask."""
        self.cluster.settles_at = now + NODE_SILENT
        for kept, incidents in records:
            job = self.jobs[kept.spec.name] = restored(now, kept, incidents)
            job.request = self.cluster.next_request()
            if job.state not in ENDED:
                job.sentence = UNHEARD
            self._stores.restored(now, job)
            if job.state in ("STOPPING", "RESTARTING"):
                job.stopping = {slot.node for slot in job.slots}
                job.stop_until = now + STOP_GRACE + NODE_SILENT

    def restored_at(self, now: float) -> None:
        """All of it was taken up: the time runs in which nodes are waited for."""
        self.cluster.settles_at = now + NODE_SILENT

    def restore_shards(self, now: float, job: str, saved: Saved) -> None:
        """Take up the shards of a job of an earlier start, after the job itself."""
        self._dispatch.of(self.jobs[job]).restore(now, saved)

    # --- the end of this host ------------------------------------------------------------------------------

    def suspend(self, now: float) -> list[Effect]:
        """This host goes away: every worker is asked for a last checkpoint, and the next start goes on there (D12)."""
        self.cluster.suspended = True
        self._dispatch.hold = SUSPENDED
        return self._stops.put_all_aside(now)

    @property
    def stopping(self) -> bool:
        """True while some job's workers are being stopped."""
        return any(job.state == "STOPPING" for job in self.jobs.values())

    # --- time ----------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Effect]:
        """What is repeated, and what is no longer waited for."""
        cluster = self.cluster
        effects: list[Effect] = self._keep_leases(now)
        gone = self._sessions.forget(now)
        for job in cluster.jobs.values():
            job.followers = {route: until for route, until in job.followers.items() if until > now}
            if job.state == "PENDING" and not cluster.suspended:
                effects += self._starts.place(now, job)
            if job.roster_request and now >= job.roster_due:
                effects += cluster.announce_again(now, job)
            if job.state == "STARTING":
                # Of a node that was never heard as a member of the job the lighthouse can say nothing.
                silent = [one for one in dict.fromkeys(slot.node for slot in job.slots) if not cluster.beats(now, one)]
                effects += [effect for node in silent for effect in self._losses.node_gone(now, job, node)]
            elif job.state == "RUNNING":
                effects += self._stops.take_room(now, job)
            effects += self._stores.keep(now, job)
            effects += self._stops.give_up(now, job, gone)
        return effects

    def _keep_leases(self, now: float) -> list[Effect]:
        """A lease lives as long as its holder's node beats; the lighthouse says sooner if one is lost."""
        self._dispatch.hold = SUSPENDED if self.cluster.suspended else self.cluster.trouble
        if now - self._ticked_at > LATE:
            # This daemon stood still, or begins: nobody's silence is known to be theirs.
            self._awake_since = now
        self._ticked_at = now
        effects: list[Effect] = []
        for job in self.jobs.values():
            if job.shards is None or job.state in ENDED:
                continue
            for name in {process.node for process in job.processes.values() if process.alive}:
                known = self.cluster.nodes.get(name)
                if known is None or now - max(known.last_beat, self._awake_since) > LEASE_TIMEOUT:
                    effects += self._dispatch.node_lost(now, job, name, "")
        return effects + self._dispatch.tick(now, settled=now >= self.cluster.settles_at)

    def due(self) -> float | None:
        """When something is to be done that no message brings; None if nothing is known to be."""
        return self._dispatch.due()
