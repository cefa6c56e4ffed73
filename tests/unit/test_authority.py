"""Who may send what: the table against the messages' own directions, and whom a key speaks for."""

from __future__ import annotations

from itertools import pairwise

import pytest

from seamark.protocol.authority import MAY_SEND, Role, refusal
from seamark.protocol.messages import (
    TYPES,
    Beat,
    Cause,
    DrainNode,
    FollowJob,
    IncidentsRequest,
    InjectFailure,
    JobSpec,
    Join,
    MemberLost,
    Message,
    NodeHello,
    RankJoin,
    Roster,
    StatusRequest,
    StopJob,
    StoreAddress,
    StoreLost,
    SubmitJob,
)

SPEAKERS: dict[str, set[Role]] = {
    "agent": {"node"},
    "worker": {"worker"},
    "operator": {"operator"},
    "coordinator": {"daemon"},
    "manager": {"client"},
    "rank": {"client"},
    # seamark events is one, too
    "subscriber": {"client", "operator"},
}
"""The words of ``Message.direction`` for who sends, by the role that speaks so."""
DOORS = {"lighthouse", "coordinator", "its manager", "another manager"}
"""Its words for who listens; agents' doors are for workers alone."""


def hops(kind: type[Message]) -> set[tuple[str, str]]:
    """(who sends it, who takes it), by the words of its direction."""
    found = set()
    for chain in kind.direction.split(";"):
        stations = [[word.strip() for word in part.replace("|", ",").split(",")] for part in chain.split("->")]
        for senders, takers in pairwise(stations):
            found |= {(sender, taker) for sender in senders for taker in takers}
    return found


def test_the_table_is_what_the_messages_say_of_themselves() -> None:
    expected: dict[Role, set[type[Message]]] = {role: set() for role in MAY_SEND}
    for kind in TYPES.values():
        for sender, taker in hops(kind):
            if taker in DOORS or (sender, taker) == ("worker", "agent"):
                for role in SPEAKERS[sender]:
                    expected[role].add(kind)
            if (sender, taker) == ("agent", "lighthouse"):
                # A rank under fork_and_monitor has an agent of its own, with a client's key.
                expected["client"].add(kind)
    expected["client"].add(Roster)  # which that one tells, in place of a coordinator
    assert {role: set(kinds) for role, kinds in MAY_SEND.items()} == expected


COMMANDS = (DrainNode, FollowJob, IncidentsRequest, InjectFailure, StatusRequest, StopJob, SubmitJob)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_an_operator_s_alone(command: type[Message]) -> None:
    assert [role for role, kinds in MAY_SEND.items() if command in kinds] == ["operator"]


SPEC = JobSpec("j", ["x"], False, "python", "/", {}, 1, 1, 1, "replace", 0, "", "/")


def roster(submission: str) -> Roster:
    store = StoreAddress()
    return Roster(1, "j", 0, "replace", 1, [], store, "", 0, -1, 30.0, 120.0, 0, SPEC, submission=submission)


def lost(node: str) -> MemberLost:
    return MemberLost(1, "j", 0, "j/0", "inc", Cause("exit"), 0.0, 0.0, "agent", node=node)


def store_lost(node: str) -> StoreLost:
    return StoreLost(1, "j", 0, StoreAddress(), 0.0, node)


JOIN = Join("j", "ranks", 0, "j/0", "inc", 1, -1, 0, 0, [])


@pytest.mark.parametrize(
    ("role", "name", "message", "reason"),
    [
        ("node", "a", NodeHello("a", "i", "tcp://h:1", 1), None),
        ("node", "a", NodeHello("b", "i", "tcp://h:1", 1), "other_node"),
        ("node", "a", Beat("a", "i", 1), None),
        ("node", "a", Beat("b", "i", 1), "other_node"),
        ("node", "a", lost("a"), None),
        ("node", "a", lost("b"), "other_node"),
        ("node", "a", lost(""), "other_node"),
        ("node", "a", store_lost(""), None),
        ("node", "a", store_lost("b"), "other_node"),
        ("node", "a", JOIN, None),
        ("node", "a", StopJob(1, "j", "x"), "not_allowed"),
        ("node", "a", DrainNode(1, "a", "x"), "not_allowed"),
        ("node", "a", roster("s"), "not_allowed"),
        ("daemon", "daemon", roster("s"), None),
        ("daemon", "daemon", store_lost("b"), None),
        ("daemon", "daemon", StopJob(1, "j", "x"), "not_allowed"),
        ("operator", "alice", DrainNode(1, "a", "x"), None),
        ("operator", "alice", Beat("a", "i", 1), "not_allowed"),
        ("client", "client", Beat("j/0", "i", 1), None),
        ("client", "client", Beat("a", "i", 1), "other_node"),
        ("client", "client", lost("j/0"), None),
        ("client", "client", lost("other/0"), "other_node"),
        ("client", "client", roster(""), None),
        ("client", "client", roster("s"), "not_allowed"),
        ("client", "client", RankJoin(1, 0, 0, "", False, 0, 0, 0, -1.0, 1.0), None),
        ("client", "client", StopJob(1, "j", "x"), "not_allowed"),
        ("worker", "", JOIN, None),
        ("worker", "", StopJob(1, "j", "x"), "not_allowed"),
        ("worker", "", Beat("a", "i", 1), "not_allowed"),
    ],
)
def test_who_may_send_what(role: Role, name: str, message: Message, reason: str | None) -> None:
    refused = refusal(role, name, message)
    assert (refused.reason if refused else None) == reason
    if refused is not None:
        assert type(message).__name__ in refused.sentence or getattr(message, "node", "") in refused.sentence
        assert name in refused.sentence
