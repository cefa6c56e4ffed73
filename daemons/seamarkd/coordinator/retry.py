"""What becomes of a shard after a failure: tried again, on without a batch, or given up (docs/retries.md).

Pure: a failure and the shard's account in, an action and the new account out. A delay is a deadline for the caller's
heap; nobody sleeps here. Each kind has an account of its own, so that fifty preemptions cost a transient failure
nothing:

===========================  =========================  ===================  =======================  ===========
kind                         budget                     delay                effect                   resets
===========================  =========================  ===================  =======================  ===========
spot_preemption              none                       none                 none                     nothing
hardware, a lost node        none: charged to the node  none                 not on that node again   nothing
poison_input                 attempts of that batch     ``poison_delay``     the batch is quarantined never
oom                          ``oom_retries``            back-off             half the batch size      checkpoint
transient, timeout, unknown  ``<kind>_retries``         back-off             none                     checkpoint
any of the last three rows   ``no_progress_cycles``                          the shard is given up    checkpoint
===========================  =========================  ===================  =======================  ===========
"""

from __future__ import annotations

import random
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from seamark.runtime_config import RuntimeConfig
from seamarkd.coordinator.classification import Verdict

MAX_TRIED = 1_000
"""Batches of one shard that may have failed; a shard of which more fail has another fault than bad data."""
MAX_DOUBLINGS = 6
"""2 to this power is above every ``max_delay``."""

Charged = Literal["oom", "transient", "timeout", "unknown"]


class Failure(Struct, frozen=True, kw_only=True):
    """One attempt at a shard that failed."""

    verdict: Verdict
    shard: str
    worker: str
    node: str
    batch: int | None = None
    """The batch that was run; None if nobody knows."""
    progressed: bool = False
    """A durable checkpoint was made since this shard's last failure, or since its first start."""


class Tried(Struct, frozen=True):
    """The runs of one batch that ended in poison_input. ``batch`` None stands for the shard as a whole."""

    batch: int | None
    workers: tuple[str, ...]
    """Who ran it, a name for each run."""
    quarantined: bool = False


class Budgets(Struct, frozen=True, kw_only=True):
    """The account of one shard: what was spent since the last checkpoint, by kind."""

    oom: int = 0
    transient: int = 0
    timeout: int = 0
    unknown: int = 0
    fruitless: int = 0
    """Retries in a row that were granted since the last checkpoint, of whatever kinds."""
    tried: tuple[Tried, ...] = ()
    """A checkpoint does not change what is known of a batch."""
    batch_size_scale: float = 1.0
    """What part of the batch size the shard is run with; never raised again, for the memory is no larger."""


class Retry(Struct, frozen=True):
    """The shard is leased again, not before ``at``; from now on not on ``exclude_node``, where one is named.

    The node's exclusion is the caller's to remember: it is no part of the shard's account.
    """

    at: float
    batch_size_scale: float
    exclude_node: str
    reason: str


class Quarantine(Struct, frozen=True):
    """The shard goes on at once without this batch; without a number, the whole shard is put aside."""

    batch: int | None
    reason: str


class GiveUp(Struct, frozen=True):
    """The shard has failed."""

    reason: str


Action = Retry | Quarantine | GiveUp


class Decision(Struct, frozen=True):
    """What to do, and the account afterwards; both have to be durable together."""

    action: Action
    budgets: Budgets


def decide(failure: Failure, budgets: Budgets, config: RuntimeConfig, rng: random.Random, now: float) -> Decision:
    """What becomes of the shard.

    Args:
        failure: what happened, with its verdict.
        budgets: the shard's account before.
        config: the job's limits.
        rng: jitter is drawn from it.
        now: seconds on the clock on which the deadline is to be.

    Returns:
        The action, with a sentence for people, and the account after it.
    """
    if failure.progressed:
        budgets = Budgets(tried=budgets.tried, batch_size_scale=budgets.batch_size_scale)
    match failure.verdict.kind:
        case "spot_preemption":
            reason = "spot_preemption: retried at once, charged to nobody"
            return Decision(Retry(now, budgets.batch_size_scale, "", _because(reason, failure)), budgets)
        case "hardware":
            reason = f"hardware: retried at once, not on node {failure.node}, which it is charged to"
            return Decision(Retry(now, budgets.batch_size_scale, failure.node, _because(reason, failure)), budgets)
        case "poison_input":
            return _poisoned(failure, budgets, config, now)
        case "oom" | "transient" | "timeout" | "unknown" as kind:
            return _charged(kind, failure, budgets, config, rng, now)


def _charged(
    kind: Charged, failure: Failure, budgets: Budgets, config: RuntimeConfig, rng: random.Random, now: float
) -> Decision:
    limit: int = getattr(config, f"{kind}_retries")
    spent: int = getattr(budgets, kind)
    if spent >= limit:
        return _give_up(f"{kind} once more after {limit} of {limit} retries ({kind}_retries)", failure, budgets)
    if budgets.fruitless >= config.no_progress_cycles:
        return _no_progress(failure, budgets, config)
    number = spent + 1
    budgets = replace(budgets, fruitless=budgets.fruitless + 1, **{kind: number})
    change = ""
    if kind == "oom":
        scale = min(budgets.batch_size_scale, max(config.min_batch_size_scale, budgets.batch_size_scale / 2))
        change = f" with {scale:.3g} of the batch size"
        budgets = replace(budgets, batch_size_scale=scale)
    # Full jitter: shards that failed together don't come back together.
    delay = rng.uniform(0.0, min(2.0 ** min(number, MAX_DOUBLINGS), config.max_delay))
    reason = f"{kind} {number} of {limit}, retried in {delay:.1f} s{change}"
    return Decision(Retry(now + delay, budgets.batch_size_scale, "", _because(reason, failure)), budgets)


def _poisoned(failure: Failure, budgets: Budgets, config: RuntimeConfig, now: float) -> Decision:
    name = f"shard {failure.shard}" if failure.batch is None else f"batch {failure.batch} of shard {failure.shard}"
    before = next((one for one in budgets.tried if one.batch == failure.batch), Tried(failure.batch, ()))
    if before.quarantined:
        return _give_up(f"poison_input: {name} is quarantined, and was run nevertheless", failure, budgets)
    others = tuple(one for one in budgets.tried if one.batch != failure.batch)
    if len(others) >= MAX_TRIED:
        return _give_up(f"poison_input: more than {MAX_TRIED} batches of this shard failed", failure, budgets)
    workers = (*before.workers, failure.worker)
    bad = len(workers) >= config.poison_attempts
    tried = (*others, Tried(failure.batch, workers, bad))
    reason = f"poison_input: attempt {len(workers)} of {config.poison_attempts} at {name}"
    if bad:
        on = " and ".join(dict.fromkeys(workers))
        action = Quarantine(failure.batch, _because(f"{reason}, quarantined after it failed on {on}", failure))
        return Decision(action, replace(budgets, tried=tried))
    if budgets.fruitless >= config.no_progress_cycles:
        return _no_progress(failure, budgets, config)
    budgets = replace(budgets, tried=tried, fruitless=budgets.fruitless + 1)
    delay = min(config.poison_delay, config.max_delay)
    reason = _because(f"{reason}, retried in {delay:.1f} s", failure)
    return Decision(Retry(now + delay, budgets.batch_size_scale, "", reason), budgets)


def _no_progress(failure: Failure, budgets: Budgets, config: RuntimeConfig) -> Decision:
    cycles = f"{config.no_progress_cycles} retries in a row made no new checkpoint (no_progress_cycles)"
    return _give_up(f"{failure.verdict.kind} again after {cycles}", failure, budgets)


def _give_up(reason: str, failure: Failure, budgets: Budgets) -> Decision:
    return Decision(GiveUp(_because(f"shard {failure.shard} given up: {reason}", failure)), budgets)


def _because(reason: str, failure: Failure) -> str:
    return f"{reason}; {failure.verdict.evidence}"
