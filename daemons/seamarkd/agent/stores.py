"""A job's TCPStore service on this node: made ready, started anew when it died, left to another node."""

from __future__ import annotations

from seamark.protocol.messages import PrepareFailed, PrepareJob, Roster, StoreAddress, StoreLost, StoreReady
from seamarkd.agent.effects import Effect, Remember, StartKeeper, StartStore, ToCoordinator, ToLighthouse
from seamarkd.agent.ends import Ends
from seamarkd.agent.job import Job
from seamarkd.agent.node import Node
from seamarkd.agent.reports import Reports


class Stores:
    """The stores of one node's jobs."""

    def __init__(self, node: Node, reports: Reports, ends: Ends) -> None:
        self._node = node
        self._reports = reports
        self._ends = ends

    def prepare(self, order: PrepareJob) -> list[Effect]:
        """The keeper and, where it is to be here, the store are to be ready before the roster.

        The same order of a coordinator that was started anew has another request number.
        """
        job = self._node.jobs.setdefault(order.spec.name, Job(order.spec.name, order.spec))
        if job.ended:
            self._ends.defer(job.name, order)
            return []
        job.prepare_request = order.request
        if not order.store:
            return [StartKeeper(job.name)]
        if job.has_store:
            return [ToCoordinator(self._ready(job))]
        if job.store_incarnation:
            return []
        # What a roster named is another node's, or was.
        job.store, job.master_port = StoreAddress(), 0
        job.store_incarnation = self._node.new_incarnation()
        return [Remember(job.name), StartStore(job.name, job.store_incarnation, order.spec.master_port)]

    def started(self, job_name: str, address: StoreAddress, master_port: int) -> list[Effect]:
        """The TCPStore service listens."""
        job = self._node.jobs[job_name]
        job.store = address
        job.master_port = master_port
        return [Remember(job_name), ToCoordinator(self._ready(job))]

    def failed(self, job_name: str, reason: str, *, killed: bool = False) -> list[Effect]:
        """The keeper or the TCPStore service could not be started; tried again if the order is repeated.

        ``killed``: the keeper was, and another one may come to more.
        """
        job = self._node.jobs.get(job_name)
        if job is None:
            return []
        job.store_incarnation = ""
        return [
            Remember(job_name),
            ToCoordinator(PrepareFailed(job.prepare_request, job_name, f"node {self._node.name}: {reason}", killed)),
        ]

    def exited(self, job_name: str) -> list[Effect]:
        """The TCPStore service died: a new one on the same port, at once."""
        job = self._node.jobs[job_name]
        if job.ended or job.roster is None or not job.has_store:
            return []
        job.store_incarnation = self._node.new_incarnation()
        return [Remember(job_name), StartStore(job.name, job.store_incarnation, job.master_port)]

    def restarted(self, now: float, job_name: str, detected_at: float) -> list[Effect]:
        """The new TCPStore service listens: everybody's groups have to be made anew on it."""
        job = self._node.jobs[job_name]
        if job.roster is None:
            return []
        job.store = StoreAddress(job.store.host, job.store.port, job.store_incarnation)
        report = StoreLost(self._reports.next_request(), job.name, job.roster.generation, job.store, detected_at)
        job.store_loss = report
        return [Remember(job_name), self._reports.send(now, ToLighthouse(report))]

    def elsewhere(self, job: Job, roster: Roster) -> list[Effect]:
        """The store's host was lost, and the coordinator has had another one started; perhaps here."""
        job.roster = roster
        if job.store.incarnation != roster.store.incarnation:
            job.store = roster.store
            job.store_incarnation, job.master_port = "", 0
        return [Remember(job.name)]

    def _ready(self, job: Job) -> StoreReady:
        return StoreReady(job.prepare_request, job.name, job.store.host, job.master_port, job.store)
