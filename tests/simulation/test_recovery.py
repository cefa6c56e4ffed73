"""Whatever is killed, and whenever: every rank ends up in one new iteration, or the job completes.

Each seed is a schedule of its own: ranks die or fail, and beside that any of the daemons, at random moments around it,
also between two effects of one message. A failing seed is run again, with its story, by ``SEAMARK_SEED=<seed>``.
"""

from __future__ import annotations

import os
import random

import pytest
from cluster import JOB, Cluster

from seamark.protocol.messages import Complete, Join
from seamarkd.effects import Effect
from seamarkd.lighthouse.group import Group

SEEDS = int(os.environ.get("SEAMARK_SEEDS", "100"))
"""Of each kind. The proof is 10,000: ``SEAMARK_SEEDS=10000 scripts/test.sh --timeout 3600 tests/simulation``."""
FIRST = int(os.environ.get("SEAMARK_SEED", "0"))
WORLD = 4


def started(seed: int) -> Cluster:
    cluster = Cluster(seed)
    cluster.run(1.0)
    cluster.submit()
    cluster.run(4.0)
    assert {worker.iteration for worker in cluster.workers()} == {0}
    return cluster


def some_time(chance: random.Random) -> float:
    """After a moment of interest, in seconds; negative before it."""
    return chance.choice(
        [
            0.0,
            chance.uniform(-0.003, 0.006),
            chance.uniform(-0.05, 0.05),
            chance.uniform(-0.5, 1.5),
            chance.uniform(-2.5, 0.5),
        ]
    )


def disturb(cluster: Cluster, at: float) -> None:
    """Around this time from now, each daemon may die: at once, or between two of its effects."""
    chance = cluster.chance
    for daemon in cluster.daemons():
        if chance.random() < 0.4:
            when = max(0.0, at + some_time(chance))
            if chance.random() < 0.5:
                cluster.at(when, daemon.kill)
            else:
                cluster.at(when, lambda one=daemon: setattr(one, "mortality", 0.1))


def hurt(cluster: Cluster, at: float) -> None:
    """At this time from now, one or two ranks die, or one fails."""
    chance = cluster.chance

    def strike(rank: int, fails: bool) -> None:
        worker = cluster.rank(rank)
        if worker is not None and fails:
            worker.fail()
        elif worker is not None:
            worker.end(-9)

    fails = chance.random() < 0.2
    first, second = chance.randrange(WORLD), chance.randrange(WORLD)
    cluster.at(at, lambda: strike(first, fails))
    if chance.random() < 0.2:
        later = at + chance.choice([0.0, chance.uniform(0.0, 0.01), chance.uniform(0.0, 0.6)])
        cluster.at(later, lambda: strike(second, fails=False))


def settle(cluster: Cluster, seconds: float) -> None:
    cluster.run(seconds)
    for daemon in cluster.daemons():
        daemon.mortality = 0.0
    cluster.run(seconds)


def told(cluster: Cluster, seed: int, what: str) -> str:
    return f"seed {seed}: {what}\n" + "\n".join(cluster.story[-200:])


def schedules() -> range:
    return range(FIRST, FIRST + (1 if "SEAMARK_SEED" in os.environ else SEEDS))


def test_ranks_and_daemons_are_killed_and_all_go_on_together() -> None:
    for seed in schedules():
        cluster = started(seed)
        times = [0.1]
        for _ in range(cluster.chance.randrange(3)):
            times.append(times[-1] + cluster.chance.choice([0.01, 0.1, 0.5, 2.0, 4.0]))
        for at in times:
            hurt(cluster, at)
            disturb(cluster, at)
        settle(cluster, 15.0)
        living = [worker for worker in cluster.workers() if worker.alive]
        where = sorted((worker.member, worker.iteration, worker.inside) for worker in living)
        assert not cluster.violations, told(cluster, seed, str(cluster.violations))
        assert len(living) == WORLD, told(cluster, seed, str(where))
        assert len({worker.iteration for worker in living}) == 1, told(cluster, seed, str(where))
        assert all(worker.inside for worker in living), told(cluster, seed, str(where))
        lost = [event.failure.incarnation for event in cluster.published if event.failure.kind == "lost"]
        ended = {worker.incarnation for worker in cluster.workers() if not worker.alive}
        assert set(lost) <= ended, told(cluster, seed, f"living processes were called lost: {set(lost) - ended}")
        counted = cluster.coordinator.records[JOB].process_restarts
        assert counted == len(ended), told(cluster, seed, f"{counted} restarts of processes are counted for {ended}")


def test_hosts_are_lost_and_come_back_and_the_world_is_whole_again() -> None:
    """Three hosts, a job on two: one after the other is cut off, loses its power, or is drained, for a while."""
    for seed in schedules():
        cluster = Cluster(seed, hosts=3)
        cluster.run(1.0)
        cluster.submit(min_nodes=1)
        cluster.run(4.0)
        chance = cluster.chance
        at = 0.1
        for name in chance.sample(sorted(cluster.hosts), chance.randint(1, 3)):
            host = cluster.hosts[name]
            back = at + chance.choice([0.7, 1.5, 4.0, 12.0]) + chance.random()
            begin, end = chance.choice([(host.cut, host.mend), (host.crash, host.boot), (host.drain, host.serve)])
            cluster.at(at, begin)
            cluster.at(back, end)
            if chance.random() < 0.5:
                disturb(cluster, at)
            at = back + chance.choice([0.3, 2.0, 8.0])
        settle(cluster, at + 25.0)
        living = [worker for worker in cluster.workers() if worker.alive]
        where = sorted((worker.member, worker.host.name, worker.iteration, worker.inside) for worker in living)
        assert not cluster.violations, told(cluster, seed, str(cluster.violations))
        assert sorted({worker.member for worker in living}) == sorted(worker.member for worker in living), told(
            cluster, seed, f"a rank runs twice: {where}"
        )
        assert len(living) == WORLD, told(cluster, seed, str(where))
        assert len({worker.iteration for worker in living}) == 1, told(cluster, seed, str(where))
        assert all(worker.inside for worker in living), told(cluster, seed, str(where))


def test_a_job_completes_whatever_is_killed_while_it_does() -> None:
    for seed in schedules():
        cluster = started(seed)
        chance = cluster.chance

        def complete(cluster: Cluster = cluster) -> None:
            cluster.completing = True
            for worker in cluster.workers():
                cluster.at(cluster.chance.uniform(0.0, 0.05), worker.complete)

        cluster.at(3.0, complete)
        disturb(cluster, 3.0)
        if chance.random() < 0.5:
            hurt(cluster, 3.0 + chance.uniform(-0.05, 0.05))
        settle(cluster, 20.0)
        assert not cluster.violations, told(cluster, seed, str(cluster.violations))
        record = cluster.coordinator.records[JOB]
        assert record.state == "SUCCEEDED", told(cluster, seed, f"{record.state} {record.result}")


def test_the_model_finds_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lighthouse that takes every incarnation it does not expect for a stale one, as it once did."""
    refusal = Group._refusal

    def as_it_was(group: Group, route: bytes, request: Join | Complete) -> list[Effect] | None:
        state = group.membership.members.get(request.member)
        if state is not None and state.incarnation not in ("", request.incarnation):
            group.membership.dead.add(request.incarnation)
        return refusal(group, route, request)

    monkeypatch.setattr(Group, "_refusal", as_it_was)
    monkeypatch.setattr("test_recovery.schedules", lambda: range(1_000))
    with pytest.raises(AssertionError, match="was refused"):
        test_ranks_and_daemons_are_killed_and_all_go_on_together()
