"""Which job's shards a message or an event is about, and who is told."""

from __future__ import annotations

import json
import random

import msgspec
import pytest

from seamark.protocol.messages import (
    Cause,
    CheckpointShard,
    CompleteShard,
    Dataset,
    Decisions,
    DecisionsRequest,
    FailShard,
    FailurePattern,
    JobSpec,
    LeaseShard,
    OpenShards,
    Refused,
    ReportFailure,
    ShardAnswer,
    ShardLease,
    ShardRequest,
    WorkerExited,
    WorkerStarted,
)
from seamarkd.coordinator.budget import RestartBudget
from seamarkd.coordinator.classification import Evidence
from seamarkd.coordinator.dispatch import Dispatch, unusable
from seamarkd.coordinator.effects import Effect
from seamarkd.coordinator.job import Job, Process
from seamarkd.coordinator.node import Node
from seamarkd.coordinator.shards import Record
from seamarkd.effects import Send

SET = Dataset("set", 12, 4)


def spec(**changes: object) -> JobSpec:
    made = JobSpec("job", ["t.py"], False, "python", "/", {}, 1, 1, 2, "replace", 2, "", "/tmp")
    return msgspec.structs.replace(made, **changes)


class Bench:
    """A job of two ranks on two nodes."""

    def __init__(self, **changes: object) -> None:
        self.job = Job(spec(**changes), RestartBudget(2), 0.0, state="RUNNING")
        for rank in range(2):
            self.job.processes[f"job/{rank}"] = Process(f"i{rank}", 1, True, f"n{rank}")
        self.nodes = {f"n{rank}": Node(f"r{rank}".encode(), 8, 0.0) for rank in range(2)}
        self.dispatch = Dispatch(1, {"job": self.job}, self.nodes, random.Random(0))
        self.number = 0

    def ask(self, kind: type[ShardRequest], rank: int = 0, /, **fields: object) -> list[Effect]:
        given = {"job": "job", "route": f"r{rank}".encode(), "incarnation": f"i{rank}"} | fields
        route, incarnation = given.pop("route"), given.pop("incarnation")
        self.number += 1
        request = kind(
            request=self.number, member=f"job/{rank}", consumer=f"{incarnation}#set/0", dataset="set", **given
        )  # type: ignore[arg-type]
        return self.dispatch.request(0.0, route, request)  # type: ignore[arg-type]

    def lease(self, rank: int = 0) -> ShardLease:
        self.ask(OpenShards, rank, spec=SET)
        (answer,) = told(self.ask(LeaseShard, rank))
        assert answer.lease is not None
        return answer.lease

    def exit(self, rank: int = 0, **changes: object) -> list[Effect]:
        report = WorkerExited(1, "job", 1, f"job/{rank}", f"i{rank}", -9, False, False, False, "", "", [], 0)
        return self.dispatch.exited(0.0, self.job, msgspec.structs.replace(report, **changes))

    def decided(self) -> list[tuple[str, str]]:
        shards = self.job.shards
        return [(one.kind, one.action) for one in shards.decisions] if shards else []


def told(effects: list[Effect]) -> list[ShardAnswer]:
    return [one.message for one in effects if isinstance(one, Send) and isinstance(one.message, ShardAnswer)]


def test_what_is_taken_is_to_be_durable_before_it_is_told() -> None:
    made = Bench()
    lease = made.lease()
    effects = made.ask(CompleteShard, shard=lease.shard, lease_id=lease.lease_id)
    assert [type(effect) for effect in effects] == [Record, Send]
    assert isinstance(effects[1], Send)
    assert effects[1].to == b"r0"


@pytest.mark.parametrize(
    ("fields", "state", "why"),
    [
        ({"job": "other"}, "RUNNING", "there is no job named other"),
        ({}, "SUCCEEDED", "job job has ended"),
        ({"incarnation": "zombie"}, "RUNNING", "this process has been replaced: what it says counts no longer"),
    ],
)
def test_who_may_not_ask_is_told_why(fields: dict[str, object], state: str, why: str) -> None:
    made = Bench()
    made.job.state = state  # type: ignore[assignment]
    (answer,) = told(made.ask(LeaseShard, **fields))
    assert (answer.kind, answer.reason) == ("refused", why)


def test_of_a_job_that_ends_what_is_done_is_taken_and_nothing_is_given() -> None:
    made = Bench()
    lease = made.lease()
    made.job.state = "STOPPING"
    (answer,) = told(made.ask(CompleteShard, shard=lease.shard, lease_id=lease.lease_id, more=True))
    assert (answer.kind, answer.lease) == ("recorded", None)
    assert [(one.kind, one.reason) for one in told(made.ask(LeaseShard))] == [("wait", "the job ends")]


def test_who_has_ended_may_not_ask() -> None:
    made = Bench()
    made.job.processes["job/0"].alive = False
    assert [answer.kind for answer in told(made.ask(LeaseShard))] == ["refused"]


def test_what_comes_before_its_agent_has_introduced_it_is_not_answered() -> None:
    made = Bench()
    assert made.ask(LeaseShard, route=b"another agent") == []
    del made.job.processes["job/0"]
    assert made.ask(LeaseShard) == []


def test_a_node_that_drains_gets_nothing_more_and_its_waiters_are_told() -> None:
    made = Bench()
    made.lease(0), made.lease(1), made.lease(0)
    made.job.processes["job/2"] = Process("i2", 1, True, "n1")
    made.ask(OpenShards, 2, route=b"r1", spec=SET)
    assert [one.lease.shard for one in told(made.ask(LeaseShard, 2, route=b"r1")) if one.lease] == [2]
    made.job.processes["job/3"] = Process("i3", 1, True, "n1")
    assert [one.kind for one in told(made.ask(LeaseShard, 3, route=b"r1"))] == ["wait"]
    (answer,) = told(made.dispatch.drain(0.0, "n1"))
    assert (answer.consumer, answer.kind) == ("i3#set/0", "drain")
    made.nodes["n1"].draining = "spot"
    assert [one.kind for one in told(made.ask(LeaseShard, 3, route=b"r1"))] == ["drain"]


def test_nothing_is_given_while_there_is_a_reason_not_to() -> None:
    made = Bench()
    made.ask(OpenShards, spec=SET)
    made.dispatch.hold = "the disk is full"
    assert [(one.kind, one.reason) for one in told(made.ask(LeaseShard))] == [("wait", "the disk is full")]
    assert made.dispatch.tick(1.0, settled=True) == []
    made.dispatch.hold = ""
    assert [one.kind for one in told(made.dispatch.tick(2.0, settled=True))] == ["leased"]


@pytest.mark.parametrize(
    ("changes", "decided"),
    [
        ({}, [("transient", "Retry")]),
        ({"ordered": True}, []),
        ({"discarded": True, "status": 1}, []),
        ({"drains": "spot", "status": -15}, [("spot_preemption", "Retry")]),
        ({"oom_kill": True}, [("oom", "Retry")]),
        ({"hang": "no sign of life for 90 s"}, [("timeout", "Retry")]),
        ({"status": 1, "log_tail": ["a", "my: disk is gone"]}, [("hardware", "Retry")]),
        ({"status": 0, "completed": True}, [("unknown", "Retry")]),
    ],
)
def test_how_a_worker_ended_decides_about_what_it_had(
    changes: dict[str, object], decided: list[tuple[str, str]]
) -> None:
    made = Bench(failure_patterns=[FailurePattern("^my: disk", "hardware")])
    lease = made.lease()
    made.exit(**changes)
    assert made.decided() == decided
    assert made.job.shards is not None
    assert made.job.shards.status()[0].leased == 0
    (answer,) = told(made.ask(CheckpointShard, 0, shard=lease.shard, lease_id=lease.lease_id, progress=1))
    assert answer.kind == "stale"


@pytest.mark.parametrize(
    ("cause", "decided"),
    [
        (Cause(kind="exception", text="CUDA out of memory"), [("oom", "Retry")]),
        (Cause(kind="hang", text="no ping"), [("timeout", "Retry")]),
        (Cause(kind="stuck", text="in a collective"), [("timeout", "Retry")]),
        (Cause(kind="exception", text="Connection reset by peer", communication=True), []),
        (Cause(kind="node", text="lost"), []),
        (Cause(kind="joined", text="a rank has come"), []),
    ],
)
def test_a_fault_of_a_worker_that_goes_on_is_its_shard_s(cause: Cause, decided: list[tuple[str, str]]) -> None:
    made = Bench()
    made.lease()
    made.dispatch.faulted(0.0, made.job, "i0", cause)
    assert made.decided() == decided


def test_what_a_worker_reported_of_its_fault_is_believed_first() -> None:
    made = Bench()
    lease = made.lease()
    made.dispatch.reported(ReportFailure("job", "job/0", "i0", "poison_input", 1, "bad", lease.lease_id))
    made.dispatch.reported(ReportFailure("no such job", "job/0", "i0", "oom"))
    made.dispatch.faulted(0.0, made.job, "i0", Cause(kind="exception", text="CUDA out of memory"))
    answer = made.dispatch.decisions(0.0, DecisionsRequest(1, "job"))
    assert isinstance(answer, Decisions)
    assert [(one.kind, one.batch) for one in answer.decisions] == [("poison_input", 1)]


@pytest.mark.parametrize(("draining", "kind"), [("", "hardware"), ("spot", "spot_preemption")])
def test_with_a_node_all_is_lost_that_its_workers_had(draining: str, kind: str) -> None:
    made = Bench()
    made.lease(0), made.lease(1)
    made.dispatch.node_lost(0.0, made.job, "n1", draining)
    assert made.decided() == [(kind, "Retry")]
    assert made.job.shards is not None
    assert made.job.shards.holders() == {"i0"}


def test_a_restart_of_all_gives_everything_back_and_charges_nobody() -> None:
    made = Bench()
    made.lease(0), made.lease(1)
    made.dispatch.all_lost(0.0, made.job)
    assert made.job.shards is not None
    assert (made.job.shards.holders(), made.decided()) == (set(), [])


def test_events_of_a_job_without_shards_are_nothing() -> None:
    made = Bench()
    started = WorkerStarted(1, "job", 1, "job/0", "i0", 1, 0.0, "")
    effects = [
        *made.dispatch.started(0.0, made.job, started),
        *made.exit(),
        *made.dispatch.faulted(0.0, made.job, "i0", Cause(kind="exception")),
        *made.dispatch.lost(0.0, made.job, ["i0"], Evidence()),
        *made.dispatch.node_lost(0.0, made.job, "n0", ""),
        *made.dispatch.all_lost(0.0, made.job),
        *made.dispatch.drain(0.0, "n0"),
        *made.dispatch.tick(0.0, settled=True),
    ]
    assert effects == []
    assert made.dispatch.due() is None


def test_decisions_are_found_by_data_set_and_shard() -> None:
    made = Bench()
    for rank in range(2):
        lease = made.lease(rank)
        made.ask(FailShard, rank, shard=lease.shard, lease_id=lease.lease_id, kind="transient")

    def found(**about: object) -> list[int]:
        answer = made.dispatch.decisions(0.0, DecisionsRequest(1, "job", **about))  # type: ignore[arg-type]
        assert isinstance(answer, Decisions)
        return [one.shard for one in answer.decisions]

    assert found() == [0, 1]
    assert found(dataset="set", shard=1) == [1]
    assert found(dataset="other") == []
    assert isinstance(made.dispatch.decisions(0.0, DecisionsRequest(1, "other")), Refused)


def test_a_back_off_that_somebody_waits_for_is_due_until_the_job_ends() -> None:
    made = Bench()
    lease = made.lease(0)
    made.lease(1), made.lease(1)
    made.ask(FailShard, 0, shard=lease.shard, lease_id=lease.lease_id, kind="transient")
    assert made.dispatch.due() is None
    made.job.processes["job/2"] = Process("i2", 1, True, "n1")
    made.job.processes["job/3"] = Process("i3", 1, True, "n1")
    made.ask(LeaseShard, 2, route=b"r1")
    made.ask(LeaseShard, 3, route=b"r1")
    assert made.dispatch.due() is not None
    made.job.state = "SUCCEEDED"
    assert made.dispatch.due() is None


def test_a_failure_is_dealt_with_at_once_while_another_job_s_shard_waits_out_its_back_off() -> None:
    waiting, failing = Bench(name="waiting"), Bench(name="failing")
    jobs = {"waiting": waiting.job, "failing": failing.job}
    for made in (waiting, failing):
        made.job.processes |= {f"job/{rank}": Process(f"i{rank}", 1, True, "n1") for rank in (2, 3)}
        made.dispatch = Dispatch(1, jobs, made.nodes, random.Random(0))
    failing.dispatch = waiting.dispatch
    for name, made in (("waiting", waiting), ("failing", failing)):
        for rank, route in ((0, b"r0"), (1, b"r1"), (2, b"r1")):
            made.ask(OpenShards, rank, job=name, route=route, spec=SET)
            made.ask(LeaseShard, rank, job=name, route=route)
    held = waiting.job.shards
    assert held is not None
    (lease,) = [one for one in held._ledgers["set"].leases() if one.holder.member == "job/0"]
    told_so = FailShard(9, "waiting", "job/0", "i0#set/0", "set", lease.shard, lease.lease_id, "oom")
    waiting.dispatch.request(0.0, b"r0", told_so)
    waiting.ask(LeaseShard, 3, job="waiting", route=b"r1")
    assert (waiting.dispatch.due() or 0.0) > 0.0, "nothing of it is to be done before"
    failing.ask(LeaseShard, 3, job="failing", route=b"r1")
    # No tick, and no time, between the failure and the lease of who waits.
    (given,) = [one for one in told(failing.exit(0, drains="spot")) if one.kind == "leased"]
    assert given.consumer == "i3#set/0"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"runtime": json.dumps({"oom_retries": 5})}, ""),
        ({"runtime": json.dumps({"oom_retries": -1})}, "oom_retries: must be a whole number"),
        ({"runtime": "{"}, "Expecting property name"),
        ({"failure_patterns": [FailurePattern("(", "oom")]}, "is no regular expression"),
    ],
)
def test_operational_parameters_that_can_t_be_used_are_named(changes: dict[str, object], why: str) -> None:
    assert why in unusable(spec(**changes))
    assert bool(why) == bool(unusable(spec(**changes)))
