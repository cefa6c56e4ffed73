"""What waits for a disk that takes nothing stays bounded, however often clients ask, and none of it is lost.

Nor is what people ask about jobs that had ended before a coordinator was started anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq

from seamark.protocol.codec import decode, encode
from seamark.protocol.messages import (
    Acknowledged,
    Beat,
    BeatAnswer,
    CompleteShard,
    Dataset,
    Datasets,
    DatasetsRequest,
    Decisions,
    DecisionsRequest,
    FailShard,
    FollowJob,
    JobSpec,
    JobStatus,
    LeaseShard,
    Message,
    NodeHello,
    OpenShards,
    Refused,
    ShardAnswer,
    ShardRequest,
    SharedState,
    SnapshotRequest,
    StopJob,
    StopWorkers,
    StoreAddress,
    StoreReady,
    SubmitJob,
    WorkersStopped,
    WorkerStarted,
)
from seamarkd.coordinator.backlog import MAX_ANSWERS, compacted
from seamarkd.coordinator.effects import Tell, ToLighthouse
from seamarkd.coordinator.manifest import Manifest
from seamarkd.coordinator.shards import Record
from seamarkd.coordinator.shell import COMPACT_FROM, CoordinatorShell
from seamarkd.effects import Send

T = TypeVar("T", bound=Message)
REPEATS = 3 * COMPACT_FROM


def wait(consumer: str, request: int) -> ShardAnswer:
    return ShardAnswer(request, "job", consumer, "wait")


def test_of_what_is_asked_or_ordered_again_the_last_is_kept() -> None:
    effects = [
        Send(b"n", wait("a", 1)),
        Send(b"n", wait("b", 1)),
        ToLighthouse(SnapshotRequest(1, "job")),
        Tell("job"),
        Send(b"n", wait("a", 2)),
        ToLighthouse(SnapshotRequest(2, "job")),
        Tell("job"),
    ]
    assert compacted(effects) == [effects[1], *effects[4:]]


def test_what_says_something_of_its_own_is_kept_in_order() -> None:
    effects = [
        Send(b"n", Acknowledged(1)),
        Send(b"m", Acknowledged(1)),
        Send(b"n", Acknowledged(2)),
        Send(b"n", StopWorkers(3, "job", 1, 10.0, final=False)),
        Send(b"n", StopWorkers(4, "job", 2, 10.0, final=True)),
        Send(b"n", StopWorkers(4, "other", 2, 10.0, final=True)),
    ]
    assert compacted(effects) == effects
    assert compacted([*effects, effects[0]]) == [*effects[1:], effects[0]]


def test_changes_stand_before_what_waits_for_them() -> None:
    first, second = (Record("job", {}, {}, {}, {number: None}) for number in (1, 2))  # type: ignore[dict-item]
    answer = Send(b"n", wait("a", 1))
    assert compacted([first, answer, second]) == [first.followed_by(second), answer]


def test_of_too_many_askers_the_latest_are_answered() -> None:
    answers = [Send(b"%d" % number, Acknowledged(1)) for number in range(MAX_ANSWERS + 5)]
    order = Send(b"n", StopWorkers(3, "job", 1, 10.0, final=False))
    assert compacted([order, *answers]) == [order, *answers[5:]]


# --- with a shell ------------------------------------------------------------------------------------------


class Bench:
    """A coordinator that serves one node, and the sockets of the node and of a person."""

    def __init__(self, home: Path) -> None:
        self.path = home / "m.db"
        self._home = home
        self._context: zmq.Context[Any] = zmq.Context()
        self.start()
        self.node, self.person = self._peer(f"ipc://{home}/c"), self._peer(f"ipc://{home}/c")

    def start(self) -> None:
        """The coordinator, or another one after it was closed."""
        self.manifest = Manifest(self.path)
        sockets = (f"ipc://{self._home}/{name}" for name in "cle")
        self.shell = CoordinatorShell(self._context, *sockets, self.manifest)

    def _peer(self, address: str) -> zmq.Socket[Any]:
        socket = self._context.socket(zmq.DEALER)
        socket.connect(address)
        return socket

    async def ask(self, socket: zmq.Socket[Any], message: Message, kind: type[T], /, **fields: object) -> T:
        """The next answer of this kind in which the fields are so."""
        socket.send_multipart(encode(message))
        return await self.hear(socket, kind, **fields)

    async def hear(self, socket: zmq.Socket[Any], kind: type[T], /, **fields: object) -> T:
        until = time.monotonic() + 30.0
        while time.monotonic() < until:
            if not socket.poll(0):
                await asyncio.sleep(0.001)
                continue
            message = decode(socket.recv_multipart())
            if isinstance(message, kind) and all(getattr(message, name) == value for name, value in fields.items()):
                return message
        raise AssertionError(f"no {kind.__name__} with {fields}")

    async def begin(self) -> None:
        """A job runs with one worker, who has a lease."""
        await self.ask(self.node, NodeHello("n", "i", "ipc:///a", 1), Message)
        spec = JobSpec("job", ["t.py"], False, "python", "/", {}, 1, 1, 1, "replace", 2, "", "/tmp")
        await self.ask(self.person, SubmitJob(1, spec, "once"), JobStatus)
        job = self.shell.core.jobs["job"]
        store = StoreAddress("127.0.0.1", 20002, "s0")
        self.node.send_multipart(encode(StoreReady(job.request, "job", "127.0.0.1", 20000, store)))
        await until(lambda: job.generation == 0)
        await self.ask(self.node, WorkerStarted(7, "job", 0, "job/0", "w", 100, 0.0, "", "n"), Acknowledged, request=7)
        await self.shards(OpenShards, 1, spec=Dataset("d", 8, 1))
        assert (await self.shards(LeaseShard, 2)).lease is not None

    async def shards(self, kind: type[ShardRequest], request: int, /, **fields: Any) -> ShardAnswer:
        asked = kind(request, "job", "job/0", "w#d/0", "d", **fields)
        return await self.ask(self.node, asked, ShardAnswer, request=request)


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


@asynccontextmanager
async def begun(home: Path) -> AsyncIterator[Bench]:
    bench = Bench(home)
    try:
        await bench.begin()
        yield bench
    finally:
        await bench.shell.close()
        bench.node.close(0)
        bench.person.close(0)
        bench._context.term()


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("b")


def test_a_disk_that_refuses_costs_no_memory_and_no_answer(home: Path) -> None:
    asyncio.run(_refusing(home))


async def _refusing(home: Path) -> None:
    async with begun(home) as bench:
        lease = bench.shell.core.jobs["job"].shards._ledgers["d"].lease_of(0)  # type: ignore[union-attr]
        assert lease is not None
        # SQLite's own refusal, at every write from here on.
        bench.manifest._connection.execute("PRAGMA query_only = ON")
        complete = CompleteShard(3, "job", "job/0", "w#d/0", "d", 0, lease.lease_id, "digest")
        bench.node.send_multipart(encode(complete))
        await until(lambda: bool(bench.shell._refused))
        assert "make it and its directory writable" in bench.shell.core.cluster.trouble
        answers = 0
        for number in range(REPEATS):
            for message in (Beat("n", "i", number), complete, SharedState("job", "job/0", "w", number + 1, "{}")):
                bench.node.send_multipart(encode(message))
            bench.person.send_multipart(encode(FollowJob(number + 2, "job")))
            if number % 50 == 49:
                await bench.hear(bench.node, BeatAnswer, sequence=number)
                answers += 1
            assert len(bench.shell._waiting) <= 2 * COMPACT_FROM
        assert answers == REPEATS // 50
        held = await bench.ask(bench.node, complete, ShardAnswer, request=3)
        assert (held.kind, held.reason) == ("wait", bench.shell.core.cluster.trouble)
        found = await bench.ask(bench.person, DatasetsRequest(REPEATS + 5, "job"), Datasets)
        assert [one.name for one in found.datasets] == ["d"]
        refused = await bench.ask(bench.person, SubmitJob(REPEATS + 6, _other(), "other"), Refused)
        assert "no new jobs now" in refused.reason
        assert [one.state for one in bench.manifest.page(_number(bench), 0, 10)] == ["LEASED"]
        bench.manifest._connection.execute("PRAGMA query_only = OFF")
        assert (await bench.hear(bench.node, ShardAnswer, kind="recorded")).request == 3
        assert [one.state for one in bench.manifest.page(_number(bench), 0, 10)] == ["DONE"]
        bench.node.send_multipart(encode(LeaseShard(4, "job", "job/0", "w#d/0", "d")))
        assert (await bench.hear(bench.node, ShardAnswer, kind="leased")).request == 4


def _number(bench: Bench) -> int:
    ((number, _),) = bench.manifest.datasets("job")
    return number


def _other() -> JobSpec:
    return JobSpec("other", ["t.py"], False, "python", "/", {}, 1, 1, 1, "replace", 2, "", "/tmp")


def test_decisions_of_an_ended_job_outlive_the_coordinator(home: Path) -> None:
    asyncio.run(_decided(home))


async def _decided(home: Path) -> None:
    async with begun(home) as bench:
        job = bench.shell.core.jobs["job"]
        lease = job.shards._ledgers["d"].lease_of(0)  # type: ignore[union-attr]
        assert lease is not None
        await bench.shards(FailShard, 3, shard=0, lease_id=lease.lease_id, kind="oom")
        before = await bench.ask(bench.person, DecisionsRequest(5, "job"), Decisions)
        assert [one.kind for one in before.decisions] == ["oom"]
        await bench.ask(bench.person, StopJob(6, "job", "enough"), JobStatus, request=6)
        order = await bench.hear(bench.node, StopWorkers)
        bench.node.send_multipart(encode(WorkersStopped(order.request, "job", order.generation)))
        await until(lambda: job.state == "CANCELLED")
        await bench.shell.close()
        bench.start()
        after = await bench.ask(bench.person, DecisionsRequest(7, "job"), Decisions, request=7)
        assert after.decisions == before.decisions
        none = await bench.ask(bench.person, DecisionsRequest(8, "job", shard=1), Decisions, request=8)
        assert none.decisions == []
        await bench.ask(bench.person, DecisionsRequest(9, "other"), Refused, request=9)
