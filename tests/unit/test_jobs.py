"""The coordinator: placement, generations, budgets, and the end of a job."""

from __future__ import annotations

from typing import TypeVar

import msgspec
import pytest
from msgspec.structs import replace

from seamark.protocol.codec import decode, encode
from seamark.protocol.messages import (
    RANKS,
    AbortJob,
    Acknowledged,
    Beat,
    BeatAnswer,
    Cause,
    CompletedEvent,
    DrainNode,
    EventBeat,
    Failure,
    FailureEvent,
    FollowJob,
    Incident,
    Incidents,
    IncidentsRequest,
    JobEnded,
    JobProgress,
    JobSpec,
    JobStatus,
    LeaseShard,
    Member,
    Message,
    NodeHello,
    NodeLeft,
    NodeRefusals,
    PrepareFailed,
    PrepareJob,
    QuorumEvent,
    Refused,
    ReportFailure,
    Roster,
    SharedState,
    Snapshot,
    SnapshotRequest,
    StopJob,
    StopWorkers,
    StoreAddress,
    StoreLost,
    StoreReady,
    SubmitJob,
    WorkerExited,
    WorkerRegistered,
    WorkersStopped,
    WorkerStarted,
)
from seamarkd.coordinator.cluster import NODE_SILENT
from seamarkd.coordinator.core import Coordinator
from seamarkd.coordinator.effects import Effect, Persist, Tell, ToLighthouse
from seamarkd.coordinator.job import FRUITLESS_RESTARTS, Job, record
from seamarkd.coordinator.operators import ENDED_KEPT
from seamarkd.coordinator.sessions import SILENT_KEPT
from seamarkd.effects import Send
from seamarkd.exits import NOT_STARTED, UNKNOWN_STATUS

T = TypeVar("T", bound=Message)
STORE = StoreAddress("127.0.0.1", 20002, "s0")
WORLD = 2


def spec(**changes: object) -> JobSpec:
    made = JobSpec(
        name="job",
        argv=["t.py"],
        module=False,
        python="python",
        cwd="/",
        env={},
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=WORLD,
        policy="replace",
        max_restarts=2,
        checkpoint_dir="",
        log_dir="/tmp",
    )
    return msgspec.structs.replace(made, **changes)


class Bench:
    """A coordinator with its nodes, and what it said last."""

    def __init__(self, nodes: int = 1, **changes: object) -> None:
        self.core = Coordinator(1)
        self.now = 0.0
        self.spec = spec(**changes)
        self.said: list[Effect] = []
        for node in range(nodes):
            self.hello(f"n{node}")
        self.submit()

    @property
    def job(self) -> Job:
        return self.core.jobs["job"]

    def send(self, message: Message, route: bytes = b"node") -> list[Effect]:
        self.said = self.core.handle(self.now, route, message)
        return self.said

    def hello(self, node: str = "n0", slots: int = 8) -> None:
        self.send(NodeHello(node, "i", "ipc:///a", slots))

    def submit(self) -> list[Effect]:
        return self.send(SubmitJob(1, self.spec, "once"), b"operator")

    def told(self, kind: type[T], effects: list[Effect] | None = None) -> list[T]:
        said = self.said if effects is None else effects
        return [one.message for one in said if isinstance(one, Send) and isinstance(one.message, kind)]

    def run(self, *, wrapped: bool = True) -> None:
        self.send(StoreReady(self.job.request, "job", "127.0.0.1", 20000, STORE))
        self.start_workers()
        if wrapped:
            self.send(WorkerRegistered("job", "job/0", "i"))

    def start_workers(self) -> None:
        self.said = self.core.from_lighthouse(self.now, Acknowledged(self.job.roster_request))
        generation = self.job.generation
        for rank in range(WORLD):
            incarnation = f"g{generation}r{rank}"
            self.send(WorkerStarted(0, "job", generation, f"job/{rank}", incarnation, 100 + rank, 0.0, ""))

    def exit(
        self,
        rank: int,
        status: int,
        *,
        replacement: str = "",
        completed: bool = False,
        discarded: bool = False,
        route: bytes = b"node",
    ) -> list[Effect]:
        process = self.job.processes[f"job/{rank}"]
        effects = self.send(
            WorkerExited(
                0,
                "job",
                self.job.generation,
                f"job/{rank}",
                process.incarnation,
                status,
                True,
                completed,
                False,
                replacement,
                "/log",
                ["last words"],
                1 if replacement else 0,
                discarded,
            )
        )
        if replacement:
            self.send(WorkerStarted(0, "job", self.job.generation, f"job/{rank}", replacement, 200, 0.0, "old"))
        return effects

    def all_stopped(self) -> None:
        self.send(WorkersStopped(self.job.request, "job", self.job.generation))


def test_a_job_is_durable_before_it_is_acknowledged() -> None:
    bench = Bench()
    effects = Bench.submit(bench)
    assert bench.told(JobStatus, effects), "the same submission again is answered the same way"
    fresh = Coordinator(1).handle(0.0, b"operator", SubmitJob(1, spec(), "once"))
    kinds = [type(one) for one in fresh]
    assert kinds.index(Persist) < kinds.index(Send)


def test_the_path_to_running() -> None:
    bench = Bench()
    assert bench.told(PrepareJob)
    effects = bench.send(StoreReady(bench.job.request, "job", "127.0.0.1", 20000, STORE))
    (roster,) = [one.message for one in effects if isinstance(one, ToLighthouse)]
    assert isinstance(roster, Roster)
    assert (roster.generation, roster.min_members, roster.allowance) == (0, WORLD, 2)
    assert bench.told(Roster) == [], "agents get the roster once the lighthouse has it"
    bench.start_workers()
    assert bench.job.state == "RUNNING"


def test_a_lighthouse_that_answers_later_than_the_roster_is_repeated_has_taken_it() -> None:
    bench = Bench()
    effects = bench.send(StoreReady(bench.job.request, "job", "127.0.0.1", 20000, STORE))
    (first,) = to_the_lighthouse(effects, Roster)
    for _ in range(3):
        bench.now += 0.6
        (again,) = to_the_lighthouse(bench.core.tick(bench.now), Roster)
        assert again == first
    assert bench.told(Roster, bench.core.from_lighthouse(bench.now, Acknowledged(first.request)))
    bench.now += 0.6
    assert to_the_lighthouse(bench.core.tick(bench.now), Roster) == []


def test_a_store_that_is_reported_twice_starts_no_second_generation() -> None:
    """A node that introduces itself while it starts the store is asked again, and answers twice."""
    bench = Bench()
    bench.send(StoreReady(bench.job.request, "job", "127.0.0.1", 20000, STORE))
    assert bench.send(StoreReady(bench.job.request, "job", "127.0.0.1", 20000, STORE)) == []
    assert bench.job.generation == 0


def test_all_nodes_prepare_at_once_and_one_starts_the_store() -> None:
    bench = Bench(min_nodes=2, max_nodes=2)
    bench.hello("n1", 16)
    assert sorted(one.store for one in bench.told(PrepareJob)) == [False, True]
    first = bench.job.slots[0].node
    for node in ("n0", "n1"):
        bench.hello(node)
        assert [one.store for one in bench.told(PrepareJob)] == [node == first]


def test_what_is_said_of_an_older_order_to_prepare_changes_nothing() -> None:
    bench = Bench()
    bench.send(PrepareFailed(bench.job.request + 1, "job", "of another time"))
    assert bench.job.state == "STARTING"


def test_a_job_waits_for_a_node_with_enough_slots_and_says_so() -> None:
    bench = Bench(min_nodes=2, max_nodes=2)
    assert bench.job.state == "PENDING"
    assert "2 nodes with 2 free slots" in bench.job.sentence
    bench.hello("n1", 16)
    assert bench.job.state == "STARTING"


def test_the_end_of_a_job_makes_room_for_the_next() -> None:
    bench = Bench(nproc_per_node=8)
    bench.send(SubmitJob(2, spec(name="next", nproc_per_node=8), "next"), b"other")
    assert bench.core.jobs["next"].state == "PENDING"
    bench.send(StopJob(5, "job", "Ctrl-C"), b"operator")
    bench.all_stopped()
    assert bench.core.jobs["next"].state == "STARTING"


def test_a_job_that_no_node_can_ever_hold_is_refused() -> None:
    core = Coordinator(1)
    core.handle(0.0, b"node", NodeHello("n0", "i", "ipc:///a", 4))
    (effect,) = core.handle(0.0, b"operator", SubmitJob(1, spec(nproc_per_node=5), "once"))
    assert isinstance(effect, Send)
    assert isinstance(effect.message, Refused)
    assert effect.message.code == "NO_SLOTS"
    assert "n0 4" in effect.message.reason


def test_a_name_is_taken_while_its_job_lives() -> None:
    bench = Bench()
    bench.send(SubmitJob(2, spec(argv=["other.py"]), "twice"), b"other")
    (refused,) = bench.told(Refused)
    assert refused.code == "NAME_TAKEN"


def test_who_takes_a_name_again_is_told_what_is_forgotten() -> None:
    bench = Bench()
    bench.run()
    assert bench.told(JobStatus, bench.submit())[0].notice == ""
    for rank in range(WORLD):
        bench.exit(rank, 0, completed=True)
    bench.all_stopped()
    (status,) = bench.told(JobStatus, bench.send(SubmitJob(2, bench.spec, "again"), b"operator"))
    assert status.notice.startswith("the run that had this name before (succeeded) is forgotten, with its incidents")
    assert (status.datasets, status.incidents) == ([], 0)


def test_what_can_not_work_is_refused_at_once() -> None:
    effects = Coordinator(1).handle(0.0, b"o", SubmitJob(1, spec(min_nodes=3, max_nodes=2), "once"))
    (effect,) = effects
    assert isinstance(effect, Send)
    assert isinstance(effect.message, Refused)


def test_a_replaced_worker_is_charged_and_nothing_else_happens() -> None:
    bench = Bench()
    bench.run()
    effects = bench.exit(1, -9, replacement="new")
    assert bench.told(StopWorkers, effects) == []
    assert (bench.job.process_restarts, bench.job.budget.remaining(0.0)) == (1, 1)


def test_a_replacement_that_could_not_be_started_leaves_no_place_that_nobody_fills() -> None:
    bench = Bench()
    bench.run()
    last = WorkerExited(0, "job", 0, "job/1", "old", -9, True, False, False, "new", "/log", [], 1)
    bench.job.processes["job/1"].incarnation = "old"
    bench.send(last)
    bench.send(msgspec.structs.replace(last, incarnation="new", status=NOT_STARTED, replacement="", charged=0))
    assert bench.job.sentence == "rank 1 could not be started; all workers are restarted"
    assert bench.told(StopWorkers)


def test_who_completed_has_finished_although_nobody_saw_how_it_ended() -> None:
    bench = Bench()
    bench.run()
    bench.exit(0, UNKNOWN_STATUS, completed=True)
    bench.exit(1, 0, completed=True)
    bench.all_stopped()
    assert bench.job.state == "SUCCEEDED"


def test_success_needs_every_rank() -> None:
    bench = Bench()
    bench.run()
    bench.exit(0, 0, completed=True)
    assert bench.job.state == "RUNNING"
    bench.exit(1, 0, completed=True)
    assert bench.told(StopWorkers)[0].final
    bench.all_stopped()
    assert (bench.job.state, bench.job.result) == ("SUCCEEDED", "all 2 ranks completed")


@pytest.mark.parametrize("policy", ["any-failed", "replace"])
def test_without_a_wrapper_any_failure_restarts_all_up_to_the_budget(policy: str) -> None:
    bench = Bench(policy=policy)
    bench.run(wrapped=False)
    for generation in range(2):
        assert bench.job.generation == generation
        bench.exit(0, 1)
        assert not bench.told(StopWorkers)[0].final
        bench.exit(1, -15)
        bench.all_stopped()
        bench.start_workers()
    bench.exit(0, 1)
    bench.all_stopped()
    assert bench.job.generation == 2, "three starts for two restarts"
    assert bench.job.state == "FAILED"
    assert "rank 0 exited with code 1, and the 2 restarts of --max-restarts are used up" in bench.job.result
    assert bench.job.log_tail == ["last words"]


def test_restarts_are_forgotten_after_an_hour_and_by_checkpoints() -> None:
    bench = Bench(max_restarts=1)
    bench.run()
    bench.exit(0, 1, replacement="a")
    assert bench.job.budget.remaining(bench.now) == 0
    bench.send(JobProgress("job", {"job/0": 5}, {"job/0": 10}))
    assert bench.job.budget.remaining(bench.now) == 1
    assert bench.told(Roster)[0].allowance == 1
    bench.exit(0, 1, replacement="b")
    bench.now += 3_600.0
    assert bench.job.budget.remaining(bench.now) == 1


def test_restart_abort_ends_the_job() -> None:
    bench = Bench()
    bench.run()
    bench.send(AbortJob("job", "job/1", "g0r1", "the data is poisoned"))
    assert bench.told(StopWorkers)[0].final
    bench.all_stopped()
    assert bench.job.state == "ABORTED"
    assert "rank 1" in bench.job.result
    assert "the data is poisoned" in bench.job.result


def test_exit_130_is_restart_abort_even_if_its_message_was_lost() -> None:
    bench = Bench()
    bench.run()
    bench.exit(1, 130)
    bench.all_stopped()
    assert bench.job.state == "ABORTED"


def test_any_failed_with_a_wrapper_is_refused_with_what_to_do() -> None:
    bench = Bench(policy="any-failed")
    bench.run()
    bench.all_stopped()
    assert bench.job.state == "FAILED"
    assert "--restart-policy replace" in bench.job.result


def test_a_store_that_can_not_start_fails_the_job_with_its_reason() -> None:
    bench = Bench()
    bench.send(PrepareFailed(bench.job.request, "job", "port 29500 is in use"))
    bench.all_stopped()
    assert (bench.job.state, bench.job.result) == ("FAILED", "port 29500 is in use")


def test_a_keeper_that_was_killed_at_its_start_is_a_failed_start_of_the_job() -> None:
    bench = Bench(max_restarts=1)
    bench.send(PrepareFailed(bench.job.request, "job", "node n0: the keeper was killed", killed=True))
    assert (bench.job.state, bench.job.process_restarts, bench.job.budget.remaining(bench.now)) == ("RESTARTING", 1, 0)
    assert bench.job.notice == "", "whether it wraps its function nobody knows yet"
    bench.all_stopped()
    (order,) = bench.told(PrepareJob)
    assert (bench.job.state, order.request, order.store) == ("STARTING", bench.job.request, True)
    bench.send(PrepareFailed(bench.job.request, "job", "node n0: the keeper was killed", killed=True))
    bench.all_stopped()
    assert bench.job.state == "FAILED"
    assert bench.job.result == "node n0: the keeper was killed, and the 1 restarts of --max-restarts are used up"


def test_stopping_a_job_that_waits_ends_it_at_once() -> None:
    bench = Bench(min_nodes=2, max_nodes=2)
    bench.send(StopJob(5, "job", "Ctrl-C"), b"operator")
    assert bench.job.state == "CANCELLED"


def test_the_lighthouse_hears_of_the_end_of_a_job_once_it_is_durable() -> None:
    bench = Bench()
    bench.run()
    bench.send(StopJob(5, "job", "Ctrl-C"), b"operator")
    assert to_the_lighthouse(bench.said, JobEnded) == [], "its workers still run"
    bench.all_stopped()
    assert isinstance(bench.said[0], Persist)
    assert to_the_lighthouse(bench.said, JobEnded) == [JobEnded("job", "once")]


def test_who_asks_again_for_the_end_of_a_job_puts_it_off_no_further() -> None:
    bench = Bench()
    bench.run()
    bench.send(StopJob(5, "job", "Ctrl-C"), b"operator")
    until, asked = bench.job.stop_until, bench.job.request
    while bench.now < until:
        again = bench.send(StopJob(6, "job", "Ctrl-C"), b"operator")
        assert [one.state for one in bench.told(JobStatus, again)] == ["STOPPING"]
        assert (bench.job.stop_until, bench.job.request) == (until, asked)
        bench.now += 3.0
        bench.core.tick(bench.now)
    assert bench.job.state == "CANCELLED", "its node said nothing in its time"


def test_a_job_that_has_succeeded_is_not_cancelled_while_its_workers_end() -> None:
    bench = Bench()
    bench.run()
    for rank in range(WORLD):
        bench.exit(rank, 0, completed=True)
    assert bench.job.state == "STOPPING"
    bench.send(StopJob(5, "job", "Ctrl-C"), b"operator")
    bench.all_stopped()
    assert (bench.job.state, bench.job.result) == ("SUCCEEDED", "all 2 ranks completed")


def test_followers_are_told_until_they_stop_asking() -> None:
    bench = Bench()
    bench.run()
    assert Tell("job") in bench.exit(0, -9, replacement="x")
    bench.now += 11.0
    bench.core.tick(bench.now)
    assert Tell("job") not in bench.exit(1, -9, replacement="y")
    bench.send(FollowJob(1, "job"), b"operator")
    assert Tell("job") in bench.exit(1, -9, replacement="z")


def test_people_see_what_the_quorum_waits_for() -> None:
    bench = Bench()
    bench.run()
    bench.core.from_lighthouse(0.0, EventBeat(1, {"job": 0}, {}))
    beat = EventBeat(1, {"job": 0}, {"job": "New quorum waits for job/1"})
    assert bench.core.from_lighthouse(0.0, beat) == [Tell("job")]
    assert bench.job.sentence == "New quorum waits for job/1"


def test_the_incidents_of_a_large_job_are_answered_as_far_back_as_a_message_goes() -> None:
    bench = Bench()
    bench.run()
    members = [Member(f"job/{rank}", f"{rank:032x}", rank, f"node-{rank // 8}", rank % 8) for rank in range(1_000)]
    one = Incident(1, RANKS, 0, [], [], 1, 0.0, members, {}, {}, [])
    bench.job.incidents.incidents = [replace(one, number=number) for number in range(1, 201)]
    (answer,) = bench.told(Incidents, bench.send(IncidentsRequest(3, "job"), b"operator"))
    assert decode(encode(answer)) == answer
    numbers = [incident.number for incident in answer.incidents]
    assert numbers == list(range(201 - len(numbers), 201))
    assert len(numbers) > 10
    bench.job.incidents.incidents = [replace(one, members=members * 60)]
    (answer,) = bench.told(Incidents, bench.send(IncidentsRequest(3, "job"), b"operator"))
    assert len(answer.incidents) == 1
    bench.job.incidents.incidents = []
    (answer,) = bench.told(Incidents, bench.send(IncidentsRequest(3, "job"), b"operator"))
    assert answer.incidents == []


def test_the_status_of_a_thousand_jobs_that_failed_fits_into_a_message() -> None:
    bench = Bench()
    bench.run()
    bench.job.state, bench.job.log_tail = "FAILED", ["x" * 16_384]
    bench.core.jobs |= {f"job{number}": bench.job for number in range(ENDED_KEPT)}
    answer = bench.core.status(bench.now, 1)
    assert decode(encode(answer)) == answer
    (one,) = bench.told(JobStatus, bench.send(FollowJob(2, "job"), b"operator"))
    assert one.log_tail == bench.job.log_tail


def test_an_unknown_job_is_refused() -> None:
    bench = Bench()
    bench.send(FollowJob(1, "nope"), b"o")
    assert bench.told(Refused)[0].code == "UNKNOWN_JOB"


# --- a coordinator that is started anew --------------------------------------------------------------------


def restarted(bench: Bench) -> Bench:
    """Another coordinator with what the first one had made durable."""
    records = [(record(job), list(job.incidents.incidents)) for job in bench.core.jobs.values()]
    bench.core = Coordinator(bench.core.cluster.epoch + 1)
    bench.core.restore(bench.now, records)
    return bench


def to_the_lighthouse(effects: list[Effect], kind: type[T]) -> list[T]:
    return [one.message for one in effects if isinstance(one, ToLighthouse) and isinstance(one.message, kind)]


def test_a_running_job_is_announced_again_and_no_worker_is_touched() -> None:
    bench = Bench()
    bench.run()
    before = bench.job
    restarted(bench)
    assert (bench.job.state, bench.job.generation) == ("RUNNING", before.generation)
    (roster,) = to_the_lighthouse(bench.core.from_lighthouse(0.0, EventBeat(7, {}, {})), Roster)
    assert roster.running
    bench.hello()
    assert bench.told(StopWorkers) == bench.told(PrepareJob) == []
    for rank in range(WORLD):
        bench.send(WorkerStarted(0, "job", 0, f"job/{rank}", f"g0r{rank}", 100 + rank, 0.0, ""))
    assert (bench.job.sentence, len(bench.job.processes)) == ("runs", WORLD)


@pytest.mark.parametrize("heard", [False, True])
def test_an_exit_is_acknowledged_once_it_is_durable_and_charged_once(heard: bool) -> None:
    bench = Bench()
    bench.run()
    exited = WorkerExited(9, "job", 0, "job/1", "g0r1", -9, True, False, False, "g0r1b", "", [], 1)
    if heard:
        kinds = [type(one) for one in bench.send(exited) if isinstance(one, Persist | Send)]
        assert kinds == [Persist, Send]
        restarted(bench)
        bench.hello()
    bench.send(exited)
    assert bench.told(Acknowledged) == [Acknowledged(9)]
    assert (bench.job.process_restarts, bench.job.budget.remaining(0.0)) == (1, 1)


def test_finished_ranks_stay_finished() -> None:
    bench = Bench()
    bench.run()
    bench.exit(0, 0, completed=True)
    restarted(bench)
    bench.hello()
    bench.send(WorkerExited(0, "job", 0, "job/1", "g0r1", 0, True, True, False, "", "", [], 0))
    bench.all_stopped()
    assert bench.job.state == "SUCCEEDED"


@pytest.mark.parametrize("state", ["STARTING", "RESTARTING", "STOPPING"])
def test_what_was_begun_is_finished(state: str) -> None:
    bench = Bench(policy="any-failed")
    if state != "STARTING":
        bench.run(wrapped=False)
        if state == "RESTARTING":
            bench.exit(1, 1)
        else:
            bench.send(StopJob(5, "job", "Ctrl-C"), b"operator")
    assert bench.job.state == state
    restarted(bench)
    bench.hello()
    if state == "STARTING":
        assert bench.told(PrepareJob)[0].request == bench.job.request
        return
    (order,) = bench.told(StopWorkers)
    assert order.final is (state == "STOPPING")
    bench.all_stopped()
    assert bench.job.state == ("CANCELLED" if state == "STOPPING" else "STARTING")


def test_a_node_that_never_comes_back_does_not_keep_a_job_from_ending() -> None:
    bench = Bench()
    bench.run()
    bench.send(StopJob(5, "job", "Ctrl-C"), b"operator")
    restarted(bench)
    bench.core.tick(bench.job.stop_until)
    assert bench.job.state == "CANCELLED"


def test_the_same_submission_is_the_same_job_even_when_it_has_ended() -> None:
    bench = Bench()
    bench.send(StopJob(5, "job", "Ctrl-C"), b"operator")
    bench.all_stopped()
    restarted(bench)
    bench.submit()
    assert [one.state for one in bench.told(JobStatus)] == ["CANCELLED"]
    bench.send(SubmitJob(1, bench.spec, "again"), b"operator")
    assert bench.job.state in ("PENDING", "STARTING")


def test_without_room_on_the_disk_new_jobs_are_refused_and_running_ones_go_on() -> None:
    bench = Bench()
    bench.run()
    bench.core.cluster.trouble = "the disk is full"
    bench.send(SubmitJob(1, spec(name="other"), "other"), b"operator")
    (refused,) = bench.told(Refused)
    assert (refused.code, "the disk is full" in refused.reason) == ("READ_ONLY", True)
    bench.exit(1, -9, replacement="new")
    assert bench.job.process_restarts == 1


@pytest.mark.parametrize("heard_live", [False, True])
def test_what_happened_while_it_was_away_is_learned_from_a_snapshot_once(heard_live: bool) -> None:
    bench = Bench()
    bench.run()
    cause = Cause(kind="signal", status=9, text="killed")
    failure = Failure("lost", "job/1", "g0r1", 1, "n0", 0, cause, -1.0, 1.0, 1.0, "canary")
    events = [FailureEvent("job", "ranks", 1, 2, failure)]
    quorums = [
        QuorumEvent("job", "ranks", 1, 1, 1, 0, 0, 0, [], 0.5, -1, []),
        QuorumEvent("job", "ranks", 1, 3, 2, 0, 1, 1, [], 1.5, 0, []),
    ]
    if heard_live:
        assert to_the_lighthouse(bench.core.from_lighthouse(2.0, quorums[1]), SnapshotRequest)
    for _ in range(2):
        bench.core.from_lighthouse(2.0, Snapshot(1, "job", 1, 3, events, quorums, False, ""))
        assert (bench.job.iteration, bench.job.restarts) == (1, 1)
        assert [(one.iteration, one.next_iteration) for one in bench.job.incidents.incidents] == [(0, 1)]
        restarted(bench)


def test_a_job_that_has_ended_is_asked_about_once() -> None:
    bench = Bench()
    bench.run()
    bench.send(StopJob(5, "job", "Ctrl-C"), b"operator")
    bench.all_stopped()
    restarted(bench)
    beat = EventBeat(7, {"job": 3}, {})
    (asked,) = to_the_lighthouse(bench.core.from_lighthouse(0.0, beat), SnapshotRequest)
    snapshot = Snapshot(asked.request, "job", 7, 3, [], [], False, "")
    assert bench.core.from_lighthouse(0.0, snapshot) == []
    assert bench.core.from_lighthouse(0.0, beat) == []
    assert bench.job.state == "CANCELLED"


@pytest.mark.parametrize("missed", [False, True])
def test_what_the_lighthouse_says_of_an_earlier_job_of_the_name_is_not_the_next_ones(missed: bool) -> None:
    bench = Bench()
    bench.run()
    bench.send(StopJob(5, "job", "Ctrl-C"), b"operator")
    bench.all_stopped()
    bench.send(SubmitJob(1, bench.spec, "again"), b"operator")
    assert bench.job.state == "STARTING"
    late = lost_node("n0", 1, 1)
    bench.core.from_lighthouse(1.0, Snapshot(1, "job", 1, 1, [late], [], True, "") if missed else late)
    assert (bench.job.state, bench.job.completed, bench.job.incidents.count) == ("STARTING", False, 0)
    assert "n0" in bench.core.nodes


def test_a_job_ends_well_without_the_ranks_that_its_assignment_dropped() -> None:
    bench = Bench(nodes=2, nproc_per_node=1, min_nodes=1, max_nodes=2)
    bench.run()
    bench.exit(1, 1, discarded=True)
    assert (bench.job.state, bench.job.process_restarts) == ("RUNNING", 0)
    bench.exit(0, 0, completed=True)
    assert bench.job.outcome == "SUCCEEDED"
    assert bench.job.result == "1 of 2 ranks completed, 1 were discarded by its rank assignment"


def test_a_job_of_which_too_few_ranks_are_left_fails_and_says_why() -> None:
    bench = Bench()
    bench.run()
    bench.exit(1, 1, discarded=True)
    assert bench.job.outcome == "FAILED"
    assert bench.job.result == "the job's rank assignment discarded rank 1: 1 ranks are left, fewer than 2"


def test_an_abort_travels_with_the_order_to_stop() -> None:
    bench = Bench()
    bench.run()
    said = bench.send(AbortJob("job", "job/1", "g0r1", "the data is poisoned"))
    (stop,) = bench.told(StopWorkers, said)
    assert stop.abort == "rank 1 asked for the end of the job: the data is poisoned"


def quorums(bench: Bench, first: int, last: int) -> None:
    """So many restarts in process, one after the other."""
    for number in range(first, last + 1):
        cause = Cause(kind="exception", text="TypeError: no")
        failure = Failure("faulted", "job/1", "g0r1", 1, "n0", number - 1, cause, 0.0, 0.0, 0.0, "wrapper")
        for event in (
            FailureEvent("job", RANKS, 1, 2 * number - 1, failure),
            QuorumEvent("job", RANKS, 1, 2 * number, number, 0, number, number, [], 0.0, number - 1, []),
        ):
            bench.said = bench.core.from_lighthouse(bench.now, event)


def test_a_function_that_fails_at_once_again_and_again_comes_to_an_end() -> None:
    bench = Bench()
    bench.run()
    quorums(bench, 1, FRUITLESS_RESTARTS)
    assert bench.job.state == "RUNNING"
    quorums(bench, FRUITLESS_RESTARTS + 1, FRUITLESS_RESTARTS + 1)
    assert (bench.job.state, bench.job.outcome) == ("STOPPING", "FAILED")
    assert bench.job.result == (
        f"{FRUITLESS_RESTARTS} restarts followed each other without a ping(); the last: rank 1 faulted (TypeError: no)"
    )


def test_restarts_with_steps_between_them_are_not_counted() -> None:
    bench = Bench()
    bench.run()
    quorums(bench, 1, FRUITLESS_RESTARTS)
    bench.send(JobProgress("job", {"job/0": 1}, {"job/0": 0}))
    quorums(bench, FRUITLESS_RESTARTS + 1, FRUITLESS_RESTARTS + 5)
    assert bench.job.state == "RUNNING"


# --- what outlives the store --------------------------------------------------------------------------------


def test_the_latest_of_what_workers_share_is_durable_and_goes_with_the_roster() -> None:
    bench = Bench()
    bench.run()
    effects = bench.send(SharedState("job", "job/0", "g0r0", 2, "two"))
    assert [effect.record.state_text for effect in effects if isinstance(effect, Persist)] == ["two"]
    assert bench.send(SharedState("job", "job/1", "g0r1", 1, "one")) == [], "an older one, come late"
    again = Coordinator(2)
    again.restore(bench.now, [(record(bench.job), [])])
    assert again.jobs["job"].state_version == 2
    bench.exit(0, 1)
    bench.all_stopped()
    (roster,) = (effect.message for effect in bench.said if isinstance(effect, ToLighthouse))
    assert isinstance(roster, Roster)
    assert roster.state == "two"


def lost_node(node: str, rank: int, sequence: int) -> FailureEvent:
    cause = Cause(kind="node", text=f"node {node} is gone")
    failure = Failure("lost", f"job/{rank}", f"g0r{rank}", rank, node, 0, cause, -1.0, 0.0, 0.0, "missed heartbeats")
    return FailureEvent("job", RANKS, 1, sequence, failure)


MOVED = StoreAddress("10.0.0.2", 20402, "s1")


def spread() -> Bench:
    """A job on two nodes, with its store on the first."""
    bench = Bench(nodes=2, min_nodes=1, max_nodes=2, nproc_per_node=1)
    bench.run()
    assert bench.job.store_node == "n0"
    return bench


def test_a_store_whose_host_was_lost_is_started_on_another_node() -> None:
    bench = spread()
    effects = bench.core.from_lighthouse(bench.now, lost_node("n0", 0, 1))
    (order,) = bench.told(PrepareJob, effects)
    assert order.store
    assert "starts another TCPStore on node n1" in bench.job.sentence
    moved = bench.send(StoreReady(order.request, "job", "10.0.0.2", 20400, MOVED))
    (lost,) = (effect.message for effect in moved if isinstance(effect, ToLighthouse))
    assert isinstance(lost, StoreLost)
    assert (lost.store, lost.node) == (MOVED, "n1")
    assert {(one.store, one.store_node, one.master_port) for one in bench.told(Roster, moved)} == {(MOVED, "n1", 20400)}
    assert [effect.record.store_node for effect in moved if isinstance(effect, Persist)] == ["n1"]
    bench.now += 5.0
    assert lost in [effect.message for effect in bench.core.tick(bench.now) if isinstance(effect, ToLighthouse)]
    bench.core.from_lighthouse(bench.now, Acknowledged(lost.request))
    bench.now += 5.0
    messages = [effect.message for effect in bench.core.tick(bench.now) if isinstance(effect, ToLighthouse)]
    assert not any(isinstance(message, StoreLost) for message in messages)


def test_a_node_that_does_not_answer_is_asked_again_and_one_that_is_gone_no_more() -> None:
    bench = spread()
    bench.core.from_lighthouse(bench.now, lost_node("n0", 0, 1))
    bench.now += 5.0
    assert bench.told(PrepareJob, bench.core.tick(bench.now)) != []
    bench.now += 60.0
    assert bench.told(PrepareJob, bench.core.tick(bench.now)) == [], "nobody is there"
    bench.hello("n1")
    bench.now += 5.0
    assert bench.told(PrepareJob, bench.core.tick(bench.now)) != []


def test_the_loss_of_another_node_moves_no_store() -> None:
    bench = spread()
    assert bench.told(PrepareJob, bench.core.from_lighthouse(bench.now, lost_node("n1", 1, 1))) == []


def test_a_node_that_can_not_have_the_store_is_asked_after_the_others() -> None:
    bench = Bench(nodes=3, min_nodes=1, max_nodes=3, nproc_per_node=1)
    bench.send(StoreReady(bench.job.request, "job", "127.0.0.1", 20000, STORE))
    bench.said = bench.core.from_lighthouse(bench.now, Acknowledged(bench.job.roster_request))
    for rank in range(3):
        bench.send(WorkerStarted(0, "job", 0, f"job/{rank}", f"g0r{rank}", 100 + rank, 0.0, ""))
    bench.send(WorkerRegistered("job", "job/0", "i"))
    bench.core.from_lighthouse(bench.now, lost_node("n0", 0, 1))
    assert bench.job.moving == "n1"
    (order,) = bench.told(PrepareJob, bench.send(PrepareFailed(bench.job.request, "job", "node n1: port 5 is in use")))
    assert (bench.job.moving, order.store) == ("n2", True)
    bench.send(PrepareFailed(bench.job.request, "job", "node n2: port 5 is in use"))
    assert "node n1: port 5 is in use; node n2: port 5 is in use" in bench.job.sentence
    bench.now += 4.0
    assert bench.told(PrepareJob, bench.core.tick(bench.now)) != [], "and again"


def test_a_store_moves_although_nobody_of_its_node_was_a_member_any_more() -> None:
    bench = spread()
    bench.now += 5.0
    bench.hello("n1")
    bench.now += 6.0
    assert bench.told(PrepareJob, bench.core.tick(bench.now)) != []
    assert bench.job.moving == "n1"


def test_a_coordinator_started_anew_says_where_the_store_is_and_moves_it_for_no_silence_of_its_own() -> None:
    bench = spread()
    again = Coordinator(2)
    again.restore(100.0, [(record(bench.job), [])])
    again.handle(100.1, b"node", NodeHello("n1", "i", "ipc:///a", 8))
    assert [one for one in again.tick(100.2) if isinstance(one, Send) and isinstance(one.message, PrepareJob)] == []
    again.handle(109.0, b"node", NodeHello("n0", "i", "ipc:///a", 8))
    messages = [one.message for one in again.tick(111.0) if isinstance(one, ToLighthouse)]
    assert [message.store for message in messages if isinstance(message, StoreLost)] == [STORE]


# --- policies: places that are lost, and found -------------------------------------------------------------


def wide(nodes: int = 2, *, wrapped: bool = True, **changes: object) -> Bench:
    """A job that runs with two ranks on each of its nodes."""
    bench = Bench(nodes=nodes, **({"min_nodes": 1, "max_nodes": nodes} | changes))
    bench.send(StoreReady(bench.job.request, "job", "127.0.0.1", 20000, STORE))
    start_all(bench, wrapped=wrapped)
    return bench


def start_all(bench: Bench, *, wrapped: bool = True) -> None:
    bench.said = bench.core.from_lighthouse(bench.now, Acknowledged(bench.job.roster_request))
    for slot in bench.job.slots:
        incarnation = f"g{bench.job.generation}r{slot.rank}p{slot.placed}"
        known = bench.job.processes.get(slot.member)
        if known is None or known.incarnation != incarnation:
            bench.send(WorkerStarted(0, "job", bench.job.generation, slot.member, incarnation, 1, 0.0, ""))
    if wrapped:
        bench.send(WorkerRegistered("job", "job/0", "i"))


def lose_node(bench: Bench, node: str) -> list[Effect]:
    """Everything the lighthouse says about it: an event for each of its ranks."""
    lost = [slot.rank for slot in bench.job.slots if slot.node == node]
    bench.said = [
        effect
        for number, rank in enumerate(lost)
        for effect in bench.core.from_lighthouse(bench.now, lost_node(node, rank, number + 1))
    ]
    return bench.said


def rosters(effects: list[Effect]) -> list[Roster]:
    """Those to the lighthouse."""
    return [one.message for one in effects if isinstance(one, ToLighthouse) and isinstance(one.message, Roster)]


def places(bench: Bench) -> dict[int, str]:
    return {slot.rank: slot.node for slot in bench.job.slots}


def test_the_places_of_a_lost_node_go_to_one_that_has_room() -> None:
    bench = wide(2)
    bench.hello("n2")
    assert places(bench) == {0: "n0", 1: "n0", 2: "n1", 3: "n1"}, "it is not taken while nobody misses it"
    *_, roster = rosters(lose_node(bench, "n1"))
    assert (roster.generation, roster.placement) == (0, 1)
    assert places(bench) == {0: "n0", 1: "n0", 2: "n2", 3: "n2"}
    assert [slot.placed for slot in roster.slots] == [0, 0, 1, 1]
    sent = bench.told(Roster, bench.core.from_lighthouse(bench.now, Acknowledged(roster.request)))
    assert len(sent) == 2, "to both of its nodes"
    assert bench.told(StopWorkers) == []


def test_where_no_node_has_room_the_lighthouse_is_told_so_and_the_next_node_fills_the_gap() -> None:
    bench = wide(2)
    *_, roster = rosters(lose_node(bench, "n1"))
    assert [slot.rank for slot in roster.slots] == [0, 1]
    bench.hello("n2", slots=1)
    assert places(bench) == {0: "n0", 1: "n0"}, "too small"
    bench.hello("n3")
    assert places(bench) == {0: "n0", 1: "n0", 2: "n3", 3: "n3"}
    assert rosters(bench.said)[0].placement == 2


def test_a_node_that_comes_back_gets_its_places_again() -> None:
    bench = wide(2)
    lose_node(bench, "n1")
    bench.hello("n1")
    assert places(bench)[3] == "n1"
    assert bench.told(StopWorkers) == []


def test_a_node_that_comes_back_too_late_is_told_to_end_what_it_has() -> None:
    bench = wide(2)
    bench.hello("n2")
    lose_node(bench, "n1")
    bench.hello("n1")
    (order,) = bench.told(StopWorkers)
    assert order.final
    assert places(bench)[3] == "n2"


def test_a_job_without_a_wrapper_is_started_anew_where_there_is_room() -> None:
    bench = wide(2, wrapped=False)
    bench.hello("n2")
    lose_node(bench, "n1")
    assert bench.job.state == "RESTARTING"
    assert "node n1 is lost" in bench.job.sentence
    bench.send(WorkersStopped(bench.job.request, "job", 0), b"node")
    assert (bench.job.state, bench.job.generation) == ("STARTING", 1)
    assert places(bench) == {0: "n0", 1: "n0", 2: "n2", 3: "n2"}
    assert bench.job.store == STORE, "its node is there"


def test_a_restart_without_the_store_s_node_starts_another() -> None:
    bench = wide(2, wrapped=False)
    lose_node(bench, "n0")
    bench.said = bench.send(WorkersStopped(bench.job.request, "job", 0))
    (order,) = bench.told(PrepareJob)
    assert order.store
    assert places(bench) == {0: "n1", 1: "n1"}
    bench.send(StoreReady(order.request, "job", "127.0.0.1", 20100, MOVED))
    assert (bench.job.generation, bench.job.store_node) == (1, "n1")


def test_below_the_minimum_a_job_waits_for_nodes_and_starts_when_they_come() -> None:
    bench = wide(2, wrapped=False, min_nodes=2)
    lose_node(bench, "n1")
    bench.send(WorkersStopped(bench.job.request, "job", 0))
    assert bench.job.state == "PENDING"
    assert "waits for 2 nodes" in bench.job.sentence
    bench.hello("n5")
    assert (bench.job.state, places(bench)) == ("STARTING", {0: "n0", 1: "n0", 2: "n5", 3: "n5"})


def test_nobody_is_left_to_take_the_newcomers_in() -> None:
    bench = wide(1)
    bench.hello("n1")
    lose_node(bench, "n0")
    assert (bench.job.state, bench.job.generation, places(bench)) == ("STARTING", 0, {0: "n1", 1: "n1"})


def test_a_job_that_lost_a_node_for_good_ends_well_and_says_so() -> None:
    bench = wide(2)
    lose_node(bench, "n1")
    for rank in (0, 1):
        bench.exit(rank, 0, completed=True)
    assert bench.job.result == "2 of 4 ranks completed, 2 were lost and had no replacement"


def test_a_node_that_is_lost_once_all_have_completed_is_not_waited_for() -> None:
    bench = wide(2)
    bench.core.from_lighthouse(bench.now, CompletedEvent("job", RANKS, 1, 1))
    for rank in (0, 1):
        bench.exit(rank, 0, completed=True)
    for number, rank in enumerate((2, 3)):
        bench.core.from_lighthouse(bench.now, lost_node("n1", rank, number + 2))
    assert (bench.job.outcome, bench.job.result) == ("SUCCEEDED", "all 4 ranks completed")


def test_a_node_that_is_lost_between_two_wrapped_calls_is_missed_in_the_second() -> None:
    bench = wide(2)
    bench.hello("n2")
    bench.core.from_lighthouse(bench.now, CompletedEvent("job", RANKS, 1, 1))
    bench.core.from_lighthouse(bench.now, lost_node("n1", 2, 2))
    assert places(bench)[3] == "n2"


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_node_that_comes_while_a_job_starts_is_taken_once_it_runs(wrapped: bool) -> None:
    bench = Bench(nodes=1, min_nodes=1, max_nodes=2, policy="replace" if wrapped else "any-failed")
    bench.hello("n1")
    bench.send(StoreReady(bench.job.request, "job", "127.0.0.1", 20000, STORE))
    start_all(bench, wrapped=wrapped)
    bench.core.tick(bench.now)
    assert (len(bench.job.slots) == 4) if wrapped else (bench.job.state == "RESTARTING")


def test_what_is_left_on_a_node_that_was_away_at_the_end_is_ended_when_it_is_back() -> None:
    bench = wide(2, policy="min-healthy")
    lose_node(bench, "n1")
    bench.send(StopJob(7, "job", "enough"), b"operator")
    bench.all_stopped()
    assert bench.job.state == "CANCELLED"
    bench.hello("n1")
    assert [order.final for order in bench.told(StopWorkers)] == [True]
    bench.send(SubmitJob(8, bench.spec, "again"), b"operator")
    assert "n1" in bench.job.left or places(bench)[3] == "n1"


def test_a_node_that_has_nothing_left_of_an_ended_job_is_told_of_it_no_more() -> None:
    bench = wide(2, policy="min-healthy")
    lose_node(bench, "n1")
    bench.send(StopJob(7, "job", "enough"), b"operator")
    bench.all_stopped()
    bench.send(NodeHello("n1", "i", "ipc:///a", 8), b"n1")
    (order,) = bench.told(StopWorkers)
    (durable,) = bench.send(WorkersStopped(order.request, "job", order.generation), b"n1")
    assert isinstance(durable, Persist)
    assert durable.record.left == []
    bench.send(NodeHello("n1", "i", "ipc:///a", 8), b"n1")
    assert bench.told(StopWorkers) == []


def test_the_exit_itself_says_that_its_node_drains() -> None:
    """It may be heard before the node introduces itself to a coordinator that was started anew."""
    bench = wide(2, wrapped=False)
    process = bench.job.processes["job/2"]
    exit_of = WorkerExited(
        0, "job", 0, "job/2", process.incarnation, 143, False, False, False, "", "", [], 0, node="n1", drains="spot"
    )
    bench.send(exit_of)
    assert (bench.job.state, bench.job.process_restarts) == ("RESTARTING", 0)


def test_an_order_to_drain_is_repeated_until_the_node_says_so() -> None:
    bench = wide(2)
    bench.send(DrainNode(5, "n1", "why"), b"operator")
    bench.send(Beat("n1", "i", 1))
    assert len(bench.told(DrainNode)) == 1
    drains(bench, "n1")
    bench.send(Beat("n1", "i", 2), b"n1")
    assert bench.told(DrainNode) == []


@pytest.mark.parametrize("policy", ["any-failed", "replace", "min-healthy"])
def test_a_new_node_within_the_maximum(policy: str) -> None:
    bench = wide(1, max_nodes=2, policy=policy, wrapped=policy == "replace")
    bench.hello("n1")
    if policy == "any-failed":
        assert (bench.job.state, bench.job.process_restarts) == ("RESTARTING", 0)
        bench.send(WorkersStopped(bench.job.request, "job", 0))
    grown = {0: "n0", 1: "n0", 2: "n1", 3: "n1"}
    assert places(bench) == ({0: "n0", 1: "n0"} if policy == "min-healthy" else grown)
    assert bench.job.generation == (1 if policy == "any-failed" else 0)


def test_a_node_that_came_before_the_wrapper_was_reached_is_taken_then() -> None:
    bench = wide(1, max_nodes=2, wrapped=False)
    bench.hello("n1")
    assert len(bench.job.slots) == 2
    bench.send(WorkerRegistered("job", "job/0", "i"))
    assert len(bench.job.slots) == 4


@pytest.mark.parametrize(("group", "restarted"), [("node", True), ("rank", False)])
def test_min_healthy_counts_nodes_or_ranks(group: str, restarted: bool) -> None:
    """MIN 1 of 2: a rank of each is lost, so no node is whole, and two ranks are."""
    bench = wide(2, policy="min-healthy", worker_group=group)
    bench.exit(0, 1)
    assert bench.job.state == "RUNNING"
    assert "worker groups go on" in bench.job.sentence
    bench.exit(3, 1)
    assert bench.job.state == ("RESTARTING" if restarted else "RUNNING")
    assert bench.job.process_restarts == int(restarted)


def test_min_healthy_restarts_on_all_nodes_and_succeeds_with_the_minimum() -> None:
    bench = wide(2, policy="min-healthy")
    bench.exit(0, 1)
    bench.exit(1, 1, discarded=True)
    bench.exit(2, 1)
    bench.send(WorkersStopped(bench.job.request, "job", 0), b"node")
    assert (bench.job.generation, len(bench.job.slots)) == (1, 4)
    start_all(bench)
    bench.exit(0, 1)
    bench.exit(1, 1, discarded=True)
    for rank in (2, 3):
        bench.exit(rank, 0, completed=True)
    assert (bench.job.outcome, bench.job.result) == (
        "SUCCEEDED",
        "2 of 4 ranks completed, 1 were discarded by its rank assignment, 1 were lost and had no replacement",
    )


def test_min_healthy_takes_a_node_that_came_back_for_well_again() -> None:
    bench = wide(2, policy="min-healthy")
    lose_node(bench, "n1")
    assert bench.job.failed == {"job/2", "job/3"}
    members = [Member(f"job/{rank}", "i", rank, f"n{rank // 2}", rank % 2) for rank in range(4)]
    quorum = QuorumEvent("job", RANKS, 1, 9, 7, 0, 5, 1, members, 0.0, 4, [])
    bench.core.from_lighthouse(bench.now, EventBeat(1, {"job": 8}, {}))
    bench.core.from_lighthouse(bench.now, Snapshot(0, "job", 1, 9, [], [quorum], False, ""))
    assert bench.job.failed == set()


def test_an_exit_that_a_node_reports_after_its_places_were_given_away_changes_nothing() -> None:
    bench = wide(2)
    bench.hello("n2")
    lose_node(bench, "n1")
    start_all(bench)
    report = WorkerExited(0, "job", 0, "job/3", "g0r3p0", -9, True, False, False, "", "/log", [], 0, node="n1")
    bench.send(report)
    assert bench.job.state == "RUNNING"
    assert bench.job.processes["job/3"].alive


def test_where_everybody_is_outlives_the_coordinator() -> None:
    bench = wide(2)
    bench.hello("n2")
    lose_node(bench, "n1")
    again = Coordinator(2)
    again.restore(100.0, [(record(bench.job), [])])
    job = again.jobs["job"]
    assert (job.slots, job.placement, job.left, job.width) == (bench.job.slots, 1, {"n1"}, 4)


def test_a_node_that_falls_silent_while_a_job_starts_on_it_is_not_waited_for() -> None:
    bench = Bench(nodes=2, min_nodes=1, max_nodes=2)
    bench.now += 30.0
    bench.hello("n0")
    bench.core.tick(bench.now)
    assert bench.job.state == "RESTARTING"
    bench.send(WorkersStopped(bench.job.request, "job", 0))
    assert places(bench) == {0: "n0", 1: "n0"}


def drains(bench: Bench, node: str) -> None:
    bench.send(NodeHello(node, "i", "ipc:///a", 8, "", "spot"), node.encode())


def test_nodes_that_will_have_the_places_of_one_that_drains_are_prepared() -> None:
    bench = wide(2)
    bench.hello("n2")
    drains(bench, "n1")
    (order,) = bench.told(PrepareJob)
    assert not order.store
    assert places(bench)[3] == "n1", "as long as its workers are there"
    assert bench.told(StopWorkers) == []
    lose_node(bench, "n1")
    assert places(bench)[3] == "n2"
    assert bench.job.process_restarts == 0


def test_no_worker_is_placed_on_a_node_that_drains_until_it_serves_again() -> None:
    bench = wide(2)
    drains(bench, "n1")
    lose_node(bench, "n1")
    assert places(bench) == {0: "n0", 1: "n0"}
    drains(bench, "n1")
    assert places(bench) == {0: "n0", 1: "n0"}
    bench.hello("n1")
    assert places(bench)[3] == "n1"


def unhealthy(bench: Bench, node: str, why: str = "disk: full") -> None:
    bench.send(NodeHello(node, "i", "ipc:///a", 8, unhealthy=why), node.encode())


def test_no_job_is_placed_on_an_unhealthy_node_until_its_checks_pass() -> None:
    bench = Bench(nodes=0)
    unhealthy(bench, "n0")
    assert bench.job.state == "PENDING"
    status = bench.core.status(0.0, 1)
    assert [(one.node, one.unhealthy) for one in status.nodes] == [("n0", "disk: full")]
    bench.core.tick(1.0)
    assert bench.job.state == "PENDING", "it is not refused either: the node has the places"
    bench.hello("n0")
    assert bench.job.state == "STARTING"


def test_what_runs_on_a_node_that_becomes_unhealthy_goes_on_and_a_restart_of_all_goes_elsewhere() -> None:
    bench = wide(2, wrapped=False, policy="any-failed")
    bench.hello("n2")
    unhealthy(bench, "n1")
    assert (bench.job.state, places(bench)[3]) == ("RUNNING", "n1")
    bench.exit(2, 1)
    assert (bench.job.state, bench.job.process_restarts) == ("RESTARTING", 1), "it is no host that goes away"
    for route in (b"node", b"n1"):
        bench.send(WorkersStopped(bench.job.request, "job", 0), route)
    assert places(bench)[3] == "n2"


@pytest.mark.parametrize("first", ["exit", "event"])
def test_a_restart_for_a_node_that_drains_is_charged_to_nobody(first: str) -> None:
    bench = wide(2, wrapped=False, policy="any-failed")
    drains(bench, "n1")
    if first == "exit":
        bench.exit(2, 143)
    else:
        lose_node(bench, "n1")
    assert (bench.job.state, bench.job.process_restarts) == ("RESTARTING", 0)
    assert ("rank 2 exited with code 143" if first == "exit" else "node n1 drains: spot") in bench.job.sentence
    bench.send(WorkersStopped(bench.job.request, "job", 0), b"node")
    assert bench.job.state == "RESTARTING", "its checkpoint is waited for"
    bench.send(WorkersStopped(bench.job.request, "job", 0), b"n1")
    assert places(bench) == {0: "n0", 1: "n0"}


def test_an_order_to_drain_reaches_its_node_or_is_refused() -> None:
    bench = wide(2)
    bench.send(DrainNode(5, "n1", "why"), b"operator")
    assert [type(one.message) for one in bench.said if isinstance(one, Send)] == [DrainNode, Acknowledged]
    bench.send(DrainNode(6, "n7", "why"), b"operator")
    (refused,) = bench.told(Refused)
    assert refused.reason == "there is no node n7 here; there are: n0, n1"


def test_a_node_that_drained_and_went_is_forgotten() -> None:
    bench = wide(2)
    drains(bench, "n1")
    bench.now += 30.0
    bench.core.tick(bench.now)
    assert "n1" not in bench.core.nodes


def test_a_node_that_is_never_heard_again_is_forgotten_unless_a_job_is_on_it() -> None:
    bench = Bench()
    bench.run()
    bench.hello("n1")
    bench.now = SILENT_KEPT
    bench.core.tick(bench.now)
    assert list(bench.core.nodes) == ["n0", "n1"]
    bench.now += 1.0
    bench.core.tick(bench.now)
    assert list(bench.core.nodes) == ["n0"]
    (answer,) = bench.told(BeatAnswer, bench.send(Beat("n1", "i", 1)))
    assert not answer.known, "it introduces itself, and is there again"


def test_news_of_a_process_that_was_replaced_is_old_news() -> None:
    bench = Bench()
    bench.run()
    for incarnation, forked_at in (("second", 5.0), ("first", 4.0), ("third", 6.0), ("second", 5.0)):
        bench.send(WorkerStarted(0, "job", 0, "job/1", incarnation, 1, forked_at, "", "n0"))
    assert bench.job.processes["job/1"].incarnation == "third"


def test_an_agent_that_was_not_heard_for_a_moment_introduces_itself_and_is_told_everything_again() -> None:
    bench = Bench()
    bench.run()

    def known_after(seconds: float) -> bool:
        bench.now += seconds
        (answer,) = bench.told(BeatAnswer, bench.send(Beat("n0", "i", 1)))
        return answer.known

    known_after(0.0)
    assert known_after(0.5)
    assert not known_after(0.8), "what was sent to it meanwhile may be lost"
    assert known_after(0.5)


def test_places_on_a_node_that_drains_and_starts_nobody_go_elsewhere() -> None:
    bench = wide(2)
    drains(bench, "n1")
    bench.hello("n2")
    bench.send(NodeLeft("job", "n1"))
    assert places(bench)[3] == "n2"
    bench.send(NodeLeft("job", "n1"))
    assert bench.job.placement == 1


def test_a_node_that_was_prepared_in_vain_is_told_of_the_end_of_the_job() -> None:
    bench = wide(2)
    bench.send(NodeHello("n2", "i", "ipc:///a", 8), b"n2")
    drains(bench, "n1")
    bench.send(NodeHello("n1", "i", "ipc:///a", 8), b"n1")
    assert places(bench)[3] == "n1", "it serves again before anybody had left"
    bench.send(StopJob(7, "job", "enough"), b"operator")
    told = {one.to for one in bench.said if isinstance(one, Send) and isinstance(one.message, StopWorkers)}
    assert told == {b"node", b"n1", b"n2"}


# --- the coordinator's host goes away ----------------------------------------------------------------------


def test_a_coordinator_whose_host_goes_away_has_its_workers_save_and_the_next_one_goes_on() -> None:
    bench = Bench()
    bench.run()
    bench.said = bench.core.suspend(bench.now)
    (order,) = bench.told(StopWorkers)
    assert (order.final, order.grace) == (True, 30.0), "they have time for a checkpoint"
    assert bench.core.stopping
    refused = bench.send(SubmitJob(2, replace(bench.spec, name="other"), "two"), b"operator")
    assert bench.told(Refused, refused)[0].code == "READ_ONLY"
    bench.all_stopped()
    assert (bench.job.state, bench.core.stopping) == ("PENDING", False)
    bench.now += 60.0
    bench.hello()
    assert bench.told(PrepareJob) == [], "nobody is started by who leaves"
    generation, iteration = bench.job.generation, bench.job.iteration
    restarted(bench)
    bench.hello()
    assert bench.job.state == "STARTING"
    bench.run()
    assert (bench.job.state, bench.job.generation) == ("RUNNING", generation + 1)
    assert bench.job.iteration == iteration


def test_one_that_is_killed_while_its_host_goes_away_goes_on_with_that() -> None:
    bench = Bench()
    bench.run()
    bench.core.suspend(bench.now)
    restarted(bench)
    bench.hello()
    assert [order.final for order in bench.told(StopWorkers)] == [True]
    bench.all_stopped()
    assert bench.job.state == "STARTING", "it stays, and has a node"


def test_a_job_that_ends_while_its_host_goes_away_has_ended() -> None:
    bench = Bench()
    bench.run()
    bench.send(StopJob(5, "job", "Ctrl-C"), b"operator")
    bench.core.suspend(bench.now)
    bench.all_stopped()
    assert bench.job.state == "CANCELLED"


def test_a_node_without_a_place_in_a_job_speaks_for_none_of_it() -> None:
    bench = Bench(nodes=2)
    for message in (
        AbortJob("job", "job/0", "i", "why"),
        SharedState("job", "job/0", "i", 1, "{}"),
        WorkerRegistered("job", "job/0", "i"),
        PrepareFailed(bench.job.request, "job", "why"),
        StoreReady(bench.job.request, "job", "127.0.0.1", 20000, STORE),
        LeaseShard(1, "job", "job/0", "i#c", "data"),
        ReportFailure("job", "job/0", "i", "oom"),
    ):
        assert bench.job.slots[0].node == "n0"
        assert not bench.core.foreign("n0", message)
        assert bench.core.foreign("n1", message)
        bench.job.left.add("n1")
        assert not bench.core.foreign("n1", message), "it was there, and ends"
        bench.job.left.clear()
    assert not bench.core.foreign(
        "n1", WorkerExited(0, "job", 0, "job/0", "i", 0, True, True, False, "", "/log", [], 0)
    )
    assert not bench.core.foreign("n1", AbortJob("another", "another/0", "i", "why"))


def test_what_agents_refused_is_in_the_status_until_they_come_back() -> None:
    bench = Bench()
    bench.send(NodeRefusals("n0", {"not_allowed": 3}))
    bench.send(NodeRefusals("unknown", {"not_allowed": 1}))
    assert [node.refused for node in bench.core.status(0.0, 1).nodes] == [{"not_allowed": 3}]
    bench.now = 10.0
    bench.send(NodeRefusals("n0", {"not_allowed": 4}, {"not_allowed": 2.0}))
    assert [node.refused_ago for node in bench.core.status(15.0, 1).nodes] == [{"not_allowed": 7.0}]
    bench.hello()
    assert [node.refused for node in bench.core.status(0.0, 1).nodes] == [{}], "it says so again"


def test_a_node_that_drained_and_ended_without_a_word_is_not_waited_for_any_longer() -> None:
    bench = Bench()
    bench.run()
    bench.send(NodeHello("n0", "i", "ipc:///a", 8, draining="spot"))
    bench.send(StopJob(5, "job", "Ctrl-C"), b"operator")
    assert bench.job.state == "STOPPING"
    bench.now += NODE_SILENT + 0.5
    bench.core.tick(bench.now)
    assert bench.job.state == "CANCELLED", "long before its time to stop is over"
    bench.hello()
    assert bench.told(StopWorkers) != [], "and what may live there is ended if it comes back"


# --- at the seams ------------------------------------------------------------------------------------------


def test_that_the_last_generation_had_completed_says_nothing_of_the_next() -> None:
    bench = Bench()
    bench.run()
    bench.job.completed = True
    bench.exit(0, 1)
    bench.all_stopped()
    bench.run()
    assert not bench.job.completed


def test_what_ends_a_job_while_it_is_put_aside_has_ended_it() -> None:
    aborted = Bench()
    aborted.run()
    aborted.core.suspend(aborted.now)
    aborted.exit(0, 130)
    aborted.all_stopped()
    assert (aborted.job.state, "RestartAbort" in aborted.job.result) == ("ABORTED", True)
    completed = Bench()
    completed.run()
    completed.core.suspend(completed.now)
    for rank in range(WORLD):
        completed.exit(rank, 0, completed=True)
    completed.all_stopped()
    assert completed.job.state == "SUCCEEDED"
    saved = Bench()
    saved.run()
    saved.core.suspend(saved.now)
    for rank in range(WORLD):
        saved.exit(rank, 0)
    saved.all_stopped()
    assert saved.job.state == "PENDING", "who saved and ended with 0 has not come to the end"


def test_of_a_node_that_drains_one_rank_ends_and_the_others_still_count() -> None:
    bench = Bench(policy="replace", independent=True, min_nodes=1)
    bench.run(wrapped=False)
    bench.send(NodeHello("n0", "i", "ipc:///a", 8, draining="spot"))
    process = bench.job.processes["job/0"]
    report = WorkerExited(
        0, "job", bench.job.generation, "job/0", process.incarnation, 143, False, False, False, "", "", [], 0
    )
    bench.send(replace(report, drains="spot"))
    assert bench.job.processes["job/1"].alive
