"""What a listener delivers: each failure once, through gaps, lost tails and lighthouses that come and go."""

from __future__ import annotations

import random
from collections import Counter
from typing import Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamark import listening
from seamark.listening import ABSENT_BEATS, EventsLost, Listening
from seamark.protocol.messages import (
    RANKS,
    REPLICAS,
    Cause,
    CompletedEvent,
    Event,
    EventBeat,
    Failure,
    FailureEvent,
    GroupMember,
    GroupStatus,
    Member,
    QuorumEvent,
    RecoveredEvent,
    Replica,
    ReplicaQuorumEvent,
    Snapshot,
)
from seamarkd.lighthouse import events as ring
from seamarkd.lighthouse.events import EventLog

KILLED = Cause(kind="signal", status=9, text="killed by SIGKILL")


def failure(
    member: str, incarnation: str = "i", kind: Literal["lost", "faulted"] = "lost", iteration: int = 0
) -> Failure:
    return Failure(kind, member, incarnation, 0, "n", iteration, KILLED, -1.0, 1.0, 1.0, "agent")


def lost(
    sequence: int,
    member: str | None = None,
    incarnation: str = "i",
    *,
    epoch: int = 1,
    group: str = RANKS,
    job: str = "j",
) -> FailureEvent:
    return FailureEvent(job, group, epoch, sequence, failure(member or f"j/{sequence}", incarnation))


def faulted(sequence: int, iteration: int, *, epoch: int = 1) -> FailureEvent:
    return FailureEvent("j", RANKS, epoch, sequence, failure("j/0", kind="faulted", iteration=iteration))


def recovered(sequence: int, member: str, incarnation: str = "i", *, epoch: int = 1) -> RecoveredEvent:
    return RecoveredEvent("j", REPLICAS, epoch, sequence, member, incarnation)


def quorum(sequence: int, members: dict[str, str], *, epoch: int = 1, iteration: int = 0) -> QuorumEvent:
    listed = [Member(name, incarnation, 0, "n", 0) for name, incarnation in members.items()]
    return QuorumEvent("j", RANKS, epoch, sequence, 1, 0, iteration, 0, listed, 1.0, -1, [])


def replica_quorum(sequence: int, members: dict[str, str], *, epoch: int = 1) -> ReplicaQuorumEvent:
    listed = [Replica(name, incarnation, "", "", 0, 1) for name, incarnation in members.items()]
    return ReplicaQuorumEvent("j", REPLICAS, epoch, sequence, 1, listed, "")


def status(
    members: dict[str, str], *, group: str = RANKS, settled: bool = True, failures: tuple[FailureEvent, ...] = ()
) -> GroupStatus:
    living = [GroupMember(name, incarnation, "n", 0.0, -1, False) for name, incarnation in members.items()]
    return GroupStatus("j", group, 0, "", settled, living, list(failures))


def snapshot(
    sequence: int, *events: Event, groups: tuple[GroupStatus, ...] = (), epoch: int = 1, completed: bool = False
) -> Snapshot:
    return Snapshot(
        1,
        "j",
        epoch,
        sequence,
        [event for event in events if isinstance(event, FailureEvent)],
        [event for event in events if isinstance(event, QuorumEvent)],
        completed,
        "",
        [event for event in events if isinstance(event, RecoveredEvent)],
        list(groups),
    )


def beat(latest: int | None = None, *, epoch: int = 1, job: str = "j") -> EventBeat:
    return EventBeat(epoch, {} if latest is None else {job: latest}, {})


class Listener:
    """A ``Listening`` of job j, and everything that it delivered and asked."""

    def __init__(
        self,
        *told: Event | Snapshot | EventBeat,
        job: str | None = "j",
        group: str | None = None,
        include_current: bool = False,
        recoveries: bool = False,
    ) -> None:
        self.core = Listening(job, group, include_current, recoveries=recoveries)
        self.tell(*told)

    def tell(self, *messages: Event | Snapshot | EventBeat) -> list[object]:
        """What these messages have delivered."""
        out: list[object] = []
        self.asked: list[str] = []
        for message in messages:
            heard = self.core.take(message)
            out += heard.deliver
            self.asked += heard.ask
        return out


def begun(latest: int = 0, members: dict[str, str] | None = None, **options: bool) -> Listener:
    """A listener that has its first snapshot."""
    listener = Listener(**options)  # type: ignore[arg-type]
    listener.tell(beat(latest), snapshot(latest, groups=(status(members or {}),)))
    assert listener.core.wanted == []
    return listener


def test_the_ring_is_as_long_as_the_lighthouse_s() -> None:
    assert listening.RING == ring.RING


# --- where it begins ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        (beat(2),),
        (beat(2), snapshot(2, lost(1), lost(2))),
        (snapshot(2, lost(1), lost(2)), beat(2)),
    ],
)
def test_a_new_listener_begins_now(first: tuple[Event | Snapshot | EventBeat, ...]) -> None:
    listener = Listener()
    assert listener.tell(*first) == []
    assert listener.tell(lost(2), lost(3)) == [lost(3)]


def test_an_event_that_comes_before_the_first_beat_is_now() -> None:
    assert Listener().tell(lost(3), beat(3), lost(3), lost(4)) == [lost(3), lost(4)]


def test_a_job_that_turns_up_later_is_heard_from_its_first_event() -> None:
    listener = Listener(beat())
    assert listener.tell(beat(2)) == []
    assert listener.asked == ["j"]
    assert listener.tell(snapshot(2, lost(1), lost(2))) == [lost(1), lost(2)]


def test_what_happened_between_the_first_beat_and_the_snapshot_is_new() -> None:
    listener = Listener(beat(1))
    assert listener.asked == ["j"]
    assert listener.tell(snapshot(2, lost(1), lost(2))) == [lost(2)]


def test_the_failures_in_force_go_first_if_they_are_asked_for() -> None:
    listener = Listener(include_current=True)
    assert listener.tell(beat(3), lost(5)) == []
    in_force = status({}, failures=(lost(1), lost(4)))
    assert listener.tell(snapshot(4, lost(1), lost(2), lost(4), groups=(in_force,))) == [lost(1), lost(4), lost(5)]
    assert listener.tell(lost(5), lost(6)) == [lost(6)]


def test_a_lighthouse_without_events_holds_nothing_up() -> None:
    assert Listener(beat(0), include_current=True).tell(lost(1)) == [lost(1)]


# --- gaps and lost tails -----------------------------------------------------------------------------------


def test_an_event_comes_once_in_order_and_after_a_gap_it_waits_for_the_snapshot() -> None:
    listener = begun()
    assert listener.tell(lost(1), lost(1)) == [lost(1)]
    assert listener.tell(lost(3), lost(3), lost(5)) == []
    assert listener.asked == ["j"]
    assert listener.tell(snapshot(3, lost(1), lost(2), lost(3))) == [lost(2), lost(3)]
    assert listener.asked == ["j"], "4 is still missing"
    assert listener.tell(snapshot(5, lost(4), lost(5))) == [lost(4), lost(5)]
    assert (listener.asked, listener.core.wanted) == ([], [])


def test_a_late_event_closes_the_gap_as_well() -> None:
    listener = begun()
    assert listener.tell(lost(2), lost(1)) == [lost(1), lost(2)]
    assert listener.core.wanted == []


def test_a_beat_that_is_ahead_is_a_lost_tail() -> None:
    listener = begun(2)
    assert listener.tell(beat(2)) == []
    assert listener.asked == []
    assert listener.tell(beat(3), beat(3)) == []
    assert (listener.asked, listener.core.wanted) == (["j"], ["j"])
    assert listener.tell(snapshot(3, lost(3))) == [lost(3)]


def test_numbers_that_are_no_failures_are_not_missed() -> None:
    listener = begun()
    assert listener.tell(replica_quorum(1, {"a": "1"}), quorum(2, {}), CompletedEvent("j", RANKS, 1, 3)) == []
    assert listener.tell(lost(7)) == []
    assert listener.tell(snapshot(7, quorum(6, {}), lost(7))) == [lost(7)]


def test_what_the_ring_no_longer_holds_is_said_to_be_lost() -> None:
    listener = begun(10)
    kept = [lost(sequence) for sequence in range(21, 21 + listening.RING)]
    last = kept[-1].sequence
    assert listener.tell(beat(last)) == []
    known = (quorum(15, {}), recovered(16, "a"))
    assert listener.tell(snapshot(last, *known, *kept)) == [EventsLost("j", 8), *kept]


def test_a_full_ring_that_reaches_back_lost_nothing() -> None:
    listener = begun(20)
    kept = [lost(sequence) for sequence in range(21, 21 + listening.RING)]
    assert listener.tell(snapshot(kept[-1].sequence, *kept)) == kept


def test_a_snapshot_that_events_have_overtaken_does_not_bring_the_dead_back() -> None:
    listener = Listener(beat(0))
    assert listener.tell(lost(1, "j/0", "x")) == [lost(1, "j/0", "x")]
    assert listener.tell(snapshot(0, groups=(status({"j/0": "x"}),))) == []
    assert listener.core.wanted == ["j"]
    assert listener.tell(lost(2, "j/0", "x")) == []


# --- who and what ------------------------------------------------------------------------------------------


def test_other_jobs_and_groups_are_nobody_s_business() -> None:
    listener = Listener(beat(0), group=REPLICAS)
    assert listener.tell(lost(1, job="k"), EventBeat(1, {"j": 0, "k": 9}, {})) == []
    assert listener.core.wanted == ["j"]
    assert listener.tell(lost(1), lost(2, group=REPLICAS)) == [lost(2, group=REPLICAS)]


def test_all_jobs_are_heard_each_by_its_own_numbers() -> None:
    listener = Listener(EventBeat(1, {"j": 4, "k": 0}, {}), job=None)
    assert listener.asked == ["j", "k"]
    assert listener.tell(lost(5), lost(1, job="k"), lost(1, job="new")) == [
        lost(5),
        lost(1, job="k"),
        lost(1, job="new"),
    ]


def test_a_job_that_the_lighthouse_forgot_is_forgotten() -> None:
    listener = Listener(EventBeat(1, {"j": 4}, {}), job=None)
    assert listener.tell(lost(6), EventBeat(1, {}, {})) == [EventsLost("j", 1), lost(6)]
    assert listener.core.wanted == []
    assert listener.tell(lost(1)) == [lost(1)]


def test_recoveries_are_delivered_if_asked_for_and_allow_another_loss() -> None:
    first, back, again = lost(1, "a", group=REPLICAS), recovered(2, "a"), lost(3, "a", group=REPLICAS)
    assert begun().tell(first, back, again) == [first, again]
    assert begun(recoveries=True).tell(first, back, again) == [first, back, again]
    filled = begun(recoveries=True)
    assert filled.tell(again) == []
    assert filled.tell(snapshot(3, first, back, again)) == [first, back, again]


def test_a_loss_that_is_published_twice_is_one() -> None:
    assert begun().tell(lost(1, "a"), lost(2, "a")) == [lost(1, "a")]


def test_faults_of_one_iteration_are_one() -> None:
    listener = begun()
    assert listener.tell(faulted(1, 3), faulted(2, 3), faulted(3, 4)) == [faulted(1, 3), faulted(3, 4)]


def test_identities_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "SEEN_KEPT", 3)
    listener = begun()
    listener.tell(*(lost(sequence) for sequence in range(1, 6)))
    again = [lost(sequence - 2, f"j/{sequence}", epoch=2) for sequence in range(3, 6)]
    assert listener.tell(*again) == []


def test_what_waits_behind_a_gap_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "WAITING_KEPT", 3)
    listener = begun()
    events = [lost(sequence) for sequence in range(1, 8)]
    assert listener.tell(*events[1:]) == []
    assert listener.tell(snapshot(7, *events)) == events


# --- a lighthouse that was away ----------------------------------------------------------------------------

KNOWN = {"j/0": "a", "j/1": "b", "j/2": "c"}


def away(out: list[object]) -> list[tuple[str, str]]:
    """Who was concluded to be lost; everything else fails."""
    found = []
    for event in out:
        assert isinstance(event, FailureEvent)
        assert "while the lighthouse was away" in event.failure.cause.text
        assert (event.sequence, event.failure.cause.kind, event.failure.kind) == (0, "gone", "lost")
        found.append((event.failure.member, event.failure.incarnation))
    return found


def test_a_new_lighthouse_is_asked_until_it_knows_and_then_compared() -> None:
    listener = begun(5, KNOWN)
    assert listener.tell(beat(epoch=2)) == []
    assert listener.asked == [], "it does not know the job yet"
    assert listener.tell(beat(0, epoch=2)) == []
    assert listener.asked == ["j"]
    unsettled = snapshot(0, groups=(status({"j/0": "a"}, settled=False),), epoch=2)
    assert listener.tell(unsettled) == []
    assert (listener.asked, listener.core.wanted) == ([], ["j"])
    settled = snapshot(0, groups=(status({"j/0": "a", "j/1": "new"}),), epoch=2)
    out = listener.tell(settled)
    assert away(out) == [("j/1", "b"), ("j/2", "c")]
    assert isinstance(out[0], FailureEvent)
    assert (out[0].epoch, out[0].failure.node, out[0].group) == (2, "n", RANKS)
    assert listener.core.wanted == []
    assert listener.tell(settled, beat(0, epoch=2)) == []


def test_a_loss_that_both_lighthouses_report_is_one() -> None:
    listener = begun(5, KNOWN)
    assert listener.tell(lost(6, "j/0", "a"), lost(1, "j/0", "a", epoch=2)) == [lost(6, "j/0", "a")]
    late = lost(2, "j/2", "c", epoch=2)
    assert away(listener.tell(snapshot(1, groups=(status({"j/1": "b"}),), epoch=2))) == [("j/2", "c")]
    assert listener.tell(late) == []


def test_a_loss_published_by_the_new_lighthouse_is_not_concluded_as_well() -> None:
    listener = begun(5, KNOWN)
    published = lost(1, "j/0", "a", epoch=2)
    answer = snapshot(1, published, groups=(status({"j/0": "new", "j/1": "b", "j/2": "c"}),), epoch=2)
    assert listener.tell(beat(1, epoch=2)) == []
    assert listener.tell(answer) == [published]


def test_members_are_known_from_quorums_too() -> None:
    listener = begun()
    listener.tell(quorum(1, {"j/0": "a"}, iteration=7), replica_quorum(2, {"x": "1", "y": "2"}))
    out = listener.tell(snapshot(0, groups=(status({}), status({"x": "1"}, group=REPLICAS)), epoch=2))
    assert away(out) == [("j/0", "a"), ("y", "2")]
    assert isinstance(out[0], FailureEvent)
    assert (out[0].failure.iteration, out[0].failure.rank) == (7, 0)


def test_who_is_there_without_a_known_incarnation_is_not_called_lost() -> None:
    assert begun(0, KNOWN).tell(snapshot(0, groups=(status(dict.fromkeys(KNOWN, "")),), epoch=2)) == []


def test_two_lighthouses_in_a_row() -> None:
    listener = begun(5, KNOWN)
    listener.tell(beat(0, epoch=2), quorum(1, KNOWN | {"j/2": "d"}, epoch=2))
    out = listener.tell(snapshot(0, groups=(status({"j/0": "a", "j/1": "b", "j/2": "e"}),), epoch=3))
    assert away(out) == [("j/2", "c"), ("j/2", "d")]


def test_the_members_of_a_completed_job_are_not_missed() -> None:
    listener = begun(5, KNOWN)
    listener.tell(CompletedEvent("j", RANKS, 1, 6))
    assert listener.tell(snapshot(0, groups=(status({}),), epoch=2)) == []
    assert begun(5, KNOWN).tell(snapshot(0, groups=(status({}),), epoch=2, completed=True)) == []


def test_an_older_lighthouse_says_nothing_any_more() -> None:
    listener = begun(5)
    listener.tell(beat(0, epoch=2))
    assert listener.tell(lost(6), snapshot(9, lost(9)), beat(9)) == []
    assert listener.tell(lost(1, epoch=2)) == [lost(1, epoch=2)]


def test_a_gap_that_nobody_can_fill_any_more_is_said_to_be_one() -> None:
    listener = begun()
    assert listener.tell(lost(2), lost(5), beat(6)) == []
    expected = [EventsLost("j", 1), lost(2), EventsLost("j", 2), lost(5), EventsLost("j", 1)]
    assert listener.tell(beat(0, epoch=2)) == expected


def test_replicas_that_a_new_lighthouse_never_hears_of_are_lost_after_a_while() -> None:
    listener = begun()
    listener.tell(replica_quorum(1, {"x": "1"}))
    beats = [beat(epoch=2)] * ABSENT_BEATS
    assert listener.tell(*beats[:-1]) == []
    assert away(listener.tell(beats[-1])) == [("x", "1")]
    assert listener.tell(*beats) == []


def test_ranks_without_a_roster_are_waited_for() -> None:
    listener = begun(5, KNOWN)
    assert listener.tell(*[beat(epoch=2)] * (2 * ABSENT_BEATS)) == []
    assert away(listener.tell(snapshot(0, groups=(status({"j/0": "a"}),), epoch=2))) == [("j/1", "b"), ("j/2", "c")]


# --- properties --------------------------------------------------------------------------------------------


class Lighthouse:
    """The real ring, members that die and come back, and a network that does what it likes."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.members = {f"m{number}": f"m{number}#0" for number in range(4)}
        self.born = 0
        self.expected: Counter[tuple[str, str]] = Counter()
        self.dead: set[str] = set()
        self.wire: list[Event | Snapshot | EventBeat] = []
        self.asked: list[int] = []
        self.log = EventLog("j", 0)
        self.start()

    def start(self) -> None:
        """A new process; what the old one had on the wire may still arrive, or not."""
        self.wire = [message for message in self.wire if self.chance.random() < 0.5]
        self.log = EventLog("j", self.log.epoch + 1)

    def kill(self, *, seen: bool = True) -> None:
        """One member dies; unseen while no lighthouse serves."""
        if not self.members:
            return
        member = self.chance.choice(sorted(self.members))
        incarnation = self.members.pop(member)
        self.expected[member, incarnation] += 1
        self.dead.add(member)
        if seen:
            self.wire.append(self.log.failure(REPLICAS, failure(member, incarnation)))

    def revive(self) -> None:
        """The dead come back, in new processes or (a frozen one) in the same, and a quorum lists them."""
        for member in sorted(self.dead):
            self.born += 1
            self.members[member] = f"{member}#{self.born}"
            self.wire.append(self.log.recovered(REPLICAS, member, self.members[member]))
        self.dead.clear()
        listed = [Replica(member, incarnation, "", "", 0, 1) for member, incarnation in self.members.items()]
        self.wire.append(self.log.replica_quorum(REPLICAS, 1, listed, ""))

    def thaw(self) -> None:
        """A member that was lost goes on as the same process; it may be lost again."""
        if self.dead:
            member = self.chance.choice(sorted(self.dead))
            self.dead.discard(member)
            incarnation = max(one for (name, one) in self.expected if name == member)
            self.members[member] = incarnation
            self.wire.append(self.log.recovered(REPLICAS, member, incarnation))

    def beat(self) -> EventBeat:
        return EventBeat(self.log.epoch, {"j": self.log.sequence}, {})

    def snapshot(self) -> Snapshot:
        groups = [status(self.members, group=REPLICAS)]
        return self.log.snapshot(1, completed=False, reason="", groups=groups)


class Reader:
    """A listener behind a bad network."""

    def __init__(self, lighthouse: Lighthouse) -> None:
        self.core = Listening("j", None, False)
        self.delivered: Counter[tuple[str, str]] = Counter()
        self.missed = 0
        self.lighthouse = lighthouse

    def take(self, message: Event | Snapshot | EventBeat) -> None:
        heard = self.core.take(message)
        for one in heard.deliver:
            if isinstance(one, EventsLost):
                self.missed += one.count
            else:
                assert isinstance(one, FailureEvent)
                self.delivered[one.failure.member, one.failure.incarnation] += 1
        if heard.ask and self.lighthouse.chance.random() < 0.7:
            self.lighthouse.wire.append(self.lighthouse.snapshot())

    def disturbed(self) -> None:
        """Something on the wire arrives, is lost, comes twice or out of order."""
        wire, chance = self.lighthouse.wire, self.lighthouse.chance
        if not wire:
            return
        at = chance.randrange(len(wire)) if chance.random() < 0.3 else 0
        what = chance.random()
        message = wire[at] if what < 0.2 else wire.pop(at)
        if what < 0.8:
            self.take(message)

    def catch_up(self) -> None:
        """The network is quiet, and every request is answered."""
        while self.lighthouse.wire:
            self.disturbed()
        self.take(self.lighthouse.beat())
        for _ in range(3):
            for _ in self.core.wanted:
                self.take(self.lighthouse.snapshot())
        assert self.core.wanted == []


@given(st.integers(0, 2**32))
def test_each_failure_is_delivered_once_whatever_the_network_does(seed: int) -> None:
    lighthouse = Lighthouse(random.Random(seed))
    reader = Reader(lighthouse)
    reader.take(lighthouse.beat())
    for step in lighthouse.chance.choices("ktrbsn", (4, 4, 1, 1, 1, 8), k=100):
        match step:
            case "k":
                lighthouse.kill()
            case "t":
                lighthouse.thaw()
            case "r":
                lighthouse.revive()
            case "b":
                lighthouse.wire.append(lighthouse.beat())
            case "s":
                lighthouse.wire.append(lighthouse.snapshot())
            case _:
                reader.disturbed()
    reader.catch_up()
    assert reader.delivered == lighthouse.expected
    assert reader.missed == 0


@given(st.integers(0, 2**32))
def test_each_loss_is_delivered_once_through_lighthouses_that_come_and_go(seed: int) -> None:
    lighthouse = Lighthouse(random.Random(seed))
    reader = Reader(lighthouse)
    reader.take(lighthouse.beat())
    reader.catch_up()
    for step in lighthouse.chance.choices("krane", (4, 2, 1, 8, 1), k=100):
        match step:
            case "k":
                lighthouse.kill()
            case "r":
                lighthouse.revive()
            case "a":
                lighthouse.wire.append(lighthouse.beat())
            case "e":
                reader.catch_up()
                for _ in range(lighthouse.chance.randrange(3)):
                    lighthouse.kill(seen=False)
                lighthouse.start()
            case _:
                reader.disturbed()
    reader.catch_up()
    assert reader.delivered == lighthouse.expected
    assert reader.missed == 0


def test_who_joins_a_running_job_has_not_failed() -> None:
    listener = begun()
    joined = msgspec.structs.replace(faulted(1, 4).failure, cause=Cause(kind="joined", text="ranks 2, 3 joined"))
    assert listener.tell(FailureEvent("j", RANKS, 1, 1, joined)) == []
    assert listener.tell(lost(2, "j/1")) == [lost(2, "j/1")]
