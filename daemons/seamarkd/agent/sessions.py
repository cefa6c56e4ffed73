"""What the lighthouse says of a job's sessions: quorums, completions, failures, and what was missed of them."""

from __future__ import annotations

from msgspec.structs import replace

from seamark.protocol.messages import (
    Completed,
    Event,
    EventBeat,
    FailureEvent,
    LastQuorum,
    QuorumAnswer,
    Refused,
    Snapshot,
    SnapshotRequest,
)
from seamarkd.agent.effects import Effect, Remember, TellWorkers, ToLighthouse, ToWorker
from seamarkd.agent.node import Node
from seamarkd.cursor import EventCursor


class Sessions:
    """The sessions of one node's jobs."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._cursor = EventCursor()

    def quorum(self, answer: QuorumAnswer) -> list[Effect]:
        """A quorum passed: what a lighthouse started anew has to be told of it."""
        job = self._node.jobs.get(answer.job)
        if job is None:
            return []
        job.quorum = LastQuorum(
            request=0,
            job=job.name,
            generation=answer.generation,
            quorum_id=answer.quorum_id,
            iteration=answer.iteration,
            restarts=answer.restarts,
            members=[member.member for member in answer.members],
            completed=False,
            node=self._node.name,
            call=answer.call,
        )
        for one in answer.recipients:
            worker = job.workers.get(one.incarnation)
            if worker is not None:
                # What it had completed was the call before.
                worker.completed = False
        present = {member.incarnation for member in answer.members}
        job.losses = [report for report in job.losses if report.incarnation in present]
        if job.store_loss is not None and job.store_loss.store == answer.store:
            job.store_loss = None
        return [Remember(job.name)]

    def completed(self, message: Completed) -> list[Effect]:
        """A wrapped call has completed on all ranks."""
        job = self._node.jobs.get(message.job)
        effects: list[Effect] = []
        if job is not None:
            for one in message.recipients:
                worker = job.workers.get(one.incarnation)
                if worker is not None:
                    worker.completed = True
            if job.quorum is not None and message.call == job.quorum.call:
                job.quorum = replace(job.quorum, completed=True)
            # Sticky: a worker that ends now must not be taken for lost by an agent started anew.
            effects.append(Remember(job.name))
        return [*effects, *(ToWorker(one.incarnation, message) for one in message.recipients)]

    def refused(self, message: Refused) -> list[Effect]:
        """A member's request: the worker that has asked is told."""
        job = self._node.jobs.get(message.job)
        workers = job.workers.values() if job else ()
        # Its successor has asked for nothing yet that could be refused.
        mine = [one.incarnation for one in workers if one.member == message.member]
        return [ToWorker(one, message) for one in mine if message.incarnation in ("", one)]

    def heard(self, message: Event | EventBeat | Snapshot) -> list[Effect]:
        """What follows from what the lighthouse publishes: failures go to the workers at once, gaps are filled."""
        if self._cursor.turn(message.epoch) == "old":
            return []
        if isinstance(message, EventBeat):
            behind = self._cursor.behind(message.latest)
            return [ToLighthouse(SnapshotRequest(0, job)) for job in behind if job in self._node.jobs]
        if message.job not in self._node.jobs:
            return []
        effects: list[Effect] = []
        if isinstance(message, FailureEvent | Snapshot):
            effects.append(TellWorkers(message.job, message))
        if not isinstance(message, Snapshot) and message.sequence > self._cursor.position(message.job) + 1:
            effects.append(ToLighthouse(SnapshotRequest(0, message.job)))
        else:
            self._cursor.advance(message.job, message.sequence)
        return effects
