"""What a keeper answers, as its agent reads it: refusals, processes, and their descriptors."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence

from msgspec import Struct

from seamarkd.agent.keeper.requests import Message


class KeeperError(Exception):
    """What a keeper refused or could not do, as a sentence.

    Attributes:
        code: the keeper's reason, or "timeout", "closed", "spawn" or "killed".
    """

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def was_killed(error: Exception) -> bool:
    """Whether a keeper was killed while it started: another one may come to more."""
    return isinstance(error, KeeperError) and error.code == "killed"


class Ready(Struct, frozen=True):
    """A keeper's answer to hello.

    Attributes:
        modules: what it has imported, and the seconds each took.
        forks: whether workers are forked; otherwise they are exec'ed, and `reason` says why.
        culprit: the module that made forking unsafe.
    """

    job: str
    pid: int
    start_time: int
    python: str
    modules: list[tuple[str, float]]
    forks: bool
    culprit: str | None
    reason: str | None


class Process(Struct, frozen=True):
    """One process that a keeper started.

    Attributes:
        kind: "worker" or "store".
        start_time: field 22 of /proc/PID/stat, in clock ticks since boot.
        forked: whether it was forked; if not, `why_exec` says why.
        forked_at: `time.monotonic` right before the fork, in seconds.
        fork_seconds: how long the fork held up the keeper.
        port: the port of a store.
        status: None while it lives, then its exit code, or minus the number of the signal that ended it.
        core: whether it left a core dump.
        at: `time.monotonic` when the keeper saw it end.
        discarded: whether it had said that the job's rank assignment dropped it.
    """

    slot: str
    incarnation: str
    kind: str
    pid: int
    start_time: int
    forked: bool
    forked_at: float
    fork_seconds: float
    why_exec: str | None
    port: int | None
    status: int | None
    core: bool
    at: float | None
    discarded: bool = False


class Held(Struct, frozen=True):
    """A process together with its descriptors, which the caller owns and closes; -1 once it has ended."""

    process: Process
    pidfd: int
    page: int

    def close(self) -> None:
        """Close both descriptors."""
        for fd in (self.pidfd, self.page):
            if fd >= 0:
                os.close(fd)


class Packet(Struct, frozen=True):
    """One message, and the descriptors that came with it."""

    message: Message
    fds: tuple[int, ...]


def descriptors(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, ...]:
    """Those that came with a packet."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return tuple(fds)


def close_all(fds: Sequence[int]) -> None:
    """Closes them."""
    for fd in fds:
        os.close(fd)


def process_of(message: Message) -> Process:
    """The process that a message describes."""
    # A keeper that was started before this agent's version may say less.
    return Process(**{name: message[name] for name in Process.__struct_fields__ if name in message})


def held_of(packet: Packet) -> Held:
    """A process with its descriptors, which are the caller's.

    Raises:
        KeeperError: it lives and came without them.
    """
    process = process_of(packet.message)
    if len(packet.fds) == 2:
        return Held(process, *packet.fds)
    close_all(packet.fds)
    if process.status is None:
        sentence = "a process came without its file descriptors: raise the limit of open files (ulimit -n)"
        raise KeeperError("system", sentence)
    return Held(process, -1, -1)
