"""The agent of one monitored process: what it does where a coordinator would have been."""

from __future__ import annotations

import itertools

import msgspec

from seamark.protocol.messages import (
    AbortJob,
    Acknowledged,
    JobAborted,
    Join,
    LastQuorum,
    MemberLost,
    MemberStarted,
    Message,
    Refused,
    Roster,
)
from seamarkd.agent.effects import Effect, StartWorker, StopJobHere, TellWorkers, ToLighthouse
from seamarkd.agent.job import Job
from seamarkd.agent.lone import Launch, LoneAgent

LAUNCH = Launch("job", 1, 4, 0, "127.0.0.1", 29500, 29502, 100.0, "first")


def agent(*, store_ready: bool = True, again: bool = False) -> LoneAgent:
    names = (f"life-{number}" for number in itertools.count(2))
    lone = LoneAgent(LAUNCH, lambda: next(names), store_ready=store_ready, again=again)
    lone.begin(0.0)
    return lone


def told(effects: list[Effect]) -> list[Message]:
    return [effect.message for effect in effects if isinstance(effect, ToLighthouse)]


def join(incarnation: str = "first") -> Join:
    return Join("job", "ranks", 0, "job/1", incarnation, 1, -1, 0, 0, [], 0)


def test_the_roster_is_told_first_and_the_same_by_every_rank() -> None:
    roster, last, started = told(agent().registered(0.0))
    assert isinstance(roster, Roster)
    assert [type(last), type(started)] == [LastQuorum, MemberStarted]
    assert [slot.member for slot in roster.slots] == [f"job/{rank}" for rank in range(4)]
    other = LoneAgent(Launch(**{**_fields(LAUNCH), "rank": 3}), lambda: "x", store_ready=True, again=False)
    other.begin(0.0)
    theirs = told(other.registered(0.0))[0]
    assert isinstance(theirs, Roster)
    assert theirs.slots == roster.slots


def _fields(launch: Launch) -> dict[str, object]:
    return {name: getattr(launch, name) for name in launch.__struct_fields__}


def test_a_later_lighthouse_hears_that_the_job_runs_already() -> None:
    lone = agent()
    running = [
        message.running for _ in range(2) for message in told(lone.registered(0.0)) if isinstance(message, Roster)
    ]
    assert running == [False, True]
    (first,) = (message for message in told(agent(again=True).registered(0.0)) if isinstance(message, Roster))
    assert first.running


def test_it_is_quiet_once_all_is_acknowledged() -> None:
    lone = agent()
    messages = told(lone.registered(0.0))
    assert not lone.quiet
    for message in messages:
        lone.from_lighthouse(0.0, Acknowledged(message.request))  # type: ignore[attr-defined]
    assert lone.quiet


def test_a_death_names_the_next_life_unless_this_was_the_last() -> None:
    lone = agent()
    effects = lone.losses.dying(1.0, "job", "first", "canary", 1.0)
    (loss,) = told(effects)
    assert isinstance(loss, MemberLost)
    assert [effect.incarnation for effect in effects if isinstance(effect, StartWorker)] == [loss.replacement]
    lone.ended(1.1, "first", -9, 1.1, discarded=False)
    lone.last_life()
    (loss,) = told(lone.ended(2.0, loss.replacement, 1, 2.0, discarded=False))
    assert isinstance(loss, MemberLost)
    assert loss.replacement == ""


def test_whoever_waits_is_told_when_the_monitor_is_gone() -> None:
    lone = agent()
    (loss,) = told(lone.losses.dying(1.0, "job", "first", "canary", 1.0))
    assert isinstance(loss, MemberLost)
    (never,) = told(lone.left(1.1))
    assert isinstance(never, MemberLost)
    assert (never.incarnation, never.replacement) == (loss.replacement, "")


def test_a_life_that_nobody_named_is_announced() -> None:
    lone = agent()
    (started,) = told(lone.started_anew(0.0, "unheard-of"))
    assert isinstance(started, MemberStarted)
    assert started.incarnation == "unheard-of"
    assert lone.started_anew(0.0, "unheard-of") == []


def test_a_join_waits_for_the_store() -> None:
    lone = agent(store_ready=False)
    assert told(lone.from_worker(0.0, "first", join())) == []
    assert told(lone.store_serves()) == [join()]
    assert told(lone.store_serves()) == []
    assert told(lone.from_worker(0.0, "first", join())) == [join()]


def test_the_end_of_the_job_is_asked_of_the_lighthouse() -> None:
    request = AbortJob("job", "job/1", "first", "enough")
    assert told(agent().from_worker(0.0, "first", request)) == [request]


def test_an_aborted_job_is_ended_once_and_who_asks_meanwhile_is_told_again() -> None:
    lone = agent()
    lone.from_worker(0.0, "first", join())
    aborted = JobAborted("job", "job/3: enough")
    effects = lone.from_lighthouse(0.0, aborted)
    assert TellWorkers("job", aborted) in effects
    assert any(isinstance(effect, StopJobHere) for effect in effects)
    assert lone.from_lighthouse(0.1, aborted) == [TellWorkers("job", aborted)]
    assert lone.stopping


def test_an_agent_that_comes_after_the_greeting_knows_from_the_page_who_listens() -> None:
    lone = agent(again=True)
    assert lone.node.listening("job") == []
    lone.wraps("first")
    assert lone.node.listening("job") == ["first"]


def test_a_name_that_was_used_is_refused_with_the_lighthouse_s_sentence() -> None:
    lone = agent()
    lone.from_lighthouse(0.0, Refused(1, "NAME_TAKEN", "it has ended", "job"))
    assert lone.refused == "it has ended"


def test_an_agent_that_takes_up_what_another_wrote_down_knows_the_last_quorum_and_names_a_fresh_successor() -> None:
    before = agent()
    before.from_worker(0.0, "first", join())
    job = msgspec.json.decode(msgspec.json.encode(before.node.jobs["job"]), type=Job)
    job.quorum = LastQuorum(0, "job", 0, 7, 3, 2, ["job/1"], False, "job/1")
    after = LoneAgent(LAUNCH, lambda: "fresh", store_ready=True, again=True)
    assert after.begin(1.0, job) == []
    assert after.node.listening("job") == ["first"]
    assert job.quorum.iteration in {one.iteration for one in told(after.registered(1.0)) if isinstance(one, LastQuorum)}
    (loss,) = told(after.losses.dying(2.0, "job", "first", "canary", 2.0))
    assert isinstance(loss, MemberLost)
    assert (loss.incarnation, loss.replacement) == ("first", "fresh")
