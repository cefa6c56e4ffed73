"""What a core asks its shell to do: the only way by which a core reaches the world.

A core returns these; a shell carries them out in order. They hold no behaviour.
"""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from seamark.protocol.messages import Message


class Send(Struct, frozen=True):
    """Send a message to the peer with this routing id."""

    to: bytes
    message: Message


class Publish(Struct, frozen=True):
    """Publish a message to the subscribers of a job."""

    job: str
    message: Message


class Probe(Struct, frozen=True):
    """Connect to a silent node's address and say what happened."""

    node: str
    address: str


class ProbeMember(Struct, frozen=True):
    """Connect to the address of a replica group's manager and say what happened."""

    job: str
    member: str
    incarnation: str
    address: str


class Wake(Struct, frozen=True):
    """Let the core look at the time again after so many seconds, besides its regular tick."""

    after: float


Effect: TypeAlias = Send | Publish | Probe | ProbeMember | Wake
