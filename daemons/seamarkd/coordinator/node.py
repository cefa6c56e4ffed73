"""An agent as the coordinator knows it."""

from __future__ import annotations

from msgspec import Struct, field


class Node(Struct):
    """A node that has introduced itself."""

    route: bytes
    slots: int
    last_beat: float
    draining: str = ""
    """Why it gets no workers, and those that it has leave."""
    unhealthy: str = ""
    """Why it gets no workers but those that replace one in its place."""
    refused: dict[str, int] = field(default_factory=dict)
    """What its agent refused its workers, by reason."""
    refused_at: dict[str, float] = field(default_factory=dict)
    """When each of them rose last."""
