"""A TCPStore whose host was lost is started on another node of the job, and the lighthouse is told (D8)."""

from __future__ import annotations

from seamark.protocol.messages import PrepareFailed, PrepareJob, StoreLost, StoreReady
from seamarkd.coordinator.cluster import NODE_SILENT, Cluster
from seamarkd.coordinator.effects import Effect, ToLighthouse, persist
from seamarkd.coordinator.job import Job, take_store

MOVE_RETRY = 3.0
"""Seconds after which a node that was to start another TCPStore is asked again, or another node is."""


class StoreMoves:
    """Moves the stores of jobs that run.

    Args:
        cluster: nodes and jobs.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def restored(self, now: float, job: Job) -> None:
        """Perhaps a coordinator before this one had moved it, and told nobody; to who knows, it is nothing new."""
        job.store_lost = self._news(now, job) if job.store_node else None
        job.move_due = now + NODE_SILENT

    def move(self, now: float, job: Job) -> list[Effect]:
        """On the first of the job's nodes that lives and has not refused; asked again until one has answered."""
        cluster = self._cluster
        nodes = dict.fromkeys(slot.node for slot in job.slots if slot.node != job.store_node)
        alive = [one for one in nodes if cluster.beats(now, one) and not cluster.nodes[one].draining]
        willing = [one for one in alive if one not in job.refused_store]
        job.move_due = now + MOVE_RETRY
        job.moving = willing[0] if willing else job.store_node
        if not willing:
            why = "; ".join(job.refused_store.values()) if alive else "no other node of the job is there"
            job.sentence = f"the TCPStore was on node {job.store_node}, which is gone: {why}"
            job.refused_store.clear()
            return cluster.tell(job)
        job.request = cluster.next_request()
        job.sentence = f"starts another TCPStore on node {job.moving}: node {job.store_node} is gone"
        order = PrepareJob(job.request, job.spec, store=True)
        return [*cluster.to_node(job.moving, order), *cluster.tell(job)]

    def moved(self, now: float, job: Job, report: StoreReady) -> list[Effect]:
        """The other one listens."""
        cluster = self._cluster
        take_store(job, report, job.moving)
        job.moving = ""
        job.refused_store.clear()
        job.store_lost = self._news(now, job)
        job.move_due = now + MOVE_RETRY
        roster = cluster.to_nodes(job, cluster.roster(now, job))
        return [persist(job), ToLighthouse(job.store_lost), *roster, *cluster.tell(job)]

    def refused(self, now: float, job: Job, report: PrepareFailed) -> list[Effect]:
        """The node that was asked can't start one."""
        job.refused_store[job.moving] = report.reason
        return self.move(now, job)

    def _news(self, now: float, job: Job) -> StoreLost:
        number = self._cluster.next_request()
        return StoreLost(number, job.spec.name, job.generation, job.store, now, job.store_node)

    def keep(self, now: float, job: Job) -> list[Effect]:
        """What is asked, and told, until it is answered."""
        if now < job.move_due or job.state != "RUNNING":
            return []
        # Also where no event says so: none of the store's node may have been a member any more.
        others = any(self._cluster.beats(now, slot.node) for slot in job.slots)
        if job.moving or (others and job.store_node and not self._cluster.beats(now, job.store_node)):
            return self.move(now, job)
        if job.store_lost is None:
            return []
        job.move_due = now + MOVE_RETRY
        return [ToLighthouse(job.store_lost)]
