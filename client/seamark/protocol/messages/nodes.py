"""A node and its agent: introduced, heard, drained."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from seamark.protocol.messages.base import Count, Duration, Message, Name, Short

ANSWER_EVERY = 10
"""The lighthouse answers one of so many beats of a known node, and all of a stranger's: an answer costs what three
beats cost."""


class NodeHello(Message, frozen=True):
    """An agent introduces its node. ``address`` is where the lighthouse may knock, to see whether the host lives.

    ``draining`` says why no worker is to be placed there, and those that are there leave; empty for a node that serves.
    ``unhealthy`` says why no job is to be placed there, although what runs there goes on.
    """

    type_id = 1
    direction = "agent -> lighthouse, coordinator"
    answer = "Welcome | Refused"
    node: Name
    incarnation: Name
    address: Short
    slots: Count
    software: Short = ""
    draining: Short = ""
    unhealthy: Short = ""


class Beat(Message, frozen=True):
    """One heartbeat for a node and all its workers."""

    type_id = 4
    direction = "agent -> lighthouse | coordinator"
    answer = "BeatAnswer"
    node: Name
    incarnation: Name
    sequence: Count


class BeatAnswer(Message, frozen=True):
    """``known`` false means: register again. For a node that it knows the lighthouse has one each ``ANSWER_EVERY``."""

    type_id = 5
    direction = "lighthouse -> agent"
    epoch: Count
    sequence: Count
    known: bool


class DrainNode(Message, frozen=True):
    """A person wants this node to be left by its workers, and given no new ones; with ``undo`` to serve again."""

    type_id = 8
    direction = "operator -> coordinator -> agent"
    answer = "Acknowledged | Refused"
    request: Count
    node: Name
    reason: Short
    undo: bool = False


class NodeLeft(Message, frozen=True):
    """A node that drains was given places of this job, and will start nobody in them."""

    type_id = 9
    direction = "agent -> coordinator"
    job: Name
    node: Name


class NodeRefusals(Message, frozen=True):
    """What an agent has refused its workers since it started, by reason: messages that are not theirs to send."""

    type_id = 100
    direction = "agent -> coordinator"
    node: Name
    refused: Annotated[dict[Short, Count], Meta(max_length=20)]
    ago: Annotated[dict[Short, Duration], Meta(max_length=20)] = {}
    """Seconds since each of them rose last."""
