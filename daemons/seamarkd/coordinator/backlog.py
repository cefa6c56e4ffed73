"""What waits for the disk, without what nobody needs any more: bounded however long the disk refuses.

Changes become the latest of each job and of each shard. Of what is to be sent behind them, an answer that is asked for
again and an order that is given again are kept once, as they are last. What is left grows with what really happened,
and not with how often it was asked after.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from seamark.protocol.messages import (
    Acknowledged,
    DrainNode,
    JobStatus,
    PrepareJob,
    Roster,
    ShardAnswer,
    SnapshotRequest,
    StoreLost,
    Welcome,
)
from seamarkd.coordinator.effects import Effect, Forget, Persist, Tell, ToLighthouse
from seamarkd.coordinator.shards import Record
from seamarkd.effects import Send

MAX_ANSWERS = 10_000
"""To askers who ask again; the oldest are given up first."""
LATEST = (DrainNode, JobStatus, PrepareJob, Roster, ShardAnswer, SnapshotRequest, StoreLost, Welcome)
"""Of these a later one to the same peer, about the same job, says all that an earlier one did."""
ASKED_AGAIN = (Acknowledged, JobStatus, ShardAnswer)

Change: TypeAlias = Persist | Forget | Record
Kept: TypeAlias = Send | ToLighthouse | Tell


def coalesced(changes: Iterable[Change]) -> tuple[list[Persist | Forget], list[Record]]:
    """The changes with the latest of each job and of each shard: as durable, and bounded while the disk is full."""
    jobs: dict[str, Persist | Forget] = {}
    records: dict[str, Record] = {}
    for change in changes:
        if isinstance(change, Record):
            before = records.get(change.job)
            records[change.job] = change if before is None else before.followed_by(change)
            continue
        name = change.job if isinstance(change, Forget) else change.record.spec.name
        earlier = jobs.pop(name, None)
        if isinstance(change, Forget) or change.fresh:
            # What was to be written of an earlier job of this name.
            records.pop(name, None)
        elif isinstance(earlier, Persist):
            incidents = {one.number: one for one in (*earlier.incidents, *change.incidents)}
            change = Persist(change.record, tuple(incidents.values()), earlier.fresh)
        jobs[name] = change
    return list(jobs.values()), list(records.values())


def compacted(effects: Iterable[Effect]) -> list[Effect]:
    """The same effects for a disk that still has to take the changes: these first, in one transaction."""
    changes: list[Change] = []
    kept: dict[object, Kept] = {}
    for effect in effects:
        if isinstance(effect, Change):
            changes.append(effect)
            continue
        key = _key(effect)
        kept.pop(key, None)
        kept[key] = effect
    batch, records = coalesced(changes)
    return [*batch, *records, *_bounded(list(kept.values()))]


def _key(effect: Kept) -> object:
    if isinstance(effect, Tell):
        return effect.job
    message = effect.message
    request = -1 if isinstance(message, LATEST) else getattr(message, "request", -1)
    about = (getattr(message, "job", ""), getattr(message, "consumer", ""), getattr(message, "node", ""))
    return (effect.to if isinstance(effect, Send) else None, type(message), *about, request)


def _bounded(kept: list[Kept]) -> list[Kept]:
    answers = [one for one in kept if isinstance(one, Send) and isinstance(one.message, ASKED_AGAIN)]
    given_up = {id(one) for one in answers[:-MAX_ANSWERS]}
    return [one for one in kept if id(one) not in given_up]
