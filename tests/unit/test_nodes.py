"""Silence is not absence: what a missed beat means."""

from __future__ import annotations

import pytest

from seamark.protocol.messages import NodeHello
from seamarkd.effects import Effect, Probe, Wake
from seamarkd.lighthouse.nodes import AGENT_GRACE, BEAT_INTERVAL, RETURN_GRACE, NodeWatch


def watch(*nodes: str, at: float = 0.0) -> NodeWatch:
    watched = NodeWatch()
    for node in nodes:
        watched.hello(at, b"r-" + node.encode(), NodeHello(node, "i", f"tcp://{node}:1", 8))
    return watched


def beat_all_but(watched: NodeWatch, silent: str, now: float) -> None:
    for node in watched.nodes:
        if node != silent:
            assert watched.beat(now, node, "i", b"r-" + node.encode())


FOUR = ("a", "b", "c", "d")


def probes(effects: list[Effect]) -> list[Effect]:
    return [effect for effect in effects if isinstance(effect, Probe)]


def test_three_missed_beats_are_probed_once_and_five_are_a_lost_host() -> None:
    watched = watch(*FOUR)
    beat_all_but(watched, "a", 0.35)
    effects, lost = watched.tick(0.31)
    assert (probes(effects), lost) == ([Probe("a", "tcp://a:1")], [])
    (wake,) = (effect for effect in effects if isinstance(effect, Wake))
    assert 0.31 + wake.after == pytest.approx(5 * BEAT_INTERVAL, abs=0.002), "looked at again at the very deadline"
    assert watched.tick(0.4) == ([], [])
    watched.probed("a", "i", "silent")
    beat_all_but(watched, "a", 0.5)
    assert watched.tick(5 * BEAT_INTERVAL + 0.01) == ([], ["a"])
    assert "a" not in watched.nodes


def test_a_refused_probe_means_that_only_the_agent_is_down() -> None:
    watched = watch(*FOUR)
    watched.tick(0.31)
    watched.probed("a", "i", "refused")
    for step in range(1, int(AGENT_GRACE / BEAT_INTERVAL)):
        beat_all_but(watched, "a", step * BEAT_INTERVAL)
        assert watched.tick(step * BEAT_INTERVAL)[1] == []
    beat_all_but(watched, "a", AGENT_GRACE + 0.1)
    assert watched.tick(AGENT_GRACE + 0.1)[1] == ["a"]


def test_beats_that_are_asked_for_less_often_are_waited_for_longer() -> None:
    watched = NodeWatch(beat_interval=1.0)
    for node in FOUR:
        watched.hello(0.0, b"r-" + node.encode(), NodeHello(node, "i", f"tcp://{node}:1", 8))
    beat_all_but(watched, "a", 2.9)
    assert watched.tick(2.9) == ([], [])
    assert probes(watched.tick(3.1)[0]) == [Probe("a", "tcp://a:1")]
    beat_all_but(watched, "a", 4.9)
    assert watched.tick(4.9)[1] == []
    assert watched.tick(5.1)[1] == ["a"]


def test_a_beat_clears_the_suspicion() -> None:
    watched = watch(*FOUR)
    watched.tick(0.31)
    watched.beat(0.4, "a", "i", b"r-a")
    beat_all_but(watched, "a", 0.7)
    watched.beat(0.7, "a", "i", b"r-a")
    assert watched.tick(0.8) == ([], [])


def test_when_many_are_silent_at_once_nobody_is_lost_and_it_is_said() -> None:
    watched = watch(*FOUR)
    assert len(probes(watched.tick(0.31)[0])) == len(FOUR)
    assert watched.tick(60.0)[1] == []
    assert "4 of 4 nodes" in watched.sentence


def test_after_they_were_all_silent_nodes_have_time_to_come_back_one_by_one() -> None:
    watched = watch("a", "b")
    watched.tick(0.31)
    assert watched.tick(3.0)[1] == []
    beat_all_but(watched, "a", 3.05)
    assert watched.tick(3.1)[1] == []
    assert watched.sentence == ""
    beat_all_but(watched, "a", 3.2)
    effects, lost = watched.tick(3.2)
    assert (probes(effects), lost) == ([Probe("a", "tcp://a:1")], []), "another look, now that there is a network"
    beat_all_but(watched, "a", 3.0 + RETURN_GRACE)
    assert watched.tick(2.9 + RETURN_GRACE)[1] == []
    assert watched.tick(3.1 + RETURN_GRACE)[1] == ["a"]


def test_who_came_back_is_lost_as_soon_as_anybody_the_next_time() -> None:
    watched = watch("a", "b")
    watched.tick(0.31)
    watched.tick(3.0)
    for now in (3.05, 3.1):
        assert watched.beat(now, "a", "i", b"r-a")
        assert watched.beat(now, "b", "i", b"r-b")
    watched.tick(3.1)
    beat_all_but(watched, "a", 3.7)
    assert watched.tick(3.7)[1] == ["a"]


def test_one_silent_host_of_two_is_lost_and_the_only_one_never() -> None:
    watched = watch("a", "b")
    for now in (0.25, 0.5):
        beat_all_but(watched, "a", now)
        watched.tick(now + 0.06)
    assert [*watched.nodes] == ["b"]
    alone = watch("a")
    alone.tick(0.31)
    assert alone.tick(60.0)[1] == []


def test_the_lighthouse_s_own_pause_is_nobody_s_death() -> None:
    watched = watch(*FOUR)
    watched.late(60.0)
    assert watched.tick(60.1) == ([], [])


def test_a_stranger_and_an_old_session_are_told_to_register_again() -> None:
    watched = watch("a")
    assert not watched.beat(0.1, "x", "i", b"r-x")
    assert not watched.beat(0.1, "a", "older", b"r-a")
    assert not watched.beat(0.1, "a", "i", b"another route")


def on(host: str, port: int) -> NodeHello:
    return NodeHello(f"{host}-{port}", "i", f"tcp://{host}:{port}", 1)


def test_many_agents_of_one_host_are_one_host_s_trouble() -> None:
    watched = NodeWatch()
    for host in ("10.0.0.1", "10.0.0.2"):
        for port in range(4):
            watched.hello(0.0, b"r", on(host, port))
    for tenth in range(1, 12):
        for port in range(4):
            watched.beat(tenth / 10, f"10.0.0.1-{port}", "i", b"r")
        _, lost = watched.tick(tenth / 10)
        if lost:
            break
    assert sorted(lost) == [f"10.0.0.2-{port}" for port in range(4)]
    assert watched.sentence == ""


def test_some_agents_of_the_only_host_are_no_network() -> None:
    watched = NodeWatch()
    for port in range(4):
        watched.hello(0.0, b"r", on("127.0.0.1", port))
    lost: list[str] = []
    for tenth in range(1, 12):
        watched.beat(tenth / 10, "127.0.0.1-0", "i", b"r")
        lost += watched.tick(tenth / 10)[1]
    assert sorted(lost) == [f"127.0.0.1-{port}" for port in range(1, 4)]
