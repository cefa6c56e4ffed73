"""The host of a job's TCPStore is lost: the others go on with another store, and with all that was counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from standalone import descendants_of, wait_for

from harness.hosts import Hosts
from harness.network import Network, NoNamespaces

pytestmark = pytest.mark.chaos

SCRIPT = """
import json, os, pathlib, sys
import torch, torch.distributed as dist
import seamark

HERE = pathlib.Path(__file__).parent

@seamark.Wrapper()
def train(call: seamark.CallWrapper):
    dist.init_process_group("gloo")
    call.state_dict[f"{call.iteration}-{call.state.rank}"] = os.getpid()
    dist.barrier()
    line = {"iteration": call.iteration, "restarts": call.state.restarts, "world": call.state.world_size}
    line["pid"], line["shared"] = os.getpid(), sorted(call.state_dict)
    line["node"] = os.environ["SEAMARK_NODE"]
    with open(HERE / f"said-{call.state.initial_rank}", "a") as file:
        file.write(json.dumps(line) + "\\n")
    one = torch.ones(1)
    while not (HERE / "fail").exists() or call.iteration > 1:
        dist.all_reduce(one)
        one.fill_(1.0)
        call.ping()
    if call.state.rank == 0:
        raise ValueError("after the move")
    dist.barrier()

train()
"""


@pytest.fixture
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """A head and two hosts."""
    home: Path = tmp_path_factory.mktemp("s")
    try:
        joined = Network(3)
    except (NoNamespaces, OSError) as error:
        pytest.skip(f"needs root, network namespaces and TUN devices: {error}")
    with joined, Hosts(home, joined, slots=1) as made:
        yield made
    wait_for("processes of the hosts to end", lambda: not descendants_of(str(home)), 20.0)


def said(hosts: Hosts, rank: int) -> list[dict[str, Any]]:
    path = hosts.home / f"said-{rank}"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_another_host_takes_the_store(two_hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = two_hosts
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "tun0")
    script = hosts.home / "train.py"
    script.write_text(SCRIPT)
    hosts.run("job", "--nnodes", "1:2", str(script))
    hosts.wait("both ranks", lambda: all(said(hosts, rank) for rank in range(2)))
    assert [said(hosts, rank)[0]["world"] for rank in range(2)] == [2, 2]
    # Rank 0's host has the store.
    hosts.network.cut(hosts.nodes[said(hosts, 0)[0]["node"]])
    hosts.wait("the survivor", lambda: len(said(hosts, 1)) > 1)
    before, after = said(hosts, 1)[0], said(hosts, 1)[-1]
    assert after["pid"] == before["pid"]
    assert (after["world"], after["iteration"], after["restarts"]) == (1, 1, 1)
    assert after["shared"] == ["0-0", "0-1", "1-0"], "what the lost host's store held is there"
    (hosts.home / "fail").touch()
    hosts.wait("the next iteration", lambda: said(hosts, 1)[-1]["iteration"] == 2)
