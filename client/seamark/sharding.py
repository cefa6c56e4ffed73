"""Shards of a data set: leased, worked on, and counted exactly once, whatever dies meanwhile.

    for shard in seamark.shards("inputs", size=1_000_000, shard_size=1_000):
        for batch in shard.batches(32):
            work(batch.indices)
        shard.complete()

The coordinator gives each shard to one worker process at a time and writes down what became of it before it says so. A
lease lives as long as its process does, which the agent knows better than any timer: nothing has to be renewed, and a
process that is blocked for an hour loses nothing but time. The shard of a process that dies is leased to another, which
begins behind the last ``checkpoint``; what the first one still says is refused.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import zmq

from seamark.environment import WorkerEnvironment
from seamark.failure_kinds import KINDS
from seamark.failure_report import kind_of
from seamark.protocol.codec import ProtocolError, decode, encode
from seamark.protocol.messages import (
    CheckpointShard,
    CompleteShard,
    Dataset,
    FailShard,
    LeaseShard,
    Message,
    OpenShards,
    Refused,
    ReleaseShard,
    ReportFailure,
    ShardAnswer,
    ShardEntry,
    ShardLease,
    ShardsPage,
    ShardsRequest,
)
from seamark.protocol.sockets import check_address, make_socket, receive

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger("seamark")

REPEAT_INTERVAL = 1.0
"""Seconds after which an unanswered request is sent again."""
WAIT_INTERVAL = 5.0
"""Seconds after which a worker that waits for a shard asks whether that is still so."""
QUIET = 10.0
"""Seconds without an answer, or without a shard, after which people are told."""
MAX_NAME = 100
TEXT_LIMIT = 16_000
PREEMPTED = 143
LAST_WORDS_MS = 500

T = TypeVar("T", bound=Message)


class ShardError(RuntimeError):
    """The coordinator refused; the sentence is its reason."""


class HostLeaves(SystemExit, Exception):
    """This host goes away, and no more shards are for it: ends the process with 143.

    An ``Exception`` too, because a DataLoader brings nothing else from its workers to the trainer.
    """

    def __init__(self, why: str = "") -> None:
        super().__init__(PREEMPTED)
        self.why = why


class Batch:
    """A batch of a shard. Where the batch size was halved, several of them have the same ``index``.

    Attributes:
        index: its number in the shard, by which it is checkpointed and quarantined.
        start, stop: its places in the data set's order.
        last: it is the last of this index.
    """

    def __init__(self, shard: Shard, index: int, start: int, stop: int, last: bool) -> None:
        self.shard = shard
        self.index = index
        self.start = start
        self.stop = stop
        self.last = last

    @property
    def indices(self) -> NDArray[np.int64]:
        """Its samples, of shape (stop - start,)."""
        return self.shard.samples(self.start, self.stop)


class Shard:
    """A shard that this process has the lease of.

    Attributes:
        index: its number in its epoch.
        epoch: from 0 on.
        start, stop: its places in the epoch's order.
        lease_id: never used for another lease; in the name of an output file it keeps a zombie's output apart.
        attempt: 1 at the first.
        progress: batches that were done and checkpointed by an earlier holder.
        skip: batches that are quarantined.
        batch_size_scale: 1.0, or less after running out of memory.
    """

    def __init__(self, owner: Shards, spec: Dataset, lease: ShardLease) -> None:
        self._owner = owner
        self._spec = spec
        self.lease = lease
        self._number = lease.shard
        self.epoch, self.index = divmod(lease.shard, spec.per_epoch)
        self.start = self.index * spec.shard_size
        self.stop = min(spec.size, self.start + spec.shard_size)
        self.lease_id = lease.lease_id
        self.attempt = lease.attempt
        self.progress = lease.progress
        self.skip = frozenset(lease.skip)
        self.batch_size_scale = lease.batch_size_scale
        self.current: int | None = None
        """The batch that ``batches`` gave out last: a failure is taken for this one's."""
        self.open = True
        """Neither completed nor failed nor released."""

    def __repr__(self) -> str:
        return f"<Shard {self._spec.name} {self.epoch}:{self.index} samples {self.start}..{self.stop}>"

    @property
    def indices(self) -> NDArray[np.int64]:
        """All of its samples, shuffled if the data set is, of shape (stop - start,)."""
        return self.samples(self.start, self.stop)

    def samples(self, start: int, stop: int) -> NDArray[np.int64]:
        """The samples at these places of the epoch's order."""
        import numpy as np

        if self._spec.shuffle_seed < 0:
            return np.arange(start, stop, dtype=np.int64)
        from seamark.shuffle import shuffled

        return shuffled(start, stop, self._spec.size, self._spec.shuffle_seed, self.epoch)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The batches that are still to be done: behind the last checkpoint, without the quarantined ones.

        After running out of memory each comes in several parts, of ``batch_size`` times ``batch_size_scale`` samples.

        Args:
            batch_size: samples of a batch; the same at every attempt, or numbers of batches mean others.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
        part = max(1, int(batch_size * self.batch_size_scale))
        for index, start in enumerate(range(self.start, self.stop, batch_size)):
            if index < self.progress or index in self.skip:
                continue
            self.current = index
            stop = min(self.stop, start + batch_size)
            for at in range(start, stop, part):
                yield Batch(self, index, at, min(stop, at + part), at + part >= stop)
        self.current = None

    def checkpoint(self, batch: int) -> bool:
        """All batches up to and with this one are done, and what came of them is durable.

        Returns:
            False if its lease has ended.
        """
        self.progress = max(self.progress, batch + 1)
        return self._owner.report(self, CheckpointShard, progress=batch + 1)

    def complete(self, result_digest: str = "") -> bool:
        """The shard is done; durable when this returns.

        Args:
            result_digest: of its result, 200 characters at most; ``results()`` and ``seamark manifest`` give it.

        Returns:
            False if its lease has ended: what this process made of it must not be used.
        """
        self.open = False
        return self._owner.complete(self, result_digest)

    def fail(self, error: BaseException | str, batch: int | None = None, kind: str = "") -> bool:
        """The shard could not be done. The coordinator decides whether and when it is tried again, and by whom.

        Args:
            error: what happened.
            batch: the batch that it happened in; by default the one that ``batches`` gave out last.
            kind: the class of failure (docs/retries.md), where it is known better than ``error`` tells.

        Returns:
            False if its lease has ended.
        """
        self.open = False
        batch = self.current if batch is None else batch
        text = _text(error)
        kind = kind or _kind(error)
        return self._owner.report(self, FailShard, batch=-1 if batch is None else batch, kind=kind, text=text)

    def release(self) -> bool:
        """Gives the shard back; nothing failed."""
        self.open = False
        return self._owner.report(self, ReleaseShard)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and self.open:
            self.fail(error)

    @property
    def number(self) -> int:
        """Its number through all epochs."""
        return self._number


class Shards:
    """The shards of a data set, as they are leased to this process; see ``shards``."""

    def __init__(self, spec: Dataset, consumer: str = "0", afresh: Literal["", "consumer", "process"] = "") -> None:
        who = WorkerEnvironment.read()
        if who.alone:
            raise ShardError(
                "shards are given out by a coordinator, and this worker has none: start the script with seamark run"
            )
        self.spec = spec
        self._line = Line(who, f"{who.incarnation}#{spec.name}/{consumer}", spec.name)
        self._following: ShardLease | None = None
        self.finished = False
        """Every shard is terminal."""
        self._latest = 0
        self.current: Shard | None = None
        """The shard that was given out last."""
        self._line.ask(OpenShards, spec=spec, afresh=afresh)
        _open.append(self)

    def __iter__(self) -> Iterator[Shard]:
        return self

    def __next__(self) -> Shard:
        lease, self._following = self._following, None
        if lease is None:
            if self.finished:
                raise StopIteration
            answer = self._line.ask(LeaseShard)
            if answer.kind == "drain":
                log.warning("no more shards for this process: %s", answer.reason)
                raise SystemExit(PREEMPTED)
            lease = answer.lease
        if lease is None:
            self.finished = True
            raise StopIteration
        self.current = Shard(self, self.spec, lease)
        return self.current

    def ahead(self, patience: float) -> Shard | None:
        """The next shard, besides those that this consumer holds.

        Args:
            patience: seconds to wait for one.

        Returns:
            None if there is none yet; called again it goes on waiting, unless all are ``finished``.

        Raises:
            HostLeaves: this host goes away.
        """
        answer = self._line.lease(self._latest, patience)
        if answer is None:
            return None
        if answer.kind == "drain":
            raise HostLeaves(answer.reason)
        if answer.lease is None:
            self.finished = True
            return None
        self._latest = answer.lease.lease_id
        return Shard(self, self.spec, answer.lease)

    def complete(self, shard: Shard, digest: str) -> bool:
        """What ``Shard.complete`` does; the answer brings the next shard."""
        answer = self._line.ask(
            CompleteShard, shard=shard.number, lease_id=shard.lease_id, digest=digest, more=shard is self.current
        )
        self._following = answer.lease
        self.finished = self.finished or answer.kind == "done"
        return self._taken(shard, answer)

    def report(self, shard: Shard, message: type[Message], /, **fields: Any) -> bool:
        """Says something of a shard; False if its lease has ended."""
        return self._taken(shard, self._line.ask(message, shard=shard.number, lease_id=shard.lease_id, **fields))

    @staticmethod
    def _taken(shard: Shard, answer: ShardAnswer) -> bool:
        if answer.kind == "stale":
            # Its holder may have been this very process, in which the load of another batch of it has failed.
            log.warning("%r: what was said of it came too late, and does not count: %s", shard, answer.reason)
        elif answer.reason:
            log.warning("%r: %s", shard, answer.reason)
        return answer.kind != "stale"

    def results(self) -> Iterator[ShardEntry]:
        """The shards that are DONE: number, the lease under which each was done, the digest of its result."""
        first = 0
        while first >= 0:
            page = self._line.page(first)
            yield from (entry for entry in page.entries if entry.state == "DONE")
            first = page.following

    @property
    def in_hand(self) -> Shard | None:
        """The shard that this process works on."""
        return self.current if self.current is not None and self.current.open else None

    def tell(self, kind: str, batch: int | None, text: str) -> None:
        """Says what this process knows of its failure, without waiting for anything."""
        shard = self.in_hand
        if batch is None and shard is not None:
            batch = shard.current
        self._line.tell_failure(kind, -1 if batch is None else batch, text, shard.lease_id if shard else 0)

    def give_all_back(self) -> None:
        """Gives back whatever any consumer in this process has leased of the data set."""
        self._line.ask(OpenShards, spec=self.spec, afresh="process")

    def abandon(self, linger_ms: int = 0) -> None:
        """Ends the connection; the lease is this process's still, and whoever asks next in it has it again."""
        if self in _open:
            _open.remove(self)
            self._line.close(linger_ms)

    def close(self) -> None:
        """Gives back what is leased and not worked on, and ends the connection; may be called twice."""
        if self not in _open:
            return
        if self.current is not None and self.current.open:
            self.current.release()
        if self._following is not None:
            Shard(self, self.spec, self._following).release()
        self.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()


_open: list[Shards] = []


def shards(name: str, *, size: int, shard_size: int, shuffle_seed: int | None = None, epochs: int = 1) -> Shards:
    """The shards of a data set, to be iterated: each goes to one worker of the job, and is done exactly once.

    Iteration ends when every shard of every epoch is terminal: as long as one is in flight elsewhere it may come back,
    and ``next`` waits. It raises ``SystemExit(143)`` where this host goes away. What is not completed when the process
    ends is given to another; leave a loop early with ``close()``, or use ``with``, to give it back at once.

    Args:
        name: of the data set, one per job; all ranks describe it alike.
        size: its samples.
        shard_size: samples of a shard; the last may have fewer.
        shuffle_seed: shuffles the samples, anew for each epoch; None leaves them in their order.
        epochs: how often all samples are gone through.

    Raises:
        ShardError: the coordinator refuses, or there is none.
        MissingEnvironmentError: the script was not started by ``seamark run``.
        ValueError: a number that can't be.
    """
    spec = described(name, size=size, shard_size=shard_size, shuffle_seed=shuffle_seed, epochs=epochs)
    abandon(name)
    watch_exceptions()
    return Shards(spec)


def abandon(name: str) -> bool:
    """Ends what is open of a data set: the function was entered again, and what was leased is its next iterator's.

    Returns:
        False if nothing was open.
    """
    before = [one for one in _open if one.spec.name == name]
    for one in before:
        one.abandon()
    return bool(before)


def described(name: str, *, size: int, shard_size: int, shuffle_seed: int | None, epochs: int) -> Dataset:
    """The data set that these arguments of ``shards`` describe.

    Raises:
        ValueError: a name or a number that can't be.
    """
    if not 0 < len(name.encode()) <= MAX_NAME:
        raise ValueError(f"the name of a data set has 1 to {MAX_NAME} characters, this one {len(name.encode())} bytes")
    if not name.isprintable() or "/" in name:
        raise ValueError(f"the name of a data set is printable and has no slash, unlike {name!r}")
    for what, value, least in (("size", size, 0), ("shard_size", shard_size, 1), ("epochs", epochs, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{what} must be a whole number of {least} or more, not {value!r}")
    if shuffle_seed is not None and (not isinstance(shuffle_seed, int) or not 0 <= shuffle_seed < 1 << 63):
        raise ValueError(f"shuffle_seed must be None or a whole number of 0 or more, not {shuffle_seed!r}")
    return Dataset(name, size, shard_size, -1 if shuffle_seed is None else shuffle_seed, epochs)


@dataclass
class _Asked:
    """A request on its way."""

    message: Message
    request: int
    began: float
    told: float
    repeat_at: float = 0.0
    reason: str = "no answer from the coordinator yet"


class Line:
    """A consumer's connection to its agent: a request, repeated until it is answered.

    Requests are numbered by the microseconds of the host's clock: whoever has this name next in the process, in a
    forked child too, goes on above.

    Args:
        who: this worker.
        consumer: who asks, in this worker.
        dataset: what it asks of.
    """

    def __init__(self, who: WorkerEnvironment, consumer: str, dataset: str) -> None:
        self._who = who
        self._consumer = consumer
        self._dataset = dataset
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._requests = itertools.count(time.monotonic_ns() // 1_000)
        self._lease: _Asked | None = None
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = make_socket(self._context, zmq.DEALER, identity=consumer.encode())
        self._socket.connect(check_address(who.address))

    def ask(self, message: type[Message], /, **fields: Any) -> ShardAnswer:
        """Asks until there is an answer that is more than "wait".

        Raises:
            ShardError: the coordinator refuses.
        """
        with self._lock:
            answer = self._exchange(self._asked(message, **fields), ShardAnswer)
        assert answer is not None
        return _granted(answer)

    def lease(self, after: int, patience: float) -> ShardAnswer | None:
        """Asks for a shard besides those up to the lease ``after``; None if there is none within so many seconds.

        The request stays: the next call waits for its answer.

        Raises:
            ShardError: the coordinator refuses.
        """
        with self._lock:
            if self._lease is None:
                self._lease = self._asked(LeaseShard, after=after)
            answer = self._exchange(self._lease, ShardAnswer, patience)
            if answer is None:
                return None
            self._lease = None
        return _granted(answer)

    def _asked(self, message: type[Message], /, **fields: Any) -> _Asked:
        request, now, who = next(self._requests), time.monotonic(), self._who
        about = {"job": who.job, "member": who.member, "consumer": self._consumer, "dataset": self._dataset}
        return _Asked(message(request=request, **about, **fields), request, now, now)

    def page(self, first: int) -> ShardsPage:
        """Shards of the data set, from this one on."""
        with self._lock:
            request, now = next(self._requests), time.monotonic()
            message = ShardsRequest(request, self._who.job, self._dataset, first, consumer=self._consumer)
            page = self._exchange(_Asked(message, request, now, now), ShardsPage)
        assert page is not None
        return page

    def tell_failure(self, kind: str, batch: int, text: str, lease_id: int) -> None:
        """Sends what this process knows of its failure; not answered."""
        who = self._who
        if os.getpid() == self._pid:
            self._send(ReportFailure(who.job, who.member, who.incarnation, kind, batch, text, lease_id))

    def _exchange(self, asked: _Asked, kind: type[T], patience: float = math.inf) -> T | None:
        if os.getpid() != self._pid:
            raise ShardError("this process was forked after it opened its shards: open them in the child, too")
        until = time.monotonic() + patience
        while (now := time.monotonic()) < until:
            if now >= asked.repeat_at:
                self._send(asked.message)
                asked.repeat_at = now + REPEAT_INTERVAL
            if now - asked.told > QUIET:
                asked.told = now
                log.warning("data set %s: waits for %.0f s: %s", self._dataset, now - asked.began, asked.reason)
            self._socket.poll(max(1, int((min(asked.repeat_at, until) - now) * 1_000)))
            answer = self._receive()
            if isinstance(answer, Refused):
                raise ShardError(answer.reason)
            if not isinstance(answer, kind) or getattr(answer, "request", None) != asked.request:
                continue
            if isinstance(answer, ShardAnswer) and answer.kind == "wait":
                asked.reason = answer.reason
                asked.repeat_at = time.monotonic() + WAIT_INTERVAL
                continue
            return answer
        return None

    def _send(self, message: Message) -> None:
        try:
            self._socket.send_multipart(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            log.debug("the agent does not read: the request is repeated")

    def _receive(self) -> Message | None:
        frames = receive(self._socket)
        if frames is None:
            return None
        try:
            return decode(frames)
        except ProtocolError as error:
            log.warning("an unreadable answer: %s", error)
            return None

    def close(self, linger_ms: int = 0) -> None:
        """Ends the connection."""
        if os.getpid() == self._pid:
            self._socket.close(linger_ms)
            self._context.term()


def _granted(answer: ShardAnswer) -> ShardAnswer:
    if answer.kind == "refused":
        raise ShardError(answer.reason)
    return answer


def report_failure(kind: str, batch: int | None = None, text: str = "") -> None:
    """Says what this process knows of the failure that is about to end it, or its iteration.

    It is the strongest evidence there is (docs/retries.md). Exceptions that end a process which has opened shards are
    reported by themselves; this is for what only the script knows.

    Args:
        kind: the class of failure.
        batch: the batch it happened in.
        text: for people.

    Raises:
        ValueError: ``kind`` is no class of failure.
        ShardError: this process has opened no shards: of whose failure should this speak?
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no class of failure: choose one of {', '.join(KINDS)}")
    if not _open:
        raise ShardError("report_failure() speaks of a shard's failure, and this process has opened none")
    _worked_on().tell(kind, batch, text[:TEXT_LIMIT])


def report_exception(error: BaseException) -> None:
    """Reports an exception that ends this process, or its iteration, if it has opened shards."""
    if _open:
        _worked_on().tell(_kind(error), None, _text(error))


def _worked_on() -> Shards:
    """One word alone, on one line: of two the coordinator may hear the wrong one last."""
    return max(_open, key=lambda shards: shards.in_hand is not None)


def _kind(error: BaseException | str) -> str:
    return kind_of(error) if isinstance(error, BaseException) else ""


def _text(error: BaseException | str) -> str:
    if isinstance(error, str):
        return error[-TEXT_LIMIT:]
    return "".join(traceback.format_exception(error))[-TEXT_LIMIT:]


def watch_exceptions() -> None:
    """Has the exception that ends this process reported."""
    global _watching
    if _watching:
        return
    _watching = True
    before = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        with suppress(Exception):
            report_exception(error)
            for one in _open.copy():
                one.abandon(LAST_WORDS_MS)
        before(kind, error, trace)

    sys.excepthook = report


_watching = False
