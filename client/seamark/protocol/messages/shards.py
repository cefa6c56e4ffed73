"""The data sets of a job: what a consumer asks, and what a person asks about them."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from seamark.protocol.messages.base import Count, Fraction, Message, Moment, Name, Part, Short, Text


class Dataset(Part, frozen=True):
    """A data set of a job: ``size`` samples, cut into shards, gone through ``epochs`` times.

    ``shuffle_seed`` -1 leaves the samples in their order. Shards are numbered through all epochs.
    """

    name: Name
    size: Count
    shard_size: Annotated[int, Meta(ge=1, le=2**53)]
    shuffle_seed: Annotated[int, Meta(ge=-1, le=2**63 - 1)] = -1
    epochs: Annotated[int, Meta(ge=1, le=1_000_000)] = 1

    @property
    def per_epoch(self) -> int:
        """Shards of one epoch."""
        return -(-self.size // self.shard_size)

    @property
    def total(self) -> int:
        """Shards of all epochs."""
        return self.per_epoch * self.epochs


class ShardLease(Part, frozen=True):
    """The right of one worker process to work on one shard; its id is never used again.

    ``progress`` batches were done durably by whoever had it before, those in ``skip`` are quarantined.
    """

    dataset: Name
    shard: Count
    lease_id: Count
    attempt: Count
    progress: Count = 0
    skip: list[int] = []
    batch_size_scale: Fraction = 1.0


class ShardRequest(Message, frozen=True):
    """Base of what a consumer asks: an iterator over a data set in a worker process.

    ``consumer`` is the worker's incarnation, ``#`` and the iterator's name in that process. ``request`` rises with
    every request of a consumer; the same number again gets the same answer.
    """

    request: Count
    job: Name
    member: Name
    consumer: Name
    dataset: Name

    @property
    def incarnation(self) -> str:
        """Of the worker process."""
        return self.consumer.partition("#")[0]


class OpenShards(ShardRequest, frozen=True):
    """What this consumer will ask of; the first of a job makes the data set, and all must describe it alike.

    ``afresh``: whose leases of it are given back first, because who had them in hand is no more: this consumer's, or
    those of all consumers in its process.
    """

    type_id = 80
    direction = "worker -> agent -> coordinator"
    answer = "ShardAnswer"
    spec: Dataset
    afresh: Literal["", "consumer", "process"] = ""


class LeaseShard(ShardRequest, frozen=True):
    """The next shard, please; who holds one already gets it again.

    Who reads ahead names its latest lease, ``after``, and gets another besides those that it holds.
    """

    type_id = 81
    direction = "worker -> agent -> coordinator"
    answer = "ShardAnswer"
    after: Count = 0


class CompleteShard(ShardRequest, frozen=True):
    """The shard is done. With ``more`` the answer brings the next, if one is ready. ``digest``: of the result."""

    type_id = 82
    direction = "worker -> agent -> coordinator"
    answer = "ShardAnswer"
    shard: Count
    lease_id: Count
    digest: Short = ""
    more: bool = False


class CheckpointShard(ShardRequest, frozen=True):
    """``progress`` batches of the shard are done and durable: who has it next begins behind them."""

    type_id = 83
    direction = "worker -> agent -> coordinator"
    answer = "ShardAnswer"
    shard: Count
    lease_id: Count
    progress: Count


class FailShard(ShardRequest, frozen=True):
    """The worker could not do it: ``kind`` as it knows better than anybody, or empty; ``batch`` -1 if it was none's."""

    type_id = 84
    direction = "worker -> agent -> coordinator"
    answer = "ShardAnswer"
    shard: Count
    lease_id: Count
    kind: Short = ""
    batch: Annotated[int, Meta(ge=-1, le=2**53)] = -1
    text: Text = ""


class ReleaseShard(ShardRequest, frozen=True):
    """The worker will not do it, and nothing failed."""

    type_id = 85
    direction = "worker -> agent -> coordinator"
    answer = "ShardAnswer"
    shard: Count
    lease_id: Count


class ReportFailure(Message, frozen=True):
    """What a worker knows of its own failure, which is about to end it or its iteration.

    ``lease_id``: of what it was working on; what else it holds was read ahead, and has not failed. 0: it doesn't say.
    """

    type_id = 86
    direction = "worker -> agent -> coordinator"
    job: Name
    member: Name
    incarnation: Name
    kind: Short
    batch: Annotated[int, Meta(ge=-1, le=2**53)] = -1
    text: Text = ""
    lease_id: Count = 0


class ShardAnswer(Message, frozen=True):
    """The answer to every request of a consumer; durable before it is sent.

    ``kind``: opened; leased (``lease``); recorded; stale (the lease has ended: what was done under it counts for
    nothing); wait (shards are in flight and may come back: the lease is pushed as soon as there is one); done
    (every shard is terminal); drain (this host goes away: no more for it); refused (``reason`` says why).
    """

    type_id = 87
    direction = "coordinator -> agent -> worker"
    request: Count
    job: Name
    consumer: Name
    kind: Literal["opened", "leased", "recorded", "stale", "wait", "done", "drain", "refused"]
    lease: ShardLease | None = None
    reason: Text = ""


class ShardsRequest(Message, frozen=True):
    """Which shards of a data set stand where? ``limit`` of them, from ``first`` on, those never leased left out."""

    type_id = 88
    direction = "operator -> coordinator; worker -> agent -> coordinator"
    answer = "ShardsPage | Refused"
    request: Count
    job: Name
    dataset: Name
    first: Count = 0
    limit: Annotated[int, Meta(ge=1, le=5_000)] = 5_000
    consumer: Short = ""
    """The worker's consumer who asks; empty for a person."""


class ShardEntry(Part, frozen=True):
    """A shard in the books. For a DONE one ``lease_id`` is the one under which it was done, ``digest`` its result's."""

    shard: Count
    state: Literal["PENDING", "LEASED", "DONE", "QUARANTINED", "FAILED"]
    lease_id: Count
    member: Short
    node: Short
    progress: Count
    skip: list[int]
    digest: Short


class ShardsPage(Message, frozen=True):
    """Shards by number; ``following`` is where the next page begins, -1 after the last."""

    type_id = 89
    direction = "coordinator -> operator | agent -> worker"
    request: Count
    job: Name
    consumer: Short
    spec: Dataset
    entries: list[ShardEntry]
    following: Annotated[int, Meta(ge=-1)]


class DatasetsRequest(Message, frozen=True):
    """Which data sets are in the books of a job, living or ended?"""

    type_id = 96
    direction = "operator -> coordinator"
    answer = "Datasets | Refused"
    request: Count
    job: Name


class Datasets(Message, frozen=True):
    """The data sets of a job, the first that was opened first."""

    type_id = 97
    direction = "coordinator -> operator"
    request: Count
    job: Name
    datasets: list[Dataset]


class DecisionsRequest(Message, frozen=True):
    """What was decided about failures of a job's shards? ``shard`` -1: of all."""

    type_id = 90
    direction = "operator -> coordinator"
    answer = "Decisions | Refused"
    request: Count
    job: Name
    dataset: Short = ""
    shard: Annotated[int, Meta(ge=-1)] = -1


class ShardDecision(Part, frozen=True):
    """What became of a shard after a failure, and why."""

    number: Count
    dataset: Name
    shard: Count
    lease_id: Count
    member: Short
    node: Short
    batch: Annotated[int, Meta(ge=-1)]
    at: Moment
    """Of the coordinator's monotonic clock."""
    kind: Short
    """The failure's class."""
    evidence: Text
    confidence: Fraction
    action: Short
    reason: Text


class Decisions(Message, frozen=True):
    """The decisions, oldest first; ``now`` is of the clock that theirs are of."""

    type_id = 91
    direction = "coordinator -> operator"
    request: Count
    job: Name
    now: Moment
    decisions: list[ShardDecision]


class DatasetStatus(Part, frozen=True):
    """How far a data set is."""

    name: Name
    total: Count
    done: Count
    leased: Count
    quarantined: Count
    failed: Count
    skipped: Count
    """Batches that were quarantined out of shards that went on."""
