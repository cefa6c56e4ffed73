"""What every message is made of: the limited types of its fields, and the base classes.

A message is a frozen, typed struct that knows nothing of sockets, clocks or bytes. Times are
``time.monotonic()`` seconds of the host of the process that saw the event, and mean nothing on another host;
-1.0 stands for "not observed". Durations are seconds.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta, Struct

VERSION = 1
"""Version of the protocol; peers of different versions refuse each other, naming both."""
Name = Annotated[str, Meta(min_length=1, max_length=200)]
Short = Annotated[str, Meta(max_length=200)]
Text = Annotated[str, Meta(max_length=16_384)]
SharedText = Annotated[str, Meta(max_length=65_536)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Iteration = Annotated[int, Meta(ge=-1, le=2**53)]
"""A restart iteration; -1 before the first."""
QuorumId = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Port = Annotated[int, Meta(ge=0, le=65_535)]
Duration = Annotated[float, Meta(ge=0.0, le=1e9)]
Moment = Annotated[float, Meta(ge=-1.0, le=1e12)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
RANKS = "ranks"
"""The group whose members are the workers of a job."""
REPLICAS = "replicas"
"""The group whose members are replica groups, each with a ``seamark.Manager`` per rank."""


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all messages. ``direction`` and ``answer`` are documentation that tests hold to be complete."""

    type_id: ClassVar[int]
    direction: ClassVar[str]
    answer: ClassVar[str] = ""


class Part(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the structs that only occur inside messages."""


def by_number(base: type[Message]) -> dict[int, type[Message]]:
    """The messages below ``base`` that have a number, by it.

    Raises:
        TypeError: two have the same.
    """
    found: dict[int, type[Message]] = {}
    for sub in base.__subclasses__():
        own = {sub.type_id: sub} if "type_id" in vars(sub) else by_number(sub)
        for number, kind in own.items():
            if number in found:
                raise TypeError(f"{kind.__name__} and {found[number].__name__} share type {number}")
            found[number] = kind
    return found
