"""Agents and a lighthouse that a coordinator takes for real ones: what they send is what those send.

Their workers are consumers of one data set and nothing else, all on one loop, so that one core loads another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import zmq
from msgspec import Struct

from seamark.protocol.messages import (
    Acknowledged,
    Beat,
    BeatAnswer,
    Cause,
    CompleteShard,
    Dataset,
    Failure,
    FailureEvent,
    JobSpec,
    LeaseShard,
    Message,
    NodeHello,
    OpenShards,
    PrepareJob,
    ReleaseShard,
    Roster,
    ShardAnswer,
    StoreAddress,
    StoreReady,
    SubmitJob,
    Welcome,
    WorkerStarted,
)
from seamark.protocol.sockets import make_socket
from seamarkd.channel import Channel

JOB, DATASET = "bench", "samples"
BEAT = 0.5


class Consumer(Struct):
    """One iterator in one worker."""

    name: str
    member: str
    node: str
    request: int = 0
    asked_at: float = 0.0


class Cluster:
    """Nodes with workers, beside one coordinator.

    Args:
        coordinator: its address.
        lighthouse, events: where this serves as its lighthouse.
        nodes: how many.
        workers: of each.
        consumers: of each worker.
        spec: the data set.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        coordinator: str,
        lighthouse: str,
        events: str,
        *,
        nodes: int,
        workers: int,
        consumers: int,
        spec: Dataset,
    ) -> None:
        self.spec = spec
        self._workers = workers
        router = make_socket(context, zmq.ROUTER)
        router.bind(lighthouse)
        self._lighthouse = Channel(router, self._as_lighthouse)
        publisher = make_socket(context, zmq.PUB)
        publisher.bind(events)
        self._events = Channel(publisher)
        self._dealers: dict[str, Channel] = {}
        for number in range(nodes):
            name = f"n{number}"
            dealer = make_socket(context, zmq.DEALER, identity=name.encode())
            dealer.connect(coordinator)
            self._dealers[name] = Channel(dealer, lambda route, message, node=name: self._as_agent(node, message))
        self._operator = Channel(self._connect(context, coordinator), lambda route, message: None)
        self._answers: dict[str, asyncio.Future[ShardAnswer]] = {}
        self.on_answer: Callable[[Consumer, ShardAnswer], None] | None = None
        self._placed = asyncio.Event()
        self._silent: set[str] = set()
        self._welcomed: set[str] = set()
        self.consumers: dict[str, Consumer] = {}
        self._nodes = {f"{JOB}/{rank}": f"n{rank // workers}" for rank in range(nodes * workers)}
        """By member, in rank order; as the roster says it, once there is one."""
        for rank, (member, node) in enumerate(self._nodes.items()):
            for index in range(consumers):
                name = f"i{rank}#{DATASET}/{index}"
                self.consumers[name] = Consumer(name, member, node)
        self._beats = 0

    @staticmethod
    def _connect(context: zmq.Context[Any], address: str) -> zmq.Socket[Any]:
        socket = make_socket(context, zmq.DEALER)
        socket.connect(address)
        return socket

    def close(self) -> None:
        """Ends all connections."""
        for channel in (self._lighthouse, self._events, self._operator, *self._dealers.values()):
            channel.close()

    async def start(self, log_dir: str) -> None:
        """Introduces the nodes, submits the job, opens the data set."""
        self._hello()
        self._beat()
        spec = JobSpec(
            name=JOB,
            argv=["x"],
            module=False,
            python="python",
            cwd="/",
            env={},
            min_nodes=len(self._dealers),
            max_nodes=len(self._dealers),
            nproc_per_node=self._workers,
            policy="replace",
            max_restarts=0,
            checkpoint_dir="",
            log_dir=log_dir,
            independent=True,
        )
        while len(self._welcomed) < len(self._dealers):
            await asyncio.sleep(0.01)
        self._operator.send(SubmitJob(1, spec, "s"))
        await asyncio.wait_for(self._placed.wait(), 30)
        await self.all_ask(lambda consumer: self._message(OpenShards, consumer, spec=self.spec))

    def introduce(self) -> None:
        """To a coordinator that was started anew: nodes and workers, as agents do it."""
        self._hello()
        self._workers_run()

    def _hello(self) -> None:
        for name, dealer in self._dealers.items():
            dealer.send(NodeHello(name, f"a-{name}", "tcp://127.0.0.1:1", self._workers))

    def _beat(self) -> None:
        self._beats += 1
        for name, dealer in self._dealers.items():
            if name not in self._silent:
                dealer.send(Beat(name, f"a-{name}", self._beats))
        asyncio.get_running_loop().call_later(BEAT, self._beat)

    def _workers_run(self) -> None:
        for rank, node in enumerate(self._nodes.values()):
            self._dealers[node].send(
                WorkerStarted(rank + 1, JOB, 0, f"{JOB}/{rank}", f"i{rank}", 1_000 + rank, 0.0, "", node)
            )

    def _as_lighthouse(self, route: bytes, message: Message) -> None:
        if isinstance(message, Roster):
            self._lighthouse.send(Acknowledged(message.request), route)

    def _as_agent(self, node: str, message: Message) -> None:
        match message:
            case ShardAnswer():
                self._on_answer(message)
            case PrepareJob(store=True):
                store = StoreAddress("127.0.0.1", 2, "store")
                self._dealers[node].send(StoreReady(message.request, JOB, "127.0.0.1", 1, store))
            case Roster():
                self._nodes |= {slot.member: slot.node for slot in message.slots}
                for consumer in self.consumers.values():
                    consumer.node = self._nodes[consumer.member]
                self._workers_run()
                self._placed.set()
            case Welcome():
                self._welcomed.add(node)
            case BeatAnswer(known=False):
                self.introduce()

    # --- consumers -----------------------------------------------------------------------------------------

    def _message(self, kind: type[Any], consumer: Consumer, **fields: Any) -> Message:
        consumer.request += 1
        message: Message = kind(consumer.request, JOB, consumer.member, consumer.name, DATASET, **fields)
        return message

    def ask(self, consumer: Consumer, message: Message) -> None:
        """Sends it."""
        consumer.asked_at = time.perf_counter()
        self._dealers[consumer.node].send(message)

    def lease(self, consumer: Consumer) -> None:
        """Asks for a shard."""
        self.ask(consumer, self._message(LeaseShard, consumer))

    def complete(self, consumer: Consumer, answer: ShardAnswer) -> None:
        """Completes what it has, and asks for the next in the same message."""
        assert answer.lease is not None
        lease = answer.lease
        self.ask(
            consumer, self._message(CompleteShard, consumer, shard=lease.shard, lease_id=lease.lease_id, more=True)
        )

    def _on_answer(self, answer: ShardAnswer) -> None:
        consumer = self.consumers[answer.consumer]
        if answer.request != consumer.request:
            return
        waiting = self._answers.pop(answer.consumer, None)
        if waiting is not None:
            waiting.set_result(answer)
        elif self.on_answer is not None:
            self.on_answer(consumer, answer)

    async def all_ask(self, make: Callable[[Consumer], Message]) -> None:
        """Each consumer asks once, and again each second until it has its answer."""
        loop = asyncio.get_running_loop()
        asked = {name: make(consumer) for name, consumer in self.consumers.items()}
        self._answers = {name: loop.create_future() for name in asked}
        waiting = dict(self._answers)
        while waiting:
            for name in waiting:
                self.ask(self.consumers[name], asked[name])
            await asyncio.wait(waiting.values(), timeout=1.0)
            waiting = {name: future for name, future in waiting.items() if not future.done()}

    async def ask_until(self, consumer: Consumer, kind: type[Any], **fields: Any) -> ShardAnswer:
        """One asks until it is answered; the answer."""
        future: asyncio.Future[ShardAnswer] = asyncio.get_running_loop().create_future()
        message = self._message(kind, consumer, **fields)
        self._answers[consumer.name] = future
        while not future.done():
            self.ask(consumer, message)
            await asyncio.wait([future], timeout=0.05)
        return future.result()

    async def release(self, consumer: Consumer, answer: ShardAnswer) -> None:
        """Gives its lease back."""
        assert answer.lease is not None
        await self.ask_until(consumer, ReleaseShard, shard=answer.lease.shard, lease_id=answer.lease.lease_id)

    # --- a lost node ---------------------------------------------------------------------------------------

    def lose(self, node: str) -> None:
        """The lighthouse says that this node is lost."""
        self._silent.add(node)
        cause = Cause(kind="node", text=f"node {node} is lost")
        failure = Failure(
            kind="lost",
            member=f"{JOB}/0",
            incarnation="i0",
            rank=0,
            node=node,
            iteration=0,
            cause=cause,
            occurred_at=-1.0,
            detected_at=0.0,
            published_at=0.0,
            detector="heartbeat",
        )
        self._events.send(FailureEvent(JOB, "ranks", 1, 1, failure), JOB.encode())
