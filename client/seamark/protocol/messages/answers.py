"""What any request may be answered with."""

from __future__ import annotations

from typing import Literal

from seamark.protocol.messages.base import Count, Duration, Message, Short, Text


class Welcome(Message, frozen=True):
    """The session stands. ``beat_interval`` is the one to use from now on; ``epoch`` rises with every start."""

    type_id = 2
    direction = "lighthouse, coordinator -> agent; agent -> worker"
    epoch: Count
    beat_interval: Duration = 0.0


class Refused(Message, frozen=True):
    """A request that was understood and not granted; ``reason`` is a sentence for people.

    ``job``, ``member`` and ``incarnation`` say on whose behalf the request was forwarded.
    """

    type_id = 3
    direction = "any daemon -> whoever asked"
    request: Count
    code: Literal[
        "UNKNOWN_JOB",
        "UNKNOWN_MEMBER",
        "UNKNOWN_NODE",
        "STALE_GENERATION",
        "NAME_TAKEN",
        "NO_SLOTS",
        "POLICY",
        "READ_ONLY",
        "BAD_REQUEST",
        "TIMEOUT",
        "UNREACHABLE",
        "NOT_ALLOWED",
    ]
    reason: Text
    job: Short = ""
    member: Short = ""
    incarnation: Short = ""


class Acknowledged(Message, frozen=True):
    """The report with this number was taken (or had been taken before)."""

    type_id = 6
    direction = "lighthouse, coordinator -> agent; agent -> coordinator"
    request: Count
