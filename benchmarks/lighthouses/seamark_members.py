"""Members of Seamark's replica groups in one process: each order is a round in which all of them join a quorum.

They speak the protocol directly: DEALER sockets and the codec, one connection for each member as separate replicas
have them, or one for all. A member is answered when its answer is decoded.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from typing import Any

import zmq
from msgspec.structs import replace

from seamark.protocol.codec import decode, encode
from seamark.protocol.messages import (
    BeatAnswer,
    Message,
    QuorumReset,
    Refused,
    Replica,
    ReplicaBeat,
    ReplicaJoin,
    ReplicaQuorum,
)
from seamark.protocol.sockets import make_socket

PATIENCE = 30_000  # milliseconds


class Members:
    """The members of this process and their connections.

    Args:
        address: the lighthouse's.
        job: their job.
        names: their replica ids, of which all processes together have `world`.
        world: the quorum waits for so many.
        shared: one connection for all.
    """

    def __init__(self, address: str, job: str, names: list[str], world: int, shared: bool) -> None:
        self._job = job
        self._world = world
        self._listener = socket.create_server(("127.0.0.1", 0))  # where the lighthouse may look whether they live
        own = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._replicas = [Replica(name, f"{name}.1", own, "127.0.0.1:1", 0, 1) for name in names]
        self._quorum_id = 0
        self._quorum_members: list[str] = []
        self._request = 0
        context: zmq.Context[Any] = zmq.Context()
        sockets = [make_socket(context, zmq.DEALER) for _ in (names[:1] if shared else names)]
        self._socket_of = {name: sockets[0 if shared else index] for index, name in enumerate(names)}
        self._poller = zmq.Poller()
        for connection in sockets:
            connection.connect(address)
            self._poller.register(connection, zmq.POLLIN)

    def introduce(self) -> None:
        """Have each member send a heartbeat and be answered: from now on all are connected."""
        for replica in self._replicas:
            name = replica.replica_id
            beat = ReplicaBeat(self._job, name, replica.incarnation, replica.address, 0, 0)
            self._socket_of[name].send_multipart(encode(beat))
        missing = len(self._replicas)
        while missing:
            for message in self._received():
                if isinstance(message, Refused):
                    raise SystemExit(f"a heartbeat was refused: {message.reason}")
                missing -= isinstance(message, BeatAnswer)

    def round(self) -> dict[str, Any]:
        """Join, and wait until all are answered: when the last one asked, when the last answer was read."""
        self._request += 1
        waiting = {replica.replica_id for replica in self._replicas}
        last_join = 0.0
        for replica in self._replicas:
            frames = encode(self._join(replica))
            last_join = time.monotonic()
            self._socket_of[replica.replica_id].send_multipart(frames)
        resets = 0
        while waiting:
            for message in self._received():
                match message:
                    case ReplicaQuorum():
                        last = message
                        waiting -= {one.member for one in message.recipients if one.request == self._request}
                    case QuorumReset():
                        resets += 1
                        self._join_again({one.member for one in message.recipients})
                    case Refused():
                        raise SystemExit(f"a join was refused: {message.reason}")
        answered = time.monotonic()
        self._quorum_id = last.quorum_id
        self._quorum_members = [replica.replica_id for replica in last.participants]
        return {
            "joined": last_join,
            "answered": answered,
            "quorum_id": last.quorum_id,
            "participants": len(last.participants),
            "resets": resets,
        }

    def _join(self, replica: Replica) -> ReplicaJoin:
        return ReplicaJoin(
            self._job,
            self._request,
            replace(replica, step=self._request),
            self._quorum_id,
            self._quorum_members,
            min_members=self._world,
        )

    def _join_again(self, names: set[str]) -> None:
        # The same request: it has no answer yet.
        for replica in self._replicas:
            if replica.replica_id in names:
                self._socket_of[replica.replica_id].send_multipart(encode(self._join(replica)))

    def _received(self) -> list[Message]:
        ready = self._poller.poll(PATIENCE)
        if not ready:
            raise SystemExit(f"no answer for {PATIENCE / 1_000:g} s")
        return [decode(connection.recv_multipart()) for connection, _ in ready]


def main() -> None:
    """Take the first order, introduce all, then one round for each line."""
    order = json.loads(sys.stdin.readline())
    members = Members(order["address"], order["job"], order["names"], order["world"], order["shared"])
    print(json.dumps({"ready": len(order["names"])}), flush=True)
    for line in sys.stdin:
        if json.loads(line).get("introduce"):
            members.introduce()
            answer: dict[str, Any] = {"introduced": len(order["names"])}
        else:
            answer = members.round()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
