"""An agent as the coordinator knows it."""

from __future__ import annotations

from msgspec import Struct


class Node(Struct):
    """A node that has introduced itself."""

    route: bytes
    slots: int
    last_beat: float
    draining: str = ""
    """Why it gets no workers."""
