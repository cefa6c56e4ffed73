"""The ledger of one data set: who has which shard, and what became of it.

    PENDING -> LEASED -> DONE | QUARANTINED | FAILED         LEASED -> PENDING: given back, or failed and tried again

A shard never leaves the books: PENDING + LEASED + the terminal ones are all of them at any time, and what is terminal
stays so. A lease is one worker process's, its id is never used again and rises, and only under the living lease
something is taken: who lost it is told so. A consumer that reads ahead holds several: it works on the oldest. Pure
book-keeping: what a failure means is ``retry.py``'s, whom to tell ``shards.py``'s, and neither a clock nor a disk is
known here.

The states are a byte and a number per shard, and accounts exist only of those that did not go smoothly: a data set has
a million shards, and a coordinator many data sets.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum

import msgspec
from msgspec import Struct

from seamark.protocol.messages import Dataset, DatasetStatus
from seamarkd.coordinator.retry import Budgets

MAX_HELD = 64
"""Leases that one consumer may hold: what a DataLoader's worker can have read that nobody has trained on yet."""


class State(IntEnum):
    """Where a shard stands; the last three are terminal."""

    PENDING = 0
    LEASED = 1
    DONE = 2
    QUARANTINED = 3
    FAILED = 4


class Holder(Struct, frozen=True):
    """A consumer in a worker process."""

    consumer: str
    member: str
    node: str

    @property
    def incarnation(self) -> str:
        """Of the process."""
        return self.consumer.partition("#")[0]


class Lease(Struct):
    """A living lease."""

    shard: int
    lease_id: int
    holder: Holder
    granted_at: float


class Account(Struct):
    """What is known of a shard beyond its state."""

    attempts: int = 0
    progress: int = 0
    """Batches that are done durably: who has it next begins behind them."""
    failed_at: int = 0
    """How many of them were when it failed last."""
    skip: list[int] = []
    """Quarantined batches."""
    member: str = ""
    """Who had it last."""
    excluded: list[str] = []
    """Nodes that it is not to be done on."""
    not_before: float = -1.0
    """When it may be leased again, seconds of the coordinator's monotonic clock."""
    budgets: Budgets = Budgets()


class Row(Struct, frozen=True):
    """A shard as it is written down."""

    shard: int
    state: int
    lease_id: int
    consumer: str
    member: str
    node: str
    digest: str
    account: bytes
    """JSON; empty where there is none."""


class Ledger:
    """All shards of a data set.

    Args:
        number: of the data set in the manifest; never used again.
        spec: what it is.
        sticky: a shard that was begun is only for the same member (elastic redistribution is off).
    """

    def __init__(self, number: int, spec: Dataset, *, sticky: bool = False) -> None:
        self.number = number
        self.spec = spec
        self._sticky = sticky
        self._states = bytearray(spec.total)
        self._lease_ids = array("q", bytes(8 * spec.total))
        self._counts = [spec.total, 0, 0, 0, 0]
        self._fresh = 0
        self._ready: dict[str, list[int]] = {"": []}
        """Heaps of shards that may be leased again, by the member whose they are alone; empty: anybody's."""
        self._later: list[tuple[float, int]] = []
        self._accounts: dict[int, Account] = {}
        self._leases: dict[int, Lease] = {}
        self._held: dict[str, list[int]] = {}
        """By consumer: the shards that it holds, the oldest lease first."""
        self._changed: dict[int, tuple[Holder, str]] = {}
        """Shards to be written down, each with who has or had it, and the digest of its result."""

    # --- looking -------------------------------------------------------------------------------------------

    def state(self, shard: int) -> State:
        """Where a shard stands."""
        return State(self._states[shard])

    def count(self, state: State) -> int:
        """How many shards stand there."""
        return self._counts[state]

    @property
    def finished(self) -> bool:
        """Whether every shard is terminal."""
        return self._counts[State.PENDING] == 0 and self._counts[State.LEASED] == 0

    @property
    def complete(self) -> bool:
        """Whether every shard is DONE."""
        return self._counts[State.DONE] == self.spec.total

    def account(self, shard: int) -> Account:
        """What is known of a shard; an empty account where nothing is."""
        return self._accounts.get(shard) or Account()

    def lease_of(self, shard: int) -> Lease | None:
        """The living lease of a shard."""
        return self._leases.get(shard)

    def leases(self) -> Iterable[Lease]:
        """All living leases."""
        return self._leases.values()

    def held_by(self, consumer: str) -> list[Lease]:
        """The living leases of a consumer, the oldest first."""
        return [self._leases[shard] for shard in self._held.get(consumer, ())]

    def ahead(self, lease: Lease) -> bool:
        """Whether this living lease is of a shard that was read ahead: its holder works on an older one."""
        return self._held[lease.holder.consumer][0] != lease.shard

    def live(self, incarnation: str, shard: int, lease_id: int) -> Lease | None:
        """The lease that this process means, if it lives and is its own."""
        lease = self._leases.get(shard)
        if lease is None or lease.lease_id != lease_id or lease.holder.incarnation != incarnation:
            return None
        return lease

    def last_lease(self, shard: int) -> int:
        """The id of the lease that the shard had last; of a DONE one the one under which it was done; 0: none."""
        return self._lease_ids[shard] if 0 <= shard < self.spec.total else 0

    def skipped(self) -> Iterator[tuple[int, int]]:
        """The quarantined batches: shard and batch."""
        return ((shard, batch) for shard, account in sorted(self._accounts.items()) for batch in account.skip)

    def in_state(self, state: State) -> list[int]:
        """The shards that stand there: for QUARANTINED and FAILED, of which there are few."""
        return [shard for shard, one in enumerate(self._states) if one == state]

    def status(self) -> DatasetStatus:
        """How far it is."""
        return DatasetStatus(
            name=self.spec.name,
            total=self.spec.total,
            done=self._counts[State.DONE],
            leased=self._counts[State.LEASED],
            quarantined=self._counts[State.QUARANTINED],
            failed=self._counts[State.FAILED],
            skipped=sum(len(account.skip) for account in self._accounts.values()),
        )

    # --- leases --------------------------------------------------------------------------------------------

    def lease(
        self, now: float, holder: Holder, lease_id: int, nodes: Callable[[], frozenset[str]], after: int = 0
    ) -> Lease | None:
        """The shard that this consumer holds already, or the first that is ready for it; None if none is.

        Nor is one for a consumer that holds ``MAX_HELD``.

        Args:
            now: seconds.
            holder: who asks.
            lease_id: of a new lease: never used before.
            nodes: where workers of the job are: an exclusion that leaves nobody is none.
            after: the latest lease that the consumer knows; of those that it holds only a later one is given again.
        """
        held = self.held_by(holder.consumer)
        unknown = next((lease for lease in held if lease.lease_id > after), None)
        if unknown is not None or len(held) >= MAX_HELD:
            return unknown
        shard = self._take(now, holder, nodes)
        if shard is None:
            return None
        lease = self._leases[shard] = Lease(shard, lease_id, holder, now)
        self._held.setdefault(holder.consumer, []).append(shard)
        self._lease_ids[shard] = lease_id
        account = self._accounts.get(shard)
        if account is not None:
            account.attempts += 1
            account.member = holder.member
        self._set(lease, State.LEASED)
        return lease

    def _take(self, now: float, holder: Holder, nodes: Callable[[], frozenset[str]]) -> int | None:
        self.ripen(now)
        heaps = [heap for member in dict.fromkeys(("", holder.member)) if (heap := self._ready.get(member))]
        for heap in sorted(heaps, key=lambda one: one[0]):
            shard = self._first_suiting(heap, holder, nodes)
            if shard is not None:
                return shard
        if self._fresh == self.spec.total:
            return None
        self._fresh += 1
        return self._fresh - 1

    def _first_suiting(self, heap: list[int], holder: Holder, nodes: Callable[[], frozenset[str]]) -> int | None:
        passed: list[int] = []
        found: int | None = None
        while heap and found is None:
            shard = heapq.heappop(heap)
            if self._suits(shard, holder, nodes):
                found = shard
            else:
                passed.append(shard)
        for shard in passed:
            heapq.heappush(heap, shard)
        return found

    def _suits(self, shard: int, holder: Holder, nodes: Callable[[], frozenset[str]]) -> bool:
        # Who alone may do it does so wherever that one is.
        excluded = () if self._owner(shard) else self.account(shard).excluded
        return holder.node not in excluded or nodes().issubset(excluded)

    def _owner(self, shard: int) -> str:
        """The member whose it is alone; empty: anybody's."""
        return self.account(shard).member if self._sticky else ""

    def ripen(self, now: float) -> None:
        """Shards whose back-off is over may be leased."""
        while self._later and self._later[0][0] <= now:
            shard = heapq.heappop(self._later)[1]
            heapq.heappush(self._ready.setdefault(self._owner(shard), []), shard)

    def due(self) -> float | None:
        """When the next shard that waits out a back-off may be leased; None if none waits."""
        return self._later[0][0] if self._later else None

    # --- what becomes of a lease ---------------------------------------------------------------------------

    def done(self, lease: Lease, digest: str) -> None:
        """It was done under this living lease."""
        self._end(lease)
        self._set(lease, State.DONE, digest)

    def progressed(self, lease: Lease, progress: int) -> bool:
        """So many of its batches are done durably; False if that is nothing new."""
        account = self._account(lease)
        if progress <= account.progress:
            return False
        account.progress = progress
        self._changed[lease.shard] = (lease.holder, "")
        return True

    def again(self, lease: Lease, at: float, change: Callable[[Account], None] | None = None) -> None:
        """It is to be done again, not before ``at``; ``change`` writes down what is known now."""
        account = self._account(lease)
        if change is not None:
            change(account)
        account.not_before = at
        self._end(lease)
        self._set(lease, State.PENDING)
        heapq.heappush(self._later, (at, lease.shard))

    def ended(self, lease: Lease, state: State, change: Callable[[Account], None]) -> None:
        """It is QUARANTINED or FAILED, for good."""
        change(self._account(lease))
        self._end(lease)
        self._set(lease, state)

    def _account(self, lease: Lease) -> Account:
        account = self._accounts.get(lease.shard)
        if account is None:
            account = self._accounts[lease.shard] = Account(
                attempts=1, member=lease.holder.member, skip=[], excluded=[]
            )
        return account

    def _end(self, lease: Lease) -> None:
        del self._leases[lease.shard]
        held = self._held[lease.holder.consumer]
        held.remove(lease.shard)
        if not held:
            del self._held[lease.holder.consumer]

    def _set(self, lease: Lease, state: State, digest: str = "") -> None:
        shard = lease.shard
        self._counts[self._states[shard]] -= 1
        self._counts[state] += 1
        self._states[shard] = state
        self._changed[shard] = (lease.holder, digest)

    # --- the durable form ----------------------------------------------------------------------------------

    def take_changed(self) -> list[Row]:
        """The shards that changed since the last time, as they are now."""
        changed, self._changed = self._changed, {}
        return [self._row(shard, holder, digest) for shard, (holder, digest) in changed.items()]

    def _row(self, shard: int, holder: Holder, digest: str) -> Row:
        account = self._accounts.get(shard)
        return Row(
            shard=shard,
            state=self._states[shard],
            lease_id=self._lease_ids[shard],
            consumer=holder.consumer,
            member=holder.member,
            node=holder.node,
            digest=digest,
            account=b"" if account is None else msgspec.json.encode(account),
        )

    def restore(self, now: float, smooth: Iterable[tuple[int, int]], rows: Iterable[Row], longest: float) -> None:
        """Takes up what was written down of this data set, once.

        Args:
            now: seconds; the leases that live are as of now.
            smooth: of the shards that are DONE, number and lease id.
            rows: all others that were ever leased, and the DONE ones with an account.
            longest: seconds of the longest back-off: the clock of a host that was started anew begins anew.
        """
        for shard, lease_id in smooth:
            self._states[shard] = State.DONE
            self._lease_ids[shard] = lease_id
            self._fresh = max(self._fresh, shard + 1)
        for row in rows:
            self._states[row.shard] = row.state
            self._lease_ids[row.shard] = row.lease_id
            self._fresh = max(self._fresh, row.shard + 1)
            if row.account:
                self._accounts[row.shard] = msgspec.json.decode(row.account, type=Account)
            if row.state == State.LEASED:
                holder = Holder(row.consumer, row.member, row.node)
                self._leases[row.shard] = Lease(row.shard, row.lease_id, holder, now)
                self._held.setdefault(row.consumer, []).append(row.shard)
            elif row.state == State.PENDING:
                self._later.append((min(self.account(row.shard).not_before, now + longest), row.shard))
        heapq.heapify(self._later)
        for held in self._held.values():
            held.sort(key=self._lease_ids.__getitem__)
        self._counts = [self._states.count(state) for state in State]
