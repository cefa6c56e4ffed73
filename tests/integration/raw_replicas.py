"""Replica groups as a lighthouse meets them: raw sockets that speak its protocol."""

from __future__ import annotations

import secrets
from typing import Any, TypeVar

import zmq

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

T = TypeVar("T", bound=Message)
DEADLINE = 20.0


class RawReplica:
    """One replica group's connection."""

    def __init__(self, context: zmq.Context[Any], lighthouse: str, replica_id: str) -> None:
        self.replica_id = replica_id
        self.incarnation = secrets.token_hex(4)
        self.socket = make_socket(context, zmq.DEALER, identity=self.incarnation.encode())
        self.socket.connect(lighthouse)
        self._number = 0
        self._waiting = 0
        self._last: ReplicaQuorum | None = None

    def send(self, message: Message) -> None:
        self.socket.send_multipart(encode(message))

    def receive(self, kind: type[T], deadline: float = DEADLINE) -> T:
        """The next message of this kind; others before it are passed over."""
        while True:
            assert self.socket.poll(int(deadline * 1e3)), f"no {kind.__name__} for {self.replica_id}"
            message = decode(self.socket.recv_multipart())
            if isinstance(message, kind):
                return message

    def beat(self) -> BeatAnswer:
        self._number += 1
        self.send(ReplicaBeat("job", self.replica_id, self.incarnation, "", self._number, 0, self._waiting))
        return self.receive(BeatAnswer)

    def join(self, **fields: Any) -> None:
        """Asks for a quorum; ``fields`` are those of the reference's quorum member, and of ReplicaJoin."""
        self._number += 1
        replica = {name: fields.pop(name) for name in list(fields) if name in Replica.__struct_fields__}
        replica = {"address": "", "store_address": "", "step": 0, "world_size": 1} | replica
        replica |= {"replica_id": self.replica_id, "incarnation": self.incarnation}
        last = self._last
        self._waiting = self._number
        self.send(
            ReplicaJoin(
                job="job",
                request=self._number,
                replica=Replica(**replica),
                quorum_id=last.quorum_id if last else 0,
                quorum_members=[one.replica_id for one in last.participants] if last else [],
                **fields,
            )
        )

    def quorum(self, deadline: float = DEADLINE) -> ReplicaQuorum:
        """The answer to the last join."""
        self._last = self.receive(ReplicaQuorum, deadline)
        assert self._last.recipients[0].request == self._waiting
        self._waiting = 0
        return self._last

    def reset(self) -> QuorumReset:
        return self.receive(QuorumReset)

    def refused(self) -> Refused:
        return self.receive(Refused)

    def close(self) -> None:
        self.socket.close()


def members(quorum: ReplicaQuorum) -> list[str]:
    return [replica.replica_id for replica in quorum.participants]
