"""A coordinator's shards, its disk and its workers on one seeded clock.

The network delays, doubles and drops; a commit takes its time, and what was not committed is lost with the coordinator;
workers die, are cut off (and go on as zombies), stall, fail and begin anew. After every event the books are checked.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

from msgspec import Struct, field

from seamark.protocol.messages import (
    CheckpointShard,
    CompleteShard,
    Dataset,
    FailShard,
    LeaseShard,
    OpenShards,
    ReleaseShard,
    ShardAnswer,
    ShardLease,
    ShardRequest,
)
from seamark.runtime_config import RuntimeConfig
from seamarkd.coordinator.classification import Evidence
from seamarkd.coordinator.ledger import Ledger, Row, State
from seamarkd.coordinator.shards import Answer, JobShards, Numbers, Record, Saved, SavedDataset

REPEAT = 1.0
GRACE = 10.0
NAME = "set"


class Worker(Struct):
    """A consumer in a process, as far as it can be seen from outside."""

    member: str
    consumer: str
    node: str
    depth: int = 1
    """Shards that it has in hand at most."""
    alive: bool = True
    cut: bool = False
    """Nobody hears it, and it does not know."""
    request: int = 0
    asked: ShardRequest | None = None
    leases: list[ShardLease] = []
    """In hand; it works on the first, the others were read ahead."""
    finished: bool = False
    epoch: int = 0

    @property
    def incarnation(self) -> str:
        """Of its process."""
        return self.consumer.partition("#")[0]


class Disk(Struct):
    """What survives the coordinator."""

    datasets: dict[int, Dataset] = field(default_factory=dict)
    rows: dict[tuple[int, int], Row] = field(default_factory=dict)
    replies: dict[str, object] = field(default_factory=dict)

    def commit(self, record: Record) -> None:
        """As the manifest does it, with the fence."""
        self.datasets |= record.datasets
        for key, row in record.rows.items():
            old = self.rows.get(key)
            assert old is None or (old.state < State.DONE and row.lease_id >= old.lease_id), (old, row)
            self.rows[key] = row
        self.replies |= record.replies

    def saved(self) -> Saved:
        """As the manifest gives it."""
        datasets = []
        for number, spec in self.datasets.items():
            mine = [row for (dataset, _), row in self.rows.items() if dataset == number]
            smooth = [(row.shard, row.lease_id) for row in mine if row.state == State.DONE and not row.account]
            rest = [row for row in mine if row.state != State.DONE or row.account]
            datasets.append(SavedDataset(number, spec, smooth, rest))
        return Saved(datasets, [reply for reply in self.replies.values() if reply is not None], [])  # type: ignore[misc]


class World:
    """A schedule of one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self.disk = Disk()
        self.epoch = 0
        self.up = False
        self.started_at = 0.0
        self.shards: JobShards
        patient = self.rng.random() < 0.8
        budget = 1_000 if patient else 3
        self.config = RuntimeConfig(
            oom_retries=budget,
            transient_retries=budget,
            timeout_retries=budget,
            unknown_retries=budget,
            no_progress_cycles=budget,
            attempt_timeout=self.rng.choice([20.0, 3_600.0]),
            elastic_redistribution=self.rng.random() < 0.8,
        )
        total = self.rng.randrange(1, 30)
        self.spec = Dataset(NAME, total * 4, 4, -1, self.rng.choice([1, 1, 2]))
        self.workers: list[Worker] = []
        self.pending: list[tuple[Record | None, list[Answer]]] = []
        self.committing = False
        self.accepted: dict[int, int] = {}
        """By shard: the lease whose completion was acknowledged."""
        self.quiet = False
        self.zombies_refused = 0
        self.deepest = 0
        self.start()
        for rank in range(self.rng.randrange(1, 5)):
            self.spawn(f"job/{rank}")
        self.later(self.rng.uniform(1, 6), self.mischief)
        self.later(1.0, self.tick)

    # --- the machinery -------------------------------------------------------------------------------------

    def later(self, delay: float, what: Callable[[], None]) -> None:
        """Schedules."""
        self._order += 1
        heapq.heappush(self._events, (self.now + delay, self._order, what))

    def run(self, mischief_until: float = 60.0, limit: float = 4_000.0) -> None:
        """Until every living worker was told that all is done."""
        while self._events:
            at, _, what = heapq.heappop(self._events)
            self.now = max(self.now, at)
            assert self.now < limit, f"stranded: {self.describe()}"
            if self.now > mischief_until and not self.quiet:
                self.quiet = True
                self.heal()
            what()
            self.check()
            if self.quiet and self.workers and all(one.finished for one in self.workers if one.alive and not one.cut):
                break
        self.check_end()

    def describe(self) -> str:
        """For a failing seed."""
        living = [worker for worker in self.workers if worker.alive]
        open_shards = [row for row in self.disk.rows.values() if row.state < State.DONE]
        return f"t={self.now:.1f} up={self.up} {self.shards.status()} {living[:5]} {open_shards[:3]}"

    def nodes(self) -> frozenset[str]:
        """Where workers of the job are."""
        return frozenset(worker.node for worker in self.workers if worker.alive and not worker.cut)

    # --- coordinator ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """A new start: what is on the disk is all it knows."""
        self.epoch += 1
        self.up = True
        self.started_at = self.now
        self.pending.clear()
        self.committing = False
        self.shards = JobShards("job", self.config, Numbers(self.epoch), random.Random(self.rng.random()))
        self.shards.restore(self.now, self.disk.saved())
        epoch = self.epoch
        # The agents tell it who lives; what happened while it was away is reported, too.
        for worker in self.workers:
            if worker.alive and not worker.cut:
                self.later(self.rng.uniform(0, 3), lambda worker=worker: self.introduce(worker, epoch))

    def crash(self) -> None:
        """kill -9."""
        self.up = False
        self.later(self.rng.uniform(0.1, 5), self.start)

    def introduce(self, worker: Worker, epoch: int) -> None:
        """An agent says that this process runs."""
        if self.up and epoch == self.epoch and worker.alive and not worker.cut:
            self.perform(self.shards.seen(self.now, worker.member, worker.incarnation, self.nodes))

    def tick(self) -> None:
        """Once a second."""
        if self.up:
            if self.now - self.started_at > GRACE:
                self.perform(self.shards.settle(self.now, self.nodes))
            self.perform(self.shards.serve(self.now, self.nodes))
        self.later(1.0, self.tick)

    def perform(self, answers: list[Answer]) -> None:
        """Durable first, then sent, in order."""
        for answer in answers:
            if answer.message.kind == "done":
                assert self.ledger().finished, "told the end while a shard is in flight"
        self.pending.append((self.shards.take_record(), answers))
        if not self.committing:
            self.committing = True
            epoch = self.epoch
            self.later(self.rng.uniform(0, 0.02), lambda: self.committed(epoch))

    def committed(self, epoch: int) -> None:
        """The disk is done with what waited."""
        if epoch != self.epoch or not self.up:
            return
        batch, self.pending = self.pending, []
        self.committing = False
        for record, _ in batch:
            if record is not None:
                self.disk.commit(record)
        for _, answers in batch:
            for answer in answers:
                self.send(lambda message=answer.message: self.answered(message))

    def ledger(self) -> Ledger:
        """Of the data set."""
        return self.shards._ledgers[NAME]

    def request(self, message: ShardRequest) -> None:
        """A consumer's request arrives."""
        worker = next(one for one in self.workers if one.consumer == message.consumer)
        current = [one for one in self.workers if one.member == message.member and one.alive][-1:]
        if not self.up or worker not in current:
            return  # the coordinator's door refuses a process that was replaced
        self.perform(self.shards.handle(self.now, message, worker.node, self.nodes, ""))

    def send(self, deliver: Callable[[], None]) -> None:
        """Through the network."""
        if not self.quiet and self.rng.random() < 0.05:
            return
        self.later(self.rng.expovariate(50), deliver)
        if self.rng.random() < 0.1:
            self.later(self.rng.uniform(0, 5), deliver)

    # --- workers -------------------------------------------------------------------------------------------

    def spawn(self, member: str) -> None:
        """A process in this place."""
        incarnation = f"i{self.rng.randrange(1 << 40):x}"
        node = f"n{self.rng.randrange(3)}"
        worker = Worker(member, f"{incarnation}#{NAME}/0", node, self.rng.choice([1, 1, 3]))
        self.workers.append(worker)
        self.later(self.rng.uniform(0, 1), lambda: self.introduce(worker, self.epoch))
        self.ask(worker, OpenShards, spec=self.spec)

    def ask(self, worker: Worker, message: type[ShardRequest], /, **fields: object) -> None:
        """Asks, and repeats until there is an answer."""
        worker.request += 1
        worker.asked = message(worker.request, "job", worker.member, worker.consumer, NAME, **fields)  # type: ignore[arg-type]
        self.repeat(worker, worker.request)

    def repeat(self, worker: Worker, request: int) -> None:
        """Sends it (again)."""
        if not worker.alive or worker.asked is None or worker.request != request:
            return
        asked = worker.asked
        if not worker.cut:
            self.send(lambda: self.request(asked))
        self.later(REPEAT, lambda: self.repeat(worker, request))

    def answered(self, answer: ShardAnswer) -> None:
        """An answer arrives."""
        worker = next(one for one in self.workers if one.consumer == answer.consumer)
        if not worker.alive or worker.cut or worker.asked is None or answer.request != worker.request:
            return
        if answer.kind == "wait":
            if worker.leases:
                # Nothing more to read ahead: it goes on with what it has.
                worker.asked = None
                self.work(worker)
            return
        asked, worker.asked = worker.asked, None
        assert answer.kind != "refused", answer
        if isinstance(asked, CompleteShard):
            if answer.kind == "stale":
                self.zombies_refused += 1
            else:
                before = self.accepted.setdefault(asked.shard, asked.lease_id)
                assert before == asked.lease_id, f"shard {asked.shard} was taken twice: {before}, {asked.lease_id}"
        if not isinstance(asked, OpenShards | LeaseShard | CheckpointShard):
            worker.leases = worker.leases[1:]
        if answer.lease is not None:
            self.leased(worker, answer.lease)
        elif answer.kind == "done" and not isinstance(asked, OpenShards):
            worker.finished = True
        elif worker.leases:
            self.work(worker)
        else:
            self.ask(worker, LeaseShard)

    def leased(self, worker: Worker, lease: ShardLease) -> None:
        """Has one more in hand."""
        assert lease.lease_id not in [one.lease_id for one in worker.leases]
        worker.leases = [*worker.leases, lease]
        self.deepest = max(self.deepest, len(worker.leases))
        self.work(worker)

    def work(self, worker: Worker) -> None:
        """Works on the first for a while."""
        lease = worker.leases[0]
        stalls = not self.quiet and self.rng.random() < 0.1
        self.later(self.rng.uniform(0, 2) if not stalls else self.rng.uniform(10, 40), lambda: self.act(worker, lease))

    def act(self, worker: Worker, lease: ShardLease) -> None:
        """Has done something with it."""
        if not worker.alive or lease not in worker.leases[:1] or worker.asked is not None:
            return
        if len(worker.leases) < worker.depth and self.rng.random() < 0.5:
            self.ask(worker, LeaseShard, after=worker.leases[-1].lease_id)
            return
        chance = self.rng.random()
        about = {"shard": lease.shard, "lease_id": lease.lease_id}
        if self.quiet or chance < 0.6:
            self.ask(worker, CompleteShard, more=len(worker.leases) == 1 and self.rng.random() < 0.5, **about)
        elif chance < 0.8:
            self.ask(worker, CheckpointShard, progress=self.rng.randrange(4), **about)
        elif chance < 0.9:
            kind = self.rng.choice(["", "oom", "transient", "poison_input", "hardware"])
            self.ask(worker, FailShard, kind=kind, batch=self.rng.randrange(-1, 2), **about)
        else:
            self.ask(worker, ReleaseShard, **about)

    # --- what goes wrong -----------------------------------------------------------------------------------

    def mischief(self) -> None:
        """One bad thing after the other."""
        if self.quiet:
            return
        self.later(self.rng.expovariate(0.5), self.mischief)
        living = [worker for worker in self.workers if worker.alive and not worker.cut]
        chance = self.rng.random()
        if chance < 0.25 and self.up:
            self.crash()
        elif living and chance < 0.6:
            self.die(self.rng.choice(living))
        elif living and chance < 0.8:
            self.cut_off(self.rng.choice(living).node)

    def die(self, worker: Worker) -> None:
        """Its agent reports it until the coordinator has heard, and starts another in its place."""
        worker.alive = False
        status = self.rng.choice([-9, -11, 1, 0])
        self.report([worker], Evidence(status=status, text="died"))
        self.spawn(worker.member)

    def cut_off(self, node: str) -> None:
        """Its workers go on, and nobody hears them; the lighthouse says so, and others are started elsewhere."""
        lost = [worker for worker in self.workers if worker.node == node and worker.alive and not worker.cut]
        for worker in lost:
            worker.cut = True
        self.report(lost, Evidence(node_lost=True))
        for worker in lost:
            self.spawn(worker.member)
            # The network is back: the zombie speaks again, and its place is another's.
            self.later(self.rng.uniform(1, 20), lambda worker=worker: self.back(worker))

    def back(self, worker: Worker) -> None:
        """A zombie's last word is heard, and then its agent ends it."""
        asked = worker.asked
        if worker.alive and asked is not None:
            self.request(asked)
        worker.alive = False

    def report(self, gone: list[Worker], evidence: Evidence) -> None:
        """Until it is taken."""
        if not self.up:
            self.later(REPEAT, lambda: self.report(gone, evidence))
            return
        self.perform(self.shards.lost(self.now, [one.incarnation for one in gone], evidence, self.nodes))

    def heal(self) -> None:
        """From now on nothing goes wrong."""
        for member in {worker.member for worker in self.workers}:
            if not any(one.alive and not one.cut for one in self.workers if one.member == member):
                self.spawn(member)

    # --- what must hold ------------------------------------------------------------------------------------

    def check(self) -> None:
        """After every event."""
        if not self.up or NAME not in self.shards._ledgers:
            return
        ledger = self.ledger()
        assert sum(ledger.count(state) for state in State) == self.spec.total
        assert ledger.count(State.LEASED) == len(list(ledger.leases()))
        held = [lease.shard for worker in self.workers for lease in ledger.held_by(worker.consumer)]
        assert sorted(held) == sorted(lease.shard for lease in ledger.leases())
        for shard, lease_id in self.accepted.items():
            assert ledger.state(shard) == State.DONE, (
                f"shard {shard} was acknowledged and is {ledger.state(shard).name}"
            )
            assert ledger.last_lease(shard) == lease_id

    def check_end(self) -> None:
        """Every shard is terminal, on disk as in memory."""
        ledger = self.ledger()
        assert ledger.finished, self.describe()
        states = {row.shard: row.state for row in self.disk.rows.values()}
        assert len(states) == self.spec.total
        for shard in range(self.spec.total):
            assert states[shard] == ledger.state(shard)
        again = JobShards("job", self.config, Numbers(self.epoch + 1), random.Random(0))
        again.restore(self.now, self.disk.saved())
        assert again.status() == self.shards.status()
