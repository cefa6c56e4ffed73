"""A store client in reserve."""

from __future__ import annotations

import socket

import pytest

from seamark.inprocess.cleanup import is_communication_error
from seamark.inprocess.exceptions import StoreUnreachableError
from seamark.inprocess.spare import SpareStore
from seamark.protocol.messages import StoreAddress


def test_a_store_that_refuses_connections_is_one_sentence() -> None:
    with socket.socket() as taken:
        # Bound and not listening: whoever connects is refused, and nobody else gets the port.
        taken.bind(("127.0.0.1", 0))
        address = StoreAddress("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(
            StoreUnreachableError, match=f"TCPStore does not answer on 127.0.0.1:{address.port}"
        ) as error:
            SpareStore(0.5).take(address)
    assert "\n" not in str(error.value)
    assert is_communication_error(error.value), "somebody else's end is the cause"
