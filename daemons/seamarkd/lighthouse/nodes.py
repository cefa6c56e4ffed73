"""Which nodes live: silence is not absence (D2).

A node that missed three beats is suspect and is probed by another way, a connection to a port of its agent's.
Refused: the host lives and its agent is down, so its workers are given ``AGENT_GRACE``. Accepted but silent: frozen,
the same grace. No answer at all: the host is lost at five missed beats. When several hosts and more than 30 % are
silent at once, or the only one, it is probably this lighthouse that is cut off: nobody is declared lost, and after
it all have ``RETURN_GRACE``, for they come back one by one. One of two or three is one host's trouble. A lighthouse
that finds its own loop late moves its deadlines by as much (Lifeguard's awareness, memberlist). Pure: beats, probe
results and the time come in.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from seamark.protocol.messages import NodeHello
from seamarkd.effects import Effect, Probe, Wake

BEAT_INTERVAL = 0.1
"""Seconds between two beats of a node, where nothing else is configured."""
SUSPECT_BEATS = 3
LOST_BEATS = 5
AGENT_GRACE = 10.0
"""Seconds an unreachable agent has to come back; supervisord needs one to two to restart it."""
MASS_SUSPICION = 0.3
RETURN_GRACE = 5.0
"""Seconds that nodes have to connect anew once they are not silent all together any more: two of TCP's time-outs."""
DEADLINE_PASSED = 0.001
"""Seconds after a deadline at which it has surely passed."""

ProbeResult = Literal["refused", "accepted", "silent"]
Verdict = Literal["", "agent down", "frozen"]
VERDICTS: dict[ProbeResult, Verdict] = {"refused": "agent down", "accepted": "frozen", "silent": ""}


class Node(Struct):
    """A node as the lighthouse sees it."""

    name: str
    incarnation: str
    address: str
    route: bytes
    last_beat: float
    host: str = ""
    """Several agents may be on one: what its network does they do together."""
    suspect_since: float | None = None
    spared_until: float = 0.0
    verdict: Verdict = ""


class NodeWatch:
    """The nodes and their beats.

    Args:
        agent_grace: seconds an unreachable agent has to come back.
        beat_interval: seconds between two beats of a node.
    """

    def __init__(self, agent_grace: float = AGENT_GRACE, beat_interval: float = BEAT_INTERVAL) -> None:
        self.beat_interval = beat_interval
        self._agent_grace = agent_grace
        self.nodes: dict[str, Node] = {}
        self.sentence = ""
        self._excused = 0.0

    def hello(self, now: float, route: bytes, hello: NodeHello) -> None:
        """An agent introduced itself: a new session, whatever was known of an older one."""
        host = hello.address.rpartition(":")[0] if hello.address.startswith("tcp://") else hello.node
        self.nodes[hello.node] = Node(hello.node, hello.incarnation, hello.address, route, now, host)

    def beat(self, now: float, node: str, incarnation: str, route: bytes) -> bool:
        """A heartbeat; False if its sender has to introduce itself again."""
        known = self.nodes.get(node)
        if known is None or known.incarnation != incarnation or known.route != route:
            return False
        known.last_beat = now
        known.suspect_since = None
        known.spared_until = 0.0
        known.verdict = ""
        return True

    def last_beat(self, node: str) -> float | None:
        """When the node was heard last; None for a stranger."""
        known = self.nodes.get(node)
        return known.last_beat if known else None

    def probed(self, node: str, incarnation: str, result: ProbeResult) -> None:
        """What came of a probe."""
        known = self.nodes.get(node)
        if known is not None and known.incarnation == incarnation and known.suspect_since is not None:
            known.verdict = VERDICTS[result]

    def late(self, seconds: float) -> None:
        """This lighthouse's own loop ran late: its pause is nobody's death."""
        self._excused += seconds

    def tick(self, now: float) -> tuple[list[Effect], list[str]]:
        """Probes to make, and the nodes that are lost."""
        effects: list[Effect] = []
        if self._excused > 0.0:
            for node in self.nodes.values():
                node.last_beat = min(now, node.last_beat + self._excused)
            self._excused = 0.0
        heard_since = now - SUSPECT_BEATS * self.beat_interval
        for node in self.nodes.values():
            if node.last_beat < heard_since and node.suspect_since is None:
                node.suspect_since = now
                left = node.last_beat + LOST_BEATS * self.beat_interval - now
                effects += [Probe(node.name, node.address), Wake(max(0.0, left) + DEADLINE_PASSED)]
        suspects = [node for node in self.nodes.values() if node.suspect_since is not None]
        if not suspects and not self.sentence:
            return effects, []
        if suspects and self._all_at_once():
            self.sentence = (
                f"{len(suspects)} of {len(self.nodes)} nodes are silent at once: that is probably this lighthouse's "
                "own network, nobody is declared lost"
            )
            for node in suspects:
                node.spared_until = now + RETURN_GRACE
            return effects, []
        if self.sentence:
            self.sentence = ""
            # What was found out about them was found out about this lighthouse's network: they are probed again.
            for node in suspects:
                node.suspect_since = None
            return effects, []
        lost = [
            node.name for node in suspects if now - node.last_beat > self._patience(node) and now >= node.spared_until
        ]
        for name in lost:
            del self.nodes[name]
        return effects, lost

    def _all_at_once(self) -> bool:
        hosts = {node.host for node in self.nodes.values()}
        silent = len(hosts - {node.host for node in self.nodes.values() if node.suspect_since is None})
        return (silent > 1 or len(hosts) == 1) and silent > MASS_SUSPICION * len(hosts)

    def _patience(self, node: Node) -> float:
        return self._agent_grace if node.verdict else LOST_BEATS * self.beat_interval
