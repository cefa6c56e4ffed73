"""The failure tick of the reference's fork, as data, through the pure function."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from seamarkd.lighthouse.failures import failure_tick

VECTOR = json.loads((Path(__file__).parent / "quorum_vectors.json").read_text())["failure_tick"]
NOW = 1_000.0


def test_one_notification_and_the_state_after_it() -> None:
    options, before = VECTOR["options"], VECTOR["state_before"]
    heartbeats = {member: NOW - age / 1e3 for member, age in before["heartbeat_age_ms"].items()}
    participants, failures = set(before["participants"]), set(before["failures"])
    for number, expect in enumerate(VECTOR["ticks"]):
        tick = failure_tick(
            now=NOW + number * options["failure_tick_ms"] / 1e3,
            heartbeats=heartbeats,
            participants=participants,
            failures=failures,
            heartbeat_timeout=options["heartbeat_timeout_ms"] / 1e3,
        )
        assert tick.notifications == expect["notifications"]
        assert sorted(tick.heartbeats) == expect["state"]["heartbeats"]
        assert sorted(tick.participants) == expect["state"]["participants"]
        assert sorted(tick.failures) == expect["state"]["failures"]
        heartbeats, participants, failures = tick.heartbeats, tick.participants, tick.failures


def test_a_notification_clears_all_participants_and_a_beat_recovers() -> None:
    tick = failure_tick(
        now=NOW,
        heartbeats={"gone": NOW - 6.0, "here": NOW, "back": NOW},
        participants={"here", "gone"},
        failures={"back"},
        heartbeat_timeout=5.0,
    )
    assert (tick.notifications, tick.recovered) == (["gone"], ["back"])
    assert (tick.participants, tick.failures) == (set(), {"gone"})


def test_at_exactly_the_timeout_nobody_has_failed() -> None:
    tick = failure_tick(now=NOW, heartbeats={"a": NOW - 5.0}, participants={"a"}, failures=set(), heartbeat_timeout=5.0)
    assert (tick.notifications, tick.participants) == ([], {"a"})


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0.0, 20.0)), st.sets(st.sampled_from("abcdef")))
def test_each_failure_is_notified_once(ages: dict[str, float], failed: set[str]) -> None:
    heartbeats = {member: NOW - age for member, age in ages.items()}
    first = failure_tick(now=NOW, heartbeats=heartbeats, participants=set(ages), failures=failed, heartbeat_timeout=5.0)
    again = failure_tick(
        now=NOW,
        heartbeats=first.heartbeats,
        participants=first.participants,
        failures=first.failures,
        heartbeat_timeout=5.0,
    )
    assert again.notifications == again.recovered == []
    assert not first.heartbeats.keys() & set(first.notifications)
