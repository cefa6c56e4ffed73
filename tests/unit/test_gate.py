"""A lighthouse with keys, on real sockets: who comes in, what each may send, and what a revocation ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq
from keyring import keyring
from msgspec.structs import replace
from standalone import wait_for
from test_group import roster
from zmq.utils.monitor import recv_monitor_message

import seamarkd.lighthouse
from seamark.protocol.codec import decode, encode
from seamark.protocol.keys import Key, own, revoke, write
from seamark.protocol.messages import (
    AbortJob,
    Acknowledged,
    Cause,
    EventBeat,
    InjectFailure,
    Join,
    LighthouseStatus,
    MemberFaulted,
    MemberStarted,
    Message,
    NodeHello,
    QuorumAnswer,
    Refused,
    Slot,
    StatusRequest,
    Welcome,
)
from seamark.protocol.sockets import connect, make_socket, new_pair
from seamarkd.cli.status import ask_one

REVOKED = 400
QUIET_MS = 300
"""Enough for many an answer on loopback; who waits for silence waits so long."""


class Peers:
    """Sockets with keys of their own, towards one lighthouse."""

    def __init__(self, directory: Path, served: seamarkd.lighthouse.Served, stack: ExitStack) -> None:
        self.directory = directory
        self.served = served
        self._stack = stack
        self.context: zmq.Context[Any] = stack.enter_context(zmq.Context())

    def socket(self, kind: int) -> zmq.Socket[Any]:
        return self._stack.enter_context(make_socket(self.context, kind))

    def dealer(self, key: Key | None) -> zmq.Socket[Any]:
        socket = self.socket(zmq.DEALER)
        connect(socket, self.served.address, key)
        return socket

    def subscriber(self, key: Key | None) -> zmq.Socket[Any]:
        socket = self.socket(zmq.SUB)
        socket.subscribe(b"")
        connect(socket, self.served.events, key)
        return socket

    def watch(self, socket: zmq.Socket[Any]) -> Callable[[], bool]:
        """Says whether a connection of this socket was refused for good meanwhile."""
        events = self._stack.enter_context(socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH))
        self._stack.callback(socket.disable_monitor)
        return lambda: bool(events.poll(10)) and recv_monitor_message(events)["value"] == REVOKED

    def status(self) -> LighthouseStatus:
        answer = ask_one(self.served.address, LighthouseStatus, key=own(self.directory, "operator"))
        assert isinstance(answer, LighthouseStatus), answer
        return answer

    def counted(self, reason: str) -> Callable[[], bool]:
        return lambda: self.status().dropped.get(reason, 0) > 0


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    directory = keyring(tmp_path / "keys", operator="operator", client="client", a="node", b="node")
    with seamarkd.lighthouse.serve(keys=directory) as served, ExitStack() as stack:
        yield Peers(directory, served, stack)


def ask(socket: zmq.Socket[Any], message: Message) -> Message:
    socket.send_multipart(encode(message))
    assert socket.poll(10_000), f"no answer to {message}"
    return decode(socket.recv_multipart())


def hello(node: str) -> NodeHello:
    return NodeHello(node, f"incarnation of {node}", "tcp://127.0.0.1:1", 1)


def hears_a_beat(socket: zmq.Socket[Any], within_ms: int = 10_000) -> bool:
    return bool(socket.poll(within_ms)) and isinstance(decode(socket.recv_multipart()[1:]), EventBeat)


def drain(socket: zmq.Socket[Any]) -> None:
    while socket.poll(0):
        socket.recv_multipart()


def test_who_has_a_key_speaks_and_hears(peers: Peers) -> None:
    key = own(peers.directory, "node", "a")
    assert isinstance(ask(peers.dealer(key), hello("a")), Welcome)
    assert hears_a_beat(peers.subscriber(key))
    assert peers.status().dropped == {}


def test_a_stranger_is_refused_counted_and_logged_once(peers: Peers, caplog: pytest.LogCaptureFixture) -> None:
    known = own(peers.directory, "node", "a")
    public, secret = new_pair()
    stranger = Key("x", "operator", public, secret, known.daemon)
    with caplog.at_level(logging.WARNING, "seamarkd.gate"):
        sockets = [peers.dealer(stranger) for _ in range(3)]
        listening = peers.subscriber(stranger)
        for socket in sockets:
            socket.send_multipart(encode(StatusRequest(1)))
        wait_for("all four to be refused", lambda: peers.status().dropped.get("unknown_key", 0) >= 4)
        assert not any(socket.poll(0) for socket in (*sockets, listening))
        assert isinstance(ask(peers.dealer(known), hello("a")), Welcome), "nobody else is harmed"
    (record,) = caplog.records
    assert record.getMessage() == (
        f"refused a connection from 127.0.0.1: nobody knows the key {public} (reason unknown_key)"
    )


def test_a_stranger_whose_key_is_added_comes_in_without_a_restart(peers: Peers) -> None:
    known = own(peers.directory, "node", "a")
    public, secret = new_pair()
    late = Key("late", "node", public, secret, known.daemon)
    socket = peers.dealer(late)
    socket.send_multipart(encode(hello("late")))
    wait_for("it to be refused", peers.counted("unknown_key"))
    assert write(peers.directory, late)
    assert socket.poll(15_000), "ZeroMQ tries again after the handshake's time"
    assert isinstance(decode(socket.recv_multipart()), Welcome)


def test_in_the_clear_nobody_is_heard(peers: Peers) -> None:
    clear, listening = peers.dealer(None), peers.subscriber(None)
    clear.send_multipart(encode(StatusRequest(1)))
    assert not clear.poll(QUIET_MS)
    assert not listening.poll(0)


def test_who_trusts_another_daemon_s_key_tells_this_one_nothing(peers: Peers) -> None:
    own_pair, another = new_pair(), new_pair()
    socket = peers.dealer(Key("a", "node", *own_pair, another[0]))
    socket.send_multipart(encode(hello("a")))
    assert not socket.poll(QUIET_MS)
    assert peers.status().nodes == []


def test_an_agent_that_claims_another_node_is_refused(peers: Peers, caplog: pytest.LogCaptureFixture) -> None:
    a, b = (peers.dealer(own(peers.directory, "node", name)) for name in "ab")
    assert isinstance(ask(b, hello("b")), Welcome)
    with caplog.at_level(logging.WARNING, "seamarkd.channel"):
        for _ in range(3):
            refused = ask(a, hello("b"))
            assert isinstance(refused, Refused)
            assert refused.code == "NOT_ALLOWED"
            assert refused.reason == "the key of node a may not speak for node b (NodeHello)"
    (record,) = caplog.records
    assert "from 127.0.0.1" in record.getMessage()
    status = peers.status()
    assert status.dropped == {"other_node": 3}
    assert [node.node for node in status.nodes] == ["b"]


def test_a_node_may_not_send_an_operator_s_command(peers: Peers) -> None:
    socket = peers.dealer(own(peers.directory, "node", "a"))
    refused = ask(socket, InjectFailure(7, "job", "ranks", "job/0"))
    assert isinstance(refused, Refused)
    assert (refused.request, refused.code) == (7, "NOT_ALLOWED")
    assert refused.reason == "the key a has the role node, which may not send InjectFailure"
    assert peers.status().dropped == {"not_allowed": 1}


def test_nobody_speaks_for_another_node_s_worker_or_another_s_job(peers: Peers) -> None:
    daemon, client = (peers.dealer(own(peers.directory, role)) for role in ("daemon", "client"))
    a, b = (peers.dealer(own(peers.directory, "node", name)) for name in "ab")
    told = replace(roster(0), submission="s", slots=[Slot("job/0", 0, 0, "b", 0)], min_members=1)
    assert isinstance(ask(daemon, told), Acknowledged)
    assert isinstance(ask(b, hello("b")), Welcome)
    assert isinstance(ask(b, MemberStarted(1, "job", 0, "job/0", "x", "b")), Acknowledged)
    for message in (
        MemberFaulted("job", "job/0", "x", 0, Cause("exception"), 0.0),
        Join("job", "ranks", 0, "job/0", "x", 1, -1, 0, 0, []),
        AbortJob("job", "job/0", "x", "why"),
    ):
        refused = ask(a, message)
        assert isinstance(refused, Refused)
        kind = type(message).__name__
        assert refused.reason == f"the key a may not speak for job/0, which is another's ({kind})"
    refused = ask(client, replace(told, submission=""))
    assert isinstance(refused, Refused)
    assert refused.reason == "the key client may not speak for job job, which is another's (Roster)"
    assert peers.status().dropped == {"other_node": 4}
    assert isinstance(ask(b, Join("job", "ranks", 0, "job/0", "x", 1, -1, 0, 0, [])), QuorumAnswer)


def test_a_revoked_key_ends_on_standing_connections_and_nobody_else_is_harmed(peers: Peers) -> None:
    a, b = own(peers.directory, "node", "a"), own(peers.directory, "node", "b")
    speaking, listening, other, still = peers.dealer(a), peers.subscriber(a), peers.dealer(b), peers.subscriber(b)
    for socket, name in ((speaking, "a"), (other, "b")):
        assert isinstance(ask(socket, hello(name)), Welcome)
    assert hears_a_beat(listening)
    assert hears_a_beat(still)
    refused_again = peers.watch(listening)

    revoke(peers.directory, "a")

    def refused() -> bool:
        answer = ask(speaking, hello("a"))
        return isinstance(answer, Refused) and answer.code == "NOT_ALLOWED" and "any more" in answer.reason

    wait_for("its messages to be refused", refused)
    wait_for("its subscription to be refused", refused_again)
    late = peers.socket(zmq.DEALER)
    refused_at_once = peers.watch(late)
    connect(late, peers.served.address, a)
    wait_for("a new connection to be refused", refused_at_once)
    drain(listening)
    drain(still)
    assert hears_a_beat(still), "who may still listen has come in anew"
    assert not listening.poll(0)
    assert isinstance(ask(other, hello("b")), Welcome)
    assert peers.status().dropped["revoked_key"] >= 3


def test_a_directory_that_is_away_for_a_moment_ends_nobody(peers: Peers, caplog: pytest.LogCaptureFixture) -> None:
    socket = peers.dealer(own(peers.directory, "node", "a"))
    assert isinstance(ask(socket, hello("a")), Welcome)
    with caplog.at_level(logging.WARNING, "seamark.protocol.keys"):
        peers.directory.rename(peers.directory.with_name("away"))
        wait_for("it to be missed", lambda: "stay as they were" in caplog.text)
        assert isinstance(ask(socket, hello("a")), Welcome)
        peers.directory.with_name("away").rename(peers.directory)
    assert peers.status().dropped == {}
