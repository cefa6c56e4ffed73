"""What the chaos tests share: hosts of their own, or the reason why there are none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from standalone import descendants_of, wait_for

from harness.hosts import Hosts
from harness.network import Network, NoNamespaces


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """A head, two more hosts with an agent each and a rank of a job ``job-0``, and a subscriber on the head."""
    # Short, because sockets are in it: the path of a Unix socket has 107 bytes at most.
    home: Path = tmp_path_factory.mktemp("c")
    try:
        joined = Network(3)
    except (NoNamespaces, OSError) as error:
        pytest.skip(f"needs root, network namespaces and TUN devices: {error}")
    with joined, Hosts(home, joined) as made:
        made.subscribe()
        made.submit("job-0")
        yield made
    wait_for("processes of the hosts to end", lambda: not descendants_of(str(home)), 20.0)
