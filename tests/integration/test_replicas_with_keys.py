"""Replica groups and listeners with a lighthouse that has keys: they meet, one heals, and others stay outside."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from keyring import keyring
from standalone import wait_for

import seamark
from seamark.protocol.codec import decode, encode
from seamark.protocol.keys import Key, KeysError, own, revoke
from seamark.protocol.messages import FailureEvent, LighthouseStatus, Refused, StateAddress, StateAddressRequest
from seamark.protocol.sockets import connect, make_socket, new_pair
from seamarkd.cli.status import ask_one
from seamarkd.lighthouse import Served, serve

pytestmark = pytest.mark.replicas


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = keyring(tmp_path / "keys", operator="operator", client="client", a="node")
    monkeypatch.setenv("SEAMARK_SECURITY_KEYS", str(directory))
    return directory


def manager(served: Served, name: str, state: torch.Tensor) -> seamark.Manager:
    return seamark.Manager(
        replica_id=name,
        rank=0,
        world_size=1,
        lighthouse_addr=served.address,
        use_async_quorum=False,
        timeout=20.0,
        state_dict=lambda: {"weights": state},
        load_state_dict=lambda other: state.copy_(other["weights"]),
    )


def test_two_groups_meet_and_one_takes_the_state_of_the_other(keys: Path) -> None:
    states = {"A": torch.full((3,), 1.0), "B": torch.full((3,), 2.0)}
    with serve(keys=keys) as served, ExitStack() as stack:
        managers = {name: stack.enter_context(manager(served, name, state)) for name, state in states.items()}
        threads = stack.enter_context(ThreadPoolExecutor(2))

        def step(name: str) -> bool:
            managers[name].start_quorum(target_world_size=2)
            managers[name].allreduce(torch.ones(1)).wait()
            return managers[name].should_commit()

        assert list(threads.map(step, "AB")) == [True, True]
        # To heal, the one asked the other's door where the state is: over TCP, with the clients' key.
        assert torch.equal(states["A"], states["B"])
        answer = ask_one(served.address, LighthouseStatus, key=own(keys, "operator"))
        assert isinstance(answer, LighthouseStatus)
        assert answer.dropped == {}


def test_a_door_is_open_to_the_clients_key_alone(keys: Path) -> None:
    client, node = own(keys, "client"), own(keys, "node", "a")
    stranger = Key("x", "client", *new_pair(), client.daemon)
    with serve(keys=keys) as served, manager(served, "A", torch.zeros(1)) as one, ExitStack() as stack:
        control = one._control
        assert control is not None
        context = stack.enter_context(zmq.Context())

        def peer(key: Key | None) -> zmq.Socket[Any]:
            socket = stack.enter_context(make_socket(context, zmq.DEALER))
            connect(socket, control.address, key, client.public)
            socket.send_multipart(encode(StateAddressRequest(5, 0)))
            return socket

        outside = [peer(stranger), peer(None)]
        refused = peer(node)
        assert refused.poll(10_000)
        answer = decode(refused.recv_multipart())
        assert isinstance(answer, Refused)
        assert (answer.code, answer.request) == ("NOT_ALLOWED", 5)
        inside = peer(client)
        assert inside.poll(10_000)
        known = decode(inside.recv_multipart())
        assert isinstance(known, StateAddress) or (isinstance(known, Refused) and known.code != "NOT_ALLOWED")
        assert not any(socket.poll(0) for socket in outside)


def test_a_listener_needs_the_clients_key_and_is_left_when_it_is_revoked(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(keys=keys) as served:
        with seamark.FailureListener(served.address, served.events) as listener:
            assert listener.wait_ready(20.0)
            with manager(served, "A", torch.zeros(1)) as one:
                one.start_quorum(target_min_world_size=1)
            event = listener.get(20.0)
            assert isinstance(event, FailureEvent)
            assert event.failure.member == "A"

            revoke(keys, "client")

            def refused() -> bool:
                answer = ask_one(served.address, LighthouseStatus, key=own(keys, "operator"))
                return isinstance(answer, LighthouseStatus) and answer.dropped.get("revoked_key", 0) > 0

            wait_for("its subscription to be refused", refused)
        with pytest.raises(KeysError, match="seamark keys add client --role client"):
            seamark.FailureListener(served.address, served.events)
        with pytest.raises(ValueError, match="there is no key of role client"):
            manager(served, "B", torch.zeros(1))
