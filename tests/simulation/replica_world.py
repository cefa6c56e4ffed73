"""Replica groups on a virtual clock: the real cores of lighthouse and managers, and ranks that train as Manager does.

What the model says of the world around them: a connection is first in, first out, with a random latency; a request may
arrive twice; a partition holds frames back, a cut loses what is on its way, and a manager that makes its connection
anew drops what it had not sent. Who dies loses a random tail of what it had sent. A rank that waits for a dead peer,
in a group's creation or in a collective, stays there until it is told, unless the peer's end is drawn to be seen.

Invariants are looked at when they can break, and collected in ``Replicas.violations``.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from subscriber import Subscriber

from seamark.protocol.codec import decode, encode
from seamark.protocol.messages import (
    REPLICAS,
    BeatAnswer,
    Cause,
    CommitDecision,
    CommitVote,
    FailureEvent,
    InjectFailure,
    MemberLost,
    Message,
    RankJoin,
    RankQuorum,
    Refused,
    Replica,
    ReplicaBeat,
    ReplicaJoin,
    ReplicaLeave,
    ReplicaQuorum,
    ReplicaQuorumEvent,
    ReplicaWithdraw,
)
from seamark.replicas.core import ManagerCore, Reconnect, Settings, ToLighthouse, ToRank
from seamarkd.effects import ProbeMember, Publish, Send, Wake
from seamarkd.lighthouse.core import Lighthouse
from seamarkd.lighthouse.replicas import ReplicaGroup, ReplicaOptions

JOB = "job"
TICK = 0.1
EVENT_BEAT = 0.2
HEARTBEAT_INTERVAL = 0.25
HEARTBEAT_TIMEOUT = 2.0
FAILURE_TICK = 0.5
COLLECTIVE_TIMEOUT = 60.0
QUORUM_TIMEOUT = 60.0
REPEAT_INTERVAL = 1.0
ANSWER_MARGIN = 2.0
LEAVE_TIMEOUT = 1.0


class Wire:
    """The connection of one manager to the lighthouse, in both directions."""

    def __init__(self, world: Replicas, process: Process) -> None:
        self._world = world
        self._process = process
        self._backlog: list[Message] = []
        self._connection = 0
        self._last = [0.0, 0.0]
        self._lost = [0, 0]
        """Frames of the connections before this one are lost, up and down."""
        self._ends_at = math.inf
        self._heals_at = 0.0
        self.up = False

    def connect_soon(self) -> None:
        """ZeroMQ tries again every so often; a partition has to end first."""
        connection = self._connection
        delay = max(self._heals_at - self._world.now, 0.0) + self._world.chance.uniform(0.001, 0.3)
        self._world.at(delay, lambda: self._connect(connection))

    def _connect(self, connection: int) -> None:
        if connection != self._connection or self.up or not self._process.alive:
            return
        if not self._world.lighthouse.alive or self._world.now < self._heals_at:
            self.connect_soon()
            return
        self.up = True
        backlog, self._backlog = self._backlog, []
        for message in backlog:
            self.send(message)

    def send(self, message: Message) -> None:
        self._process.sent(message)
        if not self.up:
            self._backlog.append(message)
            return
        chance = self._world.chance
        copies = 2 if chance.random() < self._world.doubled else 1
        for _ in range(copies):
            self._deliver(0, message, lambda m=message, at=self._world.now: self._world.lighthouse.receive(self, m, at))

    def answer(self, message: Message) -> None:
        if self.up:
            self._deliver(1, message, lambda: self._process.heard(message))

    def _deliver(self, direction: int, message: Message, action: Callable[[], None]) -> None:
        world, connection = self._world, self._connection
        at = max(self._last[direction], world.now + world.chance.uniform(0.0001, 0.002), self._heals_at)
        self._last[direction] = at

        def arrive() -> None:
            if connection >= self._lost[direction] and (direction or world.now <= self._ends_at):
                action()

        world.at(at - world.now, arrive)

    def partition(self, seconds: float) -> None:
        """Frames in both directions arrive only afterwards."""
        self._world.log(f"{self._process.incarnation} is cut off for {seconds:.2f} s")
        self._heals_at = max(self._heals_at, self._world.now + seconds)

    def partitioned(self) -> bool:
        return self._world.now < self._heals_at

    def cut(self) -> None:
        """What is on its way is lost; both ends notice and connect again."""
        self._part(lost=[True, True])

    def renew(self) -> None:
        """The manager closes its socket and makes another: what had not been sent is gone, the rest perhaps not."""
        self._backlog.clear()
        self._part(lost=[self._world.chance.random() < 0.5, True])

    def sender_died(self) -> None:
        """What the kernel had taken over still arrives."""
        self._ends_at = self._world.now + self._world.chance.uniform(0.0, 0.003)

    def _part(self, lost: list[bool]) -> None:
        if self.up:
            self.up = False
            self._connection += 1
            self._last = [0.0, 0.0]
            self._lost = [self._connection if gone else at for gone, at in zip(lost, self._lost, strict=True)]
        self.connect_soon()

    @property
    def route(self) -> bytes:
        return self._process.incarnation.encode()


class LighthouseDaemon:
    def __init__(self, world: Replicas, options: ReplicaOptions) -> None:
        self._world = world
        self._options = options
        self.alive = False
        self.epoch = 0

    def start(self) -> None:
        self.alive = True
        self.epoch += 1
        self._world.log(f"lighthouse starts, epoch {self.epoch}")
        self._world.epoch_began()
        self.core = Lighthouse(self.epoch, self._world.now, self._options)
        self._tick(self.epoch)
        self._beat(self.epoch)

    def kill(self, away: float) -> None:
        if not self.alive:
            return
        self._world.log("lighthouse is killed")
        self.alive = False
        for process in self._world.processes:
            if process.alive:
                process.wire.cut()
        self._world.at(away, self.start)

    def receive(self, wire: Wire, message: Message, sent_at: float) -> None:
        if not self.alive:
            return
        self._world.arrives(message, sent_at)
        self.perform(self.core.handle(self._world.now, wire.route, message))
        self._world.was_taken(message, self.core.replicas.get(JOB))

    def tell(self, message: Message) -> None:
        """From an agent or an operator."""
        if self.alive:
            self.perform(self.core.handle(self._world.now, b"agent", message))

    def ask(self, route: bytes, message: Message) -> None:
        """From a subscriber."""
        if self.alive:
            self.perform(self.core.handle(self._world.now, route, message))

    def _beat(self, epoch: int) -> None:
        if self.alive and self.epoch == epoch:
            for subscriber in self._world.subscribers:
                subscriber.publish(self.core.event_beat())
            self._world.at(EVENT_BEAT, lambda: self._beat(epoch))

    def _tick(self, epoch: int) -> None:
        if self.alive and self.epoch == epoch:
            self.perform(self.core.tick(self._world.now))
            self._world.at(TICK, lambda: self._tick(epoch))

    def perform(self, effects: list[Any]) -> None:
        world, epoch = self._world, self.epoch

        def later(seconds: float, action: Callable[[], list[Any]]) -> None:
            world.at(seconds, lambda: self.perform(action()) if self.alive and self.epoch == epoch else None)

        for effect in effects:
            match effect:
                case Publish(_, message):
                    world.published(message)
                case Send(route, message):
                    process = world.by_route.get(route)
                    for subscriber in world.subscribers:
                        if subscriber.route == route:
                            subscriber.hear(message)
                    if isinstance(message, ReplicaQuorum):
                        world.answered(message)
                    elif isinstance(message, Refused):
                        world.refused.add((route.decode(), message.request))
                    if process is not None and process.alive:
                        process.wire.answer(message)
                case Wake(seconds):
                    later(seconds, lambda: self.core.tick(world.now))
                case ProbeMember(_, member, incarnation, _):
                    result = world.probe(incarnation)
                    delay = 0.2 if result == "silent" else world.chance.uniform(0.0002, 0.002)
                    later(
                        delay,
                        lambda m=member, i=incarnation, r=result: self.core.member_probed(world.now, JOB, m, i, r),
                    )


class Rank:
    """One rank, as `seamark.Manager` behaves with a synchronous quorum.

    ``group`` is the quorum id of its process group across replicas; None: none was made yet, or it was cut.
    """

    def __init__(self, process: Process, index: int) -> None:
        self._process = process
        self._world = process.world
        self.index = index
        self.step = 0
        self.group: int | None = None
        self.quorum: RankQuorum | None = None
        self.failures = 0
        self.phase = "idle"
        self.doomed = False
        """A member of its quorum was lost while it made its group."""
        self.where: tuple[int, ...] = ()
        self.handed = [0.0, 0.0]
        self._built: set[int] = set()
        self._request = self._world.chance.randrange(1 << 20) << 20
        self._pending: RankJoin | CommitVote | None = None
        self._given_up: set[tuple[int, int]] = set()

    @property
    def route(self) -> bytes:
        return b"rank" + str(self.index).encode()

    @property
    def incarnation(self) -> str:
        return self._process.incarnation

    def _later(self, delay: float, action: Callable[[], None]) -> None:
        """Unless the process is gone by then; when it is frozen, as soon as it isn't."""
        self._world.at(delay, lambda: self._process.whenever(action))

    # --- quorum

    def start_quorum(self) -> None:
        if self._process.ending:
            return
        world = self._world
        failures = max(self.failures, 1) if self.quorum is not None and self.group is None else self.failures
        limit = QUORUM_TIMEOUT
        if not world.calm and world.chance.random() < world.impatient:
            limit = world.chance.choice([1.0, 2.0, world.chance.uniform(0.3, 3.0)])
        self._request += 1
        self.phase = "asking"
        self._ask(
            RankJoin(
                self._request,
                self.index,
                self.step,
                "127.0.0.1:1",
                False,
                failures,
                world.min_members,
                0,
                world.join_timeout,
                limit,
            ),
            limit,
        )

    def _ask(self, request: RankJoin | CommitVote, limit: float) -> None:
        self._pending = request
        self._process.from_rank(self, request)
        self._later(REPEAT_INTERVAL, lambda: self._repeat(request))
        self._later(limit + ANSWER_MARGIN, lambda: self._gave_up(request))

    def _repeat(self, request: RankJoin | CommitVote) -> None:
        if self._pending is request:
            self._process.from_rank(self, request)
            self._later(REPEAT_INTERVAL, lambda: self._repeat(request))

    def _gave_up(self, request: RankJoin | CommitVote) -> None:
        if self._pending is request:
            self._ended(request)

    def _ended(self, request: RankJoin | CommitVote) -> None:
        """A QuorumTimeout or a refusal: the caller has its error, and tries again after a while."""
        self._pending = None
        if isinstance(request, CommitVote):
            self._given_up.add((request.quorum_id, request.step))
        self._world.gave_up(self, request)
        self.phase = "idle"
        self._later(self._world.chance.choice([0.001, 0.3, 1.5]), self.start_quorum)

    def hear(self, message: Message) -> None:
        pending = self._pending
        if isinstance(message, FailureEvent):
            self._told(message)
        elif pending is None or getattr(message, "request", None) != pending.request:
            return
        elif isinstance(message, Refused):
            self._world.log(f"{self.incarnation}/{self.index} is refused: {message.reason}")
            self._ended(pending)
        elif isinstance(message, RankQuorum):
            self._pending = None
            self._enter(message)
        elif isinstance(message, CommitDecision):
            self._pending = None
            assert isinstance(pending, CommitVote)
            self._decided(pending, message.commit)

    def _told(self, event: FailureEvent) -> None:
        lost = event.failure
        if self.quorum is None or all(one.incarnation != lost.incarnation for one in self.quorum.participants):
            return
        self.group = None
        self.doomed = True
        self.fail()

    def fail(self) -> None:
        """What it waits for with its peers ends in an error."""
        if self.phase in ("building", "collective"):
            self.where = ()
            self._vote(False)

    # --- group and step

    def _enter(self, quorum: RankQuorum) -> None:
        self.quorum = quorum
        self._world.log(f"{self.incarnation}/{self.index} step {self.step} is in quorum {quorum.quorum_id & 0xFFFF}")
        if self.group == quorum.quorum_id:
            self._train()
            return
        self.group = None
        if quorum.quorum_id in self._built:
            self._world.violate(
                f"{self.incarnation}/{self.index} makes the group of quorum {quorum.quorum_id} a second time: "
                "who kept its own is not there"
            )
        self._built.add(quorum.quorum_id)
        self.phase = "building"
        self.doomed = False
        self._meet(("group", quorum.quorum_id, self.index), self._build)

    def _build(self) -> None:
        assert self.quorum is not None
        if self.phase != "met":
            return
        if self.doomed:
            self._vote(False)
            return
        self.group = self.quorum.quorum_id
        self._world.connections_end(self._process, self.index, self.group)
        self._train()

    def _train(self) -> None:
        assert self.quorum is not None
        self.step = max(one.step for one in self.quorum.participants)  # healed, where it was behind
        key = ("step", self.quorum.quorum_id, self.index, self.step)
        quorum = self.quorum
        self.phase = "computing"

        def reduce() -> None:
            if self.quorum is quorum and self.phase == "computing":
                if self.group is None:
                    self._vote(False)
                    return
                self.phase = "collective"
                self._meet(key, lambda: self._vote(self._world.calm or self._world.chance.random() > 0.02))

        chance = self._world.chance
        self._later(chance.choice([0.05, 0.2, 0.5]) * chance.random() + 0.01, reduce)

    def _meet(self, key: tuple[Any, ...], action: Callable[[], None]) -> None:
        """Waits until all of the quorum are there."""
        assert self.quorum is not None
        self.where = key
        self._world.meet(key, self, [one.incarnation for one in self.quorum.participants], action)
        if self.where == key and self._world.sees_an_end(self.quorum):
            self._later(0.001, lambda: self.fail() if self.where is key else None)
        limit = self._world.creation_timeout if self.phase == "building" else COLLECTIVE_TIMEOUT
        self._later(limit, lambda: self.fail() if self.where is key else None)

    def met(self, key: tuple[Any, ...], action: Callable[[], None]) -> None:
        if self.where == key:
            self.where = ()
            self.phase = "met"
            self._later(self._world.chance.uniform(0.0, 0.002), action)

    def _vote(self, mine: bool) -> None:
        assert self.quorum is not None
        world = self._world
        limit = COLLECTIVE_TIMEOUT
        if not world.calm and world.chance.random() < world.impatient:
            limit = world.chance.uniform(0.01, 1.0)
        self._request += 1
        self.phase = "voting"
        # The step that its replica group joined with: one of its ranks may have healed and another not.
        joined = next(one.step for one in self.quorum.participants if one.incarnation == self.incarnation)
        vote = CommitVote(self._request, self.index, self.quorum.quorum_id, joined, mine, limit)
        self._later(world.chance.choice([0.0, 0.0, 0.5]), lambda: self._ask(vote, limit))

    def _decided(self, vote: CommitVote, commit: bool) -> None:
        self._process.decided(self, vote, commit)
        if commit:
            self.step += 1
            self.failures = 0
            self._world.committed(self._process)
        else:
            self.failures += 1
        self.phase = "idle"
        self._later(0.001, self.start_quorum)


class Process:
    """A process of a replica group: its manager, and its ranks with it."""

    def __init__(self, world: Replicas, replica_id: str, incarnation: str, world_size: int) -> None:
        self.world = world
        self.replica_id = replica_id
        self.incarnation = incarnation
        self.alive = True
        self.frozen = False
        self.ending = False
        self.death = ""
        self.listens_until = math.inf
        self.requested_until = 0
        """The highest request of the lighthouse that its callers gave up, and when."""
        self.gave_up_at = 0.0
        self.ranks = [Rank(self, index) for index in range(world_size)]
        self._decisions: dict[tuple[int, int], bool] = {}
        self._frozen_work: list[Callable[[], None]] = []
        self._woken_for = -1.0
        settings = Settings(
            JOB, replica_id, incarnation, world_size, "tcp://h:1", "h:2", "tcp://lighthouse", HEARTBEAT_INTERVAL
        )
        self.core = ManagerCore(settings, world.now)
        self.wire = Wire(world, self)
        self.wire.connect_soon()
        self._wake()
        for rank in self.ranks:
            self.world.at(world.chance.uniform(0.0, 0.2), lambda one=rank: self.whenever(one.start_quorum))

    def whenever(self, action: Callable[[], None]) -> None:
        if self.alive and self.frozen:
            self._frozen_work.append(action)
        elif self.alive:
            action()

    # --- messages

    def from_rank(self, rank: Rank, message: Message) -> None:
        for _ in range(2 if self.world.chance.random() < self.world.doubled else 1):
            self._hand(
                rank,
                0,
                lambda: self._perform(self.core.from_rank(self.world.now, rank.route, decode(encode(message)))),
            )

    def _hand(self, rank: Rank, direction: int, action: Callable[[], None]) -> None:
        """Between a rank and its manager, in order."""
        now = self.world.now
        at = rank.handed[direction] = max(rank.handed[direction], now + self.world.chance.uniform(0.00001, 0.0003))
        self.world.at(at - now, lambda: self.whenever(action))

    def heard(self, message: Message) -> None:
        if not isinstance(message, BeatAnswer):
            message = decode(encode(message))
        self.whenever(lambda: self._perform(self.core.from_lighthouse(self.world.now, message)))

    def sent(self, message: Message) -> None:
        if isinstance(message, ReplicaWithdraw):
            self.requested_until = max(self.requested_until, message.request)
            self.gave_up_at = self.world.now
        self.world.log_message(self, message)

    def _perform(self, effects: list[Any]) -> None:
        for effect in effects if self.frozen else [*effects, *self.core.tick(self.world.now)]:
            match effect:
                case ToRank(route, message):
                    rank = self.ranks[int(route[4:])]
                    self._hand(rank, 1, lambda r=rank, m=message: r.hear(m))
                case ToLighthouse(message):
                    self.wire.send(message)
                case Reconnect():
                    self.wire.renew()
        self._wake()

    def _wake(self) -> None:
        at = max(self.core.wake_at(), self.world.now + 0.001)
        if at == self._woken_for:
            return
        self._woken_for = at

        def tick() -> None:
            if self._woken_for == at and not self.frozen:
                self._perform([])

        self.world.at(at - self.world.now, lambda: self.whenever(tick))

    def decided(self, rank: Rank, vote: CommitVote, commit: bool) -> None:
        key = (vote.quorum_id, vote.step)
        if self._decisions.setdefault(key, commit) != commit:
            self.world.violate(f"{self.incarnation}: ranks were told different decisions on step {vote.step}")
        if commit and any(key in other._given_up for other in self.ranks if other is not rank):
            self.world.violate(f"{self.incarnation}/{rank.index} commits step {vote.step}, another gave it up")

    # --- faults

    def die(self, kind: str) -> None:
        """``canary``: its agent tells; ``refused``, ``dying`` (accepts a while), ``silent``: what a probe finds."""
        if not self.alive:
            return
        world, chance = self.world, self.world.chance
        world.log(f"{self.incarnation} dies ({kind})")
        self.alive, self.death = False, kind
        self.wire.sender_died()
        lingers = chance.uniform(0.02, 1.0) if kind == "dying" else 0.0
        self.listens_until = math.inf if kind == "silent" else world.now + lingers
        if kind == "canary":
            lost = MemberLost(
                request=1,
                job="agents",
                generation=0,
                member="agents/0",
                incarnation=self.incarnation,
                cause=Cause(kind="signal", status=9),
                occurred_at=world.now,
                detected_at=world.now,
                detector="canary",
            )
            self._report(lost)
        if kind != "silent":
            world.at(lingers, lambda: world.connections_end(self))

    def _report(self, lost: MemberLost) -> None:
        """An agent repeats it until it is acknowledged."""
        world = self.world

        def tell() -> None:
            if world.lighthouse.alive:
                world.lighthouse.tell(lost)
            else:
                world.at(0.5, tell)

        world.at(world.chance.uniform(0.0002, 0.003), tell)

    def leave(self) -> None:
        if not self.alive or self.ending:
            return
        self.world.log(f"{self.incarnation} leaves")
        self.ending = True
        until = self.world.now + LEAVE_TIMEOUT
        self.whenever(lambda: self._perform(self.core.leave(self.world.now, "shut down")))

        def look() -> None:
            if self.alive and (self.core.left or self.world.now >= until):
                self.alive, self.death = False, "left"
                self.listens_until = self.world.now
                self.world.log(f"{self.incarnation} left")
                self.world.connections_end(self)
            elif self.alive:
                self.world.at(0.01, look)

        look()

    def freeze(self, seconds: float) -> None:
        if not self.alive or self.frozen or self.ending:
            return
        self.world.log(f"{self.incarnation} freezes for {seconds:.2f} s")
        self.frozen = True
        self.world.at(seconds, self._thaw)

    def _thaw(self) -> None:
        if not self.alive:
            return
        self.world.log(f"{self.incarnation} goes on")
        # The manager's thread receives all there is before it looks at the time.
        while self._frozen_work:
            self._frozen_work.pop(0)()
        self.frozen = False
        self._perform([])


class Replicas:
    """Some replica groups of one or two ranks each, and a lighthouse.

    Args:
        seed: decides everything that is not decided by the cores.
    """

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.now = 100.0
        self.calm = False
        self.violations: list[str] = []
        self.story: list[str] = []
        self.processes: list[Process] = []
        self.by_route: dict[bytes, Process] = {}
        self.join_timeout = chance.uniform(2.0, 5.0)
        self.min_members = chance.choice([1, 1, 2])
        self.doubled = chance.choice([0.0, 0.1])
        self.impatient = chance.choice([0.0, 0.0, 0.1])
        self.lighthouse_dies = chance.random() < 0.4
        """What a new lighthouse never heard of only sockets and timeouts tell: who died, who was not answered."""
        self.broken_pipes = 1.0 if self.lighthouse_dies else chance.choice([0.0, 0.5, 1.0])
        self.creation_timeout = 3.0 if self.lighthouse_dies else COLLECTIVE_TIMEOUT
        self.commits: Counter[str] = Counter()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._meetings: dict[tuple[Any, ...], dict[str, tuple[Rank, Callable[[], None]]]] = {}
        self._highest = 0
        self._lists: dict[int, list[tuple[str, str]]] = {}
        self._requests: dict[tuple[str, int], list[Replica]] = {}
        self._heard_after: dict[str, float] = {}
        self._lost: dict[tuple[str, str], FailureEvent] = {}
        self._gone: set[tuple[str, str]] = set()
        """Published as lost, and not a member again since."""
        self.returned: Counter[tuple[str, str]] = Counter()
        """How often each was heard after it had been published as lost."""
        self.refused: set[tuple[str, int]] = set()
        self.subscribers: list[Subscriber] = []
        self.lighthouse = LighthouseDaemon(self, ReplicaOptions(1, self.join_timeout, HEARTBEAT_TIMEOUT, FAILURE_TICK))
        self.subscribers += [Subscriber(self, JOB, random.Random(f"{seed} {number}")) for number in range(2)]
        self.lighthouse.start()
        world_size = chance.choice([1, 1, 2])
        for number in range(chance.randint(3, 6)):
            self.start("abcdef"[number], 1, world_size)

    # --- the clock

    def at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + delay, next(self._order), action))

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Runs for so long, or until that is true."""
        end = self.now + seconds
        while self._due and self._due[0][0] <= end and not self.violations:
            self.now, _, action = heapq.heappop(self._due)
            action()
            if until():
                return True
        self.now = max(self.now, end)
        return until()

    def log(self, line: str) -> None:
        self.story.append(f"{self.now:9.4f} {line}")

    def log_message(self, process: Process, message: Message) -> None:
        if isinstance(message, ReplicaJoin):
            self.log(f"{process.incarnation} asks ({message.request}, failures {message.replica.commit_failures})")
        elif not isinstance(message, ReplicaBeat):
            self.log(f"{process.incarnation} sends {type(message).__name__}")

    def violate(self, sentence: str) -> None:
        self.log(f"VIOLATION {sentence}")
        self.violations.append(sentence)

    # --- processes

    def start(self, replica_id: str, number: int, world_size: int) -> None:
        process = Process(self, replica_id, f"{replica_id}{number}", world_size)
        self.processes.append(process)
        self.by_route[process.incarnation.encode()] = process
        self.log(f"{process.incarnation} starts")

    def living(self) -> list[Process]:
        return [process for process in self.processes if process.alive]

    def restart(self, process: Process) -> None:
        """Under the same name, unless somebody was faster."""
        if all(one.replica_id != process.replica_id for one in self.living()):
            number = sum(one.replica_id == process.replica_id for one in self.processes) + 1
            self.start(process.replica_id, number, len(process.ranks))

    def probe(self, incarnation: str) -> str:
        process = self.by_route[incarnation.encode()]
        if process.wire.partitioned() or (process.death == "silent" and not process.alive):
            return "silent"
        return "accepted" if process.alive or self.now < process.listens_until else "refused"

    def inject(self, process: Process) -> None:
        self.log(f"{process.replica_id} is injected a failure")
        self.lighthouse.tell(InjectFailure(1, JOB, REPLICAS, process.replica_id))

    # --- what ranks do together

    def meet(self, key: tuple[Any, ...], rank: Rank, all_of_them: list[str], action: Callable[[], None]) -> None:
        there = self._meetings.setdefault(key, {})
        there[rank.incarnation] = (rank, action)
        if set(all_of_them) <= there.keys():
            del self._meetings[key]
            for other, then in there.values():
                other.met(key, then)

    def sees_an_end(self, quorum: RankQuorum) -> bool:
        """Whether a peer's end is found out by the first use of its connection."""
        peers = [self.by_route[one.incarnation.encode()] for one in quorum.participants]
        gone = any(not peer.alive and peer.listens_until <= self.now for peer in peers)
        return gone and self.chance.random() < self.broken_pipes

    def connections_end(self, gone: Process, index: int | None = None, newer: int = 1 << 62) -> None:
        """It is dead, or its rank has a new group: some of who waits for it in an older one see its sockets closed."""
        for process in self.living():
            for rank in process.ranks if index is None else process.ranks[index : index + 1]:
                quorum = rank.quorum
                if process is gone or not rank.where or quorum is None or quorum.quorum_id >= newer:
                    continue
                if any(one.incarnation == gone.incarnation for one in quorum.participants):
                    where = rank.where
                    if self.chance.random() < self.broken_pipes:
                        self.at(
                            self.chance.uniform(0.0, 0.005),
                            lambda p=process, r=rank, w=where: p.whenever(lambda: r.fail() if r.where is w else None),
                        )

    def committed(self, process: Process) -> None:
        self.commits[process.incarnation] += 1

    def gave_up(self, rank: Rank, request: RankJoin | CommitVote) -> None:
        self.log(f"{rank.incarnation}/{rank.index} gave up its {type(request).__name__}")

    # --- what the lighthouse does

    def epoch_began(self) -> None:
        # What the one before it answered, and to whom its answers came, a new lighthouse can't know.
        self._lost.clear()
        self._heard_after.clear()
        self._requests.clear()
        self.refused.clear()

    def arrives(self, message: Message, sent_at: float) -> None:
        """A sign of life reaches the lighthouse."""
        match message:
            case ReplicaBeat(replica_id=member, incarnation=incarnation):
                pass
            case ReplicaJoin(replica=replica):
                member, incarnation = replica.replica_id, replica.incarnation
            case (
                ReplicaWithdraw(replica_id=member, incarnation=incarnation)
                | ReplicaLeave(replica_id=member, incarnation=incarnation)
            ):
                self._heard_after[incarnation] = max(sent_at, self._heard_after.get(incarnation, 0.0))
                return
            case _:
                return
        self._heard_after[incarnation] = max(sent_at, self._heard_after.get(incarnation, 0.0))
        event = self._lost.get((member, incarnation))
        if event is not None and event.failure.cause.kind not in ("left", "signal"):
            del self._lost[member, incarnation]

    def was_taken(self, message: Message, group: ReplicaGroup | None) -> None:
        """If its sender is a member now, it is alive for subscribers, too."""
        match message:
            case ReplicaBeat(replica_id=member, incarnation=incarnation):
                pass
            case ReplicaJoin(replica=replica):
                member, incarnation = replica.replica_id, replica.incarnation
            case _:
                return
        living = group.members.get(member) if group is not None else None
        if living is None or living.incarnation != incarnation:
            return
        published = (member, incarnation) in self._gone
        if published:
            self._gone.discard((member, incarnation))
            self.returned[member, incarnation] += 1
        for subscriber in self.subscribers:
            subscriber.heard(member, incarnation, published=published)

    def published(self, event: Message) -> None:
        for subscriber in self.subscribers:
            subscriber.publish(event)
        if isinstance(event, ReplicaQuorumEvent):
            self.log(
                f"published: quorum {event.quorum_id & 0xFFFF} of {[one.incarnation for one in event.participants]}"
            )
        if not isinstance(event, FailureEvent):
            return
        failure = event.failure
        self.log(f"published: {failure.incarnation} {failure.cause.kind}")
        key = (failure.member, failure.incarnation)
        if key in self._lost:
            self.violate(f"the loss of {failure.incarnation} is published again: {failure.cause.kind}")
        self._lost[key] = event
        self._gone.add(key)

    def answered(self, answer: ReplicaQuorum) -> None:
        members = [(one.replica_id, one.incarnation) for one in answer.participants]
        if answer.quorum_id < self._highest:
            self.violate(f"quorum {answer.quorum_id} is answered after {self._highest}")
        self._highest = answer.quorum_id
        if self._lists.setdefault(answer.quorum_id, members) != members:
            self.violate(f"quorum {answer.quorum_id} is {self._lists[answer.quorum_id]} and {members}")
        for key in members:
            if key in self._lost:
                self.violate(f"{key[1]} was published as lost and is in quorum {answer.quorum_id & 0xFFFF}")
        for one in answer.recipients:
            request = (one.incarnation, one.request)
            if self._requests.setdefault(request, answer.participants) is not answer.participants:
                self.violate(f"request {request} is answered by two quorums")
            process = self.by_route[one.incarnation.encode()]
            knows = self._heard_after.get(one.incarnation, 0.0) > process.gave_up_at
            if one.request <= process.requested_until and knows:
                self.violate(f"{one.incarnation} is in a quorum, and was heard after it had withdrawn its request")
            if request in self.refused:
                self.violate(f"request {request} was refused and is answered by a quorum")

    # --- the end

    def together(self) -> bool:
        """Every living replica is in one and the same quorum, and its ranks work in that."""
        living = {process.incarnation for process in self.living()}
        for process in self.living():
            for rank in process.ranks:
                if rank.quorum is None or rank.group != rank.quorum.quorum_id:
                    return False
                if {one.incarnation for one in rank.quorum.participants} != living:
                    return False
        return len({rank.group for process in self.living() for rank in process.ranks}) <= 1
