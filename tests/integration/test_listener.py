"""``seamark.FailureListener`` on real sockets: before, during and after a lighthouse's absence, and its clean end."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import pytest
import zmq
from standalone import wait_for
from suite import free_ports

import seamark
from seamark.listener import REPEAT_INTERVAL, Delivery, ListenerClosedError, topics
from seamark.protocol.codec import decode, encode
from seamark.protocol.messages import (
    RANKS,
    REPLICAS,
    Acknowledged,
    BeatAnswer,
    Cause,
    EventBeat,
    Failure,
    FailureEvent,
    InjectFailure,
    JobSpec,
    MemberLost,
    MemberStarted,
    Message,
    RecoveredEvent,
    ReplicaBeat,
    Roster,
    Slot,
    SnapshotRequest,
    StoreAddress,
)
from seamark.protocol.sockets import make_socket
from seamarkd import lighthouse
from seamarkd.lighthouse import Served
from seamarkd.lighthouse import shell as lighthouse_shell
from seamarkd.lighthouse.events import EventLog

pytestmark = pytest.mark.replicas

T = TypeVar("T", bound=Message)
PATIENCE = 20.0
KILLED = Cause(kind="signal", status=9, text="killed by SIGKILL")


class Place:
    """Two addresses, and whoever serves there."""

    def __init__(self) -> None:
        self.address, self.events = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))

    def serve(self, epoch: int = 1, heartbeat_timeout: float = 60.0) -> AbstractContextManager[Served]:
        return lighthouse.serve(self.address, self.events, heartbeat_timeout=heartbeat_timeout, epoch=epoch)

    def listener(self, **options: object) -> seamark.FailureListener:
        return seamark.FailureListener(self.address, self.events, **{"job": "j", **options})  # type: ignore[arg-type]


class Peer:
    """Whatever else talks to the lighthouse."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = make_socket(self._context, zmq.DEALER)
        self._socket.connect(address)

    def ask(self, message: Message, answer: type[T]) -> T:
        self._socket.send_multipart(encode(message))
        while self._socket.poll(PATIENCE * 1_000):
            received = decode(self._socket.recv_multipart())
            if isinstance(received, answer):
                return received
        raise AssertionError(f"no {answer.__name__} for {message}")

    def beat(self, member: str, incarnation: str = "i") -> None:
        self.ask(ReplicaBeat("j", member, incarnation, "tcp://127.0.0.1:1", 1, 0), BeatAnswer)

    def lose(self, *members: str) -> None:
        for member in members:
            self.beat(member)
            self.ask(InjectFailure(1, "j", REPLICAS, member), Acknowledged)

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@contextmanager
def peer(place: Place) -> Iterator[Peer]:
    one = Peer(place.address)
    try:
        yield one
    finally:
        one.close()


@pytest.fixture
def place() -> Place:
    return Place()


def lost(delivery: Delivery) -> tuple[str, str]:
    assert isinstance(delivery, FailureEvent)
    return delivery.failure.member, delivery.failure.cause.kind


def take(listener: seamark.FailureListener, count: int) -> list[tuple[str, str]]:
    return [lost(listener.get(PATIENCE)) for _ in range(count)]


def ready(listener: seamark.FailureListener) -> seamark.FailureListener:
    assert listener.wait_ready(PATIENCE)
    return listener


def nothing_more(listener: seamark.FailureListener) -> None:
    """After two beats there would have been a word of it."""
    with pytest.raises(TimeoutError):
        listener.get(0.5)


def test_the_topics_are_the_lighthouse_s() -> None:
    assert topics("j") == [lighthouse_shell.topic("j"), lighthouse_shell.EVENT_BEAT_TOPIC]
    assert all(lighthouse_shell.topic(job).startswith(topics(None)[0]) for job in ("j", "k"))


# --- lighthouses that come and go --------------------------------------------------------------------------


def test_a_listener_may_be_there_before_any_lighthouse(place: Place) -> None:
    with place.listener() as listener:
        assert not listener.wait_ready(0.1)
        with pytest.raises(TimeoutError, match="no failure within 0 s"):
            listener.get(0)
        with place.serve(), peer(place) as other:
            ready(listener)
            other.lose("a", "b")
            assert take(listener, 2) == [("a", "injected"), ("b", "injected")]
            nothing_more(listener)


def test_a_new_listener_begins_now_or_with_the_failures_in_force(place: Place) -> None:
    with place.serve(), peer(place) as other:
        other.lose("a", "b")
        other.beat("b")
        with place.listener() as from_now, place.listener(include_current=True) as from_before:
            ready(from_now)
            assert take(from_before, 1) == [("a", "injected")]
            ready(from_before)
            other.lose("c")
            assert take(from_now, 1) == take(from_before, 1) == [("c", "injected")]


def test_what_was_lost_while_the_lighthouse_was_away_is_told_once_the_new_one_knows(place: Place) -> None:
    with place.listener() as listener, peer(place) as other:
        with place.serve(epoch=1):
            for member in ("stays", "goes", "returns anew"):
                other.beat(member)
            ready(listener)
            other.lose("known before")
            assert take(listener, 1) == [("known before", "injected")]
        nothing_more(listener)
        with place.serve(epoch=2, heartbeat_timeout=3.0):
            found: list[tuple[str, str]] = []
            deadline = time.monotonic() + PATIENCE
            while len(found) < 2 and time.monotonic() < deadline:
                other.beat("stays")
                other.beat("returns anew", "another")
                try:
                    delivery = listener.get(0.05)
                except TimeoutError:
                    continue
                assert isinstance(delivery, FailureEvent)
                assert "while the lighthouse was away" in delivery.failure.cause.text
                found.append(lost(delivery))
            assert sorted(found) == [("goes", "gone"), ("returns anew", "gone")]
            other.lose("new")
            assert take(listener, 1) == [("new", "injected")]


def test_a_report_that_is_made_to_both_lighthouses_is_one_failure(place: Place) -> None:
    slots = [Slot(f"j/{rank}", rank, rank, "n", 0) for rank in range(2)]
    spec = JobSpec("j", ["x"], False, "python", "/", {}, 1, 1, 2, "replace", 3, "", "/tmp")
    roster = Roster(
        1, "j", 0, "replace", 1, slots, StoreAddress("127.0.0.1", 1, "s"), "127.0.0.1", 1, -1, 30.0, 120.0, 3, spec
    )
    first, second = (MemberLost(2, "j", 0, f"j/{r}", f"i{r}", KILLED, -1.0, 1.0, "canary") for r in (1, 0))
    with place.listener(group=RANKS) as listener, peer(place) as other:
        for epoch in (1, 2):
            with place.serve(epoch):
                other.ask(roster, Acknowledged)
                for rank in range(2):
                    other.ask(MemberStarted(3, "j", 0, f"j/{rank}", f"i{rank}", "n"), Acknowledged)
                ready(listener)
                other.ask(first, Acknowledged)
                if epoch == 1:
                    assert take(listener, 1) == [("j/1", "signal")]
                else:
                    other.ask(second, Acknowledged)
                    assert take(listener, 1) == [("j/0", "signal")]
        nothing_more(listener)


def test_recoveries_and_groups_are_a_matter_of_choice(place: Place) -> None:
    with (
        place.serve(),
        peer(place) as other,
        place.listener(recoveries=True, job=None) as everything,
        place.listener(group=RANKS) as ranks,
    ):
        ready(everything)
        ready(ranks)
        other.lose("a")
        other.lose("a")
        assert take(everything, 1) == [("a", "injected")]
        assert isinstance(everything.get(PATIENCE), RecoveredEvent)
        assert take(everything, 1) == [("a", "injected")]
        nothing_more(ranks)


# --- what the network loses --------------------------------------------------------------------------------


class Mute:
    """A lighthouse whose events are published, or lost, as the test says; and it may not answer."""

    def __init__(self, place: Place) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.publisher = make_socket(self._context, zmq.PUB)
        self.publisher.bind(place.events)
        self.router = make_socket(self._context, zmq.ROUTER)
        self.router.bind(place.address)
        self.log = EventLog("j", 1)

    def failure(self) -> FailureEvent:
        member = f"m{self.log.sequence}"
        return self.log.failure(REPLICAS, Failure("lost", member, "i", -1, "", -1, KILLED, -1.0, 1.0, 1.0, "test"))

    def publish(self, event: Message) -> None:
        self.publisher.send_multipart([topics("j")[0], *encode(event)])

    def beat(self) -> None:
        self.publisher.send_multipart([topics("j")[1], *encode(EventBeat(1, {"j": self.log.sequence}, {}))])

    def asked(self, *, answer: bool = True) -> None:
        """Waits for a request, repeating the beat: who asks must have heard one first."""
        while True:
            self.beat()
            if self.router.poll(100):
                break
        route, *frames = self.router.recv_multipart()
        request = decode(frames)
        assert isinstance(request, SnapshotRequest)
        if answer:
            snapshot = self.log.snapshot(request.request, completed=False, reason="", groups=[])
            self.router.send_multipart([route, *encode(snapshot)])

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def mute(place: Place) -> Iterator[Mute]:
    one = Mute(place)
    yield one
    one.close()


def test_a_gap_and_a_lost_tail_are_filled_however_often_it_takes_to_ask(place: Place, mute: Mute) -> None:
    with place.listener() as listener:
        mute.asked()
        ready(listener)
        gap, after, tail = (mute.failure() for _ in range(3))
        mute.publisher.send_multipart([topics("j")[0], b"no message"])
        mute.publish(after)
        asked_at = time.monotonic()
        mute.asked(answer=False)
        mute.asked()
        assert time.monotonic() - asked_at > REPEAT_INTERVAL / 2
        assert [listener.get(PATIENCE) for _ in range(3)] == [gap, after, tail]
        mute.publish(tail)
        nothing_more(listener)


# --- consumers ---------------------------------------------------------------------------------------------


def test_a_slow_consumer_is_told_how_much_did_not_fit(place: Place) -> None:
    with place.serve(), peer(place) as other, place.listener(queue_size=3) as listener, place.listener() as fast:
        ready(listener)
        ready(fast)
        members = [f"m{number}" for number in range(10)]
        other.lose(*members)
        assert [member for member, _ in take(fast, 10)] == members
        # The two read the same stream: what the fast one has, the slow one has or is about to have.
        wait_for("the queue to overflow", lambda: sum(listener._overflow.values()) == 7)
        assert [member for member, _ in take(listener, 3)] == members[:3]
        assert listener.get(PATIENCE) == seamark.EventsLost("j", 7)
        other.lose("last")
        assert take(listener, 1) == [("last", "injected")]


def test_a_callback_gets_each_failure_and_may_raise_and_close(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[str, str]] = []

    def on_failure(delivery: Delivery) -> None:
        seen.append(lost(delivery))
        if len(seen) == 1:
            raise ValueError("in the callback")
        listener.close()

    with place.serve(), peer(place) as other, caplog.at_level(logging.ERROR):
        listener = ready(place.listener(on_failure=on_failure))
        with pytest.raises(RuntimeError, match="on_failure"):
            listener.get(0)
        other.lose("a", "b", "c")
        listener._thread.join(PATIENCE)
        assert not listener._thread.is_alive()
    assert seen == [("a", "injected"), ("b", "injected")]
    assert "in the callback" in caplog.text
    listener.close()


def test_close_ends_the_iteration_and_leaves_nothing_behind(place: Place) -> None:
    def left() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    with place.serve(), peer(place) as other:
        other.beat("b")  # so that this connection stands
        before = left()
        listener = ready(place.listener())
        seen: list[tuple[str, str]] = []
        consumer = threading.Thread(target=lambda: seen.extend(lost(failure) for failure in listener))
        consumer.start()
        other.lose("a")
        wait_for("the delivery", lambda: seen)
        listener.close()
        consumer.join(PATIENCE)
        assert not consumer.is_alive()
        listener.close()
        with pytest.raises(ListenerClosedError):
            listener.get()
        # The lighthouse runs in this process, and lets go of its end of the connections by and by.
        wait_for("the connections' end", lambda: left() == before, PATIENCE)
    assert seen == [("a", "injected")]


def test_what_was_received_before_the_end_can_still_be_taken(place: Place) -> None:
    with place.serve(), peer(place) as other, place.listener() as listener, place.listener() as fast:
        ready(listener)
        ready(fast)
        other.lose("a", "b")
        take(fast, 2)
        wait_for("both to be received", lambda: len(listener._queue) == 2)
        listener.close()
        assert [lost(failure)[0] for failure in listener] == ["a", "b"]


FORKED = """
import os, sys, seamark
listener = seamark.FailureListener(job="j")
child = os.fork()
if child == 0:
    try:
        listener.get(0)
    except RuntimeError as error:
        print(error, flush=True)
    listener.close()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


def test_a_forked_child_is_refused_and_a_process_may_end_without_a_close(place: Place) -> None:
    environ = {**os.environ, "SEAMARK_LIGHTHOUSE_ADDRESS": place.address, "SEAMARK_LIGHTHOUSE_EVENTS": place.events}
    done = subprocess.run([sys.executable, "-c", FORKED], env=environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "make another one here" in done.stdout


@pytest.mark.parametrize(
    ("addresses", "said"),
    [
        ((None, "tcp://127.0.0.1:1"), "SEAMARK_LIGHTHOUSE_ADDRESS"),
        (("tcp://127.0.0.1:1", None), "SEAMARK_LIGHTHOUSE_EVENTS"),
        (("tcp://*:1", "tcp://127.0.0.1:1"), "can't be connected to"),
        (("http://x", "tcp://127.0.0.1:1"), "begins with"),
    ],
)
def test_a_wrong_address_is_a_sentence(
    addresses: tuple[str | None, str | None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEAMARK_LIGHTHOUSE_ADDRESS", raising=False)
    monkeypatch.delenv("SEAMARK_LIGHTHOUSE_EVENTS", raising=False)
    with pytest.raises(ValueError, match=said):
        seamark.FailureListener(*addresses)
    with pytest.raises(ValueError, match="queue_size"):
        seamark.FailureListener("tcp://127.0.0.1:1", "tcp://127.0.0.1:2", queue_size=0)


# --- seamark fail ------------------------------------------------------------------------------------------


def seamark_command(place: Place, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {
        **os.environ,
        "SEAMARK_LIGHTHOUSE_ADDRESS": place.address,
        "SEAMARK_LIGHTHOUSE_EVENTS": place.events,
        "SEAMARK_COORDINATOR_ADDRESS": f"tcp://127.0.0.1:{free_ports(3)[2]}",
    }
    command = [sys.executable, "-m", "seamarkd.cli", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)


def test_a_drill_is_published_and_shown(place: Place) -> None:
    assert seamark_command(place, "fail", "j", "a", "--group", "replicas").returncode == 2
    with place.serve(), peer(place) as other, place.listener() as listener:
        ready(listener)
        stranger = seamark_command(place, "fail", "j", "a", "--group", "replicas")
        assert stranger.returncode == 64, stranger.stderr
        other.beat("a")
        other.beat("b")
        done = seamark_command(place, "fail", "j", "a", "--group", "replicas")
        assert (done.returncode, done.stdout) == (0, "published the failure of a: seamark events j\n"), done.stderr
        assert take(listener, 1) == [("a", "injected")]
        nothing_more(listener)
        shown = seamark_command(place, "events", "j")
        assert "replicas  a lost: injected failure" in shown.stdout, shown.stderr
        status = seamark_command(place, "status")
        assert status.returncode == 1
        assert "replicas of j" in status.stdout
