"""A keeper's packets to its agent, over a real pair of sockets."""

from __future__ import annotations

import json
import os
import resource
import select
import socket
from collections.abc import Iterator

import pytest

from seamarkd.agent.keeper.connection import Connection
from seamarkd.agent.keeper.requests import MAX_PACKET_BYTES

PACKET = {"type": "known", "filling": "x" * 100_000}


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(10.0)
    connection = Connection(ours)
    yield connection, theirs
    connection.close()
    theirs.close()


def test_who_does_not_read_is_not_read_from_until_it_has(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    assert connection.events == select.POLLIN
    sent = 0
    while not connection.backlog:
        connection.send(PACKET | {"id": sent})
        sent += 1
        assert sent < 1000, "the kernel takes a few megabytes"
    assert connection.events == select.POLLOUT
    received = []
    while len(received) < sent:
        received.append(json.loads(peer.recv(MAX_PACKET_BYTES))["id"])
        connection.flush()
    assert received == list(range(sent)), "nothing is lost, and the order kept"
    assert connection.events == select.POLLIN


def test_a_peer_that_is_gone_takes_its_backlog_with_it(pair: tuple[Connection, socket.socket]) -> None:
    connection, peer = pair
    before = len(os.listdir("/proc/self/fd"))
    with open("/dev/null") as file:
        while not connection.backlog:
            connection.send(PACKET, [file.fileno()])
    assert len(os.listdir("/proc/self/fd")) > before, "the packet that waits has a descriptor of its own"
    peer.close()
    connection.flush()
    assert not connection.backlog
    assert len(os.listdir("/proc/self/fd")) == before - 1, "the peer's"


def test_a_packet_without_room_for_its_descriptors_leaves_none_behind(pair: tuple[Connection, socket.socket]) -> None:
    connection, _ = pair
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open("/dev/null") as file:
        free = os.dup(file.fileno())
        os.close(free)
        try:
            # Room for one more, of two.
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, usual[1]))
            for _ in range(3):
                with pytest.raises(OSError, match="Too many open files"):
                    connection.send({"type": "started"}, [file.fileno(), file.fileno()])
            os.close(os.dup(file.fileno()))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, usual)
    assert not connection.backlog
