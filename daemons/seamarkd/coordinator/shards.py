"""The shards of one job: who asks gets one, what fails is decided on, and who is lost loses what it had.

One ledger a data set; this module says whom to give to, whom to tell and what a failure means for the shard that was
being worked on (``classification.py``, ``retry.py``). Who waits is served at the moment that something becomes ready,
the lowest rank first. Every request of a consumer has a number and every answer is kept until the next one, so a
request that is repeated, also to a coordinator that was started anew, is done once and answered alike. Pure: the
coordinator makes what ``take_record`` returns durable before it sends the answers.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from msgspec import Struct
from msgspec.structs import replace

from seamark.failure_kinds import is_kind
from seamark.protocol.messages import (
    CheckpointShard,
    CompleteShard,
    Dataset,
    DatasetStatus,
    FailShard,
    LeaseShard,
    OpenShards,
    ReleaseShard,
    ReportFailure,
    ShardAnswer,
    ShardDecision,
    ShardLease,
    ShardRequest,
)
from seamark.runtime_config import RuntimeConfig
from seamarkd.coordinator.classification import DEFAULT_PATTERNS, Evidence, Pattern, classify
from seamarkd.coordinator.ledger import MAX_HELD, Account, Holder, Lease, Ledger, Row, State
from seamarkd.coordinator.retry import Decision, Failure, GiveUp, Quarantine, Retry, decide

MAX_SHARDS = 20_000_000
"""Of a data set: nine bytes each are kept for them."""
MAX_DATASETS = 1_000
DECISIONS_KEPT = 10_000
REPORT_NAMES = 10
"""Shards that a sentence names."""


Nodes = Callable[[], frozenset[str]]
"""Where workers of the job are."""


class Answer(Struct, frozen=True):
    """An answer, and the node of the consumer that it is for."""

    node: str
    message: ShardAnswer


class Waiter(Struct):
    """A consumer that has asked for a shard when none was ready."""

    request: int
    dataset: str
    holder: Holder
    after: int
    """The latest lease that it knows."""


class Reply(Struct, frozen=True):
    """A consumer's last request and the answer to it."""

    consumer: str
    request: int
    answer: ShardAnswer


class SavedDataset(Struct, frozen=True):
    """A data set as it was written down: see ``Ledger.restore``."""

    number: int
    spec: Dataset
    smooth: list[tuple[int, int]]
    rows: list[Row]


class Record(Struct):
    """What has to be durable before anybody is told."""

    job: str
    datasets: dict[int, Dataset]
    rows: dict[tuple[int, int], Row]
    """By data set and shard."""
    replies: dict[str, Reply | None]
    """By consumer; None: nothing more has to be kept of it."""
    decisions: dict[int, ShardDecision]

    def followed_by(self, later: Record) -> Record:
        """Both, as one."""
        return Record(
            self.job,
            self.datasets | later.datasets,
            self.rows | later.rows,
            self.replies | later.replies,
            self.decisions | later.decisions,
        )


class Saved(Struct, frozen=True):
    """What was written down of a job's shards."""

    datasets: list[SavedDataset]
    replies: list[Reply]
    decisions: list[ShardDecision]


class Numbers:
    """Ids that are never used again, also not by another start of the coordinator: its epoch is in them."""

    SHIFT = 32

    def __init__(self, epoch: int) -> None:
        self._last = epoch << self.SHIFT

    def __call__(self) -> int:
        self._last += 1
        return self._last


class JobShards:
    """All data sets of a job.

    Args:
        job: its name.
        config: its operational parameters.
        numbers: gives ids of leases, data sets and decisions.
        rng: draws the jitter of back-offs.
        patterns: what failures say of themselves.
    """

    def __init__(
        self,
        job: str,
        config: RuntimeConfig,
        numbers: Callable[[], int],
        rng: random.Random,
        patterns: Sequence[Pattern] = DEFAULT_PATTERNS,
    ) -> None:
        self._job = job
        self._config = config
        self._patterns = patterns
        self._numbers = numbers
        self._rng = rng
        self._ledgers: dict[str, Ledger] = {}
        self._waiting: dict[str, Waiter] = {}
        self._replies: dict[str, Reply] = {}
        self._reports: dict[str, ReportFailure] = {}
        """By incarnation: what a worker said of its own failure, until it is believed."""
        self._signals: Counter[tuple[str, int]] = Counter()
        """Ends by signal, by node and status."""
        self._unconfirmed: set[str] = set()
        """Incarnations that held a lease before this coordinator was started, and were not heard of since."""
        self.decisions: deque[ShardDecision] = deque(maxlen=DECISIONS_KEPT)
        self._record = self._empty()
        self.held = False
        """Nothing may be given out just now."""
        self._served_at = -1.0

    # --- looking -------------------------------------------------------------------------------------------

    def status(self) -> list[DatasetStatus]:
        """How far each data set is."""
        return [ledger.status() for ledger in self._ledgers.values()]

    @property
    def complete(self) -> bool:
        """Whether every shard of every data set is DONE."""
        return all(ledger.complete for ledger in self._ledgers.values())

    @property
    def finished(self) -> bool:
        """Whether every shard of every data set is terminal, and there is one."""
        return bool(self._ledgers) and all(ledger.finished for ledger in self._ledgers.values())

    def report(self) -> str:
        """What became of the data sets, for people, when the job ends; empty where it has none."""
        return "; ".join(_report(ledger) for ledger in self._ledgers.values())

    def take_record(self) -> Record | None:
        """What has changed since the last time and has to be durable before anything is sent; None if nothing has."""
        for ledger in self._ledgers.values():
            for row in ledger.take_changed():
                self._record.rows[ledger.number, row.shard] = row
        record, self._record = self._record, self._empty()
        return record if record.datasets or record.rows or record.replies or record.decisions else None

    def _empty(self) -> Record:
        return Record(self._job, {}, {}, {}, {})

    # --- requests ------------------------------------------------------------------------------------------

    def handle(self, now: float, request: ShardRequest, node: str, nodes: Nodes, hold: str) -> list[Answer]:
        """What follows from a consumer's request.

        Args:
            now: seconds.
            request: of a living worker of the job.
            node: where it is.
            nodes: where workers of the job are.
            hold: why no shard may be given out just now; ``drain`` where that host goes away; else empty.
        """
        known = self._replies.get(request.consumer)
        if known is not None and request.request <= known.request:
            # A repeated question gets its answer again; an older one was asked by a message that was late.
            return [Answer(node, known.answer)] if request.request == known.request else []
        waiter = self._waiting.get(request.consumer)
        if waiter is not None and request.request < waiter.request:
            return []
        if isinstance(request, OpenShards):
            return self._open(now, request, node, nodes)
        ledger = self._ledgers.get(request.dataset)
        if ledger is None:
            return [self._refused(request, node, f"this job has no data set {request.dataset}: open it first")]
        self._waiting.pop(request.consumer, None)
        holder = Holder(request.consumer, request.member, node)
        match request:
            case LeaseShard():
                return self._lease(now, ledger, request, holder, nodes, hold)
            case CompleteShard():
                return self._complete(now, ledger, request, holder, nodes, hold)
            case CheckpointShard():
                return self._checkpoint(ledger, request, node)
            case FailShard():
                return self._fail(now, ledger, request, node, nodes)
            case ReleaseShard():
                return self._release(now, ledger, request, node, nodes)
        return [self._refused(request, node, f"{type(request).__name__} is no request of a consumer")]

    def _open(self, now: float, request: OpenShards, node: str, nodes: Nodes) -> list[Answer]:
        spec = request.spec
        ledger = self._ledgers.get(spec.name)
        refusal = _refusal(spec, request.dataset, ledger.spec if ledger else None, len(self._ledgers))
        if refusal:
            return [self._refused(request, node, refusal)]
        if ledger is None:
            ledger = self._ledgers[spec.name] = self._ledger(self._numbers(), spec)
            self._record.datasets[ledger.number] = spec
        opened = self._answer(request, "opened")
        if not request.afresh:
            return [Answer(node, opened)]
        self._give_back(now, ledger, request)
        # Kept: the same request once more would give back what was leased since.
        return [self._keep(node, opened), *self._serve(now, ledger, nodes)]

    def _give_back(self, now: float, ledger: Ledger, request: OpenShards) -> None:
        """What was read ahead by who is no more."""
        if request.afresh == "consumer":
            held, waiting = ledger.held_by(request.consumer), [request.consumer]
        else:
            held = [lease for lease in ledger.leases() if lease.holder.incarnation == request.incarnation]
            waiting = [one for one in self._waiting if one.partition("#")[0] == request.incarnation]
        for lease in held:
            ledger.again(lease, now)
        for consumer in waiting:
            if consumer in self._waiting and self._waiting[consumer].dataset == ledger.spec.name:
                del self._waiting[consumer]

    def _ledger(self, number: int, spec: Dataset) -> Ledger:
        return Ledger(number, spec, sticky=not self._config.elastic_redistribution)

    def _lease(
        self, now: float, ledger: Ledger, request: LeaseShard, holder: Holder, nodes: Nodes, hold: str
    ) -> list[Answer]:
        if hold == "drain":
            return [Answer(holder.node, self._answer(request, "drain", reason="this host goes away"))]
        lease = None if hold else ledger.lease(now, holder, self._numbers(), nodes, request.after)
        if lease is not None:
            return [self._keep(holder.node, self._answer(request, "leased", _lease_message(ledger, lease)))]
        if ledger.finished:
            return [Answer(holder.node, self._answer(request, "done"))]
        self._waiting[request.consumer] = Waiter(request.request, request.dataset, holder, request.after)
        return [Answer(holder.node, self._answer(request, "wait", reason=hold or _why_wait(ledger, holder, now)))]

    def _complete(
        self, now: float, ledger: Ledger, request: CompleteShard, holder: Holder, nodes: Nodes, hold: str
    ) -> list[Answer]:
        lease = ledger.live(request.incarnation, request.shard, request.lease_id)
        if lease is None:
            if ledger.last_lease(request.shard) != request.lease_id or ledger.state(request.shard) != State.DONE:
                return [self._stale(ledger, request, request.shard, request.lease_id, holder.node)]
        else:
            ledger.done(lease, request.digest)
        following = None
        if request.more and not hold:
            following = ledger.lease(now, holder, self._numbers(), nodes)
        answers: list[Answer] = []
        if following is not None:
            answers.append(self._keep(holder.node, self._answer(request, "leased", _lease_message(ledger, following))))
        else:
            kind = "done" if request.more and ledger.finished else "recorded"
            answers.append(self._keep(holder.node, self._answer(request, kind)))
        if ledger.finished:
            answers += self._tell_done(ledger)
        elif lease is not None and lease.holder.consumer in self._waiting:
            # It may have held as many as it may.
            answers += self._serve(now, ledger, nodes)
        return answers

    def _checkpoint(self, ledger: Ledger, request: CheckpointShard, node: str) -> list[Answer]:
        lease = ledger.live(request.incarnation, request.shard, request.lease_id)
        if lease is None:
            return [self._stale(ledger, request, request.shard, request.lease_id, node)]
        ledger.progressed(lease, request.progress)
        return [self._keep(node, self._answer(request, "recorded"))]

    def _fail(self, now: float, ledger: Ledger, request: FailShard, node: str, nodes: Nodes) -> list[Answer]:
        lease = ledger.live(request.incarnation, request.shard, request.lease_id)
        if lease is None:
            return [self._stale(ledger, request, request.shard, request.lease_id, node)]
        batch = request.batch if request.batch >= 0 else None
        evidence = Evidence(reported=request.kind, reported_text=request.text, batch=batch, text=request.text)
        reason = self._decide(now, ledger, lease, evidence)
        answer = self._keep(node, self._answer(request, "recorded", reason=reason))
        return [answer, *self._serve(now, ledger, nodes)]

    def _release(self, now: float, ledger: Ledger, request: ReleaseShard, node: str, nodes: Nodes) -> list[Answer]:
        lease = ledger.live(request.incarnation, request.shard, request.lease_id)
        if lease is None:
            return [self._stale(ledger, request, request.shard, request.lease_id, node)]
        ledger.again(lease, now)
        return [self._keep(node, self._answer(request, "recorded")), *self._serve(now, ledger, nodes)]

    def _stale(self, ledger: Ledger, request: ShardRequest, shard: int, lease_id: int, node: str) -> Answer:
        last = ledger.last_lease(shard)
        if not last:
            why = f"data set {ledger.spec.name} has no shard {shard} that was ever leased"
        elif last == lease_id:
            why = f"lease {lease_id} of shard {shard} has ended: the shard is {ledger.state(shard).name} now"
        else:
            why = f"lease {lease_id} of shard {shard} was given up, and it was leased again since"
        return self._keep(node, self._answer(request, "stale", reason=why))

    def _answer(
        self, request: ShardRequest, kind: str, lease: ShardLease | None = None, reason: str = ""
    ) -> ShardAnswer:
        return ShardAnswer(request.request, self._job, request.consumer, kind, lease, reason)  # type: ignore[arg-type]

    def _refused(self, request: ShardRequest, node: str, why: str) -> Answer:
        return Answer(node, self._answer(request, "refused", reason=why))

    def _keep(self, node: str, answer: ShardAnswer) -> Answer:
        """An answer of which there may be only one."""
        reply = self._replies[answer.consumer] = Reply(answer.consumer, answer.request, answer)
        self._record.replies[answer.consumer] = reply
        return Answer(node, answer)

    # --- who waits -----------------------------------------------------------------------------------------

    def serve(self, now: float, nodes: Nodes) -> list[Answer]:
        """Whose back-off is over, whose time has run out, and who can have what they wait for."""
        passed = now - self._served_at if self._served_at >= 0.0 else 0.0
        self._served_at = now
        answers: list[Answer] = []
        for ledger in self._ledgers.values():
            ledger.ripen(now)
            for lease in ledger.leases():
                if ledger.ahead(lease):
                    # Nobody works on it yet.
                    lease.granted_at = now
                elif self.held:
                    # What is done can't be taken: this time is not the worker's.
                    lease.granted_at += passed
            if self.held:
                continue
            late = [lease for lease in ledger.leases() if now - lease.granted_at > self._config.attempt_timeout]
            for lease in late:
                text = f"its attempt took longer than {self._config.attempt_timeout:g} s"
                self._decide(now, ledger, lease, Evidence(timed_out=True, text=text))
            answers += self._serve(now, ledger, nodes)
        return answers

    def due(self) -> float | None:
        """When the next back-off of which somebody waits is over; None if nobody does."""
        waited = {waiter.dataset for waiter in self._waiting.values()}
        return min((at for name in waited if (at := self._ledgers[name].due()) is not None), default=None)

    def _serve(self, now: float, ledger: Ledger, nodes: Nodes) -> list[Answer]:
        if ledger.finished:
            return self._tell_done(ledger)
        if self.held:
            return []
        mine = [waiter for waiter in self._waiting.values() if waiter.dataset == ledger.spec.name]
        answers: list[Answer] = []
        for waiter in sorted(mine, key=lambda one: _rank(one.holder.member)):
            lease = ledger.lease(now, waiter.holder, self._numbers(), nodes, waiter.after)
            if lease is not None:
                del self._waiting[waiter.holder.consumer]
                message = _lease_message(ledger, lease)
                answers.append(self._keep(waiter.holder.node, self._to(waiter, "leased", message)))
        return answers

    def _tell_done(self, ledger: Ledger) -> list[Answer]:
        mine = [waiter for waiter in self._waiting.values() if waiter.dataset == ledger.spec.name]
        for waiter in mine:
            del self._waiting[waiter.holder.consumer]
        return [Answer(waiter.holder.node, self._to(waiter, "done")) for waiter in mine]

    def drain(self, node: str) -> list[Answer]:
        """This host goes away: who waits there gets nothing more."""
        mine = [waiter for waiter in self._waiting.values() if waiter.holder.node == node]
        for waiter in mine:
            del self._waiting[waiter.holder.consumer]
        return [Answer(node, self._to(waiter, "drain", reason="this host goes away")) for waiter in mine]

    def _to(self, waiter: Waiter, kind: str, lease: ShardLease | None = None, reason: str = "") -> ShardAnswer:
        return ShardAnswer(waiter.request, self._job, waiter.holder.consumer, kind, lease, reason)  # type: ignore[arg-type]

    # --- workers that fail, are lost, or are there again ---------------------------------------------------

    def reported(self, report: ReportFailure) -> None:
        """A worker says what it knows of its failure, before that ends it or its iteration."""
        known = self._reports.get(report.incarnation)
        if known is None or is_kind(report.kind) or not is_kind(known.kind):
            # What the script itself knows is not forgotten over an exception that says nothing.
            self._reports[report.incarnation] = report

    def failed(self, now: float, incarnation: str, evidence: Evidence, nodes: Nodes) -> list[Answer]:
        """A worker failed and lives: what it was doing is decided on, and it may ask again."""
        return self._give_up(now, {incarnation}, evidence, nodes)

    def lost(self, now: float, incarnations: Iterable[str], evidence: Evidence | None, nodes: Nodes) -> list[Answer]:
        """Worker processes are gone: what they had is given to others, and what they still say is refused.

        Without ``evidence`` nothing has failed: they were stopped.
        """
        gone = set(incarnations)
        self._unconfirmed -= gone
        for consumer in [one for one in self._waiting if one.partition("#")[0] in gone]:
            del self._waiting[consumer]
        for consumer in [one for one in self._replies if one.partition("#")[0] in gone]:
            del self._replies[consumer]
            self._record.replies[consumer] = None
        return self._give_up(now, gone, evidence, nodes)

    def _give_up(self, now: float, gone: set[str], evidence: Evidence | None, nodes: Nodes) -> list[Answer]:
        answers: list[Answer] = []
        for ledger in self._ledgers.values():
            had = [
                (lease, self._read_ahead(ledger, lease))
                for lease in ledger.leases()
                if lease.holder.incarnation in gone
            ]
            for lease, ahead in had:
                if evidence is None or ahead:
                    ledger.again(lease, now)
                else:
                    self._decide(now, ledger, lease, self._with_report(lease, evidence))
            if had:
                answers += self._serve(now, ledger, nodes)
        for incarnation in gone:
            self._reports.pop(incarnation, None)
        return answers

    def _read_ahead(self, ledger: Ledger, lease: Lease) -> bool:
        """Whether nobody worked on it when its holder failed."""
        report = self._reports.get(lease.holder.incarnation)
        return lease.lease_id != report.lease_id if report and report.lease_id else ledger.ahead(lease)

    def _with_report(self, lease: Lease, evidence: Evidence) -> Evidence:
        status = evidence.status
        if status is not None and status < 0 and not evidence.ours:
            self._signals[lease.holder.node, status] += 1
            evidence = replace(evidence, repeats=self._signals[lease.holder.node, status] - 1)
        report = self._reports.get(lease.holder.incarnation)
        if report is None:
            return evidence
        batch = report.batch if report.batch >= 0 else None
        return replace(evidence, reported=report.kind, reported_text=report.text, batch=batch)

    def holders(self, node: str = "") -> set[str]:
        """The incarnations that hold a lease or wait for one, on this node, or on any."""
        found = [lease.holder for ledger in self._ledgers.values() for lease in ledger.leases()]
        found += [waiter.holder for waiter in self._waiting.values()]
        return {holder.incarnation for holder in found if node in ("", holder.node)}

    def seen(self, now: float, member: str, incarnation: str, nodes: Nodes) -> list[Answer]:
        """This process lives: its leases go on, and those of an earlier process in its place do not."""
        self._unconfirmed.discard(incarnation)
        if not self._unconfirmed:
            return []
        found = (lease.holder for ledger in self._ledgers.values() for lease in ledger.leases())
        old = {one.incarnation for one in found if one.member == member and one.incarnation != incarnation}
        return self.lost(now, old & self._unconfirmed, Evidence(text="it ended while no coordinator was there"), nodes)

    def settle(self, now: float, nodes: Nodes) -> list[Answer]:
        """The time is over in which the holders of an earlier start had to be heard of."""
        if not self._unconfirmed:
            return []
        evidence = Evidence(node_lost=True, text="it was not heard of after the coordinator's restart")
        return self.lost(now, set(self._unconfirmed), evidence, nodes)

    # --- decisions -----------------------------------------------------------------------------------------

    def _decide(self, now: float, ledger: Ledger, lease: Lease, evidence: Evidence) -> str:
        """What becomes of the shard; the sentence for people."""
        account = ledger.account(lease.shard)
        verdict = classify(evidence, self._patterns)
        failure = Failure(
            verdict=verdict,
            shard=f"{ledger.spec.name}/{lease.shard}",
            batch=evidence.batch,
            node=lease.holder.node,
            worker=lease.holder.member,
            progressed=account.progress > account.failed_at,
        )
        decision = decide(failure, account.budgets, self._config, self._rng, now)
        self._carry_out(now, ledger, lease, evidence.batch, decision)
        taken = ShardDecision(
            number=self._numbers(),
            dataset=ledger.spec.name,
            shard=lease.shard,
            lease_id=lease.lease_id,
            member=lease.holder.member,
            node=lease.holder.node,
            batch=-1 if evidence.batch is None else evidence.batch,
            at=max(now, 0.0),
            kind=verdict.kind,
            evidence=verdict.evidence,
            confidence=verdict.confidence,
            action=type(decision.action).__name__,
            reason=decision.action.reason,
        )
        self.decisions.append(taken)
        self._record.decisions[taken.number] = taken
        return decision.action.reason

    def _carry_out(self, now: float, ledger: Ledger, lease: Lease, batch: int | None, decision: Decision) -> None:
        action = decision.action

        def note(account: Account) -> None:
            account.budgets = decision.budgets
            account.failed_at = account.progress
            match action:
                case Retry(exclude_node=node) if node and node not in account.excluded:
                    account.excluded.append(node)
                case Quarantine(batch=int(skipped)) if skipped not in account.skip:
                    account.skip.append(skipped)
                case _:
                    pass

        match action:
            case Retry(at=at):
                ledger.again(lease, at, note)
            case Quarantine(batch=None):
                ledger.ended(lease, State.QUARANTINED, note)
            case Quarantine():
                ledger.again(lease, now, note)
            case GiveUp():
                ledger.ended(lease, State.FAILED, note)

    # --- a new start ---------------------------------------------------------------------------------------

    def restore(self, now: float, saved: Saved) -> None:
        """Takes up what was written down, once: leases live on until their holders were, or should have been, heard."""
        for one in saved.datasets:
            ledger = self._ledgers[one.spec.name] = self._ledger(one.number, one.spec)
            ledger.restore(now, one.smooth, one.rows, self._config.max_delay)
            self._unconfirmed |= {lease.holder.incarnation for lease in ledger.leases()}
        self._replies = {reply.consumer: reply for reply in saved.replies}
        self.decisions.extend(saved.decisions)


def _rank(member: str) -> tuple[int, str]:
    slot = member.rpartition("/")[2]
    return (int(slot) if slot.isdecimal() else 0, member)


def _lease_message(ledger: Ledger, lease: Lease) -> ShardLease:
    account = ledger.account(lease.shard)
    return ShardLease(
        dataset=ledger.spec.name,
        shard=lease.shard,
        lease_id=lease.lease_id,
        attempt=max(account.attempts, 1),
        progress=account.progress,
        skip=account.skip.copy(),
        batch_size_scale=account.budgets.batch_size_scale,
    )


def _refusal(spec: Dataset, name: str, known: Dataset | None, datasets: int) -> str:
    if spec.name != name:
        return f"the request names data set {name} and describes {spec.name}"
    if known is not None and known != spec:
        return f"data set {name} is {_describe(known)} in this job already, and this rank asks for {_describe(spec)}"
    if known is None and datasets >= MAX_DATASETS:
        return f"this job has {MAX_DATASETS} data sets, and more are not kept: use fewer, with more epochs"
    if spec.total > MAX_SHARDS:
        return f"{spec.total} shards are more than {MAX_SHARDS}: choose a larger shard_size"
    return ""


def _describe(spec: Dataset) -> str:
    shuffled = f", shuffle_seed {spec.shuffle_seed}" if spec.shuffle_seed >= 0 else ""
    return f"size {spec.size}, shard_size {spec.shard_size}, epochs {spec.epochs}{shuffled}"


def _why_wait(ledger: Ledger, holder: Holder, now: float) -> str:
    if len(ledger.held_by(holder.consumer)) >= MAX_HELD:
        return f"{MAX_HELD} shards that this consumer has leased are not done, and no more are given: complete some"
    leased, waiting = ledger.count(State.LEASED), ledger.count(State.PENDING)
    due = ledger.due()
    text = f"all shards are taken: {leased} in flight, {waiting} to be done again"
    return f"{text}, the first in {max(0.0, due - now):.1f} s" if due is not None else text


def _report(ledger: Ledger) -> str:
    total, done = ledger.spec.total, ledger.count(State.DONE)
    text = f"data set {ledger.spec.name}: {'all' if done == total else f'{done} of'} {total} shards done"
    for state, what in ((State.QUARANTINED, "quarantined"), (State.FAILED, "failed")):
        if ledger.count(state):
            text += f", {ledger.count(state)} {what} ({_names(ledger.in_state(state))})"
    left = ledger.count(State.PENDING) + ledger.count(State.LEASED)
    text += f", {left} not finished" if left else ""
    skipped = [f"shard {shard} batch {batch}" for shard, batch in ledger.skipped()]
    return f"{text}, batches left out: {_names(skipped)}" if skipped else text


def _names(found: list[int] | list[str]) -> str:
    text = ", ".join(str(one) for one in found[:REPORT_NAMES])
    return f"{text} and {len(found) - REPORT_NAMES} more" if len(found) > REPORT_NAMES else text
