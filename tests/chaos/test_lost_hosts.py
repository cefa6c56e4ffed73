"""Hosts that are lost, come back and are new, under each restart policy: what a job's ranks go through."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from standalone import descendants_of, wait_for

from harness.hosts import Hosts
from harness.network import Network, NoNamespaces

pytestmark = pytest.mark.chaos

TOGETHER = Path(__file__).parents[1] / "integration" / "together.py"


@contextmanager
def hosts_of(home: Path, nodes: int, agents: int | None = None) -> Iterator[Hosts]:
    """A head and so many nodes, of which the first have an agent."""
    try:
        joined = Network(nodes + 1)
    except (NoNamespaces, OSError) as error:
        pytest.skip(f"needs root, network namespaces and TUN devices: {error}")
    with joined, Hosts(home, joined, slots=1, agents=agents) as made:
        yield made
    wait_for("processes of the hosts to end", lambda: not descendants_of(str(home)), 20.0)


class Job:
    """A job of ``together.py`` with a rank on each of its nodes."""

    def __init__(self, hosts: Hosts, mode: str, *options: str) -> None:
        self.hosts = hosts
        shutil.copy(TOGETHER, hosts.home)
        hosts.run("job", *options, str(hosts.home / TOGETHER.name), mode)

    def said(self, rank: int) -> list[dict[str, Any]]:
        path = self.hosts.home / f"said-{rank}"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait(self, what: str, condition: Callable[[dict[str, Any], dict[str, Any]], bool], other: int = 1) -> None:
        """Until it is so of what rank 0 and another said last."""

        def so() -> bool:
            first, second = self.said(0), self.said(other)
            return bool(first) and condition(first[-1], second[-1] if second else {})

        self.hosts.wait(what, so)

    def wait_both(self, what: str, condition: Callable[[dict[str, Any], dict[str, Any]], bool]) -> None:
        """Until both are in a world of two, in the same iteration, and it is so."""

        def together(first: dict[str, Any], second: dict[str, Any]) -> bool:
            same = bool(second) and first["world"] == second["world"] == 2
            return same and first["iteration"] == second["iteration"] and condition(first, second)

        self.wait(what, together)

    def cut(self, rank: int) -> str:
        node = str(self.said(rank)[-1]["node"])
        self.hosts.network.cut(self.hosts.nodes[node])
        return node

    def finish(self) -> None:
        (self.hosts.home / "finish").touch()
        output = self.hosts.home / "run" / "output"
        self.hosts.wait("the end", lambda: "all 2 ranks completed" in output.read_text())


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "tun0")
    return tmp_path_factory.mktemp("s")


def test_replace_moves_the_ranks_of_a_lost_host_and_takes_in_who_comes_back(home: Path) -> None:
    with hosts_of(home, 3) as hosts:
        job = Job(hosts, "wrapped", "--nnodes", "1:2")
        job.wait_both("both", lambda first, second: first["iteration"] == 0)
        survivor = job.said(0)[0]["pid"]
        lost = job.cut(1)
        job.wait_both("the rank on another host", lambda first, second: second["node"] != lost)
        job.cut(1)
        job.wait("the survivor alone, for no host has room", lambda first, second: first["world"] == 1)
        alone = job.said(0)[-1]["iteration"]
        hosts.network.mend()
        job.wait_both("a host that is back", lambda first, second: first["iteration"] > alone)
        assert {line["pid"] for line in job.said(0)} == {survivor}, "in one process throughout"
        job.finish()


def test_replace_waits_below_the_minimum_and_goes_on_in_process(home: Path) -> None:
    with hosts_of(home, 2) as hosts:
        job = Job(hosts, "wrapped", "--nnodes", "2")
        job.wait_both("both", lambda first, second: first["iteration"] == 0)
        survivor = job.said(0)[0]["pid"]
        job.cut(1)
        hosts.wait("its waiting", lambda: "min_replicas 2" in hosts.status()["coordinator"]["jobs"][0]["sentence"])
        hosts.network.mend()
        job.wait_both("both again", lambda first, second: first["iteration"] > 0)
        assert (job.said(0)[-1]["pid"], len(job.said(0))) == (survivor, 2)
        job.finish()


def test_any_failed_grows_shrinks_and_grows_again_by_restarts(home: Path) -> None:
    with hosts_of(home, 2, agents=1) as hosts:
        job = Job(hosts, "plain", "--nnodes", "1:2", "--restart-policy", "any-failed")
        job.wait("one", lambda first, second: first["world"] == 1)
        hosts.start_agent("c")
        job.wait_both("a new host", lambda first, second: second["node"] == "c")
        job.cut(1)
        job.wait("one again", lambda first, second: first["world"] == 1)
        hosts.network.mend()
        job.wait_both("the host back", lambda first, second: True)
        assert len({line["pid"] for line in job.said(0)}) == len(job.said(0)) == 4, "each time all anew"
        job.finish()


def test_min_healthy_never_grows_and_uses_all_hosts_when_it_restarts(home: Path) -> None:
    with hosts_of(home, 2) as hosts:
        job = Job(hosts, "wrapped", "--nnodes", "1:2", "--restart-policy", "min-healthy")
        job.wait_both("both", lambda first, second: first["iteration"] == 0)
        lost = job.cut(1)
        job.wait("the survivor alone", lambda first, second: first["world"] == 1)
        hosts.network.mend()
        hosts.wait("the host back", lambda: hosts.hears(lost))
        survivor = job.said(0)
        assert [line["world"] for line in survivor] == [2, 1]
        # Not by a file, which a rank that is started anew would see, too.
        os.kill(survivor[0]["pid"], signal.SIGKILL)
        job.wait_both("all anew", lambda first, second: first["iteration"] == 100)
        job.finish()
