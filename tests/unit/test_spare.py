"""A store client in reserve."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from descriptors import descriptors
from standalone import wait_for

from seamark.inprocess.cleanup import is_communication_error
from seamark.inprocess.exceptions import StoreUnreachableError
from seamark.inprocess.spare import SpareStore
from seamark.protocol.messages import StoreAddress
from seamark.replicas.groups import GroupUnavailable, ReconfigurableGroup

LONG = 120.0
"""Seconds; more than a test may take: who waits for so long fails it."""


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def silent(listener: socket.socket) -> StoreAddress:
    """A store whose host was cut off: connections stand, and nobody answers."""
    return StoreAddress("127.0.0.1", listener.getsockname()[1], "before")


def clients() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("seamark-store")]


def test_a_store_that_refuses_connections_is_one_sentence() -> None:
    with socket.socket() as taken:
        # Bound and not listening: whoever connects is refused, and nobody else gets the port.
        taken.bind(("127.0.0.1", 0))
        address = StoreAddress("127.0.0.1", taken.getsockname()[1])
        spare = SpareStore(0.5)
        with pytest.raises(
            StoreUnreachableError, match=f"TCPStore does not answer on 127.0.0.1:{address.port}"
        ) as error:
            spare.take(address)
        spare.close()
    assert "\n" not in str(error.value)
    assert is_communication_error(error.value), "somebody else's end is the cause"


def test_a_store_that_does_not_answer_is_not_waited_for(silent: StoreAddress) -> None:
    spare = SpareStore(0.5)
    with pytest.raises(StoreUnreachableError, match=f"127.0.0.1:{silent.port}: no answer within 0.5 s"):
        spare.take(silent)
    spare.close()
    assert not clients()


def test_a_spare_of_a_store_that_is_gone_keeps_nobody_from_another(silent: StoreAddress) -> None:
    from torch.distributed import TCPStore

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spare = SpareStore(2.0)
    spare.prepare(silent)
    wait_for("its connection", clients)
    client, connection = spare.take(StoreAddress("127.0.0.1", server.port, "after"))
    client.set("key", "value")
    assert connection.peer()[1] == server.port
    spare.close()
    assert not clients()


def test_who_waits_for_a_store_is_freed_by_the_end_of_its_iteration(silent: StoreAddress) -> None:
    spare = SpareStore(LONG)
    failed: list[BaseException] = []

    def take() -> None:
        try:
            spare.take(silent)
        except StoreUnreachableError as error:
            failed.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    wait_for("its connection", clients)
    wait_for("its end", lambda: spare.free() or not thread.is_alive())
    assert failed
    with pytest.raises(StoreUnreachableError):
        spare.take(silent, unwanted=lambda: True)


def test_without_a_descriptor_to_spare_it_is_one_sentence() -> None:
    from torch.distributed import TCPStore

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = StoreAddress("127.0.0.1", server.port)
    spare = SpareStore(LONG)
    with descriptors(0):
        spare.prepare(address)
        with pytest.raises(StoreUnreachableError, match="Too many open files"):
            spare.take(address)
    assert spare.take(address)[0].num_keys() >= 0
    spare.close()


def test_the_end_of_an_iteration_frees_who_has_a_spare_of_the_store_before(
    listener: socket.socket, silent: StoreAddress
) -> None:
    """That spare goes on connecting to the same port: neither it nor its end disturbs another."""
    from torch.distributed import TCPStore

    spare = SpareStore(LONG)
    before = len(clients())
    spare.prepare(silent)
    wait_for("its connection", lambda: len(clients()) > before)
    failed: list[BaseException] = []

    def take() -> None:
        try:
            spare.take(StoreAddress(silent.host, silent.port, "anew"))
        except StoreUnreachableError as error:
            failed.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    wait_for("its end", lambda: spare.free() or not thread.is_alive(), 30.0)
    assert failed
    listener.close()
    server = TCPStore(silent.host, silent.port, is_master=True, wait_for_workers=False)
    client, connection = spare.take(StoreAddress(silent.host, silent.port, "after"))
    spare.close()
    client.set("key", "value")
    assert client.get("key") == b"value"
    assert connection.peer()[1] == server.port


def test_a_group_across_replicas_does_not_wait_for_a_silent_store(silent: StoreAddress) -> None:
    group = ReconfigurableGroup()
    failed: list[BaseException] = []
    gone = threading.Event()

    def configure() -> None:
        try:
            group.configure(f"127.0.0.1:{silent.port}", "one", 0, 2, LONG, gone.is_set)
        except GroupUnavailable as error:
            failed.append(error)

    thread = threading.Thread(target=configure)
    thread.start()
    wait_for("its connection", clients)
    gone.set()
    wait_for("its end", lambda: group.cut() or not thread.is_alive())
    assert failed
    group.close()
