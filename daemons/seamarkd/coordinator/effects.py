"""What the coordinator's core asks of its shell, beside sending to a route."""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from seamark.protocol.messages import Incident, Message
from seamarkd.coordinator.job import Job, JobRecord, record
from seamarkd.coordinator.shards import Record
from seamarkd.effects import Send


class ToLighthouse(Struct, frozen=True):
    """Send to the lighthouse."""

    message: Message


class Persist(Struct, frozen=True):
    """Make this durable before any later effect happens."""

    record: JobRecord
    incidents: tuple[Incident, ...]
    fresh: bool = False
    """Nothing of an earlier job of this name remains."""


class Forget(Struct, frozen=True):
    """Nothing of this job has to be kept."""

    job: str


class Tell(Struct, frozen=True):
    """The job's status changed: tell its followers, soon and not for every change alone."""

    job: str


Effect: TypeAlias = Send | ToLighthouse | Persist | Forget | Record | Tell


def persist(job: Job, *, fresh: bool = False) -> Persist:
    """Makes the job durable as it is now, with the incidents that changed.

    Args:
        job: the job.
        fresh: nothing of an earlier one of its name remains.
    """
    return Persist(record(job), job.incidents.take_changed(), fresh)
