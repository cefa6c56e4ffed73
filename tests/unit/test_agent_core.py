"""What an agent does about its workers: replace, report once, forward, stop."""

from __future__ import annotations

import itertools
import signal
from typing import TypeVar

import msgspec
import pytest

from seamark.protocol.codec import decode, encode
from seamark.protocol.messages import (
    Acknowledged,
    Cause,
    Completed,
    DrainNode,
    EventBeat,
    Failure,
    FailureEvent,
    JobAborted,
    JobSpec,
    Join,
    LastQuorum,
    Member,
    MemberFaulted,
    MemberLost,
    MemberStarted,
    MemberStuck,
    Message,
    NodeLeft,
    PrepareFailed,
    PrepareJob,
    QuorumAnswer,
    Recipient,
    Refused,
    Roster,
    Slot,
    Snapshot,
    SnapshotRequest,
    StopWorkers,
    StoreAddress,
    StoreLost,
    StoreReady,
    WorkerExited,
    WorkerHello,
    WorkerRegistered,
    WorkersStopped,
    WorkerStarted,
)
from seamarkd.agent.core import Agent
from seamarkd.agent.effects import (
    Effect,
    EndWorker,
    ForgetExit,
    Introduce,
    Remember,
    SignalWorker,
    StartKeeper,
    StartStore,
    StartWorker,
    StopJobHere,
    TellWorkers,
    ToCoordinator,
    ToLighthouse,
    ToWorker,
)
from seamarkd.agent.ends import ABORT_PATIENCE
from seamarkd.agent.hang import Verdict
from seamarkd.agent.job import Job
from seamarkd.agent.reports import RESEND_INTERVAL
from seamarkd.agent.takeup import stopped_since
from seamarkd.exits import PREEMPTION_GRACE, UNKNOWN_STATUS

T = TypeVar("T", bound=Message)
NOW = 10.0
STORE = StoreAddress("127.0.0.1", 20002, "store-0")


def spec(policy: str = "replace") -> JobSpec:
    return JobSpec(
        name="job",
        argv=["t.py"],
        module=False,
        python="python",
        cwd="/",
        env={},
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        policy=policy,
        max_restarts=2,
        checkpoint_dir="",
        log_dir="/tmp",
    )


def roster(generation: int = 0, policy: str = "replace", allowance: int = 2) -> Roster:
    slots = [Slot(f"job/{rank}", rank, rank, node, 0) for rank, node in enumerate(["here", "here", "there"])]
    return Roster(
        7, "job", generation, policy, 2, slots, STORE, "127.0.0.1", 20000, -1, 30.0, 120.0, allowance, spec(policy)
    )


class Bench:
    """An agent with two started workers."""

    def __init__(self, policy: str = "replace", allowance: int = 2, wrapped: bool = True) -> None:
        numbers = itertools.count()
        self.agent = Agent("here", lambda: f"i{next(numbers)}")
        self.first = self.agent.from_coordinator(NOW, roster(policy=policy, allowance=allowance))
        for incarnation, pid in (("i0", 100), ("i1", 101)):
            self.agent.places.worker_started(NOW, "job", incarnation, pid, NOW)
        if wrapped:
            self.agent.from_worker(NOW, "i0", WorkerHello("job", "job/0", "i0", 100, True))
            self.agent.from_worker(NOW, "i1", WorkerHello("job", "job/1", "i1", 101, True))

    def die(self, incarnation: str = "i0") -> list[Effect]:
        return self.agent.losses.dying(NOW, "job", incarnation, "canary", NOW)

    def exit(self, status: int, incarnation: str = "i0") -> list[Effect]:
        return self.agent.losses.exited(NOW, "job", incarnation, status, NOW, "/log", ["tail"])


def to_lighthouse(effects: list[Effect], kind: type[T]) -> list[T]:
    return [one.message for one in effects if isinstance(one, ToLighthouse) and isinstance(one.message, kind)]


def to_coordinator(effects: list[Effect], kind: type[T]) -> list[T]:
    return [one.message for one in effects if isinstance(one, ToCoordinator) and isinstance(one.message, kind)]


def started(effects: list[Effect]) -> list[str]:
    return [one.member for one in effects if isinstance(one, StartWorker)]


def test_a_roster_starts_this_node_s_slots_and_announces_them() -> None:
    effects = Bench().first
    assert started(effects) == ["job/0", "job/1"]
    assert [one.member for one in to_lighthouse(effects, MemberStarted)] == ["job/0", "job/1"]


def test_the_same_roster_again_starts_nobody() -> None:
    bench = Bench()
    assert started(bench.agent.from_coordinator(NOW, roster())) == []


def test_a_higher_generation_kills_the_old_and_starts_anew() -> None:
    bench = Bench()
    effects = bench.agent.from_coordinator(NOW, roster(generation=1))
    assert [one.incarnation for one in effects if isinstance(one, SignalWorker)] == ["i0", "i1"]
    assert started(effects) == ["job/0", "job/1"]
    assert to_lighthouse(bench.exit(-9), MemberLost) == [], "a worker that was ordered to end is nobody's loss"


def test_a_death_is_reported_together_with_its_replacement() -> None:
    effects = Bench().die()
    (lost,) = to_lighthouse(effects, MemberLost)
    assert (lost.member, lost.incarnation, lost.replacement, lost.detector) == ("job/0", "i0", "i2", "canary")
    assert started(effects) == ["job/0"]


def test_death_and_exit_status_are_one_loss() -> None:
    bench = Bench()
    bench.die()
    effects = bench.exit(-9)
    assert to_lighthouse(effects, MemberLost) == []
    (exited,) = to_coordinator(effects, WorkerExited)
    assert (exited.status, exited.replacement, exited.charged, exited.log_tail) == (-9, "i2", 1, ["tail"])


@pytest.mark.parametrize(
    ("bench", "status", "replaced"),
    [
        pytest.param(Bench(), 1, True, id="an error"),
        pytest.param(Bench(), -signal.SIGSEGV, True, id="a signal"),
        pytest.param(Bench(), 0, True, id="exit 0 before the job completed"),
        pytest.param(Bench(), 130, False, id="RestartAbort"),
        pytest.param(Bench(allowance=0), 1, False, id="no allowance left"),
        pytest.param(Bench(policy="any-failed"), 1, False, id="any-failed restarts all"),
        pytest.param(Bench(wrapped=False), 1, False, id="nobody's wrapper holds the session together"),
    ],
)
def test_who_is_replaced(bench: Bench, status: int, replaced: bool) -> None:
    effects = bench.exit(status)
    (lost,) = to_lighthouse(effects, MemberLost)
    assert bool(lost.replacement) is replaced
    assert bool(started(effects)) is replaced


def test_a_worker_without_a_wrapper_has_completed_when_it_exits_0() -> None:
    effects = Bench(wrapped=False).exit(0)
    assert to_lighthouse(effects, MemberLost) == []
    (exited,) = to_coordinator(effects, WorkerExited)
    assert exited.completed


def test_a_wrapped_worker_has_completed_when_the_lighthouse_says_so() -> None:
    bench = Bench()
    bench.agent.from_lighthouse(NOW, Completed("job", "ranks", [Recipient("job/0", "i0", 1)]))
    effects = bench.exit(0)
    assert to_lighthouse(effects, MemberLost) == []
    assert to_coordinator(effects, WorkerExited)[0].completed


def test_the_replacement_says_whom_it_replaces() -> None:
    bench = Bench()
    bench.die()
    (message,) = to_coordinator(bench.agent.places.worker_started(NOW, "job", "i2", 102, NOW), WorkerStarted)
    assert (message.member, message.replaces) == ("job/0", "i0")


def test_requests_are_forwarded_and_answers_delivered_to_whom_they_are_for() -> None:
    bench = Bench()
    join = Join("job", "ranks", 0, "job/1", "i1", 1, -1, 0, 0, [])
    assert bench.agent.from_worker(NOW, "i1", join) == [ToLighthouse(join)]
    recipients = [Recipient("job/0", "i0", 1), Recipient("job/1", "i1", 1)]
    answer = QuorumAnswer("job", "ranks", recipients, 1, 0, 0, 0, [], STORE)
    told = [one for one in bench.agent.from_lighthouse(NOW, answer) if isinstance(one, ToWorker)]
    assert told == [ToWorker("i0", answer), ToWorker("i1", answer)]
    refused = Refused(1, "STALE_GENERATION", "no", "job", "job/1")
    assert bench.agent.from_lighthouse(NOW, refused) == [ToWorker("i1", refused)]


def test_who_joins_is_told_of_failures_although_its_greeting_ended_with_an_earlier_agent() -> None:
    bench = Bench(wrapped=False)
    assert bench.agent.node.listening("job") == []
    join = Join("job", "ranks", 0, "job/1", "i1", 1, -1, 0, 0, [])
    effects = bench.agent.from_worker(NOW, "i1", join)
    assert effects[0] == Remember("job"), "remembered before the lighthouse is asked"
    assert to_coordinator(effects, WorkerRegistered) == [WorkerRegistered("job", "job/1", "i1")]
    assert to_lighthouse(effects, Join) == [join]
    assert bench.agent.node.listening("job") == ["i1"]


def test_a_worker_that_this_agent_did_not_start_is_refused() -> None:
    (effect,) = Bench().agent.from_worker(NOW, "x", WorkerHello("job", "job/0", "x", 1, True))
    assert isinstance(effect, ToWorker)
    assert isinstance(effect.message, Refused)


def test_a_worker_that_sends_an_operator_s_message_is_refused() -> None:
    (effect,) = Bench().agent.from_worker(NOW, "i0", StopWorkers(1, "job", 0, 0.0, True))
    assert isinstance(effect, ToWorker)
    assert isinstance(effect.message, Refused)


def test_a_wrapper_is_registered_once() -> None:
    bench = Bench(wrapped=False)
    hello = WorkerHello("job", "job/0", "i0", 100, True)
    assert len(to_coordinator(bench.agent.from_worker(NOW, "i0", hello), WorkerRegistered)) == 1
    assert to_coordinator(bench.agent.from_worker(NOW, "i0", hello), WorkerRegistered) == []
    assert bench.agent.node.listening("job") == ["i0"]


def test_reports_are_repeated_until_acknowledged() -> None:
    bench = Bench()
    bench.agent.reports.due(NOW)
    for request in range(1, 10):
        bench.agent.from_lighthouse(NOW, Acknowledged(request))
    (lost,) = to_lighthouse(bench.die(), MemberLost)
    assert bench.agent.reports.due(NOW + RESEND_INTERVAL / 2) == []
    assert bench.agent.reports.due(NOW + RESEND_INTERVAL) == [ToLighthouse(lost)]
    bench.agent.from_lighthouse(NOW, Acknowledged(lost.request))
    assert bench.agent.reports.due(NOW + 60.0) == []


def test_the_store_is_started_once_per_order_and_its_death_is_repaired() -> None:
    agent = Agent("here", lambda: "s0")
    order = PrepareJob(3, spec(), store=True)
    assert agent.from_coordinator(NOW, order) == [Remember("job"), StartStore("job", "s0", 0)]
    assert agent.from_coordinator(NOW, order) == []
    (ready,) = to_coordinator(agent.stores.started("job", STORE, 20000), StoreReady)
    assert (ready.request, ready.master_port, ready.store) == (3, 20000, STORE)
    agent.from_coordinator(NOW, roster())
    assert [type(one) for one in agent.stores.exited("job")] == [Remember, StartStore]
    (lost,) = to_lighthouse(agent.stores.restarted(NOW, "job", NOW), StoreLost)
    assert lost.store.port == STORE.port


@pytest.mark.parametrize("final", [False, True])
def test_stopping_is_answered_when_it_is_done(final: bool) -> None:
    bench = Bench()
    order = StopWorkers(9, "job", 0, 5.0, final)
    assert bench.agent.from_coordinator(NOW, order) == [Remember("job"), StopJobHere("job", 0, 5.0, final)]
    assert to_lighthouse(bench.exit(-15), MemberLost) == []
    assert to_coordinator(bench.agent.stopped(0.0, "job", final=final), WorkersStopped) == [WorkersStopped(9, "job", 0)]
    assert ("job" in bench.agent.node.jobs) is not final


@pytest.mark.parametrize("wrapped", [True, False])
def test_workers_of_an_aborted_job_are_told_before_they_are_stopped(wrapped: bool) -> None:
    bench = Bench(wrapped=wrapped)
    order = StopWorkers(9, "job", 0, 5.0, True, "the data is poisoned")
    effects = bench.agent.from_coordinator(NOW, order)
    told = [one.message for one in effects if isinstance(one, TellWorkers)]
    (stop,) = [one for one in effects if isinstance(one, StopJobHere)]
    if wrapped:
        assert told == [JobAborted("job", "the data is poisoned")]
        assert stop == StopJobHere("job", 0, 5.0, True, ABORT_PATIENCE)
    else:
        assert (told, stop.patience) == ([], 0.0), "who does not listen would be waited for in vain"


def test_a_worker_that_the_assignment_dropped_is_lost_without_a_replacement() -> None:
    bench = Bench()
    effects = bench.agent.losses.exited(NOW, "job", "i0", 1, NOW, "/log", ["tail"], discarded=True)
    assert started(effects) == []
    (lost,) = to_lighthouse(effects, MemberLost)
    assert (lost.cause.kind, lost.replacement) == ("discarded", "")
    (exited,) = to_coordinator(effects, WorkerExited)
    assert (exited.discarded, exited.charged) == (True, 0)


def test_a_worker_that_hangs_is_interrupted_with_everybody_and_then_ended() -> None:
    bench = Bench()
    (fault,) = to_lighthouse(
        bench.agent.losses.hangs(NOW, "job", "i0", 3, Verdict("soft", "it sleeps"), 5.0), MemberFaulted
    )
    assert (fault.member, fault.iteration, fault.cause.kind, fault.cause.text) == ("job/0", 3, "hang", "it sleeps")
    assert bench.agent.losses.hangs(NOW, "job", "i0", 3, Verdict("hard", "it sleeps on"), 5.0) == [
        EndWorker("job", "i0", 5.0)
    ]
    (lost,) = to_lighthouse(bench.exit(-15), MemberLost)
    assert (lost.cause.kind, lost.cause.text) == ("hang", "it sleeps on; killed by SIGTERM")
    assert lost.replacement


def test_a_stopped_worker_can_only_be_killed() -> None:
    bench = Bench()
    effects = bench.agent.losses.hangs(NOW, "job", "i1", 0, Verdict("stopped", "stopped by a signal"), 5.0)
    assert effects == [EndWorker("job", "i1", 0.0)]
    (lost,) = to_lighthouse(bench.die("i1"), MemberLost)
    assert (lost.cause.kind, lost.cause.text) == ("hang", "stopped by a signal")


@pytest.mark.parametrize("ending", ["ordered", "lost", "unknown"])
def test_nobody_is_ended_twice(ending: str) -> None:
    bench = Bench()
    if ending == "ordered":
        bench.agent.from_coordinator(NOW, StopWorkers(9, "job", 0, 5.0, True))
    elif ending == "lost":
        bench.die("i0")
    incarnation = "stranger" if ending == "unknown" else "i0"
    assert bench.agent.losses.hangs(NOW, "job", incarnation, 0, Verdict("hard", "it sleeps"), 5.0) == []


def test_an_order_to_stop_that_comes_again_is_carried_out_once() -> None:
    bench = Bench()
    bench.agent.from_coordinator(NOW, StopWorkers(9, "job", 0, 5.0, False))
    assert bench.agent.from_coordinator(NOW, StopWorkers(10, "job", 0, 5.0, False)) == [Remember("job")]
    final = bench.agent.from_coordinator(NOW, StopWorkers(11, "job", 0, 5.0, True))
    assert final == [Remember("job"), StopJobHere("job", 0, 5.0, True)], "it takes the store and the keeper, too"
    assert bench.agent.from_coordinator(NOW, StopWorkers(12, "job", 0, 5.0, True)) == [Remember("job")]
    assert bench.agent.stopped(0.0, "job", final=False) == [], "the store and the keeper are still there"
    assert bench.agent.node.jobs["job"].ended
    assert to_coordinator(bench.agent.stopped(0.0, "job", final=True), WorkersStopped) == [WorkersStopped(12, "job", 0)]
    assert bench.agent.stopped(0.0, "job", final=True) == []


def test_a_new_lighthouse_hears_of_every_living_worker() -> None:
    bench = Bench()
    bench.die("i1")
    announced = to_lighthouse(bench.agent.registered(NOW), MemberStarted)
    assert [(one.member, one.incarnation) for one in announced] == [("job/0", "i0"), ("job/1", "i2")]


def test_a_worker_that_is_stuck_is_killed_and_replaced_once() -> None:
    bench = Bench()
    effects = bench.agent.from_worker(NOW, "i0", MemberStuck("job", "job/0", "i0"))
    (lost,) = to_lighthouse(effects, MemberLost)
    assert (lost.cause.kind, lost.replacement) == ("stuck", "i2")
    assert SignalWorker("job", "job/0", "i0", signal.SIGKILL) in effects
    assert to_lighthouse(bench.die(), MemberLost) == []


# --- an agent that is started anew -------------------------------------------------------------------------


def remembered(bench: Bench) -> Job:
    """What the agent had written down, read again."""
    return msgspec.json.decode(msgspec.json.encode(bench.agent.node.jobs["job"]), type=Job)


def known(*incarnations: str) -> dict[str, tuple[int, float]]:
    return {incarnation: (100 + int(incarnation[1:]), NOW) for incarnation in incarnations}


def test_a_worker_started_just_before_the_end_is_reported() -> None:
    bench = Bench()
    bench.die("i0")
    agent = Agent("here", lambda: "new")
    agent.adopt(NOW, remembered(bench), known("i0", "i1", "i2"))
    reported = to_coordinator(agent.welcomed(NOW), WorkerStarted)
    assert [(one.incarnation, one.pid, one.replaces) for one in reported][-1] == ("i2", 102, "i0")


def test_an_agent_killed_before_its_old_workers_were_leaves_none_of_them_alive() -> None:
    """Ordered by the roster of the next generation: one of them lives, one was never forked."""
    bench = Bench()
    bench.agent.from_coordinator(NOW, roster(1))
    agent = Agent("here", lambda: "new")
    effects = agent.adopt(NOW, remembered(bench), known("i0", "i2", "i3"))
    assert effects == [SignalWorker("job", "job/0", "i0", signal.SIGKILL)]
    assert list(agent.node.jobs["job"].workers) == ["i0", "i2", "i3"], "of the other nothing will ever be heard"
    agent.losses.exited(NOW, "job", "i0", -9, NOW, "", [])
    assert [one.generation for one in agent.node.jobs["job"].workers.values()] == [1, 1]


def test_living_workers_are_taken_up_and_nobody_is_started() -> None:
    bench = Bench()
    agent = Agent("here", lambda: "new")
    assert agent.adopt(NOW, remembered(bench), known("i0", "i1")) == []
    assert agent.node.listening("job") == ["i0", "i1"]
    assert started(agent.from_coordinator(NOW, roster())) == []
    assert [one.pid for one in to_coordinator(agent.welcomed(NOW), WorkerStarted)] == [100, 101]
    assert [one.incarnation for one in to_lighthouse(agent.registered(NOW), MemberStarted)] == ["i0", "i1"]


def test_a_worker_that_is_to_end_while_it_is_being_forked_is_killed_as_soon_as_it_is_there() -> None:
    """The order to kill it found no process."""
    numbers = itertools.count()
    agent = Agent("here", lambda: f"i{next(numbers)}")
    agent.from_coordinator(NOW, roster())
    ordered = [one for one in agent.from_coordinator(NOW, roster(1)) if isinstance(one, SignalWorker)]
    assert [(one.incarnation, one.signum) for one in ordered] == [("i0", signal.SIGKILL), ("i1", signal.SIGKILL)]
    assert ordered[0] in agent.places.worker_started(NOW, "job", "i0", 100, NOW)
    kills = [one for one in agent.places.worker_started(NOW, "job", "i2", 102, NOW) if isinstance(one, SignalWorker)]
    assert kills == [], "one of the generation that runs"


def test_how_a_worker_ended_and_that_it_has_no_keeper_is_written_down() -> None:
    bench = Bench()
    assert bench.agent.losses.keeper_lost("job") == [Remember("job")]
    assert [worker.orphan for worker in remembered(bench).workers.values()] == [True, True]
    effects = bench.exit(43)
    assert effects[0] == Remember("job")
    assert remembered(bench).exited["i0"].status == 43


def test_a_worker_that_had_completed_and_ended_unseen_is_not_lost() -> None:
    bench = Bench()
    bench.agent.from_lighthouse(NOW, Completed("job", "ranks", [Recipient("job/0", "i0", 1)]))
    effects = bench.exit(UNKNOWN_STATUS)
    assert to_lighthouse(effects, MemberLost) == []
    assert to_coordinator(effects, WorkerExited)[0].completed


def test_a_worker_that_was_to_be_started_is_started() -> None:
    bench = Bench()
    assert started(Agent("here", lambda: "new").adopt(NOW, remembered(bench), known("i0"))) == ["job/1"]


def test_a_loss_that_nobody_acknowledged_is_reported_again() -> None:
    bench = Bench()
    bench.die("i0")
    agent = Agent("here", lambda: "new")
    assert started(agent.adopt(NOW, remembered(bench), known("i0", "i1", "i2"))) == []
    (lost,) = to_lighthouse(agent.registered(NOW), MemberLost)
    assert (lost.incarnation, lost.replacement) == ("i0", "i2")


def quorum(*incarnations: str) -> QuorumAnswer:
    chosen = [Member(f"job/{rank}", one, rank, "here", rank, {}) for rank, one in enumerate(incarnations)]
    return QuorumAnswer("job", "ranks", [], 5, 0, 3, 3, chosen, STORE)


def test_a_loss_is_told_every_new_lighthouse_until_a_quorum_was_answered_without_the_lost_one() -> None:
    bench = Bench()
    (lost,) = to_lighthouse(bench.die("i0"), MemberLost)
    bench.agent.from_lighthouse(NOW, Acknowledged(lost.request))
    (again,) = to_lighthouse(bench.agent.registered(NOW), MemberLost)
    assert (again.incarnation, again.request != lost.request) == ("i0", True)
    bench.agent.from_lighthouse(NOW, quorum("i0", "i1"))
    assert len(to_lighthouse(bench.agent.registered(NOW), MemberLost)) == 1, "it was in that quorum, and died in it"
    bench.agent.from_lighthouse(NOW, quorum("i2", "i1"))
    assert to_lighthouse(bench.agent.registered(NOW), MemberLost) == []


def test_what_others_act_upon_is_written_down_before_they_hear_of_it() -> None:
    bench = Bench()
    assert [type(one) for one in bench.die("i0")] == [Remember, ToLighthouse, StartWorker]
    answer = msgspec.structs.replace(quorum("i2", "i1"), recipients=[Recipient("job/1", "i1", 1)])
    assert [type(one) for one in bench.agent.from_lighthouse(NOW, answer)] == [Remember, ToWorker]


def test_that_no_quorum_is_known_can_be_sent() -> None:
    (last,) = to_lighthouse(Bench().agent.registered(NOW), LastQuorum)
    assert last.quorum_id == 0
    assert decode(encode(last)) == last


def test_the_announcement_of_a_worker_that_died_is_not_repeated() -> None:
    """Repeated after the news of its end it would raise it from the dead, and its replacements would be refused."""
    bench = Bench()
    bench.agent.registered(NOW)
    bench.die("i0")
    again = to_lighthouse(bench.agent.reports.due(NOW + RESEND_INTERVAL), MemberStarted)
    assert [one.incarnation for one in again] == ["i1"]


def test_an_exit_is_kept_by_the_keeper_until_the_coordinator_knows_it() -> None:
    bench = Bench()
    (report,) = to_coordinator(bench.exit(-9), WorkerExited)
    agent = Agent("here", lambda: "new")
    agent.adopt(NOW, remembered(bench), known("i0", "i1", "i2"))
    (again,) = to_coordinator(agent.losses.exited(NOW, "job", "i0", -9, NOW, "/log", []), WorkerExited)
    assert (again.incarnation, again.replacement) == (report.incarnation, report.replacement)
    effects = agent.from_coordinator(NOW, Acknowledged(again.request))
    assert effects == [Remember("job"), ForgetExit("job", "job/0", "i0")], (
        "killed in between, it finds no worker without an end"
    )
    assert agent.node.jobs["job"].exited == {}


def test_a_lighthouse_that_is_new_hears_of_the_last_quorum_before_all_else() -> None:
    bench = Bench()
    answer = QuorumAnswer("job", "ranks", [Recipient("job/0", "i0", 1)], 5, 0, 3, 3, [], STORE)
    bench.agent.from_lighthouse(NOW, answer)
    bench.die("i1")
    messages = [one.message for one in bench.agent.registered(NOW) if isinstance(one, ToLighthouse)]
    assert [type(one) for one in messages] == [LastQuorum, MemberLost, MemberStarted, MemberStarted]
    assert (messages[0].iteration, messages[0].completed) == (3, False)
    bench.agent.from_lighthouse(NOW, Completed("job", "ranks", [Recipient("job/0", "i0", 2)]))
    assert bench.agent.node.jobs["job"].quorum.completed
    (again,) = to_lighthouse(bench.agent.reports.due(NOW + RESEND_INTERVAL), LastQuorum)
    assert again == messages[0]


def test_an_exit_that_an_earlier_agent_reported_is_not_forgotten_before_it_was_taken() -> None:
    """The keeper tells a new agent of it before that has taken the job up: the coordinator may never have heard."""
    bench = Bench()
    bench.exit(-9)
    agent = Agent("here", lambda: "i9")
    job = remembered(bench)
    agent.node.jobs["job"] = job
    assert agent.losses.exited(NOW, "job", "i0", -9, NOW, "/log", []) == []
    assert agent.node.runs("job", "i0"), "the keeper has to keep it"
    agent.adopt(NOW, job, known("i0", "i1", "i2"))
    (report,) = to_coordinator(agent.losses.exited(NOW, "job", "i0", -9, NOW, "/log", []), WorkerExited)
    assert (report.incarnation, report.charged) == ("i0", 1)
    agent.adopt(NOW, job, known("i0", "i1", "i2"))
    assert agent.losses.exited(NOW, "job", "i0", -9, NOW, "/log", []) == [], "it is being reported"
    assert agent.from_coordinator(NOW, Acknowledged(report.request))
    assert not agent.node.runs("job", "i0")


def test_the_order_of_a_coordinator_started_anew_finds_the_store_that_runs() -> None:
    agent = Agent("here", lambda: "s0")
    agent.from_coordinator(NOW, PrepareJob(3, spec(), store=True))
    assert agent.from_coordinator(NOW, PrepareJob(4, spec(), store=True)) == [], "it is being started"
    agent.stores.started("job", STORE, 20000)
    (ready,) = to_coordinator(agent.from_coordinator(NOW, PrepareJob(5, spec(), store=True)), StoreReady)
    assert (ready.request, ready.store) == (5, STORE)


def test_a_node_without_the_store_has_its_keeper_ready_before_the_roster() -> None:
    agent = Agent("here", lambda: "i0")
    order = PrepareJob(3, spec(), store=False)
    assert agent.from_coordinator(NOW, order) == agent.from_coordinator(NOW, order) == [StartKeeper("job")]


def test_a_failed_preparation_is_told_and_tried_again_when_the_order_is_repeated() -> None:
    agent = Agent("here", lambda: "s0")
    agent.from_coordinator(NOW, PrepareJob(3, spec(), store=True))
    (failed,) = to_coordinator(agent.stores.failed("job", "no such python"), PrepareFailed)
    assert (failed.request, failed.reason, failed.killed) == (3, "node here: no such python", False)
    effects = agent.from_coordinator(NOW, PrepareJob(4, spec(), store=True))
    assert effects == [Remember("job"), StartStore("job", "s0", 0)]


def test_a_keeper_that_was_killed_at_its_start_is_told_as_that() -> None:
    agent = Agent("here", lambda: "s0")
    agent.from_coordinator(NOW, PrepareJob(3, spec(), store=True))
    (failed,) = to_coordinator(agent.stores.failed("job", "it was killed", killed=True), PrepareFailed)
    assert failed.killed


def test_a_stop_that_is_under_way_when_its_job_is_taken_up_is_not_begun_again() -> None:
    bench = Bench()
    bench.agent.from_coordinator(NOW, StopWorkers(7, "job", 0, 5.0, final=True))
    known = dict.fromkeys(("i0", "i1", "i2"), (100, NOW))
    for stopping, begun in ((True, 0), (False, 1)):
        effects = Agent("here", lambda: "new").adopt(NOW, remembered(bench), known, stopping=stopping)
        assert sum(isinstance(one, StopJobHere) for one in effects) == begun


def test_only_a_stop_that_is_new_is_under_way_when_its_job_is_taken_up() -> None:
    passing, final = (StopWorkers(7, "job", 0, 5.0, final) for final in (False, True))
    table = [(stopped_since(before, now)) for before in (None, passing, final) for now in (None, passing, final)]
    assert table == [False, True, True, False, False, True, False, False, False]


@pytest.mark.parametrize(("known", "starts"), [({}, [StartStore("job", "s0", 0)]), ({"s0": (7, 0.5)}, [])])
def test_an_agent_killed_before_its_store_listened_starts_it_once(
    known: dict[str, tuple[int, float]], starts: list[Effect]
) -> None:
    before = Agent("here", lambda: "s0")
    before.from_coordinator(NOW, PrepareJob(3, spec(), store=True))
    assert Agent("here", lambda: "s1").adopt(NOW, before.node.jobs["job"], known) == starts


# --- what the lighthouse publishes -------------------------------------------------------------------------


def event(sequence: int, epoch: int = 1) -> FailureEvent:
    failure = Failure(
        "lost", "job/2", "x", 2, "there", 0, Cause(kind="signal", text="killed"), -1.0, 0.0, 0.0, "canary"
    )
    return FailureEvent("job", "ranks", epoch, sequence, failure)


def snapshot(sequence: int) -> Snapshot:
    return Snapshot(0, "job", 1, sequence, [], [], False, "")


def test_a_failure_is_told_at_once_and_a_gap_before_it_is_asked_for() -> None:
    agent = Bench().agent
    assert agent.sessions.heard(event(1)) == [TellWorkers("job", event(1))]
    told, asked = agent.sessions.heard(event(3))
    assert (told, asked) == (TellWorkers("job", event(3)), ToLighthouse(SnapshotRequest(0, "job")))
    assert agent.sessions.heard(snapshot(3)) == [TellWorkers("job", snapshot(3))]
    assert agent.sessions.heard(event(4)) == [TellWorkers("job", event(4))]


def test_an_agent_started_anew_asks_for_what_it_missed_even_if_it_heard_a_beat_before_it_had_its_workers() -> None:
    bench = Bench()
    agent = Agent("here", lambda: "new")
    beat = EventBeat(1, {"job": 5}, {})
    assert agent.sessions.heard(beat) == []
    agent.adopt(NOW, remembered(bench), known("i0", "i1"))
    assert agent.sessions.heard(beat) == [ToLighthouse(SnapshotRequest(0, "job"))]
    agent.sessions.heard(snapshot(5))
    assert agent.sessions.heard(beat) == []


def test_events_of_a_lighthouse_that_was_replaced_are_nothing() -> None:
    agent = Bench().agent
    agent.sessions.heard(EventBeat(2, {}, {}))
    assert agent.sessions.heard(event(1, epoch=1)) == []
    assert agent.sessions.heard(event(1, epoch=2)) == [TellWorkers("job", event(1, epoch=2))]


def test_a_store_that_is_elsewhere_now_can_come_back_here() -> None:
    agent = Agent("n0", itertools.count().__next__)  # type: ignore[arg-type]
    agent.from_coordinator(NOW, PrepareJob(3, spec(), store=True))
    agent.stores.started("job", STORE, 20000)
    there = msgspec.structs.replace(roster(), store=STORE, store_node="n0")
    agent.from_coordinator(NOW, there)
    away = msgspec.structs.replace(there, store=StoreAddress("10.0.0.2", 20402, "store-9"), store_node="n1")
    assert Remember("job") in agent.from_coordinator(NOW, away)
    assert agent.stores.exited("job") == [], "what is left of the old one is nobody's store"
    assert any(isinstance(one, StartStore) for one in agent.from_coordinator(NOW, PrepareJob(4, spec(), store=True)))


# --- places, and a host that goes away ---------------------------------------------------------------------


def moved(placement: int, *nodes: str, again: bool = False) -> Roster:
    """The same generation, with ranks 0, 1, ... on these nodes; with ``again`` also where they were before."""
    before = [slot.node for slot in roster().slots]
    slots = [
        Slot(f"job/{rank}", rank, rank, node, 0, placement if again or node != before[rank] else 0)
        for rank, node in enumerate(nodes)
    ]
    return msgspec.structs.replace(roster(), slots=slots, placement=placement)


def test_a_place_that_came_here_is_started_and_one_that_went_is_ended() -> None:
    bench = Bench()
    effects = bench.agent.from_coordinator(NOW, moved(1, "there", "here", "here"))
    assert started(effects) == ["job/2"]
    assert [one.incarnation for one in effects if isinstance(one, SignalWorker)] == ["i0"]
    assert to_lighthouse(bench.exit(-9), MemberLost) == [], "nobody's loss"


def test_who_lives_in_a_place_that_was_lost_and_is_here_again_is_replaced() -> None:
    """The others have gone on without it: it may wait for them in a collective that they left long ago."""
    bench = Bench()
    effects = bench.agent.from_coordinator(NOW, moved(2, "here", "here", "there", again=True))
    assert started(effects) == ["job/0", "job/1"]
    lost = to_lighthouse(effects, MemberLost)
    assert [(one.incarnation, one.replacement) for one in lost] == [("i0", "i2"), ("i1", "i3")]
    assert [one.incarnation for one in effects if isinstance(one, SignalWorker)] == ["i0", "i1"]
    (exited,) = to_coordinator(bench.exit(-9), WorkerExited)
    assert exited.ordered, "nobody's failure"
    assert bench.agent.from_coordinator(NOW, moved(1, "there", "there", "there")) == [ToCoordinator(Acknowledged(7))]


def test_a_place_that_is_here_again_is_filled_also_without_an_allowance() -> None:
    bench = Bench(allowance=0)
    effects = bench.agent.from_coordinator(
        NOW, msgspec.structs.replace(moved(2, "here", "here", again=True), allowance=0)
    )
    assert started(effects) == ["job/0", "job/1"]
    assert [one.replacement for one in to_lighthouse(effects, MemberLost)] == ["", ""]


def test_what_is_asked_of_a_node_that_still_ends_the_job_is_done_afterwards() -> None:
    bench = Bench()
    bench.agent.from_coordinator(NOW, StopWorkers(9, "job", 0, 5.0, True))
    assert started(bench.agent.from_coordinator(NOW, moved(1, "here"))) == []
    assert started(bench.agent.stopped(NOW, "job", final=True)) == ["job/0"]


def test_what_was_asked_of_a_node_before_the_last_order_to_end_is_forgotten() -> None:
    bench = Bench()
    bench.agent.from_coordinator(NOW, StopWorkers(9, "job", 0, 5.0, True))
    bench.agent.from_coordinator(NOW, moved(1, "here"))
    bench.agent.from_coordinator(NOW, StopWorkers(10, "job", 0, 5.0, True))
    assert started(bench.agent.stopped(NOW, "job", final=True)) == []


def test_a_node_that_drains_asks_its_workers_and_gives_none_of_them_a_successor() -> None:
    bench = Bench()
    effects = bench.agent.node.drain("spot")
    assert [one for one in effects if isinstance(one, EndWorker)] == [
        EndWorker("job", "i0", PREEMPTION_GRACE),
        EndWorker("job", "i1", PREEMPTION_GRACE),
    ]
    assert bench.agent.node.drain("spot") == [Introduce()], "a second time does not begin the wait anew"
    effects = bench.exit(143)
    (lost,) = to_lighthouse(effects, MemberLost)
    assert (lost.cause.kind, lost.cause.text, lost.replacement) == ("node", "node here drains: spot", "")
    assert bench.agent.node.busy
    effects = bench.exit(-9, "i1")
    assert [type(one) for one in effects if isinstance(one, StopJobHere)] == [StopJobHere], "keeper and store, too"
    assert not bench.agent.node.busy


def test_a_node_that_leaves_knows_whether_it_owes_an_answer_to_an_order_to_stop() -> None:
    bench = Bench()
    bench.agent.node.drain("spot")
    assert not bench.agent.node.stopping
    bench.exit(143)
    bench.exit(143, "i1")
    assert bench.agent.node.stopping, "keeper and store end"
    bench.agent.from_coordinator(NOW, StopWorkers(9, "job", 0, 1.0, final=False))
    (told,) = to_coordinator(bench.agent.stopped(NOW, "job", final=True), WorkersStopped)
    assert told.request == 9, "the order came while they did"
    assert not bench.agent.node.stopping


def test_a_node_that_drains_ends_nobody_twice_who_ends_already() -> None:
    bench = Bench()
    bench.agent.from_coordinator(NOW, StopWorkers(9, "job", 0, 5.0, True))
    assert bench.agent.node.drain("spot") == [Introduce()]


def test_a_node_serves_again() -> None:
    bench = Bench()
    order = DrainNode(1, "here", "a new driver")
    bench.agent.from_coordinator(NOW, order)
    assert bench.agent.node.draining == "a new driver"
    assert bench.agent.from_coordinator(NOW, msgspec.structs.replace(order, undo=True)) == [Introduce()]
    assert bench.agent.node.draining == ""


def test_the_end_of_a_node_s_part_is_not_taken_back_by_a_restart_of_all() -> None:
    bench = Bench()
    bench.agent.node.drain("spot")
    for incarnation in ("i0", "i1"):
        bench.exit(143, incarnation)
    bench.agent.from_coordinator(NOW, StopWorkers(9, "job", 0, 5.0, False))
    assert to_coordinator(bench.agent.stopped(NOW, "job", final=True), WorkersStopped) == [WorkersStopped(9, "job", 0)]
    bench.agent.node.serve()
    assert started(bench.agent.from_coordinator(NOW, roster(generation=1))) == ["job/0", "job/1"]


def test_a_node_that_drains_starts_nobody() -> None:
    agent = Agent("here", lambda: "i")
    agent.node.drain("spot")
    for _ in range(2):
        effects = agent.from_coordinator(NOW, roster())
        assert (started(effects), to_coordinator(effects, NodeLeft)) == ([], [NodeLeft("job", "here")])
    agent.node.serve()
    assert started(agent.from_coordinator(NOW, moved(1, "here", again=True))) == ["job/0"]


def test_a_node_that_drains_goes_on_doing_so_under_a_new_agent() -> None:
    bench = Bench()
    again = Agent("here", lambda: "new")
    again.node.drain("spot")
    effects = again.adopt(NOW, bench.agent.node.jobs["job"], {"i0": (100, NOW)})
    assert [one.incarnation for one in effects if isinstance(one, EndWorker)] == ["i0"]
    (lost,) = to_lighthouse(effects, MemberLost)
    assert (lost.incarnation, lost.cause.kind) == ("i1", "node"), "it was to be started, and never is"
    assert started(effects) == []


def test_a_refusal_of_a_process_does_not_reach_its_successor() -> None:
    bench = Bench()
    refused = Refused(3, "STALE_GENERATION", "this one must end", "job", "job/0", "i0")
    assert bench.agent.from_lighthouse(NOW, refused) == [ToWorker("i0", refused)]
    bench.die("i0")
    bench.exit(-9, "i0")
    assert bench.agent.from_lighthouse(NOW, refused) == []


def test_a_worker_that_was_on_its_way_when_its_node_began_to_drain_is_asked_too() -> None:
    agent = Agent("here", lambda: "i0")
    agent.from_coordinator(NOW, moved(0, "here"))
    agent.node.drain("")
    assert agent.node.draining == "no reason was given"
    effects = agent.places.worker_started(NOW, "job", "i0", 100, NOW)
    assert [one.incarnation for one in effects if isinstance(one, EndWorker)] == ["i0"]


def test_a_job_of_the_same_name_is_another_job_whatever_its_generation() -> None:
    bench = Bench()
    bench.agent.from_coordinator(NOW, roster(generation=3))
    again = msgspec.structs.replace(roster(generation=0), submission="another")
    assert started(bench.agent.from_coordinator(NOW, again)) == ["job/0", "job/1"]


def test_who_was_asked_to_end_is_spared_when_its_node_serves_again() -> None:
    bench = Bench()
    bench.agent.node.drain("spot")
    assert bench.agent.node.is_to_end("job", "i0")
    bench.agent.node.serve()
    assert not bench.agent.node.is_to_end("job", "i0")


def test_a_plain_worker_that_ends_well_because_it_was_asked_has_not_completed() -> None:
    bench = Bench(wrapped=False)
    bench.agent.node.drain("spot")
    (exited,) = to_coordinator(bench.exit(0), WorkerExited)
    assert (exited.completed, exited.drains) == (False, "spot")
