"""A job's part on a node, and its workers there: what an agent that is started anew has to know."""

from __future__ import annotations

from msgspec import Struct, field

from seamark.protocol.messages import JobSpec, LastQuorum, MemberLost, Roster, StopWorkers, StoreAddress, StoreLost


class Worker(Struct):
    """One worker process, from the order to start it until its exit was acknowledged."""

    member: str
    incarnation: str
    generation: int
    pid: int = 0
    forked_at: float = 0.0
    wrapped: bool = False
    completed: bool = False
    lost: bool = False
    replaces: str = ""
    replacement: str = ""
    ordered: bool = False
    hang: str = ""
    """Why it is being ended: it gave no sign of life."""
    orphan: bool = False
    """Its keeper was killed: its agent alone looks after it."""
    status: int | None = None
    """How it ended."""


class Job(Struct):
    """A job's part on this node; all of it is what an agent that is started anew has to know."""

    name: str
    spec: JobSpec
    roster: Roster | None = None
    workers: dict[str, Worker] = field(default_factory=dict)
    """By incarnation; the living and those whose exit isn't reported yet."""
    exited: dict[str, Worker] = field(default_factory=dict)
    """By incarnation; those whose exit was reported and isn't acknowledged."""
    quorum: LastQuorum | None = None
    losses: list[MemberLost] = field(default_factory=list)
    """Those that no answered quorum came after: a lighthouse started anew is told of them, whoever acknowledged."""
    store_loss: StoreLost | None = None
    """Likewise."""
    allowance: int = 0
    store: StoreAddress = field(default_factory=StoreAddress)
    prepare_request: int = 0
    store_incarnation: str = ""
    master_port: int = 0
    stopping: StopWorkers | None = None
    ended: bool = False
    wrapped: bool = False

    @property
    def has_store(self) -> bool:
        """Whether the job's TCPStore is on this node, and serves."""
        return bool(self.store.port) and bool(self.store_incarnation)
