"""Nodes that introduce themselves, beat, drain, and what each has to be told of its jobs then."""

from __future__ import annotations

from seamark.protocol.messages import (
    Acknowledged,
    Beat,
    BeatAnswer,
    DrainNode,
    NodeHello,
    NodeLeft,
    NodeRefusals,
    Refused,
    Welcome,
)
from seamarkd.coordinator.cluster import Cluster
from seamarkd.coordinator.dispatch import Dispatch
from seamarkd.coordinator.effects import Effect
from seamarkd.coordinator.job import ENDED, Job
from seamarkd.coordinator.losses import Losses
from seamarkd.coordinator.node import Node
from seamarkd.coordinator.starts import Starts
from seamarkd.coordinator.stops import Stops
from seamarkd.effects import Send

SILENT_KEPT = 3_600.0
"""Seconds without a beat after which a node that no job is on is forgotten; should it beat again, it is new."""
UNBROKEN = 0.75
"""Seconds between two beats (there is one every half second) of an agent that was connected all the time."""


class Sessions:
    """The coordinator's side of what it has with each agent.

    Args:
        cluster: nodes and jobs.
        dispatch: gives nothing more to a node that drains.
        losses: decides on a node that has left a job.
        starts, stops: use a new node, and order what its jobs are at.
    """

    def __init__(self, cluster: Cluster, dispatch: Dispatch, losses: Losses, starts: Starts, stops: Stops) -> None:
        self._cluster = cluster
        self._dispatch = dispatch
        self._losses = losses
        self._starts = starts
        self._stops = stops
        self._wishes: dict[str, DrainNode] = {}
        """By node: to drain or to serve, as long as it does not yet."""

    def hello(self, now: float, route: bytes, hello: NodeHello) -> list[Effect]:
        """An agent introduces its node: one that is new, or was started anew, or has not heard this coordinator yet."""
        cluster = self._cluster
        cluster.nodes[hello.node] = Node(route, hello.slots, now, hello.draining, hello.unhealthy)
        effects: list[Effect] = [Send(route, Welcome(cluster.epoch)), *self._wish(hello.node)]
        for job in cluster.jobs.values():
            if job.state not in ENDED and any(slot.node == hello.node for slot in job.slots):
                effects += self._orders(now, job, hello.node)
        if hello.draining:
            effects += self._dispatch.drain(now, hello.node)
            return effects + self._starts.prepare_elsewhere(now, hello.node)
        effects += self._stops.use_room(now)
        for job in cluster.jobs.values():
            if hello.node in job.left and (job.state in ENDED or all(slot.node != hello.node for slot in job.slots)):
                effects += cluster.leave(job, hello.node)
        return effects

    def _orders(self, now: float, job: Job, node: str) -> list[Effect]:
        """What a node that introduces itself has to be told about a job of its own; it may have heard it before."""
        if job.state in ("STOPPING", "RESTARTING"):
            return self._cluster.to_node(node, self._stops.order(job))
        if not job.store.port:
            return self._starts.prepare(job, node)
        if job.roster_request:
            return []  # it follows the lighthouse's acknowledgement
        return self._cluster.to_node(node, self._cluster.roster(now, job))

    def beat(self, now: float, route: bytes, beat: Beat) -> list[Effect]:
        """A heartbeat; a stranger's is answered that it introduce itself."""
        node = self._cluster.nodes.get(beat.node)
        known = node is not None and node.route == route
        wish: list[Effect] = []
        if node is not None and known:
            # What it was told meanwhile may have gone into a connection that is no more: introduced, it is told again.
            known = now - node.last_beat <= UNBROKEN
            node.last_beat = now
            wish = self._wish(beat.node)
        return [Send(route, BeatAnswer(self._cluster.epoch, beat.sequence, known)), *wish]

    def forget(self, now: float) -> set[str]:
        """Nodes that drained and are gone, or that have been silent for long while no job has a place there.

        Returns:
            The first: they were left in good order.
        """
        cluster = self._cluster
        gone = {name for name, node in cluster.nodes.items() if node.draining and not cluster.beats(now, name)}
        silent = {name for name, node in cluster.nodes.items() if now - node.last_beat > SILENT_KEPT}
        used = {slot.node for job in cluster.jobs.values() if job.state not in ENDED for slot in job.slots}
        for name in gone | (silent - used):
            del cluster.nodes[name]
        return gone

    def drain(self, now: float, route: bytes, order: DrainNode) -> list[Effect]:
        """A person wants a node to be left, or to serve again."""
        node = self._cluster.nodes.get(order.node)
        if node is None:
            known = ", ".join(sorted(self._cluster.nodes)) or "none"
            sentence = f"there is no node {order.node} here; there are: {known}"
            return [Send(route, Refused(order.request, "UNKNOWN_NODE", sentence))]
        self._wishes[order.node] = order
        return [Send(node.route, order), Send(route, Acknowledged(order.request))]

    def _wish(self, node: str) -> list[Effect]:
        """What a person wants of the node, until it has said that it is so."""
        wish = self._wishes.get(node)
        if wish is None:
            return []
        if bool(self._cluster.nodes[node].draining) is not wish.undo:
            del self._wishes[node]
            return []
        return self._cluster.to_node(node, wish)

    def left(self, now: float, route: bytes, report: NodeLeft) -> list[Effect]:
        """A node that drains will start nobody of this job."""
        job = self._cluster.jobs.get(report.job)
        return self._losses.node_gone(now, job, report.node) if job is not None and job.state not in ENDED else []

    def refusals(self, now: float, route: bytes, report: NodeRefusals) -> list[Effect]:
        """What an agent has refused its workers."""
        node = self._cluster.nodes.get(report.node)
        if node is not None:
            node.refused = report.refused
            node.refused_at = {reason: now - ago for reason, ago in report.ago.items()}
        return []
