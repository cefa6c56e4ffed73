"""Where a job runs, and how its workers come to be started: places, keepers, the store, a new generation.

A job is placed as a whole when it is new or all its workers are started anew; a job that runs has its missing ranks
placed besides those that live. Which it is, others decide.
"""

from __future__ import annotations

from seamark.protocol.messages import PrepareJob, StoreAddress, StoreReady
from seamarkd.coordinator.cluster import Cluster
from seamarkd.coordinator.dispatch import Dispatch
from seamarkd.coordinator.effects import Effect, persist
from seamarkd.coordinator.job import Job, take_store
from seamarkd.coordinator.placement import fill, place


class Starts:
    """Places jobs and starts them.

    Args:
        cluster: nodes and jobs.
        dispatch: is told that the workers of an earlier generation are gone.
    """

    def __init__(self, cluster: Cluster, dispatch: Dispatch) -> None:
        self._cluster = cluster
        self._dispatch = dispatch

    def place(self, now: float, job: Job) -> list[Effect]:
        """A new start, or one of all workers: on the nodes that it was on, as far as they are there."""
        cluster = self._cluster
        free = cluster.free(now, job)
        slots = place(job.spec, free)
        before = {slot.node for slot in job.slots}
        if slots is None:
            job.left |= before
            changed = job.state != "PENDING"
            job.state, job.slots = "PENDING", []
            job.sentence = (
                f"waits for {job.spec.min_nodes} nodes with {job.spec.nproc_per_node} free slots each; "
                f"free now: {', '.join(f'{node} {count}' for node, count in free.items()) or 'no node'}"
            )
            return [persist(job), *cluster.tell(job)] if changed else []
        nodes = dict.fromkeys(slot.node for slot in slots)
        gone = (job.left | before) - nodes.keys()
        effects = [effect for node in sorted(gone) for effect in cluster.leave(job, node)]
        job.left = gone
        job.slots = slots
        job.placement, job.width = 0, len(slots)
        job.state = "STARTING"
        if job.store.port and job.store_node in nodes:
            return [*effects, *self._new_generation(now, job)]
        job.store, job.store_node = StoreAddress(), ""
        job.sentence = "starts the keepers (they import torch) and the store"
        job.request = cluster.next_request()
        prepare = [effect for node in nodes for effect in self.prepare(job, node)]
        return [*effects, persist(job), *prepare, *cluster.tell(job)]

    def prepare(self, job: Job, node: str) -> list[Effect]:
        """The node starts the job's keeper, and the first one the store beside it."""
        return self._cluster.to_node(node, PrepareJob(job.request, job.spec, store=node == job.slots[0].node))

    def prepare_elsewhere(self, now: float, node: str) -> list[Effect]:
        """The workers of a node that drains take their time: meanwhile those that get its places import torch."""
        cluster = self._cluster
        effects: list[Effect] = []
        for job in cluster.jobs.values():
            staying = [slot for slot in job.slots if slot.node != node]
            if job.state == "RUNNING" and len(staying) < len(job.slots):
                job.sentence = f"node {node} drains: {cluster.nodes[node].draining}"
                found = fill(job.spec, staying, cluster.free(now, job), 0)
                order = PrepareJob(job.request, job.spec, store=False)
                for other in dict.fromkeys(slot.node for slot in found):
                    effects += cluster.to_node(other, order)
                    # Should it get no place there after all, its keeper has to end some day.
                    job.left.add(other)
        return effects

    def has_room(self, now: float, job: Job) -> bool:
        """Whether some of a job's ranks that have no place could get one."""
        return bool(fill(job.spec, job.slots, self._cluster.free(now, job), 0))

    def fill(self, now: float, job: Job, why: str) -> list[Effect]:
        """Its lost places go to other nodes, and the workers that live notice nothing but a restart in process.

        The lighthouse is told also where no node has room: what it waits for has no place.
        """
        cluster = self._cluster
        job.placement += 1
        found = fill(job.spec, job.slots, cluster.free(now, job), job.placement)
        job.slots = sorted([*job.slots, *found], key=lambda slot: slot.rank)
        job.left -= {slot.node for slot in found}
        job.width = max(job.width, len(job.slots))
        where = f"ranks {', '.join(str(slot.rank) for slot in found)} start on {', '.join({s.node: 0 for s in found})}"
        job.sentence = f"{why}{'; ' * bool(why)}{where if found else 'no node has room for its ranks'}"
        return [persist(job), *cluster.announce(now, job), *cluster.tell(job)]

    def store_ready(self, now: float, job: Job, report: StoreReady) -> list[Effect]:
        """The job's store listens: its workers can be started."""
        if job.state != "STARTING" or job.store.port:
            # With a store already: it was asked for again, of a node that introduced itself while it started it.
            return []
        take_store(job, report, job.slots[0].node)
        return self._new_generation(now, job)

    def _new_generation(self, now: float, job: Job) -> list[Effect]:
        lost = self._dispatch.all_lost(now, job)
        job.generation += 1
        job.processes.clear()
        job.finished.clear()
        job.discarded.clear()
        job.failed.clear()
        job.completed = False
        job.step.clear()
        job.wrapped = False
        job.sentence = "starts the workers"
        return [persist(job), *lost, *self._cluster.announce(now, job), *self._cluster.tell(job)]
