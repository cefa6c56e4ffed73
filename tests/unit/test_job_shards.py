"""The shards of a job: who is given what, what failures do to it, and what a new start of the coordinator knows."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from seamark.protocol.messages import (
    CheckpointShard,
    CompleteShard,
    Dataset,
    FailShard,
    LeaseShard,
    OpenShards,
    ReleaseShard,
    ReportFailure,
    ShardAnswer,
    ShardLease,
    ShardRequest,
)
from seamark.runtime_config import RuntimeConfig
from seamarkd.coordinator.classification import Evidence
from seamarkd.coordinator.ledger import MAX_HELD, Ledger, Row, State
from seamarkd.coordinator.shards import (
    MAX_DATASETS,
    MAX_SHARDS,
    Answer,
    JobShards,
    Numbers,
    Record,
    Saved,
    SavedDataset,
)

SET = Dataset("set", 8, 4)
KILLED = Evidence(status=-9)
PREEMPTED = Evidence(status=-15, notice="spot")


class Bench:
    """A job's shards, consumers that number their requests, and what was to be made durable."""

    def __init__(self, spec: Dataset = SET, **config: object) -> None:
        self.spec = spec
        self.config = RuntimeConfig(**config)  # type: ignore[arg-type]
        self.now = 0.0
        self.epoch = 1
        self.shards = JobShards("job", self.config, Numbers(1), random.Random(0))
        self.record = Record("job", {}, {}, {}, {})
        self.where = {"job/0": "n0", "job/1": "n1", "job/2": "n2", "job/10": "n3"}
        self.hold = ""
        self.numbers: dict[str, int] = {}
        self.last: ShardRequest

    def nodes(self) -> frozenset[str]:
        return frozenset(self.where.values())

    def took(self, answers: list[Answer]) -> list[ShardAnswer]:
        """The answers; what must be durable before they are sent is kept."""
        record = self.shards.take_record()
        if record is not None:
            self.record = self.record.followed_by(record)
        return [answer.message for answer in answers]

    def send(self, request: ShardRequest) -> list[ShardAnswer]:
        node = self.where[request.member]
        return self.took(self.shards.handle(self.now, request, node, self.nodes, self.hold))

    def ask(
        self, kind: type[ShardRequest], rank: int = 0, /, name: str = "0", process: str = "", **fields: object
    ) -> list[ShardAnswer]:
        consumer = f"{process or f'i{rank}'}#{self.spec.name}/{name}"
        number = self.numbers[consumer] = self.numbers.get(consumer, 0) + 1
        self.last = kind(number, "job", f"job/{rank}", consumer, self.spec.name, **fields)  # type: ignore[arg-type]
        return self.send(self.last)

    def open(self, rank: int = 0, **fields: object) -> ShardAnswer:
        (answer, *_) = self.ask(OpenShards, rank, spec=fields.pop("spec", self.spec), **fields)
        return answer

    def lease(self, rank: int = 0, **fields: object) -> ShardLease:
        (answer,) = self.ask(LeaseShard, rank, **fields)
        assert answer.lease is not None, answer
        return answer.lease

    def say(self, kind: type[ShardRequest], lease: ShardLease, rank: int = 0, /, **fields: object) -> list[ShardAnswer]:
        return self.ask(kind, rank, shard=lease.shard, lease_id=lease.lease_id, **fields)

    def lost(self, evidence: Evidence | None, *processes: str) -> list[ShardAnswer]:
        return self.took(self.shards.lost(self.now, processes, evidence, self.nodes))

    def serve(self, now: float) -> list[ShardAnswer]:
        self.now = now
        return self.took(self.shards.serve(now, self.nodes))

    def state(self, shard: int) -> str:
        row = self.record.rows[min(self.record.datasets), shard]
        return State(row.state).name

    def actions(self) -> list[tuple[str, str]]:
        return [(one.kind, one.action) for one in self.shards.decisions]

    def restart(self) -> None:
        """Another coordinator, which knows what was made durable."""
        datasets = []
        for number, spec in self.record.datasets.items():
            rows = [row for (dataset, _), row in self.record.rows.items() if dataset == number]
            smooth = [(row.shard, row.lease_id) for row in rows if row.state == State.DONE and not row.account]
            rest = [row for row in rows if (row.shard, row.lease_id) not in smooth]
            datasets.append(SavedDataset(number, spec, smooth, rest))
        replies = [reply for reply in self.record.replies.values() if reply is not None]
        self.epoch += 1
        self.shards = JobShards("job", self.config, Numbers(self.epoch), random.Random(0))
        self.shards.restore(self.now, Saved(datasets, replies, list(self.record.decisions.values())))


def bench(spec: Dataset = SET, ranks: int = 2, **config: object) -> Bench:
    made = Bench(spec, **config)
    for rank in range(ranks):
        assert made.open(rank).kind == "opened"
    return made


def kinds(answers: list[ShardAnswer]) -> list[str]:
    return [answer.kind for answer in answers]


# --- who is given what -----------------------------------------------------------------------------------------


def test_each_shard_goes_to_one_and_the_end_is_told_when_all_are_terminal() -> None:
    made = bench()
    first, second = made.lease(0), made.lease(1)
    assert (first.shard, second.shard) == (0, 1)
    assert second.lease_id > first.lease_id
    assert kinds(made.say(CompleteShard, first, 0)) == ["recorded"]
    assert kinds(made.ask(LeaseShard, 0)) == ["wait"], "the other shard may come back"
    answers = made.say(CompleteShard, second, 1, more=True)
    assert [(one.consumer, one.kind) for one in answers] == [("i1#set/0", "done"), ("i0#set/0", "done")]
    assert made.shards.complete
    assert kinds(made.ask(LeaseShard, 0)) == ["done"]


def test_with_more_the_answer_brings_the_next_shard() -> None:
    made = bench()
    (answer,) = made.say(CompleteShard, made.lease(), more=True)
    assert answer.kind == "leased"
    assert answer.lease is not None
    assert answer.lease.shard == 1


def test_who_waits_is_served_lowest_rank_first() -> None:
    made = bench(ranks=0)
    made.where |= {"job/2": "n2"}
    for rank in (10, 2, 1, 0):
        made.open(rank)
    held = [made.lease(0), made.lease(0, name="other")]
    for rank in (10, 2, 1):
        assert kinds(made.ask(LeaseShard, rank)) == ["wait"]
    served = [made.say(ReleaseShard, lease, 0)[1:] for lease in held]
    assert [[one.consumer for one in answers] for answers in served] == [["i1#set/0"], ["i2#set/0"]]


def test_who_asks_again_without_naming_its_lease_has_it_again() -> None:
    made = bench()
    assert made.lease() == made.lease()


def test_who_reads_ahead_names_its_latest_lease_and_gets_another() -> None:
    made = bench(Dataset("set", 100, 1))
    taken = [made.lease()]
    while len(taken) < MAX_HELD:
        taken.append(made.lease(after=taken[-1].lease_id))
    assert [lease.shard for lease in taken] == list(range(MAX_HELD))
    (answer,) = made.ask(LeaseShard, after=taken[-1].lease_id)
    assert answer.kind == "wait"
    assert answer.reason.startswith("64 shards that this consumer has leased are not done")
    done, served = made.say(CompleteShard, taken[3], name="trainer")
    assert (done.consumer, done.kind) == ("i0#set/trainer", "recorded"), "any consumer of the process may say so"
    assert served.lease is not None
    assert (served.consumer, served.lease.shard) == ("i0#set/0", MAX_HELD)
    made.restart()
    assert [made.lease(after=lease.lease_id) for lease in taken[:3]] == [taken[1], taken[2], taken[4]]


@pytest.mark.parametrize(("afresh", "back"), [("", []), ("consumer", [0, 1]), ("process", [0, 1, 2])])
def test_who_opens_afresh_gives_back_what_was_in_hand(afresh: str, back: list[int]) -> None:
    made = bench(Dataset("set", 12, 4))
    first = made.lease()
    second = made.lease(after=first.lease_id)
    third = made.lease(name="other")
    assert kinds(made.ask(LeaseShard, 1)) == ["wait"]
    answers = made.ask(OpenShards, spec=made.spec, afresh=afresh)
    assert [one.kind for one in answers] == ["opened", *["leased"] * bool(back)]
    live = [made.say(CheckpointShard, one, progress=1)[0].kind for one in (first, second, third)]
    assert live == ["stale" if one.shard in back else "recorded" for one in (first, second, third)]
    assert not made.shards.decisions, "nothing has failed"


def test_a_request_to_open_afresh_that_comes_twice_gives_back_once() -> None:
    made = bench()
    opened = made.ask(OpenShards, spec=made.spec, afresh="process", name="trainer")
    request = made.last
    lease = made.lease()
    assert made.send(request) == opened
    assert kinds(made.say(CheckpointShard, lease, progress=1)) == ["recorded"]


def test_a_host_that_goes_away_gets_nothing_more() -> None:
    made = bench()
    made.lease(0), made.lease(0, name="other")
    assert kinds(made.ask(LeaseShard, 1)) == ["wait"]
    assert kinds(made.took(made.shards.drain("n0"))) == []
    (told,) = made.took(made.shards.drain("n1"))
    assert (told.consumer, told.kind) == ("i1#set/0", "drain")
    made.hold = "drain"
    assert kinds(made.ask(LeaseShard, 1)) == ["drain"]


def test_nothing_is_given_out_while_the_disk_is_full_and_what_is_done_is_taken() -> None:
    made = bench()
    lease = made.lease()
    made.hold = "the disk is full"
    (answer,) = made.ask(LeaseShard, 1)
    assert (answer.kind, answer.reason) == ("wait", "the disk is full")
    assert kinds(made.say(CompleteShard, lease, more=True)) == ["recorded"]
    made.hold = ""
    (served,) = made.serve(1.0)
    assert (served.consumer, served.kind) == ("i1#set/0", "leased")


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (Dataset("set", 9, 4), "data set set is size 8, shard_size 4, epochs 1 in this job already"),
        (Dataset("set", 8, 4, 7), "and this rank asks for size 8, shard_size 4, epochs 1, shuffle_seed 7"),
        (Dataset("other", 8, 4), "the request names data set set and describes other"),
    ],
)
def test_a_data_set_that_is_described_otherwise_is_refused(spec: Dataset, why: str) -> None:
    made = bench()
    (answer,) = made.ask(OpenShards, 1, spec=spec)
    assert answer.kind == "refused"
    assert why in answer.reason


def test_too_many_shards_and_data_sets_are_refused() -> None:
    made = Bench(Dataset("set", MAX_SHARDS + 1, 1))
    assert made.open().reason == "20000001 shards are more than 20000000: choose a larger shard_size"
    for number in range(MAX_DATASETS):
        made.spec = Dataset(f"set{number}", 1, 1)
        assert made.open().kind == "opened"
    made.spec = Dataset("one more", 1, 1)
    assert made.open().reason.startswith("this job has 1000 data sets, and more are not kept")


def test_of_a_data_set_that_nobody_has_opened_nothing_is_given() -> None:
    (answer,) = Bench().ask(LeaseShard)
    assert (answer.kind, answer.reason) == ("refused", "this job has no data set set: open it first")


def test_a_data_set_without_samples_is_done() -> None:
    made = bench(Dataset("set", 0, 4), ranks=1)
    assert kinds(made.ask(LeaseShard)) == ["done"]
    assert made.shards.complete


# --- requests that are repeated, late, or about another's lease -------------------------------------------------


def test_a_repeated_request_has_its_answer_again_and_a_late_one_none() -> None:
    made = bench()
    first = made.ask(LeaseShard)
    asked = made.last
    assert made.send(asked) == first
    assert first[0].lease is not None
    second = made.say(CompleteShard, first[0].lease, more=True)
    assert made.send(made.last) == second
    assert made.send(asked) == []
    assert made.shards.status()[0].leased == 1


def test_a_request_that_was_overtaken_does_not_end_the_wait() -> None:
    made = bench(Dataset("set", 1, 1))
    lease = made.lease(0)
    made.ask(LeaseShard, 1)
    late = made.last
    assert kinds(made.ask(LeaseShard, 1)) == ["wait"]
    assert made.send(late) == []
    assert kinds(made.say(ReleaseShard, lease, 0)) == ["recorded", "leased"]


@pytest.mark.parametrize("kind", [CompleteShard, CheckpointShard, FailShard, ReleaseShard])
def test_under_a_lease_that_was_lost_nothing_is_taken(kind: type[ShardRequest]) -> None:
    made = bench(ranks=3)
    lease = made.lease(0)
    more = {"progress": 1} if kind is CheckpointShard else {}
    assert kinds(made.say(kind, lease, 1, **more)) == ["stale"], "of another process"
    assert made.lost(None, "i0") == []
    (answer,) = made.say(kind, lease, 0, process="zombie", **more)
    assert answer.reason.endswith("has ended: the shard is PENDING now")
    assert made.lease(2).shard == lease.shard
    (answer,) = made.say(kind, lease, 0, process="i0", **more)
    assert answer.reason.endswith("was given up, and it was leased again since")
    (answer,) = made.ask(kind, 2, shard=1, lease_id=5, **more)
    assert answer.reason == "data set set has no shard 1 that was ever leased"
    (answer,) = made.ask(kind, 2, shard=1 << 40, lease_id=5, **more)
    assert answer.kind == "stale"


def test_a_completion_that_is_said_twice_is_taken_once_and_true_both_times() -> None:
    made = bench()
    lease = made.lease()
    assert kinds(made.say(CompleteShard, lease, digest="a")) == ["recorded"]
    assert kinds(made.say(CompleteShard, lease, digest="b")) == ["recorded"]
    assert [row.digest for row in made.record.rows.values()] == ["a"]


# --- what is lost ------------------------------------------------------------------------------------------------


def test_what_a_lost_process_had_goes_on_behind_its_last_checkpoint() -> None:
    made = bench()
    lease = made.lease(0)
    assert kinds(made.say(CheckpointShard, lease, 0, progress=2)) == ["recorded"]
    assert made.lost(PREEMPTED, "i0") == []
    again = made.lease(1)
    assert (again.shard, again.progress, again.attempt) == (lease.shard, 2, 2)
    assert again.lease_id > lease.lease_id
    assert "i0#set/0" in made.record.replies
    assert made.record.replies["i0#set/0"] is None, "its last answer is kept no longer"


@pytest.mark.parametrize(
    ("evidence", "kind", "action"),
    [
        (KILLED, "transient", "Retry"),
        (PREEMPTED, "spot_preemption", "Retry"),
        (Evidence(node_lost=True), "hardware", "Retry"),
        (Evidence(status=0), "unknown", "Retry"),
        (Evidence(oom_kill=True, status=-9), "oom", "Retry"),
    ],
)
def test_how_a_holder_was_lost_decides_what_it_costs(evidence: Evidence, kind: str, action: str) -> None:
    made = bench()
    made.lease(0)
    made.lost(evidence, "i0")
    assert made.actions() == [(kind, action)]


def test_a_restart_of_all_is_charged_to_no_shard() -> None:
    made = bench(no_progress_cycles=1, transient_retries=0)
    for turn in range(10):
        lease = made.lease(0, process=f"p{turn}")
        assert lease.shard == 0
        made.lost(None, f"p{turn}")
    assert made.actions() == []


def test_of_what_was_read_ahead_nothing_is_charged() -> None:
    made = bench(Dataset("set", 16, 4), transient_retries=0)
    ahead = [made.lease(name="a")]
    ahead.append(made.lease(name="a", after=ahead[0].lease_id))
    ahead.append(made.lease(name="b"))
    made.lost(KILLED, "i0")
    assert sorted(one.shard for one in made.shards.decisions) == [0, 2], "each consumer's oldest"
    assert [made.state(shard) for shard in range(3)] == ["FAILED", "PENDING", "FAILED"]


def test_a_report_names_the_lease_that_is_charged() -> None:
    made = bench(Dataset("set", 16, 4))
    first = made.lease(name="a")
    second = made.lease(name="a", after=first.lease_id)
    made.lease(name="b")
    made.shards.reported(ReportFailure("job", "job/0", "i0", "poison_input", 1, "bad", second.lease_id))
    made.took(made.shards.failed(0.0, "i0", Evidence(text="x"), made.nodes))
    assert [(one.shard, one.batch, one.kind) for one in made.shards.decisions] == [(second.shard, 1, "poison_input")]
    assert kinds(made.ask(LeaseShard, name="a")) == ["leased"], "it lives, and may ask again"


def test_what_the_script_itself_reported_is_not_forgotten_over_an_exception_that_says_nothing() -> None:
    made = bench()
    made.lease(0)
    made.shards.reported(ReportFailure("job", "job/0", "i0", "hardware", -1, "the card is broken"))
    made.shards.reported(ReportFailure("job", "job/0", "i0", "", -1, "RuntimeError"))
    made.lost(Evidence(status=1), "i0")
    assert made.actions() == [("hardware", "Retry")]


def test_an_attempt_that_takes_too_long_is_given_up_and_one_that_was_not_begun_is_not() -> None:
    made = bench(Dataset("set", 12, 4), attempt_timeout=10.0)
    first = made.lease(0)
    second = made.lease(0, after=first.lease_id)
    made.serve(10.0)
    assert made.actions() == []
    made.serve(10.5)
    assert [(one.shard, one.kind) for one in made.shards.decisions] == [(first.shard, "timeout")]
    made.serve(20.0)
    assert made.actions() == [("timeout", "Retry")], "the second has been worked on since the first was given up"
    made.serve(21.0)
    assert [one.shard for one in made.shards.decisions] == [first.shard, second.shard]


# --- decisions -----------------------------------------------------------------------------------------------------


def test_fifty_preemptions_cost_a_transient_failure_nothing() -> None:
    made = bench(Dataset("set", 4, 4), transient_retries=1)
    for turn in range(50):
        made.lease(0, process=f"p{turn}")
        made.lost(PREEMPTED, f"p{turn}")
    made.lease(0)
    made.lost(KILLED, "i0")
    assert set(made.actions()[:50]) == {("spot_preemption", "Retry")}
    assert made.actions()[50:] == [("transient", "Retry")]
    made.now = 100.0
    made.lease(1)
    made.lost(KILLED, "i1")
    assert made.actions()[51:] == [("transient", "GiveUp")]
    assert made.state(0) == "FAILED"


def test_a_checkpoint_since_the_last_failure_clears_the_account() -> None:
    made = bench(Dataset("set", 4, 4), transient_retries=1)
    for progress in (1, 2):
        lease = made.lease(0)
        made.say(CheckpointShard, lease, 0, progress=progress)
        made.say(FailShard, lease, 0, kind="transient")
        made.now += 100.0
    assert made.actions() == [("transient", "Retry")] * 2
    made.say(FailShard, made.lease(0), 0, kind="transient")
    assert made.actions()[2:] == [("transient", "GiveUp")], "the checkpoint was before the failure before"


def test_a_back_off_is_waited_out_and_whoever_waits_is_served_then() -> None:
    made = bench(Dataset("set", 4, 4))
    lease = made.lease(0)
    made.ask(LeaseShard, 1)
    assert made.shards.due() is None
    (answer,) = made.say(FailShard, lease, 0, kind="transient")
    assert answer.kind == "recorded"
    assert answer.reason.startswith("transient 1 of 3, retried in")
    due = made.shards.due()
    assert due is not None
    assert made.serve(due - 0.01) == []
    (served,) = made.serve(due)
    assert (served.consumer, served.kind) == ("i1#set/0", "leased")


def test_a_shard_is_not_done_again_on_the_node_that_failed_unless_there_is_no_other() -> None:
    made = bench(Dataset("set", 4, 4))
    lease = made.lease(0)
    made.say(FailShard, lease, 0, kind="hardware")
    assert kinds(made.ask(LeaseShard, 0)) == ["wait"]
    assert made.lease(1).shard == 0
    made.lost(None, "i1")
    made.where = {"job/0": "n0"}
    assert made.lease(0).shard == 0


def test_without_redistribution_a_shard_that_was_begun_is_its_member_s() -> None:
    made = bench(elastic_redistribution=False)
    begun = made.lease(0)
    made.lost(PREEMPTED, "i0")
    assert made.lease(1).shard == 1
    made.where["job/0"] = "n9"
    assert made.lease(0, process="i0b").shard == begun.shard


def test_without_redistribution_a_request_does_not_go_through_the_shards_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = 300
    made = bench(Dataset("set", count + 2, 1), elastic_redistribution=False)
    for number in range(count):
        made.lease(0, name=str(number))
    made.lost(None, "i0")
    looked: list[int] = []
    suits = Ledger._suits

    def counted(ledger: Ledger, shard: int, *more: Any) -> bool:
        looked.append(shard)
        return suits(ledger, shard, *more)

    monkeypatch.setattr(Ledger, "_suits", counted)
    assert [made.lease(1, name=str(number)).shard for number in range(2)] == [count, count + 1]
    assert kinds(made.ask(LeaseShard, 1, name="2")) == ["wait"]
    assert looked == []
    assert [made.lease(0, process="i0b", name=str(number)).shard for number in range(2)] == [0, 1]
    made.lost(None, "i0b")
    made.restart()
    assert made.lease(0, process="i0c").shard == 0, "whose they are is written down"
    assert looked == [0, 1, 0]


def test_a_batch_that_fails_twice_wherever_is_left_out_and_the_shard_is_done_without_it() -> None:
    made = bench(Dataset("set", 4, 4))
    assert made.say(FailShard, made.lease(0), 0, kind="poison_input", batch=2)[0].kind == "recorded"
    made.now = 2.0
    second = made.lease(1)
    assert second.skip == []
    made.say(FailShard, second, 1, kind="poison_input", batch=2)
    assert made.actions() == [("poison_input", "Retry"), ("poison_input", "Quarantine")]
    third = made.lease(0)
    assert third.skip == [2]
    assert kinds(made.say(CompleteShard, third, 0, more=True)) == ["done"]
    assert made.shards.complete
    assert made.shards.report() == "data set set: all 1 shards done, batches left out: shard 0 batch 2"


def test_after_running_out_of_memory_the_batch_size_is_halved() -> None:
    made = bench(Dataset("set", 4, 4))
    made.say(FailShard, made.lease(0), 0, kind="oom")
    made.now = 100.0
    assert made.lease(0).batch_size_scale == 0.5


def test_the_report_at_the_end_names_what_is_not_done() -> None:
    made = bench(Dataset("set", 16, 4), poison_attempts=1, oom_retries=0)
    made.say(FailShard, made.lease(0), 0, kind="poison_input")
    made.say(FailShard, made.lease(0), 0, kind="oom")
    made.say(CompleteShard, made.lease(0), 0)
    assert not made.shards.complete
    assert made.shards.report() == ("data set set: 1 of 4 shards done, 1 quarantined (0), 1 failed (1), 1 not finished")


def test_a_node_where_processes_crash_again_is_the_one_that_is_charged() -> None:
    made = bench(Dataset("set", 8, 4))
    for process in ("p0", "p1"):
        made.now += 100.0
        made.lease(0, process=process)
        made.lost(Evidence(status=-11), process)
    assert made.actions() == [("transient", "Retry"), ("hardware", "Retry")]


# --- another start of the coordinator -------------------------------------------------------------------------------


def test_another_start_knows_leases_states_and_the_last_answers() -> None:
    made = bench(Dataset("set", 16, 4))
    done, kept, failed = made.lease(0), made.lease(1), made.lease(0, name="other")
    made.say(CompleteShard, done, 0)
    completed, answer = made.last, made.send(made.last)
    made.say(CheckpointShard, kept, 1, progress=1)
    made.say(FailShard, failed, 0, name="other", kind="hardware")
    before = made.shards.status()
    made.restart()
    assert made.shards.status() == before
    assert made.send(completed) == answer
    assert [one.kind for one in made.shards.decisions] == ["hardware"]
    again = made.lease(1)
    assert (again.lease_id, again.progress) == (kept.lease_id, 1)
    other = made.lease(0)
    assert other.shard == 3, "shard 2 is not for this node"
    assert other.lease_id > failed.lease_id
    assert kinds(made.say(CompleteShard, kept, 1)) == ["recorded"]


def test_after_a_new_start_who_is_not_heard_of_in_time_has_lost_its_lease() -> None:
    made = bench()
    heard, unheard = made.lease(0), made.lease(1)
    made.restart()
    made.took(made.shards.seen(1.0, "job/0", "i0", made.nodes))
    made.took(made.shards.settle(10.0, made.nodes))
    assert [(one.shard, one.kind) for one in made.shards.decisions] == [(unheard.shard, "hardware")]
    assert kinds(made.say(CompleteShard, heard, 0)) == ["recorded"]
    assert kinds(made.say(CompleteShard, unheard, 1)) == ["stale"]
    assert made.took(made.shards.settle(11.0, made.nodes)) == []
    assert len(made.shards.decisions) == 1


def test_after_a_new_start_another_process_in_its_place_ends_a_lease() -> None:
    made = bench()
    lease = made.lease(0)
    made.restart()
    made.took(made.shards.seen(1.0, "job/0", "successor", made.nodes))
    assert [one.shard for one in made.shards.decisions] == [lease.shard]


def test_on_a_host_that_was_started_anew_no_back_off_lasts_longer_than_the_longest() -> None:
    made = bench(Dataset("set", 4, 4), max_delay=60.0)
    made.now = 1e6
    made.say(FailShard, made.lease(0), 0, kind="transient")
    made.now = 0.0
    made.restart()
    assert kinds(made.ask(LeaseShard, 1)) == ["wait"]
    assert made.shards.due() == 60.0
    assert kinds(made.serve(60.0)) == ["leased"]


def test_what_is_written_of_a_shard_is_what_is_known_of_it() -> None:
    made = bench()
    lease = made.lease(0)
    made.say(CheckpointShard, lease, 0, progress=3)
    (row,) = made.record.rows.values()
    assert (row.shard, row.state, row.lease_id, row.node) == (0, State.LEASED, lease.lease_id, "n0")
    assert msgspec.json.decode(row.account)["progress"] == 3
    assert isinstance(row, Row)


def test_while_nothing_may_be_given_out_nothing_is_and_the_time_is_nobody_s() -> None:
    shards = JobShards("job", RuntimeConfig(attempt_timeout=100.0), Numbers(1), random.Random(0))

    def nodes() -> frozenset[str]:
        return frozenset({"n0", "n1"})

    def ask(kind: type[ShardRequest], rank: int, request: int, **fields: object) -> ShardAnswer:
        message = kind(request, "job", f"job/{rank}", f"i{rank}#set/0", "set", **fields)  # type: ignore[arg-type]
        return shards.handle(0.0, message, f"n{rank}", nodes, "")[0].message

    one = Dataset("set", 4, 4)
    for rank in range(2):
        ask(OpenShards, rank, 1, spec=one)
    held = ask(LeaseShard, 0, 2).lease
    assert held is not None
    assert ask(LeaseShard, 1, 2).kind == "wait"
    shards.serve(50.0, nodes)
    shards.held = True
    for now in range(51, 1_000, 10):
        assert shards.serve(float(now), nodes) == []
    assert shards.lost(1_000.0, ["i0"], None, nodes) == [], "given back, and not to who is being stopped, too"
    shards.held = False
    (given,) = shards.serve(1_001.0, nodes)
    assert (given.message.consumer, given.message.kind) == ("i1#set/0", "leased")
    shards.held = True
    for now in range(1_002, 2_000, 10):
        shards.serve(float(now), nodes)
    shards.held = False
    shards.serve(2_000.0, nodes)
    assert [decision.kind for decision in shards.decisions] == [], "a minute without a disk is no attempt's"
