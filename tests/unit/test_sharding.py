"""The worker's side of shards, against the coordinator's own rules behind a socket."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq
from torch.utils.data import DataLoader

import seamark
from seamark import sharding
from seamark.environment import WorkerEnvironment
from seamark.protocol.codec import decode, encode
from seamark.protocol.messages import Dataset, LeaseShard, Message, ReportFailure, ShardLease, ShardRequest
from seamark.protocol.sockets import make_socket
from seamark.runtime_config import RuntimeConfig
from seamark.sharding import Line, Shard, ShardError
from seamarkd.coordinator.shards import JobShards, Numbers

INCARNATION = "i0"


class Door:
    """An agent and a coordinator in one thread: what comes is decided on by the coordinator's rules."""

    def __init__(self, address: str) -> None:
        self.shards = JobShards("job", RuntimeConfig(poison_attempts=1), Numbers(1), random.Random(0))
        self.heard: list[Message] = []
        self.hold = ""
        self.mute = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = make_socket(self._context, zmq.ROUTER)
        self._socket.bind(address)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._ended.is_set():
            if not self._socket.poll(20):
                continue
            _, *frames = self._socket.recv_multipart()
            message = decode(frames)
            self.heard.append(message)
            if isinstance(message, ReportFailure):
                self.shards.reported(message)
            elif isinstance(message, ShardRequest) and not self.mute:
                for answer in self.shards.handle(0.0, message, "n0", lambda: frozenset({"n0"}), self.hold):
                    self._socket.send_multipart([answer.message.consumer.encode(), *encode(answer.message)])

    def wait_reports(self, count: int) -> list[ReportFailure]:
        until = time.monotonic() + 30.0
        while time.monotonic() < until:
            found = [one for one in self.heard.copy() if isinstance(one, ReportFailure)]
            if len(found) >= count:
                return found
            time.sleep(0.001)
        raise AssertionError(f"fewer than {count} reports: {self.heard}")

    def leases(self) -> list[LeaseShard]:
        return [one for one in self.heard.copy() if isinstance(one, LeaseShard)]

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close(0)
        self._context.term()


@pytest.fixture
def door(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    address = f"ipc://{tmp_path_factory.mktemp('d')}/agent"
    environ = {
        "SEAMARK_ADDRESS": address,
        "SEAMARK_JOB": "job",
        "SEAMARK_MEMBER": "job/0",
        "SEAMARK_INCARNATION": INCARNATION,
        "SEAMARK_GENERATION": "1",
        "RANK": "0",
        "WORLD_SIZE": "1",
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sharding, "watch_exceptions", lambda: None)
    made = Door(address)
    yield made
    made.mute = False
    for one in sharding._open.copy():
        one.abandon()
    made.close()


def shard(spec: Dataset, **lease: object) -> Shard:
    """A shard to look at: it can't say anything."""
    return Shard(None, spec, ShardLease(spec.name, **({"shard": 0, "lease_id": 1, "attempt": 1} | lease)))  # type: ignore[arg-type]


# --- what a shard is -------------------------------------------------------------------------------------------


def spans(one: Shard, size: int) -> list[tuple[int, int, int, bool]]:
    return [(batch.index, batch.start, batch.stop, batch.last) for batch in one.batches(size)]


def test_batches_are_those_of_the_shard_and_the_last_may_be_smaller() -> None:
    spec = Dataset("set", 27, 10)
    assert spans(shard(spec, shard=1), 4) == [(0, 10, 14, True), (1, 14, 18, True), (2, 18, 20, True)]
    assert spans(shard(spec, shard=2), 100) == [(0, 20, 27, True)]


def test_batches_begin_behind_the_checkpoint_and_leave_out_what_is_quarantined() -> None:
    spec = Dataset("set", 20, 20)
    assert [index for index, *_ in spans(shard(spec, progress=2), 4)] == [2, 3, 4]
    assert [index for index, *_ in spans(shard(spec, progress=1, skip=[0, 2, 4]), 4)] == [1, 3]
    assert spans(shard(spec, progress=5), 4) == []


def test_with_a_smaller_batch_size_the_numbers_of_batches_mean_the_same() -> None:
    spec = Dataset("set", 10, 10)
    assert spans(shard(spec, batch_size_scale=0.5), 4) == [
        (0, 0, 2, False),
        (0, 2, 4, True),
        (1, 4, 6, False),
        (1, 6, 8, True),
        (2, 8, 10, True),
    ]
    assert [stop - start for _, start, stop, _ in spans(shard(spec, batch_size_scale=0.001), 4)] == [1] * 10


def test_a_batch_size_that_can_t_be_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be 1 or more, not 0"):
        list(shard(Dataset("set", 4, 4)).batches(0))


def test_samples_are_in_their_order_or_shuffled_anew_each_epoch() -> None:
    assert shard(Dataset("set", 27, 10), shard=2).indices.tolist() == list(range(20, 27))
    spec = Dataset("set", 27, 10, 5, 2)
    epochs = [np.concatenate([shard(spec, shard=3 * epoch + one).indices for one in range(3)]) for epoch in (0, 1)]
    assert [sorted(order.tolist()) for order in epochs] == [list(range(27))] * 2
    assert epochs[0].tolist() != epochs[1].tolist()
    first = shard(spec, shard=4)
    assert (first.epoch, first.index, first.number) == (1, 1, 4)
    assert np.concatenate([batch.indices for batch in first.batches(3)]).tolist() == first.indices.tolist()


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"size": -1}, "size must be a whole number of 0 or more, not -1"),
        ({"size": 1.5}, "size must be a whole number of 0 or more, not 1.5"),
        ({"size": True}, "size must be a whole number of 0 or more, not True"),
        ({"shard_size": 0}, "shard_size must be a whole number of 1 or more, not 0"),
        ({"epochs": 0}, "epochs must be a whole number of 1 or more, not 0"),
        ({"shuffle_seed": -1}, "shuffle_seed must be None or a whole number of 0 or more, not -1"),
        ({"shuffle_seed": "x"}, "shuffle_seed must be None or a whole number of 0 or more, not 'x'"),
        ({"name": ""}, "the name of a data set has 1 to 100 characters, this one 0"),
        ({"name": "x" * 101}, "the name of a data set has 1 to 100 characters, this one 101"),
    ],
)
def test_arguments_that_can_t_be_are_refused_by_name(changes: dict[str, object], why: str) -> None:
    given = {"name": "set", "size": 4, "shard_size": 2} | changes
    for function in (seamark.shards, lambda *name, **more: seamark.ShardDataset(*name, batch_size=1, **more)):
        with pytest.raises(ValueError, match=why):
            function(given["name"], **{name: value for name, value in given.items() if name != "name"})


@pytest.mark.parametrize("batch_size", [0, 1.5, True])
def test_a_data_set_s_batch_size_that_can_t_be_is_refused(batch_size: object) -> None:
    with pytest.raises(ValueError, match="batch_size must be a whole number of 1 or more, not "):
        seamark.ShardDataset("set", size=4, shard_size=2, batch_size=batch_size)  # type: ignore[arg-type]


def test_a_script_that_was_not_started_by_seamark_is_told_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEAMARK_ADDRESS", raising=False)
    with pytest.raises(seamark.RestartError, match="start this script with `seamark run"):
        seamark.shards("set", size=4, shard_size=2)


def test_a_rank_that_describes_the_data_set_otherwise_is_told_both(door: Door) -> None:
    seamark.shards("set", size=4, shard_size=2)
    with pytest.raises(ShardError, match="is size 4, shard_size 2, epochs 1 in this job already, and this rank asks"):
        seamark.shards("set", size=5, shard_size=2)


def test_a_forked_child_is_told_to_open_its_own(tmp_path: Path) -> None:
    who = WorkerEnvironment(f"ipc://{tmp_path}/nobody", "job", "job/0", "i", 1, "n", 0, 1)
    line = Line(who, "i#set/0", "set")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            line.ask(LeaseShard)
        except ShardError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 200).decode() == (
        "this process was forked after it opened its shards: open them in the child, too"
    )
    os.close(reading)
    os.close(writing)
    line.close()


def test_report_failure_needs_a_kind_and_an_open_data_set() -> None:
    with pytest.raises(ValueError, match="'sad' is no class of failure: choose one of spot_preemption"):
        seamark.report_failure("sad")
    with pytest.raises(ShardError, match="this process has opened none"):
        seamark.report_failure("oom")


# --- with a coordinator ------------------------------------------------------------------------------------------


def test_all_shards_are_gone_through_and_known_afterwards(door: Door) -> None:
    with seamark.shards("set", size=10, shard_size=4) as shards:
        seen = [one.indices.tolist() for one in shards if one.complete("digest")]
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert door.shards.complete
    assert len(door.leases()) == 1, "the answer to a completion brings the next"


def test_a_loop_that_is_left_gives_back_its_shard(door: Door) -> None:
    with seamark.shards("set", size=10, shard_size=4) as shards:
        next(shards)
        assert door.shards.status()[0].leased == 1
    assert door.shards.status()[0].leased == 0


def test_where_the_host_goes_away_the_process_ends_with_143(door: Door) -> None:
    shards = seamark.shards("set", size=10, shard_size=4)
    door.hold = "drain"
    with pytest.raises(SystemExit) as ended:
        next(shards)
    assert ended.value.code == 143


def test_who_has_no_patience_goes_on_waiting_with_the_same_request(door: Door) -> None:
    shards = seamark.shards("set", size=10, shard_size=4)
    door.mute = True
    assert shards.ahead(0.01) is None
    assert shards.ahead(0.01) is None
    door.mute = False
    first = second = None
    while first is None:
        first = shards.ahead(0.5)
    assert len({request.request for request in door.leases()}) == 1
    while second is None:
        second = shards.ahead(0.5)
    assert (first.index, second.index) == (0, 1)
    assert door.leases()[-1].after == first.lease_id


def test_who_has_the_name_next_numbers_its_requests_above(door: Door) -> None:
    for _ in range(3):
        shards = seamark.shards("set", size=10, shard_size=4)
        assert next(shards).index == 0, "the same shard again, and no old answer"
    numbers = [request.request for request in door.leases()]
    assert sorted(set(numbers)) == numbers


def test_an_exception_is_reported_with_the_shard_and_the_batch_in_hand(door: Door) -> None:
    idle = seamark.shards("idle", size=10, shard_size=4)
    one = next(seamark.shards("set", size=10, shard_size=4))
    for batch in one.batches(2):
        if batch.index == 1:
            break
    next(idle).complete()
    sharding.report_exception(MemoryError("8 GB"))
    (last,) = door.wait_reports(1)
    assert (last.kind, last.batch, last.lease_id) == ("oom", 1, one.lease_id)
    assert last.text.endswith("MemoryError: 8 GB\n")


# --- through a DataLoader, in this process -----------------------------------------------------------------------


def test_a_batch_counts_when_the_trainer_says_so(door: Door) -> None:
    with seamark.ShardDataset("set", size=8, shard_size=4, batch_size=2) as dataset:
        batches = iter(dataset)
        first, second, third = next(batches), next(batches), next(batches)
        assert (first.data.tolist(), second.data.tolist(), third.data.tolist()) == ([0, 1], [2, 3], [4, 5])
        assert door.shards.status()[0].done == 0
        assert first.done()
        assert second.done("digest")
        assert second.done(), "once more, and no harm"
        assert door.shards.status()[0].done == 1
    with pytest.raises(ShardError, match="no ShardDataset set is open in this process"):
        third.done()
    assert door.shards.status()[0].leased == 0, "what was read and not trained on is given back"


def test_a_data_set_made_again_reads_again_what_was_not_done(door: Door) -> None:
    given = {"size": 4, "shard_size": 4, "batch_size": 2}
    old = next(iter(seamark.ShardDataset("set", **given)))
    assert old.done()
    late = next(iter(seamark.ShardDataset("set", **given)))
    assert late.data.tolist() == [2, 3], "behind the checkpoint"
    again = next(iter(seamark.ShardDataset("set", **given)))
    assert not late.done(), "what was read before counts no longer"
    assert again.done()
    assert door.shards.complete


def test_where_no_shard_is_ready_there_is_an_empty_batch(door: Door) -> None:
    with seamark.ShardDataset("set", size=4, shard_size=4, batch_size=4) as dataset:
        batches = iter(dataset)
        only, empty = next(batches), next(batches)
        assert (bool(only), len(only), bool(empty), len(empty)) == (True, 4, False, 0)
        assert empty.done()
        assert only.done()
        assert [one for one in batches if one] == []


def test_a_batch_that_can_t_be_read_fails_its_shard_and_the_next_is_read(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    def load(indices: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[int]:
        if 2 in indices:
            raise MemoryError("8 GB")
        return list(indices.tolist())

    with seamark.ShardDataset("set", size=8, shard_size=4, batch_size=2, load=load) as dataset:
        batches = iter(dataset)
        with caplog.at_level(logging.WARNING, "seamark"):
            first, second = next(batches), next(batches)
        assert (first.data, second.data) == ([0, 1], [4, 5])
        assert not first.done(), "its shard has failed meanwhile"
        assert second.fail("it can't be trained on", "poison_input")
        assert [(one.shard, one.batch, one.kind) for one in door.shards.decisions] == [
            (0, 1, "oom"),
            (1, 0, "poison_input"),
        ]
    assert "batch 1: MemoryError: 8 GB" in caplog.text


def test_a_shard_of_which_nothing_is_left_is_complete(door: Door) -> None:
    next(seamark.shards("set", size=4, shard_size=4)).fail("bad", 0, "poison_input")
    assert door.shards.status()[0].skipped == 1
    assert [batch for batch in seamark.ShardDataset("set", size=4, shard_size=4, batch_size=4) if batch] == []
    assert door.shards.complete


def test_an_exception_within_a_batch_is_that_batch_s(door: Door) -> None:
    batches = iter(seamark.ShardDataset("set", size=8, shard_size=4, batch_size=2))
    next(batches).done()
    batch = next(batches)
    with pytest.raises(MemoryError), batch:
        raise MemoryError
    sharding.report_exception(MemoryError())
    # The reader's consumer is in this process, too, and says nothing.
    assert [(one.batch, one.lease_id) for one in door.wait_reports(1)] == [(1, batch.lease.lease_id)]
    with batch:
        assert batch.done()
    sharding.report_exception(MemoryError())
    assert [one.lease_id for one in door.wait_reports(2)] == [batch.lease.lease_id, 0], "no batch is in hand"


def test_where_the_host_goes_away_a_dataloader_ends_the_process_with_143(door: Door) -> None:
    loading = DataLoader(
        seamark.ShardDataset("set", size=8, shard_size=4, batch_size=2), batch_size=None, num_workers=1
    )
    door.hold = "drain"
    with pytest.raises(SystemExit) as ended:
        next(iter(loading))
    assert ended.value.code == 143


@pytest.mark.parametrize("name", ["", "a" * 101, "é" * 51, "a/b", "a\nb"])
def test_a_name_that_no_data_set_can_have_is_refused_before_anybody_is_asked(name: str) -> None:
    """Bytes count: a consumer's name on the wire has it in it."""
    with pytest.raises(ValueError, match="the name of a data set"):
        sharding.described(name, size=8, shard_size=2, shuffle_seed=None, epochs=1)
    assert sharding.described("é" * 50, size=8, shard_size=2, shuffle_seed=None, epochs=1).total == 4


def test_what_was_read_before_a_load_that_failed_comes_too_late_and_nobody_else_is_blamed(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    def load(indices: np.ndarray) -> np.ndarray:
        if 2 in indices:
            raise ValueError("sample 2")
        return indices

    with seamark.ShardDataset("set", size=4, shard_size=4, batch_size=2, load=load) as dataset:
        batches = iter(dataset)
        first = next(batches)
        assert not next(batches), "the shard was given back with its second batch, and waits"
        assert not first.done()
        said = [record.getMessage() for record in caplog.records if "does not count" in record.getMessage()]
        assert len(said) == 1
        assert "of shard 0 has ended: the shard is PENDING now" in said[0]
        assert "another" not in said[0]
        batches.close()  # type: ignore[attr-defined]
