"""A subscriber of a simulated lighthouse: the real core of ``seamark.FailureListener`` behind a network that loses.

What it was told is checked against what happened: never the same loss twice, unless its member was heard again in
between, and in the end everybody whom it knew and who is gone.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

from seamark.listening import EventsLost, Listening
from seamark.protocol.codec import decode, encode
from seamark.protocol.messages import (
    Event,
    EventBeat,
    FailureEvent,
    Message,
    ReplicaQuorumEvent,
    Snapshot,
    SnapshotRequest,
)

if TYPE_CHECKING:
    from replica_world import Replicas

LOST, DOUBLED = 0.1, 0.1
REPEAT_INTERVAL = 1.0
Member = tuple[str, str]


class Subscriber:
    """One listener.

    Args:
        world: where it listens; its chances are its own, so that it disturbs no schedule.
        job: what it listens to.
    """

    def __init__(self, world: Replicas, job: str, chance: random.Random) -> None:
        self.route = f"subscriber{chance.random()}".encode()
        self.told: Counter[Member] = Counter()
        self.missed = 0
        """Failures of which nobody knew any more; a lighthouse took them with it."""
        self._world = world
        self._job = job
        self._chance = chance
        self._core = Listening(job, None, False)
        self._concluded_wrongly: Counter[Member] = Counter()
        self._gone: set[Member] = set()
        self._known: set[Member] = set()
        self._epoch = 0
        self._begun = False
        self._request = 0
        self._ask_again()

    def publish(self, message: Event | EventBeat) -> None:
        """The lighthouse published this; it may come late, twice, out of order, or never."""
        chance = self._chance
        if chance.random() < LOST:
            return
        for _ in range(2 if chance.random() < DOUBLED else 1):
            self._world.at(chance.choice([0.0002, 0.002, 0.2]) * chance.random(), lambda: self._take(message))

    def hear(self, message: Message) -> None:
        """An answer."""
        if isinstance(message, Snapshot) and self._chance.random() >= LOST:
            self._world.at(self._chance.uniform(0.0001, 0.002), lambda: self._take(message))

    def heard(self, member: str, incarnation: str, *, published: bool) -> None:
        """The lighthouse heard this one: should it be lost again, that is another loss.

        Args:
            published: its loss had been; else this subscriber had concluded it.
        """
        if (member, incarnation) in self._gone:
            self._gone.discard((member, incarnation))
            self._concluded_wrongly[member, incarnation] += not published

    def _take(self, message: Event | Snapshot | EventBeat) -> None:
        copy = decode(encode(message))
        assert isinstance(copy, Event | Snapshot | EventBeat)
        heard = self._core.take(copy)
        # Of what was before it has known where it stands nothing is promised (FailureListener.wait_ready).
        self._begun = self._begun or self._core.ready
        if copy.epoch >= self._epoch:
            self._epoch = copy.epoch
            if self._begun and isinstance(copy, ReplicaQuorumEvent):
                self._known |= {(one.replica_id, one.incarnation) for one in copy.participants}
        for one in heard.deliver:
            if isinstance(one, EventsLost):
                self.missed += one.count
            if isinstance(one, FailureEvent) and one.failure.kind == "lost":
                key = (one.failure.member, one.failure.incarnation)
                self.told[key] += 1
                self._gone.add(key)
                self._world.log(f"a subscriber is told of {key[1]}")
                if self.told[key] > 1 + self._world.returned[key] + self._concluded_wrongly[key]:
                    self._world.violate(f"a subscriber is told {self.told[key]} times that {key[1]} is lost")
        self._ask(heard.ask)

    def _ask(self, jobs: list[str]) -> None:
        for job in jobs:
            self._request += 1
            request = SnapshotRequest(self._request, job)
            if self._chance.random() >= LOST:
                delay = self._chance.uniform(0.0001, 0.002)
                self._world.at(delay, lambda one=request: self._world.lighthouse.ask(self.route, one))

    def _ask_again(self) -> None:
        self._ask(self._core.wanted)
        self._world.at(REPEAT_INTERVAL, self._ask_again)

    @property
    def ready(self) -> bool:
        """It knows where it stands."""
        return self._core.ready

    @property
    def untold(self) -> list[Member]:
        """Whom it was told to be in a quorum, who is dead, and not said to be lost since it was heard last."""
        living = {(process.replica_id, process.incarnation) for process in self._world.living()}
        return sorted(self._known - living - self._gone)
