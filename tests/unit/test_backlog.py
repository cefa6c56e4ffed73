"""What waits for a disk that takes nothing stays bounded, however often clients ask, and none of it is lost.

Nor is what people ask about jobs that had ended before a coordinator was started anew.
"""

from __future__ import annotations

import asyncio
import threading
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
    ShardsPage,
    ShardsRequest,
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
from seamarkd.coordinator import shell
from seamarkd.coordinator.backlog import MAX_ANSWERS, compacted
from seamarkd.coordinator.cluster import NODE_SILENT
from seamarkd.coordinator.effects import Tell, ToLighthouse
from seamarkd.coordinator.manifest import Manifest
from seamarkd.coordinator.shards import Record, Saved
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

    def __init__(self, home: Path, manifest: type[Manifest] = Manifest) -> None:
        self.path = home / "m.db"
        self.manifest = manifest(self.path)
        self._context: zmq.Context[Any] = zmq.Context()
        address = f"ipc://{home}/c"
        self.shell = CoordinatorShell(self._context, address, f"ipc://{home}/l", f"ipc://{home}/e", self.manifest)
        self.node, self.person = self._peer(address), self._peer(address)

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
    async with served(home) as bench:
        await bench.begin()
        yield bench


@asynccontextmanager
async def served(home: Path, manifest: type[Manifest] = Manifest) -> AsyncIterator[Bench]:
    bench = Bench(home, manifest)
    try:
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


def test_questions_about_the_books_that_wait_are_bounded_and_asked_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "MAX_LOOKUPS", 3)
    asyncio.run(_asking(home))


async def _asking(home: Path) -> None:
    async with begun(home) as bench:
        busy = threading.Event()
        # A commit that takes its time: the database has one thread.
        bench.shell._disk.submit(busy.wait, 30.0)
        try:
            for number in range(20):
                bench.person.send_multipart(encode(_page(number)))
            # Answered on the loop, after those.
            await bench.ask(bench.person, FollowJob(100, "job"), JobStatus, request=100)
            assert len(bench.shell._lookups) <= 3
        finally:
            busy.set()
        await until(lambda: not bench.shell._lookups)
        await bench.ask(bench.person, _page(19), ShardsPage, consumer="c19")


def _page(number: int) -> ShardsRequest:
    return ShardsRequest(number, "job", "d", 0, 10, f"c{number}")


# --- started anew ------------------------------------------------------------------------------------------


def test_of_a_job_that_had_ended_before_the_start_its_data_sets_and_decisions_are_still_known(home: Path) -> None:
    asyncio.run(_ended(home))


async def _ended(home: Path) -> None:
    async with begun(home) as bench:
        lease = (await bench.shards(LeaseShard, 3)).lease
        assert lease is not None
        fail = {"shard": 0, "lease_id": lease.lease_id, "batch": 0, "kind": "transient", "text": "why"}
        assert (await bench.shards(FailShard, 4, **fail)).kind == "recorded"
        await bench.ask(bench.person, StopJob(5, "job", "enough"), JobStatus)
        job = bench.shell.core.jobs["job"]
        bench.node.send_multipart(encode(WorkersStopped(job.request, "job", 0)))
        await bench.hear(bench.person, JobStatus, state="CANCELLED")
        before = [await _known(bench), *(await _decided(bench))]
    async with served(home) as bench:
        assert [await _known(bench), *(await _decided(bench))] == before
    assert [(one.name, one.total, one.leased) for one in before[0]] == [("d", 8, 0)]
    assert [(one.kind, one.batch) for one in before[1:]] == [("transient", 0)]


async def _known(bench: Bench) -> list[Any]:
    return (await bench.ask(bench.person, FollowJob(50, "job"), JobStatus, request=50)).datasets


async def _decided(bench: Bench) -> list[Any]:
    return (await bench.ask(bench.person, DecisionsRequest(51, "job"), Decisions, request=51)).decisions


class SlowManifest(Manifest):
    """It says when the last of what is taken up was read."""

    read_at = 0.0

    def shards(self, job: str) -> Saved:
        found = super().shards(job)
        SlowManifest.read_at = time.monotonic()
        return found


def test_nodes_have_their_time_from_when_everything_was_taken_up(home: Path) -> None:
    """Millions of shards take seconds to read: who could not be heard meanwhile must not lose its leases for it."""
    asyncio.run(_settling(home))


async def _settling(home: Path) -> None:
    async with begun(home):
        pass
    async with served(home, SlowManifest) as bench:
        assert SlowManifest.read_at > 0.0
        # As late as that nobody is taken for lost.
        bench.shell.core.tick(SlowManifest.read_at + NODE_SILENT)
        shards = bench.shell.core.jobs["job"].shards
        assert shards is not None
        assert shards.status()[0].leased == 1
        bench.shell.core.tick(time.monotonic() + NODE_SILENT)
        assert shards.status()[0].leased == 0
