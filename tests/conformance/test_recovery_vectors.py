"""The reference's recovery plans, as data, through the pure functions."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamark.protocol.messages import Replica
from seamark.replicas import plan as module
from seamark.replicas.plan import Mode, Plan, compute_plan, participation

VECTORS = json.loads((Path(__file__).parent / "recovery_vectors.json").read_text())


def replica(name: str, step: int = 0, commit_failures: int = 0) -> Replica:
    return Replica(name, "i", f"{name}:1", f"{name}:2", step=step, world_size=1, commit_failures=commit_failures)


@pytest.mark.parametrize("vector", VECTORS["recovery_plan"], ids=lambda vector: vector["name"])
def test_plan(vector: dict[str, Any]) -> None:
    plan = compute_plan(
        vector["quorum"]["quorum_id"],
        [Replica(incarnation="i", **participant) for participant in vector["quorum"]["participants"]],
        replica_id=vector["replica_id"],
        group_rank=vector["group_rank"],
        init_sync=vector["init_sync"],
    )
    assert msgspec.to_builtins(plan) == vector["expect"]
    assert vector["asserted_upstream"].items() <= vector["expect"].items()


def test_the_documented_example_runs() -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@given(
    steps=st.lists(st.integers(0, 2), min_size=1, max_size=7),
    group_rank=st.integers(0, 9),
    init_sync=st.booleans(),
    data=st.data(),
)
def test_the_plans_of_a_quorum_agree(steps: list[int], group_rank: int, init_sync: bool, data: st.DataObject) -> None:
    quorum = [replica(f"r{index}", step) for index, step in enumerate(steps)]
    shuffled = data.draw(st.permutations(quorum))
    plans = [
        compute_plan(5, shuffled, replica_id=one.replica_id, group_rank=group_rank, init_sync=init_sync)
        for one in quorum
    ]
    assert [plan.replica_rank for plan in plans] == list(range(len(quorum)))
    assert len({(plan.store_address, plan.max_step, plan.max_world_size) for plan in plans}) == 1
    healing = {(plan.recover_src_replica_rank, plan.replica_rank) for plan in plans if plan.heal}
    assert healing == {(plan.replica_rank, to) for plan in plans for to in plan.recover_dst_replica_ranks}
    for source, _ in healing:
        assert source is not None
        assert steps[source] == max(steps)
        assert not plans[source].heal
    assert all(plan.heal for plan, step in zip(plans, steps, strict=True) if step != max(steps))
    assert sorted(p.max_replica_rank for p in plans if p.max_replica_rank is not None) == list(
        range(plans[0].max_world_size)
    )


def test_transfers_spread_over_the_living_and_over_the_group_ranks() -> None:
    quorum = [replica("a", 3), replica("b", 3), replica("c"), replica("d")]

    def sources(group_rank: int) -> list[int | None]:
        return [
            compute_plan(1, quorum, replica_id=name, group_rank=group_rank, init_sync=True).recover_src_replica_rank
            for name in "cd"
        ]

    assert sources(0) == [0, 1]
    assert sources(1) == [1, 0]


@pytest.mark.parametrize("quorum", [[], [replica("a"), replica("b")]])
def test_who_is_not_in_the_quorum_has_no_plan(quorum: list[Replica]) -> None:
    with pytest.raises(ValueError, match="replica c is not in quorum 9 of (nobody|a, b): it has to join"):
        compute_plan(9, quorum, replica_id="c", group_rank=0, init_sync=True)


def plan_of(name: str) -> Plan:
    """Of one among a, b, c, d; b is behind."""
    quorum = [replica("a", 4), replica("b", 3), replica("c", 4), replica("d", 4)]
    return compute_plan(1, quorum, replica_id=name, group_rank=0, init_sync=True)


@pytest.mark.parametrize(
    ("name", "use_async_quorum", "mode", "min_replica_size", "expected"),
    [
        ("a", True, "DYNAMIC", 2, (0, 3)),
        ("b", True, "DYNAMIC", 2, (None, 3)),
        ("c", True, "DYNAMIC", 2, (1, 3)),
        ("d", True, "DYNAMIC", 2, (2, 3)),
        ("a", False, "DYNAMIC", 2, (0, 4)),
        ("b", False, "DYNAMIC", 2, (1, 4)),
        ("d", False, "DYNAMIC", 2, (3, 4)),
        ("a", True, "FIXED_WITH_SPARES", 2, (0, 2)),
        ("b", True, "FIXED_WITH_SPARES", 2, (None, 2)),
        ("c", True, "FIXED_WITH_SPARES", 2, (1, 2)),
        ("d", True, "FIXED_WITH_SPARES", 2, (None, 2)),
        ("b", False, "FIXED_WITH_SPARES", 2, (1, 2)),
        ("c", False, "FIXED_WITH_SPARES", 2, (None, 2)),
        ("d", True, "FIXED_WITH_SPARES", 3, (2, 3)),
        ("d", True, "FIXED_WITH_SPARES", 9, (2, 3)),
        ("d", False, "FIXED_WITH_SPARES", 9, (3, 4)),
    ],
)
def test_participation(
    name: str, use_async_quorum: bool, mode: Mode, min_replica_size: int, expected: tuple[int | None, int]
) -> None:
    plan = plan_of(name)
    assert (
        participation(plan, use_async_quorum=use_async_quorum, mode=mode, min_replica_size=min_replica_size) == expected
    )


def test_the_plan_needs_neither_torch_nor_zmq() -> None:
    program = "import sys, seamark.replicas.plan; sys.exit(len({'torch', 'zmq', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
