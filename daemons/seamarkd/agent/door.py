"""Who may come in at a node's door: the workers that its agent started, under the names that it gave them."""

from __future__ import annotations

from seamark.protocol.messages import (
    Refused,
    ReportFailure,
    ShardAnswer,
    ShardRequest,
    ShardsRequest,
    Welcome,
    WorkerHello,
    WorkerRegistered,
)
from seamarkd.agent.effects import Effect, Remember, ToCoordinator, ToWorker, WatchWorker
from seamarkd.agent.node import Node


class Door:
    """The one door of a node's workers."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def wraps(self, name: str, incarnation: str) -> list[Effect]:
        """This worker is in the wrapper: it is told of failures, and the coordinator of it."""
        found = self._node.find(name, incarnation)
        if found is None or found[1].wrapped:
            return []
        job, worker = found
        worker.wrapped = True
        job.wrapped = True
        return [Remember(name), ToCoordinator(WorkerRegistered(name, worker.member, incarnation))]

    def about_shards(self, route: str, message: ShardRequest | ShardsRequest | ReportFailure) -> list[Effect]:
        """Forwarded for the workers that this agent started, whoever they say they are."""
        incarnation, _, consumer = route.partition("#")
        named = message.incarnation if isinstance(message, ReportFailure) else message.consumer
        said = route if consumer and not isinstance(message, ReportFailure) else incarnation
        if self._node.find(message.job, incarnation) is not None and named == said:
            return [ToCoordinator(message)]
        if isinstance(message, ShardRequest):
            why = f"{message.member} ({incarnation}) is not a worker that this agent started"
            answer = ShardAnswer(message.request, message.job, message.consumer, "refused", reason=why)
            return [ToWorker(route, answer)]
        return []

    def hello(self, incarnation: str, hello: WorkerHello) -> list[Effect]:
        """A worker is there: its canaries have names by now."""
        found = self._node.find(hello.job, hello.incarnation)
        if found is None or incarnation != hello.incarnation or found[1].member != hello.member:
            sentence = f"{hello.member} ({hello.incarnation}) is not a worker that this agent started"
            return [ToWorker(incarnation, Refused(0, "UNKNOWN_MEMBER", sentence, hello.job, hello.member))]
        wraps = self.wraps(hello.job, incarnation) if hello.wrapped else []
        return [*wraps, WatchWorker(hello.job, incarnation), ToWorker(incarnation, Welcome(0))]
