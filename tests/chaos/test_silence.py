"""Silence is not absence (D2), on a network that can be cut and that loses packets.

The tests share their hosts and the job on them: the one in which a host is lost comes last.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from harness.hosts import Hosts

pytestmark = pytest.mark.chaos

GRACE = 10.0
"""Seconds that an agent has to come back on a host that lives; one that is cut off is told before."""
QUIET = 1.0
CUTS = 2
LOSS = 0.01
LOSS_SECONDS = float(os.environ.get("SEAMARK_LOSS_SECONDS", "5"))


@pytest.mark.timeout(LOSS_SECONDS + 180.0)
def test_lost_packets_and_dead_agents_are_nobody_s_death(hosts: Hosts) -> None:
    hosts.network.loss = LOSS
    until = time.monotonic() + LOSS_SECONDS
    kills = 0
    while time.monotonic() < until:
        hosts.agents["c"].send_signal(signal.SIGKILL)
        hosts.agents["c"].wait()
        hosts.wait("it to be missed", lambda: "agent down" in str(hosts.status()["problems"]))
        hosts.start_agent("c")
        hosts.wait("the agent again", hosts.healthy)
        kills += 1
    hosts.network.loss = 0.0
    assert kills > 0
    assert hosts.listen(0.0) is None, hosts.losses
    print(f"{kills} kills of an agent in {LOSS_SECONDS:g} s at {LOSS:.0%} loss: nobody was declared lost")


def test_a_lighthouse_without_a_network_kills_nobody(hosts: Hosts) -> None:
    hosts.network.cut(hosts.head)
    hosts.wait("the sentence", lambda: "nobody is declared lost" in str(hosts.status()["problems"]))
    assert hosts.listen(QUIET) is None, hosts.losses
    hosts.network.mend()
    hosts.wait("everybody again", hosts.healthy)
    assert hosts.listen(0.0) is None, hosts.losses


def test_a_host_that_is_cut_off_is_told_and_found_again_when_it_is_back(hosts: Hosts) -> None:
    for cut in range(CUTS):
        if cut > 0:
            hosts.submit(f"job-{cut}")
        began = time.monotonic()
        hosts.network.cut(hosts.nodes["c"])
        lost = hosts.listen(GRACE)
        assert lost is not None, hosts.logs()
        assert (lost["kind"], lost["node"], lost["cause"], lost["job"]) == ("lost", "c", "node", f"job-{cut}")
        assert lost["last"] - began < GRACE
        hosts.wait("the word", lambda: not hosts.hears("c"))
        hosts.network.mend()
        hosts.wait("the host again", lambda: hosts.hears("c"))
    assert len(hosts.losses) == CUTS
