"""The nodes and jobs that a coordinator knows, the room there is, and how each node is told something.

What all duties share, and no duty of its own: who is given room, restarted or ended is decided in ``starts.py``,
``losses.py`` and ``stops.py``.
"""

from __future__ import annotations

from msgspec.structs import replace

from seamark.protocol.messages import Message, Roster, StopWorkers
from seamarkd.coordinator.effects import Effect, Tell, ToLighthouse
from seamarkd.coordinator.job import ENDED, Job
from seamarkd.coordinator.node import Node
from seamarkd.effects import Send

NODE_SILENT = 10.0
"""Seconds without a beat after which a node gets no new work, and is not waited for at the end of a job."""
ROSTER_RETRY = 0.5
"""Seconds after which a roster that the lighthouse has not acknowledged is sent again."""
STOP_GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL when all workers are stopped."""
SUSPENDED = "the coordinator's host goes away"
UNHEARD = "waits to hear from its nodes"
REQUEST_SHIFT = 32


class Cluster:
    """All jobs and nodes.

    Args:
        epoch: rises with every start of the daemon; the upper half of its request numbers.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.nodes: dict[str, Node] = {}
        self.jobs: dict[str, Job] = {}
        self.trouble = ""
        """Why nothing can be made durable just now; new jobs are refused with it."""
        self.suspended = False
        """This host goes away: nobody is given room any more."""
        self.settles_at = 0.0
        """Until then a node that has not been heard may be one that has not found this coordinator yet."""
        self._request = epoch << REQUEST_SHIFT

    def next_request(self) -> int:
        """A number that no request had before."""
        self._request += 1
        return self._request

    # --- room ----------------------------------------------------------------------------------------------

    def beats(self, now: float, node: str) -> bool:
        """Whether the node was heard lately."""
        return node in self.nodes and now - self.nodes[node].last_beat < NODE_SILENT

    def drains(self, job: Job) -> bool:
        """Whether a node of the job goes away."""
        return any(slot.node in self.nodes and self.nodes[slot.node].draining for slot in job.slots)

    def free(self, now: float, job: Job) -> dict[str, int]:
        """Places that other jobs leave, by node: first those of the nodes that it is on or was, in their order."""
        taken: dict[str, int] = {}
        for other in self.jobs.values():
            if other.state not in ENDED and other is not job:
                for slot in other.slots:
                    taken[slot.node] = taken.get(slot.node, 0) + 1
        own = [node for node in dict.fromkeys(slot.node for slot in job.slots) if node in self.nodes]
        return {
            name: self.nodes[name].slots - taken.get(name, 0)
            for name in dict.fromkeys([*own, *self.nodes])
            if self.beats(now, name) and not self.nodes[name].draining and not self.nodes[name].unhealthy
        }

    # --- telling -------------------------------------------------------------------------------------------

    def to_node(self, node: str, message: Message) -> list[Effect]:
        """Tells one node, if it is known."""
        known = self.nodes.get(node)
        return [Send(known.route, message)] if known else []

    def to_nodes(self, job: Job, message: Message) -> list[Effect]:
        """Tells the nodes of a job."""
        nodes = dict.fromkeys(slot.node for slot in job.slots)
        return [effect for node in nodes for effect in self.to_node(node, message)]

    def tell(self, job: Job) -> list[Effect]:
        """Tells who follows the job."""
        return [Tell(job.spec.name)] if job.followers else []

    def leave(self, job: Job, node: str) -> list[Effect]:
        """Ends what of a job may live on a node that it is no longer on."""
        return self.to_node(node, StopWorkers(0, job.spec.name, max(job.generation, 0), STOP_GRACE, final=True))

    def roster(self, now: float, job: Job) -> Roster:
        """Who is to be in the job, as of now."""
        return Roster(
            request=self.next_request(),
            job=job.spec.name,
            generation=job.generation,
            policy=job.spec.policy,
            min_members=job.spec.min_ranks,
            slots=job.slots,
            store=job.store,
            master_addr=job.master_addr,
            master_port=job.master_port,
            base_iteration=job.iteration,
            join_timeout=job.spec.join_timeout,
            start_timeout=job.spec.start_timeout,
            allowance=job.budget.remaining(now),
            spec=job.spec,
            running=job.state == "RUNNING",
            state=job.state_text,
            store_node=job.store_node,
            submission=job.submission,
            placement=job.placement,
        )

    def announce(self, now: float, job: Job) -> list[Effect]:
        """The roster to the lighthouse first, which has to know the members before they report to it."""
        job.roster_request = self.next_request()
        return self.announce_again(now, job)

    def announce_again(self, now: float, job: Job) -> list[Effect]:
        """Under the same number: an answer that takes longer than the repetition is one, too."""
        job.roster_due = now + ROSTER_RETRY
        return [ToLighthouse(replace(self.roster(now, job), request=job.roster_request))]
