"""An agent as the coordinator knows it."""

from __future__ import annotations

from msgspec import Struct, field


class Node(Struct):
    """A node that has introduced itself."""

    route: bytes
    slots: int
    last_beat: float
    draining: str = ""
    """Why it gets no workers."""
    refused: dict[str, int] = field(default_factory=dict)
    """What its agent refused its workers, by reason."""
