"""A cluster on a virtual clock: the real cores of all daemons, and workers that behave as the wrapper does.

What the model says of the world around them: a link is first in, first out, with a random latency. Who is killed loses
a random tail of what it had sent, and what was on its way to it. Frames for a lighthouse or a coordinator that is away
wait at their sender (DEALER); answers and events are lost (ROUTER, PUB). Every message passes the codec. A worker that
is blocked in a collective stays there until it is told, unless its peers' ends are drawn to break its connections.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any

import msgspec

from seamark.protocol.codec import decode, encode
from seamark.protocol.messages import (
    RANKS,
    Beat,
    BeatAnswer,
    Cause,
    Complete,
    Completed,
    FailureEvent,
    Incident,
    JobSpec,
    Join,
    MemberFaulted,
    Message,
    NodeHello,
    QuorumAnswer,
    QuorumReset,
    Refused,
    Snapshot,
    SnapshotRequest,
    StoreAddress,
    SubmitJob,
    Welcome,
    WorkerHello,
)
from seamarkd.agent import effects as agent
from seamarkd.agent.core import Agent
from seamarkd.agent.job import Job
from seamarkd.coordinator import effects as coordinator
from seamarkd.coordinator.core import Coordinator
from seamarkd.coordinator.job import JobRecord
from seamarkd.effects import Probe, Publish, Send
from seamarkd.lighthouse.core import Lighthouse
from seamarkd.lighthouse.nodes import ProbeResult

JOB = "job"
PER_NODE = 2
REPEAT_INTERVAL = 1.0
BEAT = 0.1


class Link:
    """One direction of a connection.

    Args:
        deliver: what its receiver does with a message.
        waits: what is sent while the receiver is away is kept for its successor.
    """

    def __init__(self, cluster: Cluster, deliver: Callable[[Message], None], *, waits: bool) -> None:
        self._cluster = cluster
        self._deliver = deliver
        self._waits = waits
        self._queue: list[Message] = []
        self._connection = 0
        self._last = 0.0
        self.up = False

    def send(self, message: Message) -> bool:
        if not self.up and not self._waits:
            return False
        self._queue.append(message)
        if self.up:
            self._schedule()
        return True

    def connect(self) -> None:
        if not self.up:
            self.up = True
            self._connection += 1
            for _ in self._queue:
                self._schedule()

    def sender_died(self) -> None:
        """What the kernel had taken over still arrives."""
        del self._queue[self._cluster.chance.randint(0, len(self._queue)) :]

    def receiver_died(self) -> None:
        del self._queue[: self._cluster.chance.randint(0, len(self._queue))]
        self.cut()

    def cut(self) -> None:
        self.up = False
        self._connection += 1
        if not self._waits:
            self._queue.clear()

    def _schedule(self) -> None:
        self._last = max(self._last, self._cluster.now + self._cluster.chance.uniform(0.0001, 0.002))
        connection = self._connection
        self._cluster.at(self._last - self._cluster.now, lambda: self._arrive(connection))

    def _arrive(self, connection: int) -> None:
        if connection == self._connection and self._queue:
            self._deliver(decode(encode(self._queue.pop(0))))


class Daemon:
    """Something that can be killed between any two effects, and is started again a while later."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.alive = False
        self.starts = 0
        self.mortality = 0.0
        """Probability of its end before each of its next effects."""

    def kill(self) -> None:
        if not self.alive:
            return
        self.alive = False
        self.mortality = 0.0
        self.cluster.log(f"{self} is killed")
        self.leave()
        chance = self.cluster.chance
        self.cluster.at(chance.choice([0.3, 1.0, 1.5, 3.0]) + chance.uniform(0.0, 0.3), self.start)

    def start(self) -> None:
        self.alive = True
        self.starts += 1
        self.cluster.log(f"{self} starts")
        self.enter()
        self._tick(self.starts)

    def soon(self, most: float, action: Callable[[], None]) -> None:
        """Does it after at most so many seconds, if this start of it is still alive then."""
        start = self.starts
        self.cluster.at(
            self.cluster.chance.uniform(0.001, most),
            lambda: action() if self.alive and self.starts == start else None,
        )

    def perform(self, effects: list[Any]) -> None:
        for effect in effects:
            if self.alive and self.cluster.chance.random() < self.mortality:
                self.kill()
            if not self.alive:
                return
            self.do(effect)

    def _tick(self, start: int) -> None:
        if self.alive and self.starts == start:
            self.tick()
            self.cluster.at(BEAT, lambda: self._tick(start))

    def enter(self) -> None: ...

    def leave(self) -> None: ...

    def tick(self) -> None: ...

    def do(self, effect: Any) -> None: ...

    def __str__(self) -> str:
        return type(self).__name__


class Peer(Daemon):
    """One that asks the lighthouse and subscribes to its events, over two connections that come up one by one."""

    to_lighthouse: Link
    from_lighthouse: Link
    events: Link

    away = False
    """Its network is cut."""

    def reach_lighthouse(self) -> None:
        if self.cluster.lighthouse.alive and not self.away:
            self.from_lighthouse.connect()
            self.to_lighthouse.connect()

    def subscribe(self) -> None:
        if self.cluster.lighthouse.alive and not self.away:
            self.events.connect()


class LighthouseDaemon(Daemon):
    def enter(self) -> None:
        self.core = Lighthouse(self.starts)
        self._ticks = 0
        for host in self.cluster.hosts.values():
            host.soon(0.5, host.reach_lighthouse)
            host.soon(0.5, host.subscribe)
        self.cluster.coordinator.soon(0.5, self.cluster.coordinator.reach_lighthouse)
        self.cluster.coordinator.soon(0.5, self.cluster.coordinator.subscribe)

    def leave(self) -> None:
        for peer in (*self.cluster.hosts.values(), self.cluster.coordinator):
            if peer.alive:
                peer.to_lighthouse.receiver_died()
                for link in (peer.from_lighthouse, peer.events):
                    link.sender_died()
                    peer.soon(0.01, link.cut)

    def receive(self, route: bytes, message: Message) -> None:
        if self.alive:
            self.perform(self.core.handle(self.cluster.now, route, message))

    def tick(self) -> None:
        self._ticks += 1
        self.perform(self.core.tick(self.cluster.now))
        if self.alive and self._ticks % 2 == 0:
            self._publish(self.core.event_beat())

    def do(self, effect: Any) -> None:
        match effect:
            case Publish(_, message):
                self._publish(message)
            case Send(route, message):
                for peer in (*self.cluster.hosts.values(), self.cluster.coordinator):
                    if peer.alive and peer.route == route:
                        peer.from_lighthouse.send(message)
            case Probe(node, _):
                incarnation = self.core.nodes.nodes[node].incarnation
                host = self.cluster.hosts[node]
                result: ProbeResult = "silent" if host.away else "accepted" if host.alive else "refused"
                self.soon(0.005, lambda: self.core.probed(node, incarnation, result))

    def _publish(self, message: Message) -> None:
        if isinstance(message, FailureEvent):
            failure = message.failure
            self.cluster.log(f"published: {failure.incarnation} {failure.kind} in {failure.iteration}")
            self.cluster.published.append(message)
        for peer in (*self.cluster.hosts.values(), self.cluster.coordinator):
            if peer.alive:
                peer.events.send(message)


class CoordinatorDaemon(Peer):
    route = b"coordinator"

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.records: dict[str, JobRecord] = {}
        self._told = ""
        self._incidents: dict[int, Incident] = {}

    def enter(self) -> None:
        self.core = Coordinator(self.starts)
        incidents = [incident for _, incident in sorted(self._incidents.items())]
        self.core.restore(self.cluster.now, [(record, incidents) for record in self.records.values()])
        self.to_lighthouse = Link(self.cluster, lambda m: self.cluster.lighthouse.receive(self.route, m), waits=True)
        self.from_lighthouse = Link(self.cluster, self._hear, waits=False)
        self.events = Link(self.cluster, self._hear, waits=False)
        self.soon(0.05, self.reach_lighthouse)
        self.soon(0.3, self.subscribe)
        for host in self.cluster.hosts.values():
            host.soon(0.5, host.reach_coordinator)

    def leave(self) -> None:
        self.to_lighthouse.sender_died()
        self.from_lighthouse.cut()
        self.events.cut()
        for host in self.cluster.hosts.values():
            if host.alive:
                host.to_coordinator.receiver_died()
                host.from_coordinator.sender_died()
                host.soon(0.01, host.from_coordinator.cut)

    def receive(self, route: bytes, message: Message) -> None:
        if self.alive:
            self.perform(self.core.handle(self.cluster.now, route, message))

    def _hear(self, message: Message) -> None:
        if self.alive:
            self.perform(self.core.from_lighthouse(self.cluster.now, message))

    def tick(self) -> None:
        self.perform(self.core.tick(self.cluster.now))

    def do(self, effect: Any) -> None:
        match effect:
            case coordinator.Persist():
                name = effect.record.spec.name
                places = ", ".join(f"{slot.rank} {slot.node}" for slot in effect.record.slots)
                line = (
                    f"generation {effect.record.generation}.{effect.record.placement} {effect.record.state}: {places}"
                )
                if self._told != line:
                    self.cluster.log(line)
                self._told = line
                self.records[name] = msgspec.json.decode(msgspec.json.encode(effect.record), type=JobRecord)
                self._incidents |= {incident.number: incident for incident in effect.incidents}
            case Send(route, message):
                for host in self.cluster.hosts.values():
                    if host.alive and host.route == route:
                        host.from_coordinator.send(message)
            case coordinator.ToLighthouse(message):
                self.to_lighthouse.send(message)


class Host(Peer):
    """A node: its agent, which can be killed, and the keeper with the workers, which stays."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        super().__init__(cluster)
        self.name = name
        self.workers: dict[str, Worker] = {}
        self._memory: bytes | None = None
        self._forgotten: set[str] = set()
        self._untold: set[str] = set()
        self._numbers = itertools.count()
        self._beats = 0
        self._drained = False
        self.door = False

    def __str__(self) -> str:
        return f"the agent of {self.name}"

    def enter(self) -> None:
        cluster = self.cluster
        self.route = f"{self.name}.{self.starts}".encode()
        self.core = Agent(self.name, lambda: f"{self.name}w{next(self._numbers)}")
        self.to_lighthouse = Link(cluster, lambda m, route=self.route: cluster.lighthouse.receive(route, m), waits=True)
        self.to_coordinator = Link(
            cluster, lambda m, route=self.route: cluster.coordinator.receive(route, m), waits=True
        )
        self.from_lighthouse = Link(cluster, self._from_lighthouse, waits=False)
        self.from_coordinator = Link(cluster, self._from_coordinator, waits=False)
        self.events = Link(
            cluster, lambda m: self.perform(self.core.sessions.heard(m)) if self.alive else None, waits=False
        )
        self._untold.clear()
        if self._drained:
            self.core.node.drain("asked")
        if self._memory is not None:
            self._adopt(msgspec.json.decode(self._memory, type=Job))
        if not self.alive:
            return
        self.door = True
        for worker in self.workers.values():
            self.soon(0.5, worker.connect)
        for link in (self.to_lighthouse, self.to_coordinator):
            link.send(self._hello())
        self.soon(0.05, self.reach_lighthouse)
        self.soon(0.3, self.subscribe)
        self.soon(0.05, self.reach_coordinator)

    def _adopt(self, job: Job) -> None:
        known = {one: (1, worker.forked_at) for one, worker in self.workers.items() if one not in self._forgotten}
        self.perform(self.core.adopt(self.cluster.now, job, known))
        for incarnation in known:
            worker = self.workers[incarnation]
            if worker.reaped:
                self.exited(incarnation)
            elif worker.status is not None:
                self.soon(0.05, lambda one=incarnation: self.dying(one))

    def leave(self) -> None:
        self.door = False
        self.to_lighthouse.sender_died()
        self.to_coordinator.sender_died()
        for link in (self.from_lighthouse, self.from_coordinator, self.events):
            link.cut()
        for worker in self.workers.values():
            worker.to_agent.receiver_died()
            worker.from_agent.sender_died()
            self.cluster.at(0.01, worker.from_agent.cut)

    def cut(self) -> None:
        """Nothing gets out of this host or in; what runs there goes on."""
        self.away = True
        self.cluster.gave_up.add(self.name)
        self.cluster.log(f"{self.name} is cut off")
        if self.alive:
            for link in (self.to_lighthouse, self.from_lighthouse, self.events):
                link.cut()
            self.to_coordinator.cut()
            self.from_coordinator.cut()

    def mend(self) -> None:
        """It can be reached again."""
        self.away = False
        self.cluster.log(f"{self.name} is there again")
        if self.alive:
            self.soon(0.5, self.reach_lighthouse)
            self.soon(0.5, self.subscribe)
            self.soon(0.5, self.reach_coordinator)

    def _hello(self) -> NodeHello:
        return NodeHello(self.name, self.route.decode(), "ipc:///agent", PER_NODE, "", self.core.node.draining)

    def drain(self) -> None:
        """It is to be left."""
        self.cluster.gave_up.add(self.name)
        self.cluster.log(f"{self.name} drains")
        self._drained = True
        if self.alive:
            self.perform(self.core.node.drain("asked"))

    def serve(self) -> None:
        """It serves again."""
        self.cluster.log(f"{self.name} serves")
        self._drained = False
        if self.alive:
            self.perform(self.core.node.serve())

    def crash(self) -> None:
        """Its power fails: all that ran there is gone, and nobody says so."""
        self.cut()
        self.starts += 1
        self.alive, self.door, self._memory = False, False, None
        for worker in self.workers.values():
            worker.vanish()

    def boot(self) -> None:
        """It comes back empty."""
        self.away = False
        self.workers.clear()
        self._forgotten.clear()
        self.start()

    def reach_coordinator(self) -> None:
        if self.cluster.coordinator.alive and not self.away:
            self.from_coordinator.connect()
            self.to_coordinator.connect()

    def tick(self) -> None:
        self._beats += 1
        beat = Beat(self.name, self.route.decode(), self._beats)
        self.to_lighthouse.send(beat)
        if self._beats % 5 == 0:
            self.to_coordinator.send(beat)
        untold, self._untold = self._untold, set()
        for job in untold:
            self.to_lighthouse.send(SnapshotRequest(0, job))
        self.perform(self.core.reports.due(self.cluster.now))

    def dying(self, incarnation: str) -> None:
        if self.alive:
            self.perform(self.core.losses.dying(self.cluster.now, JOB, incarnation, "canary", self.cluster.now))

    def exited(self, incarnation: str) -> None:
        if not self.alive:
            return
        status = self.workers[incarnation].status
        assert status is not None
        if self.core.node.runs(JOB, incarnation):
            now = self.cluster.now
            self.perform(self.core.losses.exited(now, JOB, incarnation, status, now, "", []))
        else:
            self._forgotten.add(incarnation)

    def from_worker(self, incarnation: str, message: Message) -> None:
        if self.alive:
            self.perform(self.core.from_worker(self.cluster.now, incarnation, message))

    def _from_lighthouse(self, message: Message) -> None:
        if not self.alive:
            return
        match message:
            case BeatAnswer():
                if not message.known:
                    self.to_lighthouse.send(self._hello())
            case Welcome():
                self.perform(self.core.registered(self.cluster.now))
            case Snapshot():
                self.perform(self.core.sessions.heard(message))
            case _:
                self.perform(self.core.from_lighthouse(self.cluster.now, message))

    def _from_coordinator(self, message: Message) -> None:
        if not self.alive:
            return
        if isinstance(message, BeatAnswer) and not message.known:
            self.to_coordinator.send(self._hello())
        if isinstance(message, Welcome):
            self.perform(self.core.welcomed(self.cluster.now))
        self.perform(self.core.from_coordinator(self.cluster.now, message))

    def _send_worker(self, incarnation: str, message: Message) -> bool:
        worker = self.workers.get(incarnation)
        return worker is not None and worker.alive and worker.from_agent.send(message)

    def do(self, effect: Any) -> None:
        match effect:
            case agent.ToLighthouse(message):
                self.to_lighthouse.send(message)
            case agent.ToCoordinator(message):
                self.to_coordinator.send(message)
            case agent.ToWorker(incarnation, message):
                self._send_worker(incarnation, message)
            case agent.TellWorkers(job, message):
                for incarnation in self.core.node.listening(job):
                    if not self._send_worker(incarnation, message):
                        self._untold.add(job)
            case agent.StartWorker(_, member, incarnation):
                self.soon(0.01, lambda: self._fork(member, incarnation))
            case agent.SignalWorker(_, _, incarnation, _):
                if incarnation in self.workers:
                    self.workers[incarnation].end(-9)
            case agent.EndWorker(_, incarnation, _):
                if incarnation in self.workers:
                    self.soon(0.3, lambda: self.workers[incarnation].end(143))
            case agent.Introduce():
                self.to_coordinator.send(self._hello())
            case agent.Remember(job):
                self._memory = msgspec.json.encode(self.core.node.jobs[job]) if job in self.core.node.jobs else None
            case agent.ForgetExit(_, _, incarnation):
                self._forgotten.add(incarnation)
            case agent.StartStore(job, incarnation):
                store = StoreAddress("host", 2, incarnation)
                self.soon(0.01, lambda: self.perform(self.core.stores.started(job, store, 1)))
            case agent.StopJobHere(job, _, _, final):
                self._end_workers()
                self.soon(2.0, lambda: self._stopped(job, final=final))

    def _end_workers(self) -> None:
        for worker in self.workers.values():
            worker.end(-15)

    def _stopped(self, job: str, *, final: bool) -> None:
        if job in self.core.node.jobs:
            if final:
                # With the keeper goes what it had been asked to start meanwhile.
                self._end_workers()
            self.perform(self.core.stopped(self.cluster.now, job, final=final))

    def _fork(self, member: str, incarnation: str) -> None:
        job = self.core.node.jobs.get(JOB)
        if job is None or job.roster is None:
            return
        if incarnation not in self.workers:
            self.workers[incarnation] = Worker(self, member, incarnation, job.roster.generation)
        forked_at = self.workers[incarnation].forked_at
        self.perform(self.core.places.worker_started(self.cluster.now, JOB, incarnation, 1, forked_at))


class Worker:
    """A rank in the wrapper: asks for the quorum, is in an iteration, leaves it when told or when it fails."""

    def __init__(self, host: Host, member: str, incarnation: str, generation: int) -> None:
        self.host = host
        self.cluster = host.cluster
        self.member = member
        self.incarnation = incarnation
        self.generation = generation
        self.forked_at = self.cluster.now
        self.iteration = -1
        self.completed = False
        self.status: int | None = None
        self.reaped = False
        self.last: QuorumAnswer | None = None
        self.pending: Join | Complete | None = None
        self._begun = False
        self._request = 0
        self._ended = -1
        self._asked_at = 0.0
        self.to_agent = Link(self.cluster, lambda m: self.host.from_worker(incarnation, m), waits=True)
        self.from_agent = Link(self.cluster, self._receive, waits=False)
        self.cluster.at(self.cluster.chance.uniform(0.02, 0.3), self._begin)

    @property
    def alive(self) -> bool:
        return self.status is None

    @property
    def inside(self) -> bool:
        """In the function: in a collective that only the others, or a failure, can end."""
        return self.alive and self.iteration >= 0 and self.pending is None

    @property
    def _was_away(self) -> bool:
        return self.host.name in self.cluster.gave_up

    def connect(self) -> None:
        if self.alive and self._begun and self.host.door:
            self.from_agent.connect()
            self.to_agent.connect()

    def vanish(self) -> None:
        """It ends with its host."""
        if self.alive:
            self.status, self.reaped = -9, True
            self.cluster.vanished.add(self.incarnation)
            self.to_agent.cut()
            self.from_agent.cut()

    def end(self, status: int) -> None:
        if not self.alive:
            return
        self.status = status
        self.cluster.log(f"{self.incarnation} ({self.member}) ends with {status}")
        self.to_agent.sender_died()
        self.from_agent.cut()
        chance = self.cluster.chance
        if status != 0:
            self.cluster.at(chance.uniform(0.0005, 0.003), lambda: self.host.dying(self.incarnation))
        # A process with much memory takes long to go.
        self.cluster.at(chance.choice([0.05, 0.05, 1.5]) * chance.random() + 0.001, self._reap)
        for other in self.cluster.workers():
            if other.inside and other.iteration == self.iteration and chance.random() < self.cluster.broken_pipes:
                self.cluster.at(chance.uniform(0.0, 0.005), lambda one=other: one.fail(communication=True))

    def fail(self, *, communication: bool = False) -> None:
        """Leaves the function by an exception."""
        if self.inside:
            if self._ended < self.iteration:
                cause = Cause(kind="exception", text="failed", communication=communication)
                now = self.cluster.now
                self.to_agent.send(MemberFaulted(JOB, self.member, self.incarnation, self.iteration, cause, now))
            self._leave()

    def complete(self) -> None:
        """Returns from the function, once everybody it needs is in the iteration."""
        if not self.inside:
            return
        if self.cluster.incomplete(self):
            self.cluster.at(0.05, self.complete)
            return
        self._request += 1
        self._ask(Complete(JOB, RANKS, self.generation, self.member, self.incarnation, self._request, self.iteration))

    def _reap(self) -> None:
        self.reaped = True
        self.host.exited(self.incarnation)

    def _begin(self) -> None:
        if self.alive:
            self._begun = True
            self.to_agent.send(WorkerHello(JOB, self.member, self.incarnation, 1, True))
            self.connect()
            self._join()
            self._repeat()

    def _repeat(self) -> None:
        if self.alive:
            if self.pending is not None and self.cluster.now - self._asked_at >= REPEAT_INTERVAL:
                self.to_agent.send(WorkerHello(JOB, self.member, self.incarnation, 1, True))
                self._ask(self.pending)
            self.cluster.at(REPEAT_INTERVAL / 4, self._repeat)

    def _ask(self, request: Join | Complete) -> None:
        self.pending = request
        self._asked_at = self.cluster.now
        self.to_agent.send(request)

    def _join(self) -> None:
        last = self.last
        self._request += 1
        self._ask(
            Join(
                JOB,
                RANKS,
                self.generation,
                self.member,
                self.incarnation,
                self._request,
                last.iteration if last else -1,
                last.restarts if last else 0,
                last.quorum_id if last else 0,
                [member.member for member in last.members] if last else [],
                1 if last else 0,
            )
        )

    def _leave(self) -> None:
        self.iteration = -1
        self._join()

    def _receive(self, message: Message) -> None:
        if not self.alive:
            return
        match message:
            case FailureEvent():
                self._told(message.failure.iteration)
            case Snapshot():
                for event in message.failures:
                    self._told(event.failure.iteration)
                for quorum in message.quorums:
                    self._told(quorum.iteration - 1)
            case QuorumAnswer() | QuorumReset() | Completed():
                pending = self.pending
                mine = [one.request for one in message.recipients if one.member == self.member]
                if pending is not None and pending.request in mine:
                    self.pending = None
                    self._answered(pending, message)
            case Refused(code="STALE_GENERATION" | "UNKNOWN_MEMBER") if self.pending and self._was_away:
                # Its place was given to another host.
                self.end(1)
            case Refused(code="STALE_GENERATION" | "UNKNOWN_MEMBER") if self.pending is not None:
                self.cluster.violations.append(f"{self.incarnation} was refused: {message.reason}")
                self.end(1)
            case _:
                pass

    def _told(self, iteration: int) -> None:
        self._ended = max(self._ended, iteration)
        if self.inside and self.iteration <= iteration:
            inside = self.iteration
            self.cluster.at(
                self.cluster.chance.uniform(0.0005, 0.02),
                lambda: self._leave() if self.inside and self.iteration == inside else None,
            )

    def _answered(self, asked: Join | Complete, answer: QuorumAnswer | QuorumReset | Completed) -> None:
        match answer:
            case Completed():
                self.completed = True
                self.iteration = -1
                self.cluster.at(self.cluster.chance.uniform(0.01, 0.2), lambda: self.end(0))
            case QuorumReset():
                self._leave()
            case QuorumAnswer():
                self.cluster.check_answer(self, answer)
                self.last = answer
                self.iteration = answer.iteration
                if self._ended >= answer.iteration:
                    self._leave()
                elif self.cluster.completing:
                    self.cluster.at(self.cluster.chance.uniform(0.0, 0.05), self.complete)


class Cluster:
    """Nodes with two ranks each.

    Args:
        seed: decides everything that is not decided by the cores.
        hosts: how many nodes there are.
    """

    def __init__(self, seed: int, hosts: int = 2) -> None:
        self.chance = random.Random(seed)
        self.now = 1.0
        self.completing = False
        self.broken_pipes = self.chance.choice([0.0, 0.0, 0.5, 1.0])
        """Probability that a rank in a collective sees the end of a peer by itself."""
        self.violations: list[str] = []
        self.published: list[FailureEvent] = []
        self.vanished: set[str] = set()
        """Incarnations that ended with their host."""
        self.gave_up: set[str] = set()
        """Hosts that were away."""
        self.story: list[str] = []
        self._given: dict[int, tuple[str, ...]] = {}
        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self.hosts = {name: Host(self, name) for name in (f"n{number}" for number in range(hosts))}
        self.lighthouse = LighthouseDaemon(self)
        self.coordinator = CoordinatorDaemon(self)
        for daemon in self.daemons():
            daemon.start()

    def daemons(self) -> list[Daemon]:
        return [self.coordinator, self.lighthouse, *self.hosts.values()]

    def workers(self) -> list[Worker]:
        return [worker for host in self.hosts.values() for worker in list(host.workers.values())]

    def rank(self, number: int) -> Worker | None:
        """The living process of a rank."""
        living = [one for one in self.workers() if one.member == f"{JOB}/{number}" and one.alive]
        return living[-1] if living else None

    def at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + delay, next(self._order), action))

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self._due and self._due[0][0] <= until:
            self.now, _, action = heapq.heappop(self._due)
            action()
        self.now = until

    def log(self, line: str) -> None:
        self.story.append(f"{self.now:9.4f} {line}")

    def submit(self, max_restarts: int = 30, min_nodes: int = 2, max_nodes: int = 2) -> None:
        spec = JobSpec(
            name=JOB,
            argv=["train.py"],
            module=False,
            python="python",
            cwd="/",
            env={},
            min_nodes=min_nodes,
            max_nodes=max_nodes,
            nproc_per_node=PER_NODE,
            policy="replace",
            max_restarts=max_restarts,
            checkpoint_dir="",
            log_dir="/tmp",
        )
        self.coordinator.receive(b"operator", SubmitJob(1, spec, "submission"))

    def incomplete(self, worker: Worker) -> bool:
        """True while somebody of this worker's iteration is not in it, or no longer: its collectives can't end."""
        assert worker.last is not None
        processes = {one.incarnation: one for one in self.workers()}
        members = [processes[member.incarnation] for member in worker.last.members]
        return any(not one.completed and (not one.alive or one.iteration != worker.iteration) for one in members)

    def check_answer(self, worker: Worker, answer: QuorumAnswer) -> None:
        """Iterations and quorum ids grow, and an iteration has one list of members."""
        self.log(f"{worker.incarnation} enters {answer.iteration}")
        last = worker.last
        if last is not None and (answer.iteration <= last.iteration or answer.quorum_id < last.quorum_id):
            self.violations.append(f"{worker.incarnation} went back from {last.iteration} to {answer.iteration}")
        members = tuple(member.incarnation for member in answer.members)
        if self._given.setdefault(answer.iteration, members) != members:
            self.violations.append(f"iteration {answer.iteration} has two lists of members")
