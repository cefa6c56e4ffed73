"""Replica groups under faults: whatever dies, leaves, is cut off or comes back, who lives trains on in one quorum.

Each seed is a schedule of its own. A failing seed is run again, with its story, by ``SEAMARK_SEED=<seed>``.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from msgspec.structs import replace
from replica_world import HEARTBEAT_TIMEOUT, Replicas

from seamark.protocol.messages import ReplicaBeat, Snapshot
from seamarkd.effects import Effect
from seamarkd.lighthouse.core import Lighthouse
from seamarkd.lighthouse.events import EventLog
from seamarkd.lighthouse.quorum import next_quorum_id
from seamarkd.lighthouse.replicas import ReplicaGroup

SEEDS = int(os.environ.get("SEAMARK_SEEDS", "300"))
FIRST = int(os.environ.get("SEAMARK_SEED", "0"))
SLACK = 5.0


def schedules() -> range:
    return range(FIRST, FIRST + (1 if "SEAMARK_SEED" in os.environ else SEEDS))


def told(world: Replicas, seed: int, what: str) -> str:
    return f"seed {seed}: {what}\n" + "\n".join(world.story[-300:])


def hurt(world: Replicas) -> None:
    """One fault, now."""
    chance = world.chance
    living = world.living()
    if not living:
        return
    process = chance.choice(living)
    faults = ["die", "die", "die", "leave", "freeze", "partition", "cut", "inject"]
    match chance.choice(faults + ["lighthouse"] * 4 if world.lighthouse_dies else faults):
        case "die":
            process.die(
                chance.choice(["canary", "canary", "refused", "dying"] + ["silent"] * (not world.lighthouse_dies))
            )
            if chance.random() < 0.7:
                again = chance.choice([0.001, 0.05, 0.5, 2.5]) * chance.uniform(0.5, 1.5)
                world.at(again, lambda: world.restart(process))
        case "leave":
            process.leave()
            if chance.random() < 0.5:
                world.at(chance.choice([1.1, 3.0]), lambda: world.restart(process))
        case "freeze":
            process.freeze(chance.choice([0.3, HEARTBEAT_TIMEOUT]) + chance.uniform(0.0, 2.0))
        case "partition":
            process.wire.partition(chance.choice([0.3, 1.0, HEARTBEAT_TIMEOUT]) + chance.uniform(0.0, 2.0))
        case "cut":
            process.wire.cut()
        case "lighthouse":
            world.lighthouse.kill(chance.choice([0.1, 1.0, 3.0]) * chance.uniform(0.5, 1.5))
        case "inject":
            world.inject(process)


def check(world: Replicas, seed: int) -> None:
    chance = world.chance
    world.run(chance.uniform(0.3, 2.0))
    at = 0.0
    for _ in range(chance.randint(1, 5)):
        world.at(at, lambda: hurt(world))
        at += chance.choice([0.0, chance.uniform(0.0, 0.03), chance.uniform(0.0, 0.5), chance.uniform(0.0, 3.0)])
    # The longest consequence of a fault: a restart, or the end of silence.
    world.run(at + 4.5)
    world.calm = True
    if len(world.living()) < world.min_members:
        return
    whole = world.run(world.join_timeout + HEARTBEAT_TIMEOUT + SLACK, until=world.together)
    assert not world.violations, told(world, seed, str(world.violations))
    where = [
        (process.incarnation, rank.index, rank.phase, rank.step, rank.quorum and rank.quorum.quorum_id & 0xFFFF)
        for process in world.living()
        for rank in process.ranks
    ]
    assert whole, told(world, seed, f"not all are in one quorum: {where}")
    before = world.commits.copy()
    world.run(5.0)
    assert not world.violations, told(world, seed, str(world.violations))
    for subscriber in world.subscribers:
        caught_up = world.run(SLACK, until=lambda one=subscriber: one.ready)
        assert caught_up, told(world, seed, "a subscriber does not find out where it stands")
        untold = [] if subscriber.missed else subscriber.untold
        assert not untold, told(world, seed, f"a subscriber was never told of {untold}")
    still = {one.incarnation for one in world.living()}
    assert still <= (world.commits - before).keys(), told(world, seed, f"some commit nothing any more: {where}")


def test_whatever_happens_who_lives_trains_on_in_one_quorum() -> None:
    for seed in schedules():
        check(Replicas(seed), seed)


def test_the_model_finds_a_caller_that_gave_up_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lighthouse that takes no notice of a withdrawal, as torchft's."""
    monkeypatch.setattr(Lighthouse, "_replica_withdraw", lambda *_: [])
    monkeypatch.setattr(ReplicaGroup, "beat", without_cleaning(ReplicaGroup.beat))
    with pytest.raises(AssertionError, match="withdrawn"):
        test_whatever_happens_who_lives_trains_on_in_one_quorum()


def test_the_model_finds_a_quorum_id_for_two_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that knows members by name alone, so that a process started anew is not noticed."""
    monkeypatch.setattr(
        "seamarkd.lighthouse.replicas.next_quorum_id",
        lambda previous, members, _, floor: next_quorum_id(previous, members, 0, floor=floor),
    )
    with pytest.raises(AssertionError, match=r"is \[|a second time"):
        test_whatever_happens_who_lives_trains_on_in_one_quorum()


def test_the_model_finds_a_loss_that_is_told_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener that knows no identity, as one that trusts the numbers of each lighthouse."""
    monkeypatch.setattr("seamark.listening.SEEN_KEPT", 0)
    with pytest.raises(AssertionError, match="is told 2 times"):
        test_whatever_happens_who_lives_trains_on_in_one_quorum()


def test_the_model_finds_a_loss_that_is_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lighthouse that keeps no failures for who missed one."""
    monkeypatch.setattr("seamarkd.lighthouse.events.EventLog.snapshot", without_failures(EventLog.snapshot))
    with pytest.raises(AssertionError, match="never told of"):
        test_whatever_happens_who_lives_trains_on_in_one_quorum()


def test_the_model_finds_stranded_waiters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Participants that are cleared and not told, and repeat nothing, as torchft's."""
    monkeypatch.setattr(ReplicaGroup, "_reset", lambda group, _: group._joins.clear() or [])
    monkeypatch.setattr("seamark.replicas.core.RESEND_INTERVAL", 1e9)
    with pytest.raises(AssertionError, match="not all are in one quorum"):
        test_whatever_happens_who_lives_trains_on_in_one_quorum()


def without_failures(snapshot: Any) -> Any:
    def empty(log: EventLog, *arguments: Any, **more: Any) -> Snapshot:
        made: Snapshot = snapshot(log, *arguments, **more)
        groups = [replace(group, failures=[]) for group in made.groups]
        return replace(made, failures=[], groups=groups)

    return empty


def without_cleaning(beat: Any) -> Any:
    def as_it_was(group: ReplicaGroup, now: float, route: bytes, message: ReplicaBeat) -> list[Effect]:
        waiting = group._joins.get(message.replica_id)
        effects: list[Effect] = beat(group, now, route, message)
        if waiting is not None and message.replica_id not in group._joins:
            group._joins[message.replica_id] = waiting
        return effects

    return as_it_was
