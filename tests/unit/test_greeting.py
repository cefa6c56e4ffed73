"""Whether a listener has keys, without one."""

from __future__ import annotations

import socket

import pytest
import zmq

from seamark.protocol.sockets import new_pair
from seamarkd.cli.greeting import mechanism
from seamarkd.cli.suite import unlike


@pytest.mark.parametrize(("keys", "said"), [(False, "NULL"), (True, "CURVE")])
def test_a_listener_says_whether_it_has_keys(keys: bool, said: str) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        if keys:
            router.curve_server = True
            router.curve_secretkey = new_pair()[1].encode()
        port = router.bind_to_random_port("tcp://127.0.0.1")
        for _ in range(2):
            assert mechanism(f"tcp://127.0.0.1:{port}") == said


def test_of_who_says_nothing_or_something_else_nothing_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert mechanism(f"tcp://127.0.0.1:{listener.getsockname()[1]}", 0.05) == ""
        port = listener.getsockname()[1]
    assert mechanism(f"tcp://127.0.0.1:{port}") == "", "nobody listens there any more"
    assert mechanism("ipc:///tmp/x") == ""


@pytest.mark.parametrize(
    ("keys", "said", "says"),
    [
        (True, "NULL", "has no keys, and security.keys names some: seamark down, then seamark up"),
        (False, "CURVE", "has keys, and this configuration names none: set security.keys"),
        (True, "CURVE", ""),
        (False, "NULL", ""),
        (True, "", ""),
        (False, "", ""),
    ],
)
def test_a_running_daemon_with_other_keys_than_the_configuration_is_named(keys: bool, said: str, says: str) -> None:
    found = unlike("coordinator", "tcp://127.0.0.1:1", keys, said)  # type: ignore[arg-type]
    assert says in found
    assert bool(says) == bool(found)
