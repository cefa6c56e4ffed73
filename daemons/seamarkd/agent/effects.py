"""What an agent's core asks of those who carry it out."""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from seamark.protocol.messages import FailureEvent, JobAborted, Message, Snapshot


class ToLighthouse(Struct, frozen=True):
    """Send to the lighthouse."""

    message: Message


class ToCoordinator(Struct, frozen=True):
    """Send to the coordinator."""

    message: Message


class ToWorker(Struct, frozen=True):
    """Send to the worker process with this incarnation."""

    incarnation: str
    message: Message


class TellWorkers(Struct, frozen=True):
    """Send to all workers of a job that listen; to those that can't be reached yet, as soon as they can."""

    job: str
    message: FailureEvent | Snapshot | JobAborted


class StartWorker(Struct, frozen=True):
    """Have the keeper start a worker process."""

    job: str
    member: str
    incarnation: str


class WatchWorker(Struct, frozen=True):
    """The worker has named its canaries by now: watch them, too."""

    job: str
    incarnation: str


class EndWorker(Struct, frozen=True):
    """Have the keeper end a worker: SIGTERM, and SIGKILL ``grace`` seconds later; at once with a grace of 0."""

    job: str
    incarnation: str
    grace: float


class SignalWorker(Struct, frozen=True):
    """Signal a worker's process group."""

    job: str
    member: str
    incarnation: str
    signum: int


class Introduce(Struct, frozen=True):
    """Tell the coordinator how this node is now: it drains, or serves again."""


class StartKeeper(Struct, frozen=True):
    """Have a keeper for this job, which imports torch ahead of the workers."""

    job: str


class StartStore(Struct, frozen=True):
    """Have the keeper start the TCPStore service; ``fixed`` is the port a person asked for, else 0."""

    job: str
    incarnation: str
    fixed: int


class Remember(Struct, frozen=True):
    """Write down what an agent started anew has to know of this job, before what follows happens."""

    job: str


class ForgetExit(Struct, frozen=True):
    """The coordinator knows of this exit: the keeper need not hold it any longer."""

    job: str
    member: str
    incarnation: str


class StopJobHere(Struct, frozen=True):
    """Stop all workers of a job; with ``final`` its store and keeper too. Answered by ``stopped``.

    ``patience``: seconds they have to end by themselves before they are asked.
    """

    job: str
    generation: int
    grace: float
    final: bool
    patience: float = 0.0


Effect: TypeAlias = (
    ToLighthouse
    | ToCoordinator
    | ToWorker
    | TellWorkers
    | StartWorker
    | WatchWorker
    | SignalWorker
    | EndWorker
    | Introduce
    | StartKeeper
    | StartStore
    | Remember
    | ForgetExit
    | StopJobHere
)
