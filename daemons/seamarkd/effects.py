"""What a core asks its shell to do: the only way by which a core reaches the world.

A core returns these; a shell carries them out in order. They hold no behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from seamark.protocol.messages import Message


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to the peer with this routing id."""

    to: bytes
    message: Message


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish a message to the subscribers of a job."""

    job: str
    message: Message


@dataclass(frozen=True, slots=True)
class Probe:
    """Connect to a silent node's address and say what happened."""

    node: str
    address: str


Effect: TypeAlias = Send | Publish | Probe
