"""The reference's end-to-end sequences, and what it gets wrong, through real sockets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
from raw_replicas import RawReplica, members
from standalone import wait_for

import seamarkd.lighthouse
from seamark.protocol.codec import decode, encode
from seamark.protocol.messages import (
    FailureEvent,
    JobSpec,
    Join,
    MemberStarted,
    QuorumAnswer,
    RecoveredEvent,
    ReplicaWithdraw,
    Roster,
    Slot,
    StoreAddress,
)
from seamark.protocol.sockets import make_socket
from seamarkd.lighthouse.shell import LighthouseShell

pytestmark = pytest.mark.replicas

VECTORS = json.loads((Path(__file__).parents[1] / "conformance" / "quorum_vectors.json").read_text())
N = 0xFFFFFFFF
"""The reference's quorum ids are the lower half of ours (D3)."""


class Bench:
    """A lighthouse and raw replica groups."""

    def __init__(self, served: seamarkd.lighthouse.Served) -> None:
        self.served = served
        self.context: zmq.Context[Any] = zmq.Context()
        self.replicas: dict[str, RawReplica] = {}
        self.events = make_socket(self.context, zmq.SUB)
        self.events.subscribe(b"")
        self.events.connect(served.events)
        assert self.events.poll(5_000), "no idle beat"

    def __getitem__(self, replica_id: str) -> RawReplica:
        if replica_id not in self.replicas:
            self.replicas[replica_id] = RawReplica(self.context, self.served.address, replica_id)
        return self.replicas[replica_id]

    def event(self, kind: type[Any]) -> Any:
        """The next published event of this kind."""
        while True:
            assert self.events.poll(10_000), f"no {kind.__name__}"
            message = decode(self.events.recv_multipart()[1:])
            if isinstance(message, kind):
                return message

    def close(self) -> None:
        for replica in self.replicas.values():
            replica.close()
        self.events.close()
        self.context.term()


@contextmanager
def bench(**options: Any) -> Iterator[Bench]:
    with seamarkd.lighthouse.serve(**options) as served:
        made = Bench(served)
        try:
            yield made
        finally:
            made.close()


@pytest.mark.parametrize("vector", VECTORS["e2e"], ids=lambda vector: vector["name"])
def test_the_references_sequences(vector: dict[str, Any]) -> None:
    options = vector["options"]
    with bench(
        min_replicas=options["min_replicas"],
        join_timeout=options["join_timeout_ms"] / 1e3,
        heartbeat_timeout=options["heartbeat_timeout_ms"] / 1e3,
    ) as lighthouse:
        for step in vector["steps"]:
            _play(lighthouse, step)


def _play(lighthouse: Bench, step: dict[str, Any]) -> None:
    expect = step.get("expect", {})
    if "heartbeat" in step:
        lighthouse[step["heartbeat"]].beat()
    elif "sleep_ms" in step:
        time.sleep(step["sleep_ms"] / 1e3)  # the vector's own: what is asked is what time alone does
    elif "quorum" in step:
        _ask(lighthouse, step["quorum"])
        _check(lighthouse, step["quorum"]["replica_id"], expect)
    else:
        for request in step.get("pending_before", []):
            _ask(lighthouse, request)
            lighthouse[request["replica_id"]].beat()  # answered after its join was taken
        for request in step["concurrent"]:
            _ask(lighthouse, request)
        asked = [request["replica_id"] for request in step["concurrent"]]
        named = step.get("expect_for", asked)
        checked = [name.split(" ")[0] for name in ([named] if isinstance(named, str) else named)]
        for name in checked:
            _check(lighthouse, name, expect)
        for name in set(asked) - set(checked):
            lighthouse[name].quorum()


def _ask(lighthouse: Bench, request: dict[str, Any]) -> None:
    fields = {name: value for name, value in request.items() if name not in ("replica_id", "timeout_ms")}
    lighthouse[request["replica_id"]].join(**fields)


def _check(lighthouse: Bench, name: str, expect: dict[str, Any]) -> None:
    quorum = lighthouse[name].quorum()
    for key, value in expect.items():
        match key:
            case "members":
                assert members(quorum) == value
            case "member":
                assert value in members(quorum)
            case "not_member":
                assert value not in members(quorum)
            case "participants_len":
                assert len(quorum.participants) == value
            case "quorum_id":
                assert quorum.quorum_id & N == value
            case "commit_failures":
                assert [replica.commit_failures for replica in quorum.participants] == value
            case _:
                number = int(key.removeprefix("participants[").partition("]")[0])
                assert quorum.participants[number].step == value


def test_silence_is_told_once_clears_who_waits_and_ends_with_the_next_beat() -> None:
    with bench(heartbeat_timeout=0.3, failure_tick=0.05, join_timeout=30.0) as lighthouse:
        lighthouse["a"].beat()
        lighthouse["b"].beat()
        lighthouse["a"].join(min_members=2)
        assert lighthouse["a"].socket.poll(100) == 0, "b is healthy and has not joined"
        while lighthouse["a"].socket.poll(50) == 0:
            lighthouse["a"].beat()
        lost = lighthouse.event(FailureEvent)
        assert (lost.failure.member, lost.failure.cause.text) == ("b", "heartbeat timeout")
        assert "b was lost" in lighthouse["a"].reset().reason
        lighthouse["a"].join(min_members=1)
        assert members(lighthouse["a"].quorum()) == ["a"]
        lighthouse["b"].beat()
        assert lighthouse.event(RecoveredEvent).member == "b"


def test_who_waits_is_not_kept_until_the_next_beat_where_beats_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    shells: list[LighthouseShell] = []

    def rare(*arguments: Any, **options: Any) -> LighthouseShell:
        shells.append(LighthouseShell(*arguments, beat_interval=3_600.0, **options))
        return shells[-1]

    monkeypatch.setattr("seamarkd.lighthouse.embedded.LighthouseShell", rare)
    spec = JobSpec("job", ["train.py"], False, "python", "/", {}, 1, 1, 2, "replace", 0, "", "/tmp")
    slots = [Slot("job/0", 0, 0, "n0", 0), Slot("job/1", 1, 1, "n0", 0)]
    store = StoreAddress("127.0.0.1", 20_402, "store-1")
    roster = Roster(1, "job", 0, "replace", 1, slots, store, "127.0.0.1", 20_400, -1, 0.2, 0.2, 0, spec)
    started = MemberStarted(2, "job", 0, "job/0", "process", "n0")
    join = Join("job", "ranks", 0, "job/0", "process", 3, -1, 0, 0, [], 0)
    context: zmq.Context[Any] = zmq.Context()
    with seamarkd.lighthouse.serve() as served:
        wait_for("the lighthouse to be idle", lambda: shells[0]._period == 3_600.0)
        agent = make_socket(context, zmq.DEALER, identity=b"agent")
        agent.connect(served.address)
        for message in (roster, started, join):
            agent.send_multipart(encode(message))
        answers = []
        while not answers or not isinstance(answers[-1], QuorumAnswer):
            assert agent.poll(10_000), f"nobody comes for job/1, and only these were answered: {answers}"
            answers.append(decode(agent.recv_multipart()))
        assert [member.member for member in answers[-1].members] == ["job/0"]
        agent.close()
    context.term()


def test_a_caller_that_gave_up_is_in_no_quorum() -> None:
    with bench() as lighthouse:
        for name in "abc":
            lighthouse[name].beat()
        ghost = lighthouse["a"]
        ghost.join(target_members=2)
        ghost.send(ReplicaWithdraw("job", "a", ghost.incarnation, 99))
        lighthouse["a"].beat()
        for name in "bc":
            lighthouse[name].join(target_members=2)
        assert members(lighthouse["b"].quorum()) == members(lighthouse["c"].quorum()) == ["b", "c"]


def test_limits_that_contradict_each_other_are_refused_with_both_values() -> None:
    with bench() as lighthouse:
        for name in "ab":
            lighthouse[name].beat()
        lighthouse["a"].join(min_members=2)
        lighthouse["a"].beat()  # answered after its join was taken
        lighthouse["b"].join(min_members=1)
        refusal = lighthouse["b"].refused()
        assert refusal.code == "BAD_REQUEST"
        assert "min_members=1" in refusal.reason
        assert "for 2" in refusal.reason


def test_a_lighthouse_that_was_started_anew_waits_for_who_was_there_and_counts_on() -> None:
    with bench(heartbeat_timeout=10.0) as lighthouse:
        for name in "ab":
            lighthouse[name].beat()
        for name in "ab":
            lighthouse[name].join()
        first = lighthouse["a"].quorum()
        lighthouse["b"].quorum()
        address, events = lighthouse.served.address, lighthouse.served.events
        kept = lighthouse
    with seamarkd.lighthouse.serve(address, events, epoch=2, heartbeat_timeout=10.0) as served:
        again = Bench(served)
        try:
            for name in "ab":
                again[name]._last = kept.replicas[name]._last
            again["a"].join()
            assert again["a"].socket.poll(200) == 0, "b was there before and has not been heard"
            again["b"].join()
            second = again["a"].quorum()
        finally:
            again.close()
    assert members(second) == ["a", "b"]
    assert second.quorum_id > first.quorum_id
