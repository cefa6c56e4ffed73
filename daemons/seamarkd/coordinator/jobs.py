"""The coordinator as a state machine: who should be in each job, and how each job ends.

It owns rosters, generations and restart budgets. The restart of a single worker is the agent's (out of an
allowance); a restart of all workers, and the end of the job, are decided here. Pure: (message, now) in, effects
out; ``Persist`` stands before the sends that announce what it makes durable, and the shell keeps that order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

from msgspec.structs import replace

from seamark.protocol.messages import (
    RANKS,
    AbortJob,
    Acknowledged,
    Beat,
    BeatAnswer,
    CheckpointShard,
    CompletedEvent,
    CompleteShard,
    CoordinatorStatus,
    DecisionsRequest,
    DrainNode,
    Event,
    EventBeat,
    FailShard,
    FailureEvent,
    FollowJob,
    Incident,
    Incidents,
    IncidentsRequest,
    JobProgress,
    LeaseShard,
    Message,
    NodeHello,
    NodeLeft,
    NodeRefusals,
    NodeStatus,
    OpenShards,
    PrepareFailed,
    PrepareJob,
    QuorumEvent,
    RecoveredEvent,
    Refused,
    ReleaseShard,
    ReplicaQuorumEvent,
    ReportFailure,
    Roster,
    ShardRequest,
    SharedState,
    Slot,
    Snapshot,
    SnapshotRequest,
    StopJob,
    StopWorkers,
    StoreAddress,
    StoreLost,
    StoreReady,
    SubmitJob,
    Timeline,
    Welcome,
    WorkerExited,
    WorkerRegistered,
    WorkersStopped,
    WorkerStarted,
)
from seamarkd.coordinator.budget import RestartBudget
from seamarkd.coordinator.dispatch import Dispatch, unusable
from seamarkd.coordinator.effects import Effect, Forget, Tell, ToLighthouse, persist
from seamarkd.coordinator.job import (
    ENDED,
    FRUITLESS_RESTARTS,
    Job,
    JobRecord,
    Process,
    State,
    first_line,
    forgotten,
    has_place,
    members,
    reached,
    restored,
    standing,
    status,
    success,
    unwrapped,
)
from seamarkd.coordinator.node import Node
from seamarkd.coordinator.placement import fill, larger_than, place, refusal
from seamarkd.coordinator.policy import Happening, decide
from seamarkd.coordinator.shards import Saved
from seamarkd.cursor import EventCursor
from seamarkd.effects import Send
from seamarkd.exits import ABORT_EXIT_CODE, NOT_STARTED, PREEMPTION_GRACE, UNKNOWN_STATUS, exit_cause

STOP_GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL when all workers are stopped."""
FOLLOW_FOR = 10.0
"""Seconds a follower is told of changes without asking again."""
EXITS_KEPT = 1_000
"""Exits of a job, or two per rank, that are known again: an agent repeats each until it hears that it was taken."""
NODE_SILENT = 10.0
"""Seconds without a beat after which a node gets no new work, and is not waited for at the end of a job."""
ROSTER_RETRY = 0.5
"""Seconds after which a roster that the lighthouse has not acknowledged is sent again."""
MOVE_RETRY = 3.0
"""Seconds after which a node that was to start another TCPStore is asked again, or another node is."""
LEASE_TIMEOUT = 60.0
"""Seconds without a beat after which what a node's workers hold is given to others, whatever the lighthouse says."""
LATE = 5.0
"""Seconds between two ticks that say that this daemon, or its host, stood still."""
SUSPENDED = "the coordinator's host goes away"
UNHEARD = "waits to hear from its nodes"
ENDED_KEPT = 1_000
"""Ended jobs that are remembered; the oldest are forgotten first."""
REQUEST_SHIFT = 32
OF_A_JOB = (AbortJob, PrepareFailed, ReportFailure, ShardRequest, SharedState, StoreReady, WorkerRegistered)
"""What names a job and no node, and changes it; reports that have to be acknowledged name their node."""


class Coordinator:
    """All jobs and nodes.

    Args:
        epoch: rises with every start of the daemon; the upper half of its request numbers.
        rng: draws the jitter of back-offs.
    """

    def __init__(self, epoch: int, rng: random.Random | None = None) -> None:
        self.epoch = epoch
        self.nodes: dict[str, Node] = {}
        self.jobs: dict[str, Job] = {}
        self._wishes: dict[str, DrainNode] = {}
        """By node: to drain or to serve, as long as it does not yet."""
        self.trouble = ""
        """Why nothing can be made durable just now; new jobs are refused with it."""
        self._settles_at = 0.0
        self._ticked_at = self._awake_since = 0.0
        self._suspended = False
        """Until then a node that has not been heard may be one that has not found this coordinator yet."""
        self._request = epoch << REQUEST_SHIFT
        self._cursor = EventCursor()
        self._dispatch = Dispatch(epoch, self.jobs, self.nodes, rng or random.Random())
        requests = (OpenShards, LeaseShard, CompleteShard, CheckpointShard, FailShard, ReleaseShard)
        self._handlers: dict[type[Message], Callable[[float, bytes, Any], list[Effect]]] = {
            NodeHello: self._hello,
            Beat: self._beat,
            SubmitJob: self._submit,
            FollowJob: self._follow,
            StopJob: self._stop_job,
            DrainNode: self._drain,
            NodeLeft: self._left,
            NodeRefusals: self._refusals,
            IncidentsRequest: self._incidents,
            StoreReady: self._store_ready,
            PrepareFailed: self._prepare_failed,
            WorkerStarted: self._worker_started,
            WorkerExited: self._worker_exited,
            WorkerRegistered: self._worker_registered,
            WorkersStopped: self._workers_stopped,
            JobProgress: self._progress,
            Timeline: self._timeline,
            SharedState: self._shared_state,
            AbortJob: self._abort,
            Acknowledged: lambda now, route, message: [],
            ReportFailure: self._report_failure,
            DecisionsRequest: lambda now, route, message: [Send(route, self._dispatch.decisions(now, message))],
            **dict.fromkeys(requests, self._dispatch.request),
        }

    def handle(self, now: float, route: bytes, message: Message) -> list[Effect]:
        """What follows from a message of an agent or an operator."""
        handler = self._handlers.get(type(message))
        if handler is None:
            sentence = f"{type(message).__name__} is not for a coordinator"
            return [Send(route, Refused(getattr(message, "request", 0), "BAD_REQUEST", sentence))]
        return handler(now, route, message)

    def only_on_disk(self, job: str) -> bool:
        """Whether this job had ended before this start: of its shards nothing was taken up."""
        known = self.jobs.get(job)
        return known is not None and known.state in ENDED and known.shards is None

    def foreign(self, node: str, message: Message) -> bool:
        """Whether a message speaks for a job that this node has no part in, although it names no node."""
        if not isinstance(message, OF_A_JOB):
            return False
        job = self.jobs.get(message.job)
        return job is not None and node not in {*(slot.node for slot in job.slots), *job.left, job.moving}

    # --- nodes ---------------------------------------------------------------------------------------------

    def _hello(self, now: float, route: bytes, hello: NodeHello) -> list[Effect]:
        self.nodes[hello.node] = Node(route, hello.slots, now, hello.draining, hello.unhealthy)
        effects: list[Effect] = [Send(route, Welcome(self.epoch)), *self._wish(hello.node)]
        for job in self.jobs.values():
            if job.state not in ENDED and any(slot.node == hello.node for slot in job.slots):
                effects += self._orders(now, job, hello.node)
        if hello.draining:
            return effects + self._dispatch.drain(now, hello.node) + self._prepare_elsewhere(now, hello.node)
        effects += self._use_room(now)
        for job in self.jobs.values():
            if hello.node in job.left and (job.state in ENDED or all(slot.node != hello.node for slot in job.slots)):
                effects += self._leave(job, hello.node)
        return effects

    def _prepare_elsewhere(self, now: float, node: str) -> list[Effect]:
        """Its workers take their time to end: meanwhile the nodes that will have their places import torch."""
        effects: list[Effect] = []
        for job in self.jobs.values():
            staying = [slot for slot in job.slots if slot.node != node]
            if job.state == "RUNNING" and len(staying) < len(job.slots):
                job.sentence = f"node {node} drains: {self.nodes[node].draining}"
                found = fill(job.spec, staying, self._free(now, job), 0)
                order = PrepareJob(job.request, job.spec, store=False)
                for other in dict.fromkeys(slot.node for slot in found):
                    effects += self._to_node(other, order)
                    # Should it get no place there after all, its keeper has to end some day.
                    job.left.add(other)
        return effects

    def _drain(self, now: float, route: bytes, order: DrainNode) -> list[Effect]:
        node = self.nodes.get(order.node)
        if node is None:
            known = ", ".join(sorted(self.nodes)) or "none"
            sentence = f"there is no node {order.node} here; there are: {known}"
            return [Send(route, Refused(order.request, "UNKNOWN_NODE", sentence))]
        self._wishes[order.node] = order
        return [Send(node.route, order), Send(route, Acknowledged(order.request))]

    def _wish(self, node: str) -> list[Effect]:
        """What a person wants of the node, until it has said that it is so."""
        wish = self._wishes.get(node)
        if wish is None:
            return []
        if bool(self.nodes[node].draining) is not wish.undo:
            del self._wishes[node]
            return []
        return self._to_node(node, wish)

    def _left(self, now: float, route: bytes, report: NodeLeft) -> list[Effect]:
        job = self.jobs.get(report.job)
        return self._node_gone(now, job, report.node) if job is not None and job.state not in ENDED else []

    def _refusals(self, now: float, route: bytes, report: NodeRefusals) -> list[Effect]:
        node = self.nodes.get(report.node)
        if node is not None:
            node.refused = report.refused
            node.refused_at = {reason: now - ago for reason, ago in report.ago.items()}
        return []

    def _use_room(self, now: float) -> list[Effect]:
        """Jobs get places in the order in which they were submitted; a small one may overtake."""
        if self._suspended:
            return []
        effects: list[Effect] = []
        for _, name in sorted((job.submitted_at, name) for name, job in self.jobs.items()):
            job = self.jobs[name]
            if job.state == "PENDING":
                effects += self._place(now, job)
            elif job.state == "RUNNING":
                effects += self._take_room(now, job)
        return effects

    def _take_room(self, now: float, job: Job) -> list[Effect]:
        """What a running job does about free places."""
        if not fill(job.spec, job.slots, self._free(now, job), 0):
            return []
        match decide("node-new", standing(job)):
            case "fill":
                return self._fill(now, job, "")
            case "grow":
                job.sentence = "another node is there: all workers are restarted, to run on it, too"
                return self._restart(now, job)
            case _:
                return []

    def _leave(self, job: Job, node: str) -> list[Effect]:
        """Ends what of a job may live on a node that it is no longer on."""
        return self._to_node(node, StopWorkers(0, job.spec.name, max(job.generation, 0), STOP_GRACE, final=True))

    def _beat(self, now: float, route: bytes, beat: Beat) -> list[Effect]:
        node = self.nodes.get(beat.node)
        known = node is not None and node.route == route
        wish: list[Effect] = []
        if node is not None and known:
            node.last_beat = now
            wish = self._wish(beat.node)
        return [Send(route, BeatAnswer(self.epoch, beat.sequence, known)), *wish]

    def _orders(self, now: float, job: Job, node: str) -> list[Effect]:
        """What a node that introduces itself has to be told about a job of its own; it may have heard it before."""
        if job.state in ("STOPPING", "RESTARTING"):
            return self._to_node(node, self._stop_order(job, final=job.state == "STOPPING"))
        if not job.store.port:
            return self._prepare(job, node)
        if job.roster_request:
            return []  # it follows the lighthouse's acknowledgement
        return self._to_node(node, self._roster(now, job))

    def _free(self, now: float, job: Job) -> dict[str, int]:
        """Places that other jobs leave, by node: first those of the nodes that it is on or was, in their order."""
        taken: dict[str, int] = {}
        for other in self.jobs.values():
            if other.state not in ENDED and other is not job:
                for slot in other.slots:
                    taken[slot.node] = taken.get(slot.node, 0) + 1
        own = [node for node in dict.fromkeys(slot.node for slot in job.slots) if node in self.nodes]
        return {
            name: self.nodes[name].slots - taken.get(name, 0)
            for name in dict.fromkeys([*own, *self.nodes])
            if self._beats(now, name) and not self.nodes[name].draining and not self.nodes[name].unhealthy
        }

    def _place(self, now: float, job: Job) -> list[Effect]:
        """A new start, or one of all workers: on the nodes that it was on, as far as they are there."""
        free = self._free(now, job)
        slots = place(job.spec, free)
        before = {slot.node for slot in job.slots}
        if slots is None:
            job.left |= before
            changed = job.state != "PENDING"
            job.state, job.slots = "PENDING", []
            job.sentence = (
                f"waits for {job.spec.min_nodes} nodes with {job.spec.nproc_per_node} free slots each; "
                f"free now: {', '.join(f'{node} {count}' for node, count in free.items()) or 'no node'}"
            )
            return [persist(job), *self._tell(job)] if changed else []
        nodes = dict.fromkeys(slot.node for slot in slots)
        gone = (job.left | before) - nodes.keys()
        effects = [effect for node in sorted(gone) for effect in self._leave(job, node)]
        job.left = gone
        job.slots = slots
        job.placement, job.width = 0, len(slots)
        job.state = "STARTING"
        if job.store.port and job.store_node in nodes:
            return [*effects, *self._new_generation(now, job)]
        job.store, job.store_node = StoreAddress(), ""
        job.sentence = "starts the keepers (they import torch) and the store"
        job.request = self._next()
        prepare = [effect for node in nodes for effect in self._prepare(job, node)]
        return [*effects, persist(job), *prepare, *self._tell(job)]

    def _fill(self, now: float, job: Job, why: str) -> list[Effect]:
        """Its lost places go to other nodes, and the workers that live notice nothing but a restart in process.

        The lighthouse is told also where no node has room: what it waits for has no place.
        """
        job.placement += 1
        found = fill(job.spec, job.slots, self._free(now, job), job.placement)
        job.slots = sorted([*job.slots, *found], key=lambda slot: slot.rank)
        job.left -= {slot.node for slot in found}
        job.width = max(job.width, len(job.slots))
        where = f"ranks {', '.join(str(slot.rank) for slot in found)} start on {', '.join({s.node: 0 for s in found})}"
        job.sentence = f"{why}{'; ' * bool(why)}{where if found else 'no node has room for its ranks'}"
        return [persist(job), *self._announce(now, job), *self._tell(job)]

    def _prepare(self, job: Job, node: str) -> list[Effect]:
        return self._to_node(node, PrepareJob(job.request, job.spec, store=node == job.slots[0].node))

    def _next(self) -> int:
        self._request += 1
        return self._request

    # --- a new start ---------------------------------------------------------------------------------------

    def restore(self, now: float, records: Iterable[tuple[JobRecord, list[Incident]]]) -> None:
        """Take up the jobs of an earlier start. Nobody is told anything: nodes and the lighthouse will ask."""
        self._settles_at = now + NODE_SILENT
        for kept, incidents in records:
            job = self.jobs[kept.spec.name] = restored(now, kept, incidents)
            job.request = self._next()
            if job.state not in ENDED:
                job.sentence = UNHEARD
            # Perhaps a coordinator before this one had moved it, and told nobody; to who knows, it is nothing new.
            job.store_lost = self._store_news(now, job) if job.store_node else None
            job.move_due = now + NODE_SILENT
            if job.state in ("STOPPING", "RESTARTING"):
                job.stopping = {slot.node for slot in job.slots}
                job.stop_until = now + STOP_GRACE + NODE_SILENT

    def restored_at(self, now: float) -> None:
        """All of it was taken up: the time runs in which nodes are waited for."""
        self._settles_at = now + NODE_SILENT

    def restore_shards(self, now: float, job: str, saved: Saved) -> None:
        """Take up the shards of a job of an earlier start, after the job itself."""
        self._dispatch.of(self.jobs[job]).restore(now, saved)

    def _lighthouse_is_new(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for job in self.jobs.values():
            if job.state in ("STARTING", "RUNNING") and job.store.port:
                effects += self._announce(now, job)
                effects.append(ToLighthouse(SnapshotRequest(self._next(), job.spec.name)))
        return effects

    def _announce(self, now: float, job: Job) -> list[Effect]:
        """The roster to the lighthouse first, which has to know the members before they report to it."""
        roster = self._roster(now, job)
        job.roster_request = roster.request
        job.roster_due = now + ROSTER_RETRY
        return [ToLighthouse(roster)]

    # --- operators -----------------------------------------------------------------------------------------

    def _submit(self, now: float, route: bytes, request: SubmitJob) -> list[Effect]:
        spec = request.spec
        known = self.jobs.get(spec.name)
        if known is not None and known.submission == request.submission:
            known.followers[route] = now + FOLLOW_FOR
            return [Send(route, status(known, now, request.request))]
        if self.trouble or self._suspended:
            why = self.trouble or SUSPENDED
            return [Send(route, Refused(request.request, "READ_ONLY", f"no new jobs now: {why}"))]
        if known is not None and known.state not in ENDED:
            sentence = f"a job named {spec.name} is running: give this one another name with --name"
            return [Send(route, Refused(request.request, "NAME_TAKEN", sentence))]
        why_not = refusal(spec) or unusable(spec)
        if why_not:
            return [Send(route, Refused(request.request, "BAD_REQUEST", why_not))]
        too_large = larger_than(spec, {name: node.slots for name, node in self.nodes.items()})
        if too_large:
            return [Send(route, Refused(request.request, "NO_SLOTS", too_large))]
        job = self.jobs[spec.name] = Job(spec, RestartBudget(spec.max_restarts), now, request.submission)
        # What an earlier job of this name has left on nodes that are away is ended when they come back.
        job.left = set(known.left) if known is not None else set()
        job.notice = forgotten(known)
        job.followers[route] = now + FOLLOW_FOR
        durable: list[Effect] = [*self._forget_oldest(), persist(job, fresh=True)]
        return [*durable, Send(route, status(job, now, request.request)), *self._place(now, job)]

    def _forget_oldest(self) -> list[Effect]:
        ended = sorted((job.ended_at, name) for name, job in self.jobs.items() if job.state in ENDED)
        forgotten = [name for _, name in ended[:-ENDED_KEPT]]
        for name in forgotten:
            del self.jobs[name]
        return [Forget(name) for name in forgotten]

    def status(self, now: float, request: int) -> CoordinatorStatus:
        """What this coordinator knows, for people; the shell adds what it knows of its process."""
        used: dict[str, int] = {}
        for job in self.jobs.values():
            for slot in job.slots if job.state not in ENDED else ():
                used[slot.node] = used.get(slot.node, 0) + 1
        return CoordinatorStatus(
            request=request,
            epoch=self.epoch,
            software="",
            pid=0,
            uptime=0.0,
            trouble=self.trouble,
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
                for name, node in sorted(self.nodes.items())
            ],
            jobs=[status(job, now) for job in self.jobs.values()],
            members={job.spec.name: members(job) for job in self.jobs.values() if job.state not in ENDED},
        )

    def _follow(self, now: float, route: bytes, request: FollowJob) -> list[Effect]:
        job = self.jobs.get(request.job)
        if job is None:
            return [Send(route, _unknown(request.request, request.job))]
        job.followers[route] = now + FOLLOW_FOR
        return [Send(route, status(job, now, request.request))]

    def _incidents(self, now: float, route: bytes, request: IncidentsRequest) -> list[Effect]:
        job = self.jobs.get(request.job)
        if job is None:
            return [Send(route, _unknown(request.request, request.job))]
        return [Send(route, Incidents(request.request, request.job, job.incidents.incidents))]

    def _stop_job(self, now: float, route: bytes, request: StopJob) -> list[Effect]:
        job = self.jobs.get(request.job)
        if job is None:
            return [Send(route, _unknown(request.request, request.job))]
        effects = [] if job.state in ENDED else self._end(now, job, "CANCELLED", f"stopped: {request.reason}")
        return [*effects, Send(route, status(job, now, request.request))]

    # --- the start of a generation -------------------------------------------------------------------------

    def _store_ready(self, now: float, route: bytes, report: StoreReady) -> list[Effect]:
        job = self.jobs.get(report.job)
        if job is not None and job.moving and job.state == "RUNNING" and report.request == job.request:
            return self._store_moved(now, job, report)
        if job is None or job.state != "STARTING" or report.request != job.request or job.store.port:
            # With a store already: it was asked for again, of a node that introduced itself while it started it.
            return []
        self._take_store(job, report, job.slots[0].node)
        return self._new_generation(now, job)

    def _take_store(self, job: Job, report: StoreReady, node: str) -> None:
        job.store, job.store_node = report.store, node
        job.master_addr, job.master_port = report.master_addr, report.master_port

    # --- a store whose host was lost (D8) ------------------------------------------------------------------

    def _move_store(self, now: float, job: Job) -> list[Effect]:
        """On the first of the job's nodes that lives and has not refused; asked again until one has answered."""
        nodes = dict.fromkeys(slot.node for slot in job.slots if slot.node != job.store_node)
        alive = [one for one in nodes if self._beats(now, one) and not self.nodes[one].draining]
        willing = [one for one in alive if one not in job.refused_store]
        job.move_due = now + MOVE_RETRY
        job.moving = willing[0] if willing else job.store_node
        if not willing:
            why = "; ".join(job.refused_store.values()) if alive else "no other node of the job is there"
            job.sentence = f"the TCPStore was on node {job.store_node}, which is gone: {why}"
            job.refused_store.clear()
            return self._tell(job)
        job.request = self._next()
        job.sentence = f"starts another TCPStore on node {job.moving}: node {job.store_node} is gone"
        return [*self._to_node(job.moving, PrepareJob(job.request, job.spec, store=True)), *self._tell(job)]

    def _store_moved(self, now: float, job: Job, report: StoreReady) -> list[Effect]:
        self._take_store(job, report, job.moving)
        job.moving = ""
        job.refused_store.clear()
        job.store_lost = self._store_news(now, job)
        job.move_due = now + MOVE_RETRY
        roster = self._to_nodes(job, self._roster(now, job))
        return [persist(job), ToLighthouse(job.store_lost), *roster, *self._tell(job)]

    def _store_news(self, now: float, job: Job) -> StoreLost:
        return StoreLost(self._next(), job.spec.name, job.generation, job.store, now, job.store_node)

    def _beats(self, now: float, node: str) -> bool:
        return node in self.nodes and now - self.nodes[node].last_beat < NODE_SILENT

    def _keep_moving(self, now: float, job: Job) -> list[Effect]:
        if now < job.move_due or job.state != "RUNNING":
            return []
        # Also where no event says so: none of the store's node may have been a member any more.
        others = any(self._beats(now, slot.node) for slot in job.slots)
        if job.moving or (others and job.store_node and not self._beats(now, job.store_node)):
            return self._move_store(now, job)
        if job.store_lost is None:
            return []
        job.move_due = now + MOVE_RETRY
        return [ToLighthouse(job.store_lost)]

    def _prepare_failed(self, now: float, route: bytes, report: PrepareFailed) -> list[Effect]:
        job = self.jobs.get(report.job)
        if job is not None and job.moving and job.state == "RUNNING" and report.request == job.request:
            job.refused_store[job.moving] = report.reason
            return self._move_store(now, job)
        if job is None or job.state != "STARTING" or report.request != job.request:
            return []
        return self._end(now, job, "FAILED", report.reason)

    def _new_generation(self, now: float, job: Job) -> list[Effect]:
        lost = self._dispatch.all_lost(now, job)
        job.generation += 1
        job.processes.clear()
        job.finished.clear()
        job.discarded.clear()
        job.failed.clear()
        job.completed = False
        job.step.clear()
        job.wrapped = False
        job.sentence = "starts the workers"
        return [persist(job), *lost, *self._announce(now, job), *self._tell(job)]

    def _roster(self, now: float, job: Job) -> Roster:
        return Roster(
            request=self._next(),
            job=job.spec.name,
            generation=job.generation,
            policy=job.spec.policy,
            min_members=job.spec.min_ranks,
            slots=job.slots,
            store=job.store,
            master_addr=job.master_addr,
            master_port=job.master_port,
            base_iteration=job.iteration,
            join_timeout=job.spec.join_timeout,
            start_timeout=job.spec.start_timeout,
            allowance=job.budget.remaining(now),
            spec=job.spec,
            running=job.state == "RUNNING",
            state=job.state_text,
            store_node=job.store_node,
            submission=job.submission,
            placement=job.placement,
        )

    def from_lighthouse(self, now: float, message: Message) -> list[Effect]:
        """What follows from an answer or an event of the lighthouse."""
        effects: list[Effect] = []
        if isinstance(message, Event | EventBeat | Snapshot):
            turn = self._cursor.turn(message.epoch)
            if turn == "old":
                return []
            if turn == "new":
                effects += self._lighthouse_is_new(now)
        match message:
            case Acknowledged():
                effects += self._roster_taken(now, message)
            case FailureEvent() | QuorumEvent() | CompletedEvent() | RecoveredEvent() | ReplicaQuorumEvent():
                job = self.jobs.get(message.job)
                if job is not None:
                    effects += self._in_order(now, job, message)
            case EventBeat():
                effects += self._missed(message)
                effects += self._waiting(message)
            case Snapshot():
                effects += self._caught_up(now, message)
            case _:
                pass
        return effects

    def _in_order(self, now: float, job: Job, event: Event) -> list[Effect]:
        """An event after a gap waits for the snapshot that fills it: a quorum closes the incident of its failure."""
        position = self._cursor.position(event.job)
        if event.sequence <= position:
            return []
        if event.sequence > position + 1:
            return [ToLighthouse(SnapshotRequest(self._next(), event.job))]
        self._cursor.advance(event.job, event.sequence)
        return self._event(now, job, event)

    def _event(self, now: float, job: Job, event: Event) -> list[Effect]:
        """Replica groups are in nobody's roster: what becomes of them changes nothing here."""
        if (event.epoch, event.sequence) <= job.heard:
            return []
        job.heard = (event.epoch, event.sequence)
        match event:
            case FailureEvent(group=group) if group == RANKS:
                return self._failure(now, job, event)
            case QuorumEvent():
                return self._quorum(now, job, event)
            case CompletedEvent():
                job.completed = True
                job.sentence = "all ranks completed"
        return []

    def _missed(self, beat: EventBeat) -> list[Effect]:
        behind = [job for job in self._cursor.behind(beat.latest) if job in self.jobs]
        return [ToLighthouse(SnapshotRequest(self._next(), job)) for job in behind]

    def _caught_up(self, now: float, snapshot: Snapshot) -> list[Effect]:
        """Events that went past while this daemon, or its connection, was away; those seen before change nothing."""
        job = self.jobs.get(snapshot.job)
        if job is None or job.state in ENDED:
            return []
        self._cursor.advance(snapshot.job, snapshot.sequence)
        effects: list[Effect] = []
        job.completed = job.completed or snapshot.completed
        events: list[FailureEvent | QuorumEvent] = [*snapshot.failures, *snapshot.quorums]
        for event in sorted(events, key=lambda one: one.sequence):
            iteration = event.failure.iteration if isinstance(event, FailureEvent) else event.iteration - 1
            of_a_node = isinstance(event, FailureEvent) and event.failure.cause.kind == "node"
            if iteration >= job.iteration or of_a_node:
                effects += self._event(now, job, event)
        return effects

    def _roster_taken(self, now: float, answer: Acknowledged) -> list[Effect]:
        effects: list[Effect] = []
        for job in self.jobs.values():
            if job.store_lost is not None and job.store_lost.request == answer.request:
                job.store_lost = None
            if job.roster_request == answer.request and job.state in ("STARTING", "RUNNING"):
                job.roster_request = 0
                effects += self._to_nodes(job, self._roster(now, job))
        return effects

    # --- the life of a generation --------------------------------------------------------------------------

    def _worker_started(self, now: float, route: bytes, report: WorkerStarted) -> list[Effect]:
        effects: list[Effect] = [Send(route, Acknowledged(report.request))]
        job = self.jobs.get(report.job)
        if job is None or report.generation != job.generation or job.state not in ("STARTING", "RUNNING"):
            return effects
        known = job.processes.get(report.member)
        if known is not None and known.incarnation == report.incarnation:
            return effects
        if not job.store.port or not has_place(job, report):
            # Of an earlier generation, or on a node that it was taken from: that is about to be told so.
            return effects
        job.processes[report.member] = Process(report.incarnation, report.pid, alive=True, node=report.node)
        job.incidents.started(report)
        effects += self._dispatch.started(now, job, report)
        if job.state == "STARTING" and len(job.processes) == len(job.slots):
            job.state = "RUNNING"
            job.sentence = "runs"
            effects.insert(0, persist(job))
        elif len(job.processes) == len(job.slots) and job.sentence == UNHEARD:
            job.sentence = "runs"
        return [*effects, *self._tell(job)]

    def _worker_registered(self, now: float, route: bytes, report: WorkerRegistered) -> list[Effect]:
        job = self.jobs.get(report.job)
        if job is None or job.state in ENDED:
            return []
        first, job.wrapped = not job.wrapped, True
        if job.spec.policy == "any-failed" and job.state != "STOPPING":
            return self._end(
                now,
                job,
                "FAILED",
                "--restart-policy any-failed restarts every process at any failure, which leaves nothing to "
                "seamark.Wrapper's restart in process: use --restart-policy replace or min-healthy, or remove it",
            )
        # Nodes that came before this was known: only now can they be taken in without a restart of all.
        return self._take_room(now, job) if first and job.state == "RUNNING" else []

    def _worker_exited(self, now: float, route: bytes, report: WorkerExited) -> list[Effect]:
        acknowledged: list[Effect] = [Send(route, Acknowledged(report.request))]
        job = self.jobs.get(report.job)
        if job is not None:
            # Durable before the report is acknowledged, like the rest.
            acknowledged = [*self._dispatch.exited(now, job, report), *acknowledged]
        if job is None or report.generation != job.generation or job.state in ENDED:
            return acknowledged
        if report.incarnation in job.exited:
            return acknowledged
        job.exited[report.incarnation] = report.member
        if len(job.exited) > max(EXITS_KEPT, 2 * len(job.slots)):
            del job.exited[next(iter(job.exited))]
        process = job.processes.get(report.member)
        # A lighthouse that ended with its answer has told nobody else: the number must not be given again.
        job.iteration = max(job.iteration, report.iteration)
        # Of one that could not be started nobody has said that it was.
        current = process is None or process.incarnation == report.incarnation or report.status == NOT_STARTED
        if process is not None and current:
            process.alive = False
        job.incidents.exited(report)
        if job.state == "STOPPING" and job.outcome == "PENDING":
            return [*self._ended_meanwhile(now, job, report), *acknowledged]
        if job.state in ("STOPPING", "RESTARTING") or report.ordered or not has_place(job, report):
            return acknowledged
        if not current and not report.replacement:
            # Its place was given to another node meanwhile.
            return acknowledged
        # Acknowledged once it is durable: the agent repeats it to a coordinator that was killed before that.
        return [*self._decide(now, job, report), *acknowledged, *self._tell(job)]

    def _decide(self, now: float, job: Job, report: WorkerExited) -> list[Effect]:
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
            return self._end(now, job, "ABORTED", f"rank {rank} {how}: the job was aborted (RestartAbort)")
        if report.replacement:
            job.budget.spend(now)
            job.process_restarts += report.charged
            job.sentence = f"rank {rank} {how}; a replacement joins"
            return [persist(job)]
        if report.drains:
            node = next(slot.node for slot in job.slots if slot.member == report.member)
            return self._node_gone(now, job, node, drains=report.drains)
        job.failed.add(report.member)
        return self._carry_out(now, job, "worker-failed", f"rank {rank} {how}")

    def _carry_out(self, now: float, job: Job, happening: Happening, why: str, *, charged: bool = True) -> list[Effect]:
        """What the job's policy says to what happened; ``why`` names it for people."""
        found = standing(job)
        match decide(happening, found):
            case "succeed":
                done = job.shards is None or job.shards.complete
                return self._end(now, job, "SUCCEEDED" if done else "FAILED", success(job))
            case "fail":
                left = len(job.slots) - len(job.discarded)
                result = f"{why}: {left} ranks are left, fewer than {job.spec.min_ranks}"
                return self._end(now, job, "FAILED", result)
            case "fill":
                return self._fill(now, job, why)
            case "restart":
                if job.spec.policy == "min-healthy":
                    why += f"; {found.well} worker groups are well, fewer than {found.least}"
                drains = any(slot.node in self.nodes and self.nodes[slot.node].draining for slot in job.slots)
                if charged and not drains:
                    return self._charged_restart(now, job, why)
                job.sentence = f"{why}; all workers are restarted"
                return self._restart(now, job)
            case _:
                job.sentence = f"{why}; {found.well} worker groups go on" if why else job.sentence
                return [persist(job)]

    def _charged_restart(self, now: float, job: Job, why: str) -> list[Effect]:
        if job.budget.spend(now):
            job.process_restarts += 1
            job.sentence = f"{why}; all workers are restarted"
            job.notice = unwrapped(job) or job.notice
            return self._restart(now, job)
        tried = (
            f"the {job.spec.max_restarts} restarts of --max-restarts are used up"
            if job.spec.max_restarts
            else "--max-restarts 0 allows no restart"
        )
        return self._end(now, job, "FAILED", f"{why}, and {tried}")

    def _restart(self, now: float, job: Job) -> list[Effect]:
        job.state = "RESTARTING"
        job.moving = ""
        return self._stop_workers(now, job, final=False)

    def _node_gone(self, now: float, job: Job, node: str, drains: str = "") -> list[Effect]:
        """The lighthouse says that a node of the job is lost."""
        members = {slot.member for slot in job.slots if slot.node == node} - job.finished - job.failed
        known = self.nodes.get(node)
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
            self.nodes.pop(node, None)
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

    def _report_failure(self, now: float, route: bytes, report: ReportFailure) -> list[Effect]:
        self._dispatch.reported(report)
        return []

    def _abort(self, now: float, route: bytes, report: AbortJob) -> list[Effect]:
        job = self.jobs.get(report.job)
        if job is None or job.state in ENDED:
            return []
        rank = report.member.rpartition("/")[2]
        result = f"rank {rank} asked for the end of the job: {report.reason}"
        if job.state == "STOPPING":
            return self._aborted_meanwhile(now, job, result)
        return self._end(now, job, "ABORTED", result)

    def _aborted_meanwhile(self, now: float, job: Job, result: str) -> list[Effect]:
        """Its workers are being stopped already, but were to go on later: they are not."""
        if job.outcome != "PENDING":
            return []
        job.outcome, job.result, job.ended_at = "ABORTED", result, now
        return [persist(job)]

    def _progress(self, now: float, route: bytes, report: JobProgress) -> list[Effect]:
        job = self.jobs.get(report.job)
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
                effects += self._to_nodes(job, self._roster(now, job))
        return [*effects, *self._tell(job)]

    # --- incidents -----------------------------------------------------------------------------------------

    def _failure(self, now: float, job: Job, event: FailureEvent) -> list[Effect]:
        failure = event.failure
        if failure.iteration >= 0 or job.iteration < 0:
            # Else it was lost before it entered the session, which goes on.
            job.incidents.failed(event, alone=job.spec.independent and not job.wrapped)
        given = (
            self._dispatch.faulted(now, job, failure.incarnation, failure.cause) if failure.kind == "faulted" else []
        )
        if failure.cause.kind == "node":
            effects = self._node_gone(now, job, failure.node)
            if failure.node == job.store_node and not job.moving and job.state == "RUNNING":
                effects += self._move_store(now, job)
            return [*effects, *self._tell(job)]
        if job.state in ("STARTING", "RUNNING"):
            who = "the store" if failure.rank < 0 else f"rank {failure.rank}"
            job.sentence = f"restarts: {who} {failure.kind} ({first_line(failure.cause.text)})"
            if failure.cause.kind == "joined":
                job.sentence = f"restarts in process: {first_line(failure.cause.text)}"
        return [*given, *self._tell(job)]

    def _quorum(self, now: float, job: Job, event: QuorumEvent) -> list[Effect]:
        if event.generation != job.generation or event.iteration <= job.iteration:
            return []
        job.incidents.answered(event)
        job.iteration = event.iteration
        self._recognise(job, event)
        job.completed = False
        again, job.restarts = event.restarts > job.restarts, event.restarts
        if again and not job.fruitless.spend(now) and job.state == "RUNNING":
            why = job.sentence.removeprefix("restarts: ")
            result = f"{FRUITLESS_RESTARTS} restarts followed each other without a ping(); the last: {why}"
            return self._end(now, job, "FAILED", result)
        job.sentence = "runs"
        return [persist(job), *self._tell(job)]

    @staticmethod
    def _recognise(job: Job, event: QuorumEvent) -> None:
        """Who is in a quorum lives, also who was thought to be gone with its node: that was only cut off."""
        job.failed -= {member.member for member in event.members}
        placed = {slot.member for slot in job.slots}
        for one in event.members:
            if one.member not in placed:
                group_rank = one.initial_rank // job.spec.nproc_per_node
                job.slots.append(Slot(one.member, one.initial_rank, one.local_rank, one.node, group_rank))
                job.left.discard(one.node)
        job.slots.sort(key=lambda slot: slot.rank)

    def _waiting(self, beat: EventBeat) -> list[Effect]:
        effects: list[Effect] = []
        for name, reason in beat.waiting.items():
            job = self.jobs.get(name)
            if job is not None and job.state == "RUNNING" and job.sentence != reason:
                job.sentence = reason
                effects += self._tell(job)
        return effects

    def _timeline(self, now: float, route: bytes, report: Timeline) -> list[Effect]:
        job = self.jobs.get(report.job)
        if job is None or not job.incidents.timeline(report):
            return []
        return [persist(job)]

    def _shared_state(self, now: float, route: bytes, report: SharedState) -> list[Effect]:
        job = self.jobs.get(report.job)
        if job is None or job.state in ENDED or report.version <= job.state_version:
            return []
        job.state_version, job.state_text = report.version, report.text
        return [persist(job)]

    # --- stopping ------------------------------------------------------------------------------------------

    def _end(self, now: float, job: Job, outcome: State, result: str) -> list[Effect]:
        job.outcome = outcome
        job.result = result
        job.state = "STOPPING"
        job.sentence = "stops the workers"
        job.ended_at = now
        return self._stop_workers(now, job, final=True)

    def _stop_workers(self, now: float, job: Job, *, final: bool) -> list[Effect]:
        job.request = self._next()
        job.roster_request = 0
        drain = any(slot.node in self.nodes and self.nodes[slot.node].draining for slot in job.slots)
        job.stop_until = now + (PREEMPTION_GRACE if drain else _grace(job)) + NODE_SILENT
        job.stopping = {slot.node for slot in job.slots if slot.node in self.nodes or now < self._settles_at}
        nodes = {slot.node for slot in job.slots}
        effects: list[Effect] = []
        if final:
            effects += [effect for node in sorted(job.left - nodes) for effect in self._leave(job, node)]
            # Those that can't hear it are told when they are there again.
            job.left |= nodes - job.stopping
        effects = [persist(job), *self._to_nodes(job, self._stop_order(job, final=final)), *effects]
        if not job.stopping:
            effects += self._all_stopped(now, job)
        return [*effects, *self._tell(job)]

    @staticmethod
    def _stop_order(job: Job, *, final: bool) -> StopWorkers:
        abort = job.result if final and job.outcome == "ABORTED" else ""
        return StopWorkers(job.request, job.spec.name, max(job.generation, 0), _grace(job), final, abort)

    def _workers_stopped(self, now: float, route: bytes, report: WorkersStopped) -> list[Effect]:
        job = self.jobs.get(report.job)
        if job is None or report.request != job.request or job.state not in ("STOPPING", "RESTARTING"):
            return []
        job.stopping -= {name for name, node in self.nodes.items() if node.route == route}
        return [] if job.stopping else self._all_stopped(now, job)

    def _all_stopped(self, now: float, job: Job) -> list[Effect]:
        if job.state == "STOPPING" and job.outcome == "PENDING":
            return self._put_aside(now, job)
        if job.state == "STOPPING":
            job.state = job.outcome
            job.sentence = job.result
            # Nobody has a lease of it any more, whether its end was heard or not.
            job.datasets = [replace(one, leased=0) for one in reached(job)]
            return [persist(job), *self._tell(job), *self._use_room(now)]
        job.incidents.restarted()
        return self._place(now, job)

    def suspend(self, now: float) -> list[Effect]:
        """This host goes away: every worker is asked for a last checkpoint, and the next start goes on there (D12)."""
        self._suspended = True
        self._dispatch.hold = SUSPENDED
        effects: list[Effect] = []
        for job in self.jobs.values():
            if job.state in ("STARTING", "RUNNING", "RESTARTING"):
                job.outcome, job.state = "PENDING", "STOPPING"
                job.sentence = f"{SUSPENDED}: its workers are asked to save, and go on when there is one again"
                effects += self._stop_workers(now, job, final=True)
        return effects

    def _ended_meanwhile(self, now: float, job: Job, report: WorkerExited) -> list[Effect]:
        """A rank of a job that is put aside may have come to its end: an exit code alone doesn't say so."""
        if report.status == ABORT_EXIT_CODE:
            rank = report.member.rpartition("/")[2]
            return self._aborted_meanwhile(now, job, f"rank {rank} aborted the job (RestartAbort)")
        if report.wrapped and report.completed:
            job.finished.add(report.member)
        return [persist(job)]

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
        job.sentence = SUSPENDED if self._suspended else UNHEARD
        return [persist(job), *self._tell(job), *self._use_room(now)]

    @property
    def stopping(self) -> bool:
        """True while some job's workers are being stopped."""
        return any(job.state == "STOPPING" for job in self.jobs.values())

    # --- telling -------------------------------------------------------------------------------------------

    def _to_node(self, node: str, message: Message) -> list[Effect]:
        known = self.nodes.get(node)
        return [Send(known.route, message)] if known else []

    def _to_nodes(self, job: Job, message: Message) -> list[Effect]:
        nodes = dict.fromkeys(slot.node for slot in job.slots)
        return [effect for node in nodes for effect in self._to_node(node, message)]

    def _tell(self, job: Job) -> list[Effect]:
        return [Tell(job.spec.name)] if job.followers else []

    def tick(self, now: float) -> list[Effect]:
        """What is repeated, and what is no longer waited for."""
        effects: list[Effect] = self._keep_leases(now)
        gone = {name for name, node in self.nodes.items() if node.draining and not self._beats(now, name)}
        for name in gone:
            # It was left in good order, and is gone.
            del self.nodes[name]
        for job in self.jobs.values():
            job.followers = {route: until for route, until in job.followers.items() if until > now}
            if job.state == "PENDING" and not self._suspended:
                effects += self._place(now, job)
            if job.roster_request and now >= job.roster_due:
                effects += self._announce(now, job)
            if job.state == "STARTING":
                # Of a node that was never heard as a member of the job the lighthouse can say nothing.
                silent = [node for node in dict.fromkeys(slot.node for slot in job.slots) if not self._beats(now, node)]
                effects += [effect for node in silent for effect in self._node_gone(now, job, node)]
            elif job.state == "RUNNING":
                effects += self._take_room(now, job)
            effects += self._keep_moving(now, job)
            late = job.stopping if now >= job.stop_until else job.stopping & gone
            if late:
                job.left |= late
                job.stopping -= late
                effects += [] if job.stopping else self._all_stopped(now, job)
        return effects

    def _keep_leases(self, now: float) -> list[Effect]:
        """A lease lives as long as its holder's node beats; the lighthouse says sooner if one is lost."""
        self._dispatch.hold = SUSPENDED if self._suspended else self.trouble
        if now - self._ticked_at > LATE:
            # This daemon stood still, or begins: nobody's silence is known to be theirs.
            self._awake_since = now
        self._ticked_at = now
        effects: list[Effect] = []
        for job in self.jobs.values():
            if job.shards is None or job.state in ENDED:
                continue
            for name in {process.node for process in job.processes.values() if process.alive}:
                known = self.nodes.get(name)
                if known is None or now - max(known.last_beat, self._awake_since) > LEASE_TIMEOUT:
                    effects += self._dispatch.node_lost(now, job, name, "")
        return effects + self._dispatch.tick(now, settled=now >= self._settles_at)

    def due(self) -> float | None:
        """When something is to be done that no message brings; None if nothing is known to be."""
        return self._dispatch.due()


def _grace(job: Job) -> float:
    """Seconds that its workers have to end: more where they go on later from what they save now."""
    return PREEMPTION_GRACE if job.state == "STOPPING" and job.outcome == "PENDING" else STOP_GRACE


def _unknown(request: int, job: str) -> Refused:
    return Refused(request, "UNKNOWN_JOB", f"there is no job named {job}", job)
