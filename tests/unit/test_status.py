"""``seamark status`` and ``seamark events``: what is judged, shown, and said to be missing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from msgspec.structs import replace
from rich.console import Console

from seamark.protocol.messages import (
    RANKS,
    REPLICAS,
    Cause,
    CompletedEvent,
    CoordinatorStatus,
    Event,
    EventBeat,
    Failure,
    FailureEvent,
    GroupMember,
    GroupStatus,
    JobStatus,
    LighthouseStatus,
    MemberStatus,
    NodeHealth,
    NodeStatus,
    QuorumEvent,
    RecoveredEvent,
    Replica,
    ReplicaQuorumEvent,
    Snapshot,
)
from seamarkd.cli.events import Printer, Reader, sentence
from seamarkd.cli.operator import UnreachableError
from seamarkd.cli.status import assess, connectable, data, draw, exposed, on_loopback, unclocked, without_suite
from seamarkd.settings import load


def job(name: str = "j", state: str = "RUNNING", alive: int = 2, world: int = 2, sentence: str = "fine") -> JobStatus:
    return JobStatus(1, name, state, 0, 3, alive, world, 4, 1, 50, {}, sentence, "", "", [], 0, 9.0)


def member(rank: int, *, alive: bool = True, step: int = 50) -> MemberStatus:
    return MemberStatus(f"j/{rank}", rank, "n", 100 + rank, alive, step)


def coordinator(
    *jobs: JobStatus, trouble: str = "", nodes: tuple[str, ...] = ("n",), members: list[MemberStatus] | None = None
) -> CoordinatorStatus:
    places = [NodeStatus(node, 8, 2) for node in nodes]
    return CoordinatorStatus(1, 7, "seamark 1", 42, 60.0, trouble, places, list(jobs), {"j": members or []})


def lighthouse(
    *groups: GroupStatus,
    age: float = 0.1,
    verdict: str = "",
    sentence: str = "",
    waiting: dict[str, str] | None = None,
    late: float = 0.0,
) -> LighthouseStatus:
    nodes = [NodeHealth("n", age, verdict)]
    return LighthouseStatus(
        1, 7, "seamark 1", 41, 60.0, sentence, nodes, waiting or {}, list(groups), {}, 0.1, late, 0.0
    )


def replicas(*failures: FailureEvent, count: int = 2, group: str = REPLICAS) -> GroupStatus:
    members = [GroupMember(f"r{number}", "i", "", 0.3, number - 1, number == 1) for number in range(count)]
    return GroupStatus("j", group, 9, "waits for 1 more replica", True, members, list(failures))


def replica_lost(kind: Literal["heartbeat", "left"] = "heartbeat") -> FailureEvent:
    cause = Cause(kind=kind, text="heartbeat timeout\nmore" if kind == "heartbeat" else "the end")
    failure = Failure("lost", "r7", "i", -1, "", -1, cause, -1.0, 1.0, 1.0, "heartbeat timeout")
    return FailureEvent("j", REPLICAS, 1, 3, failure)


def test_a_node_whose_health_checks_fail_is_a_problem_that_says_why() -> None:
    answer = coordinator()
    answer = msgspec.structs.replace(answer, nodes=[NodeStatus("n", 8, 2, unhealthy="disk: full")])
    picture = assess(answer, lighthouse())
    assert (picture.code, picture.problems) == (1, ["node n takes no more jobs: disk: full"])
    assert picture.nodes[0].cells[-1] == "takes no more jobs: disk: full"


def drawn(*answers: CoordinatorStatus | LighthouseStatus | str, exposed: list[str] | None = None) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(draw(assess(*answers, exposed)))  # type: ignore[arg-type]
    return out.getvalue()


@pytest.mark.parametrize(
    ("first", "second", "code", "problem"),
    [
        (coordinator(), lighthouse(), 0, ""),
        (coordinator(job()), lighthouse(), 0, ""),
        (coordinator(job(state="STARTING", alive=0)), lighthouse(), 0, ""),
        (coordinator(job(state="FAILED", alive=0)), lighthouse(), 0, ""),
        (coordinator(job(alive=1)), lighthouse(), 1, "job j runs with 1 of 2 ranks"),
        (coordinator(job(state="PENDING", sentence="no slots")), lighthouse(), 1, "waits to be placed: no slots"),
        (coordinator(trouble="the disk is full"), lighthouse(), 1, "the coordinator: the disk is full"),
        (coordinator(), lighthouse(sentence="many nodes are silent"), 1, "the lighthouse: many nodes"),
        (coordinator(), lighthouse(verdict="frozen"), 1, "node n: frozen"),
        (coordinator(), lighthouse(age=0.6), 1, "node n: silent"),
        (coordinator(nodes=("n", "m")), lighthouse(), 1, "node m sends no heartbeat"),
        (coordinator(), lighthouse(replicas()), 0, ""),
        (coordinator(), lighthouse(replicas(replica_lost("left"))), 0, ""),
        (coordinator(), lighthouse(replicas(replica_lost())), 1, "job j: r7 lost: heartbeat timeout"),
        ("no answer", lighthouse(), 1, "the coordinator is unreachable"),
        (coordinator(), "no answer", 1, "the lighthouse is unreachable"),
        ("no answer", "no answer", 2, "the lighthouse is unreachable"),
    ],
)
def test_the_exit_code_and_the_sentence_behind_it(
    first: CoordinatorStatus | str, second: LighthouseStatus | str, code: int, problem: str
) -> None:
    picture = assess(first, second)
    assert picture.code == code
    assert any(problem in text for text in picture.problems) if problem else not picture.problems
    assert json.loads(json.dumps(data(first, second, picture)))["code"] == code


def test_without_a_suite_the_standalone_jobs_are_shown() -> None:
    well, ill = (coordinator(job("a")), lighthouse()), (coordinator(job("b", alive=1)), lighthouse())
    assert without_suite({"a": well}).code == 0
    picture = without_suite({"a": well, "b": ill})
    assert (picture.code, picture.problems) == (1, ["b: job b runs with 1 of 2 ranks: fine"])
    out = io.StringIO()
    Console(file=out, width=200).print(draw(picture))
    assert [line for line in out.getvalue().splitlines() if line.startswith(("no suite", "standalone"))] == [
        "no suite runs on this host",
        "standalone job a",
        "standalone job b",
    ]
    assert "unreachable" not in out.getvalue()
    found = json.loads(json.dumps(data("none", "none", picture)))["standalone"]
    assert {name: one["code"] for name, one in found.items()} == {"a": 0, "b": 1}


def test_without_a_suite_and_a_standalone_job_that_is_said_plainly() -> None:
    picture = without_suite({})
    assert picture.code == 2
    assert picture.problems == ["no suite runs on this host, nor a standalone job: seamark up starts a suite"]


def test_members_come_worst_first_and_not_more_than_people_read() -> None:
    members = [member(rank) for rank in range(25)]
    members[7] = member(7, step=-1)
    members[9] = member(9, step=40)
    members[11] = member(11, alive=False, step=50)
    picture = assess(coordinator(job(), members=members), lighthouse())
    assert [row.cells[0] for row in picture.members["j"]][:4] == ["11", "7", "9", "0"]
    assert len(picture.members["j"]) == 20
    assert "and 5 more" in drawn(coordinator(job(), members=members), lighthouse())


def test_a_late_lighthouse_is_said_and_is_no_fault() -> None:
    picture = assess(coordinator(job()), lighthouse(late=0.8))
    assert picture.code == 0
    assert any("ran 0.8 s late" in note for note in picture.notes)


def test_the_quorums_sentence_goes_before_the_coordinators_while_a_job_lives() -> None:
    waiting = {"j": "waits for rank 3"}
    assert "waits for rank 3" in drawn(coordinator(job()), lighthouse(waiting=waiting))
    assert "waits for rank 3" not in drawn(coordinator(job(state="SUCCEEDED")), lighthouse(waiting=waiting))


def test_replica_groups_are_shown_with_their_quorum_and_the_failed_ones_first() -> None:
    text = drawn(coordinator(), lighthouse(replicas(replica_lost()), replicas(replica_lost(), group=RANKS)))
    assert text.count("replicas of j: waits for 1 more replica") == 1
    rows = [line.split() for line in text.splitlines() if line.startswith("r") and line[1].isdecimal()]
    assert rows == [
        ["r7", "lost", "heartbeat", "timeout"],
        ["r0", "0.3", "s", "none", "yet", "alive"],
        ["r1", "0.3", "s", "0", "joined"],
    ]
    assert "left  " in drawn(coordinator(), lighthouse(replicas(replica_lost("left"))))
    assert "and 6 more" in drawn(coordinator(), lighthouse(replicas(replica_lost(), count=25)))


def test_replica_groups_are_in_the_data() -> None:
    answers = (coordinator(), lighthouse(replicas(replica_lost())))
    (group,) = data(*answers, assess(*answers))["lighthouse"]["groups"]
    assert [member["member"] for member in group["members"]] == ["r0", "r1"]
    assert group["failures"][0]["failure"]["cause"]["kind"] == "heartbeat"


def test_what_a_job_wrote_is_shown_and_does_not_steer_the_terminal() -> None:
    text = drawn(coordinator(job(sentence="[red]x[/] \x1b[2J \udc80 \n[/oops]")), lighthouse())
    assert r"[red]x[/] \x1b[2J \udc80 \n[/oops]" in text


def test_an_open_address_is_said() -> None:
    assert "tcp://*:29710 is open to the network" in drawn(coordinator(), lighthouse(), exposed=["tcp://*:29710"])


def test_keys_make_no_address_open(tmp_path: Path) -> None:
    flags = {"security.insecure": True, "coordinator.address": "tcp://10.0.0.1:5"}
    assert exposed(load(None, {}, flags)) == ["tcp://10.0.0.1:5"]
    assert exposed(load(None, {}, flags | {"security.keys": str(tmp_path)})) == []


def test_what_was_refused_is_said_of_each_daemon() -> None:
    counts = {"unknown_key": 3, "other_node": 1, "fields": 2, "send:No route to host": 9}
    with_agent = replace(coordinator(), nodes=[NodeStatus("n", 8, 2, "", {"not_allowed": 4})], dropped={"header": 1})
    text = drawn(with_agent, replace(lighthouse(), dropped=counts))
    refused = "1 messages in the name of another node, 3 connections with a key that nobody knows"
    for said in (
        f"the lighthouse refused, the last 0.0 s ago: {refused}: its log names the peers",
        "the lighthouse dropped frames that were no message, the last 0.0 s ago: 2 fields",
        "the coordinator dropped frames that were no message, the last 0.0 s ago: 1 header",
        "the agent of node n refused, the last 0.0 s ago: 4 messages that are not their sender's to send",
    ):
        assert said in text
    assert "No route" not in text, "who is gone is no fault"
    assert assess(with_agent, lighthouse()).code == 0


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("tcp://127.0.0.1:1", True),
        ("tcp://127.9.9.9:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://localhost:1", True),
        ("ipc:///run/x", True),
        ("tcp://*:1", False),
        ("tcp://0.0.0.0:1", False),
        ("tcp://10.0.0.1:1", False),
        ("tcp://head:1", False),
    ],
)
def test_which_addresses_stay_on_this_host(address: str, expected: bool) -> None:
    assert on_loopback(address) is expected


def test_a_wildcard_is_reached_on_this_host() -> None:
    assert connectable("tcp://*:29710") == connectable("tcp://0.0.0.0:29710") == "tcp://127.0.0.1:29710"
    assert connectable("tcp://head:29710") == "tcp://head:29710"


def test_the_time_alone_is_no_change() -> None:
    def seen(age: float, alive: int) -> object:
        return unclocked(data(coordinator(job(alive=alive)), lighthouse(age=age), assess("", "")))

    assert seen(0.1, 2) == seen(0.2, 2)
    assert seen(0.1, 2) != seen(0.1, 1)


# --- events ------------------------------------------------------------------------------------------------


def lost(sequence: int, epoch: int = 1, at: float = 1.0) -> FailureEvent:
    cause = Cause(kind="signal", status=9, text="killed by SIGKILL\nmore")
    failure = Failure("lost", "j/2", "i", 2, "node-a", 3, cause, -1.0, at, at, "agent")
    return FailureEvent("j", "ranks", epoch, sequence, failure)


def quorum(sequence: int, epoch: int = 1) -> QuorumEvent:
    return QuorumEvent("j", "ranks", epoch, sequence, 1, 0, 4, 4, [], 2.0, 3, [])


def recovered(sequence: int) -> RecoveredEvent:
    return RecoveredEvent("j", REPLICAS, 1, sequence, "r7", "i")


def replica_quorum(taking_part: list[Replica]) -> ReplicaQuorumEvent:
    return ReplicaQuorumEvent("j", REPLICAS, 1, 4, 9, taking_part, "all there")


def snapshot(*events: Event, latest: int, epoch: int = 1, completed: bool = False) -> Snapshot:
    failures = [event for event in events if isinstance(event, FailureEvent)]
    quorums = [event for event in events if isinstance(event, QuorumEvent)]
    returns = [event for event in events if isinstance(event, RecoveredEvent)]
    return Snapshot(1, "j", epoch, latest, failures, quorums, completed, "", returns)


class Known:
    """A lighthouse that answers with this snapshot."""

    def __init__(self, answer: Snapshot | None = None) -> None:
        self.answer = answer
        self.asked = 0

    def __call__(self, name: str) -> Snapshot | None:
        self.asked += 1
        return self.answer


def test_history_is_in_order_and_says_what_is_no_longer_kept() -> None:
    reader = Reader(Known(snapshot(lost(1), lost(5), quorum(2), quorum(6), latest=8, completed=True)))
    assert reader.open("j") == [
        lost(1),
        quorum(2),
        "j: events 3-4 were no longer kept by the lighthouse",
        lost(5),
        quorum(6),
        "j: event 7 was no longer kept by the lighthouse",
        CompletedEvent("j", "ranks", 1, 8),
    ]


def test_returns_are_part_of_the_history() -> None:
    history = [replica_lost(), recovered(4)]
    reader = Reader(Known(snapshot(*history, latest=4)))
    assert reader.open("j") == ["j: events 1-2 were no longer kept by the lighthouse", *history]


def test_an_event_comes_out_once_and_a_gap_is_filled_from_a_snapshot() -> None:
    known = Known(snapshot(lost(1), quorum(2), latest=2))
    reader = Reader(known)
    reader.open("j")
    assert reader.event(lost(1)) == []
    assert reader.event(lost(3)) == [lost(3)]
    assert reader.event(lost(3)) == []
    known.answer = snapshot(lost(3), quorum(4), lost(5), quorum(6), latest=6)
    expected = ["j: events 4-5 were missed: snapshot taken", quorum(4), lost(5), quorum(6)]
    assert reader.event(quorum(6)) == expected
    assert known.asked == 2


def test_a_lost_tail_is_found_by_the_beat_and_only_then_is_anything_asked() -> None:
    known = Known(snapshot(lost(1), latest=1))
    reader = Reader(known)
    reader.open("j")
    assert reader.beat(EventBeat(1, {"j": 1, "other": 9}, {}), "j") == []
    assert known.asked == 1
    known.answer = snapshot(lost(1), quorum(2), latest=2)
    assert reader.beat(EventBeat(1, {"j": 2}, {}), None) == ["j: event 2 was missed: snapshot taken", quorum(2)]


def test_a_new_lighthouse_numbers_anew_whether_or_not_it_knows_the_job_yet() -> None:
    for answer in (None, snapshot(lost(1, 2), latest=1, epoch=2)):
        known = Known(snapshot(quorum(9), latest=9))
        reader = Reader(known)
        reader.open("j")
        known.answer = answer
        started = "j: the lighthouse was started anew, its numbers begin again: snapshot taken"
        assert reader.event(lost(1, 2)) == [started, lost(1, 2)]
        assert reader.event(quorum(10)) == []
        assert reader.event(quorum(2, 2)) == [quorum(2, 2)]


def test_a_lighthouse_that_gives_no_snapshot_loses_no_event_that_came() -> None:
    def silent(name: str) -> Snapshot | None:
        raise UnreachableError("no answer")

    reader = Reader(silent)
    assert reader.event(lost(3)) == ["j: no answer", "j: events 1-2 were no longer kept by the lighthouse", lost(3)]


def test_sentences() -> None:
    assert sentence(lost(1)) == "rank 2 on node-a lost: killed by SIGKILL (iteration 3)"
    assert sentence(quorum(1)) == "quorum: iteration 4, 0 ranks, restart 4"
    assert sentence(replica_lost()) == "r7 lost: heartbeat timeout"
    assert sentence(recovered(1)) == "r7 is back"
    taking_part = [Replica(f"r{number}", "i", "", "", 5 + number, 1) for number in range(2)]
    assert sentence(replica_quorum(taking_part[:1])) == "quorum: 1 replica at step 5: r0"
    assert sentence(replica_quorum(taking_part)) == "quorum: 2 replicas at steps 5 to 6: r0, r1"


def test_events_before_a_moment_are_left_out_with_what_was_missed_before_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printer = Printer(as_json=True, local=True, not_before=5.0)
    printer.show(["old gap", lost(3, at=4.0), "new gap", lost(5, at=6.0)])
    out, err = capsys.readouterr()
    assert [json.loads(line)["sequence"] for line in out.splitlines()] == [5]
    assert err == "new gap\n"


def test_an_event_without_a_time_is_as_old_as_the_one_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer(as_json=True, local=True, not_before=5.0)
    printer.show([lost(3, at=4.0), recovered(4), lost(5, at=6.0), recovered(6)])
    assert [json.loads(line)["sequence"] for line in capsys.readouterr().out.splitlines()] == [5, 6]


def test_a_line_names_job_number_and_group(capsys: pytest.CaptureFixture[str]) -> None:
    Printer(as_json=False, local=False).show([replica_lost(), recovered(4)])
    assert capsys.readouterr().out.splitlines() == [
        "--:--:--.---  j  #3  replicas  r7 lost: heartbeat timeout",
        "--:--:--.---  j  #4  replicas  r7 is back",
    ]


def test_what_was_refused_long_ago_alarms_nobody() -> None:
    ago = {"unknown_key": 7_000.0, "other_node": 9_000.0}
    old = replace(lighthouse(), dropped={"unknown_key": 3, "other_node": 1}, dropped_ago=ago)
    node = NodeStatus("n", 8, 2, "", {"not_allowed": 4}, "", {"not_allowed": 200.0})
    picture = assess(replace(coordinator(), nodes=[node]), old)
    (remark,) = picture.remarks
    assert remark.startswith("the lighthouse refused, the last 117 min ago: 1 messages in the name of another node, 3")
    (note,) = picture.notes
    assert note.startswith("the agent of node n refused, the last 3 min ago: 4 messages")
