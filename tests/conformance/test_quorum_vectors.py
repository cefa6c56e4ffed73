"""The reference's quorum decisions, as data, through the pure functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seamarkd.lighthouse.quorum import (
    Participant,
    PreviousQuorum,
    QuorumOptions,
    compute_quorum,
    next_quorum_id,
)

VECTORS = json.loads((Path(__file__).parent / "quorum_vectors.json").read_text())
NOW = 1_000_000.0


@pytest.mark.parametrize("vector", VECTORS["quorum_compute"], ids=lambda vector: vector["name"])
def test_decision(vector: dict[str, Any]) -> None:
    options, previous = vector["options"], vector["prev_quorum"]
    decision = compute_quorum(
        now=NOW,
        participants={
            p["replica_id"]: Participant(
                p["replica_id"], NOW - p["joined_age_ms"] / 1e3, p["shrink_only"], p["commit_failures"]
            )
            for p in vector["participants"]
        },
        heartbeats={member: NOW - age / 1e3 for member, age in vector["heartbeat_age_ms"].items()},
        previous=previous
        and PreviousQuorum(previous["quorum_id"], frozenset(p["replica_id"] for p in previous["participants"])),
        options=QuorumOptions(
            options["min_replicas"], options["join_timeout_ms"] / 1e3, options["heartbeat_timeout_ms"] / 1e3
        ),
    )
    expect = vector["expect"]
    assert decision.members == expect["members"]
    assert decision.kind == expect["kind"]
    assert decision.joined == expect["healthy_participants"]
    assert decision.participants == expect["participants"]
    assert decision.healthy == expect["heartbeating"]
    assert decision.shrink_only == expect["shrink_only"]
    assert vector["asserted_upstream"].get("reason_contains", "") in decision.reason


@pytest.mark.parametrize("vector", VECTORS["quorum_id_rule"], ids=lambda vector: vector["name"])
def test_quorum_id(vector: dict[str, Any]) -> None:
    previous = None if vector["prev"] is None else PreviousQuorum(vector["prev_id"], frozenset(vector["prev"]))
    assert next_quorum_id(previous, vector["members"], max(vector["commit_failures"])) == vector["expect_id"]


def test_an_expected_member_is_waited_for_until_its_deadline() -> None:
    def decide(now: float) -> list[str] | None:
        return compute_quorum(
            now=now,
            participants={"a": Participant("a", 0.0), "b": Participant("b", 0.0)},
            heartbeats={"a": now, "b": now},
            previous=None,
            options=QuorumOptions(min_members=1, join_timeout=0.0),
            expected={"c": 30.0},
        ).members

    assert decide(29.9) is None
    assert decide(30.0) == ["a", "b"]


def test_an_expected_member_counts_for_the_majority() -> None:
    decision = compute_quorum(
        now=1.0,
        participants={"a": Participant("a", 0.0)},
        heartbeats={"a": 1.0},
        previous=None,
        options=QuorumOptions(min_members=1),
        expected={"b": 9.0},
    )
    assert decision.kind == "not_majority_of_healthy"
