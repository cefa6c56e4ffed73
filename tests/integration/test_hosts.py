"""``scripts/cluster-up.sh`` brings up two hosts, a job runs across both, and nothing of them is left.

The ``ssh`` that comes first in PATH runs each command in directories of its own; each host has a loopback address.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from standalone import descendants_of, wait_for

pytestmark = pytest.mark.suite

SCRIPTS = Path(__file__).parents[2] / "scripts"
SSH = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done
mkdir -p "$HOSTS/$1" && cd "$HOSTS/$1" || exit 255
export HOME=$PWD
export XDG_RUNTIME_DIR=$PWD/run XDG_STATE_HOME=$PWD/state
exec bash -c "$2"
"""
EVERYBODY = ("client.key", "daemon.key", "first.key", "operator.key")
SCRIPT = """
import os, pathlib, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
pathlib.Path(os.environ["OUT"], os.environ["RANK"]).write_text(f"{int(total)} {os.environ['SEAMARK_NODE']}")
"""


def killed(marker: str) -> list[psutil.Process]:
    """Kills what there is with this directory in its environment or arguments."""
    found = descendants_of(marker)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return found


@pytest.mark.parametrize("keyed", [False, True], ids=["in the clear", "with keys"])
def test_two_hosts_up_a_job_across_both_and_down(tmp_path_factory: pytest.TempPathFactory, keyed: bool) -> None:
    home = tmp_path_factory.mktemp("h")
    # The daemons' ports are the usual ones, so the addresses have to be nobody else's.
    head, other = (f"127.{random.randrange(1, 255)}.{random.randrange(256)}.{last}" for last in (1, 2))
    (home / "hosts").mkdir()
    (home / "ssh").write_text(SSH)
    (home / "ssh").chmod(0o755)
    (home / "script.py").write_text(SCRIPT)
    hosts = f"{head} slots=1 node=first\n{other} slots=1 node=second\n"
    (home / "hostfile").write_text(hosts)
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SEAMARK_")},
        "PATH": f"{home}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOSTS": str(home / "hosts"),
        "OUT": str(home),
    }

    def script(*command: str) -> str:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    up = [str(SCRIPTS / "cluster-up.sh"), *(["--keys", str(home / "suite")] if keyed else []), str(home / "hostfile")]
    try:
        for _ in range(2):
            script(*up)
        ports = {"LIGHTHOUSE_ADDRESS": 29710, "LIGHTHOUSE_EVENTS": 29711, "COORDINATOR_ADDRESS": 29712}
        suite = " ".join(f"SEAMARK_{name}=tcp://{head}:{port}" for name, port in ports.items())
        suite += ' SEAMARK_SECURITY_KEYS="$HOME/.config/seamark/keys"' if keyed else ""
        run = f"env {suite} seamark run --nnodes 2 --preload numpy,torch,torch.distributed {home}/script.py"
        script("ssh", head, run)
        assert [(home / str(rank)).read_text() for rank in range(2)] == ["2 first", "2 second"]
        if keyed:
            copied = {host: {path.name for path in (home / "hosts" / host).rglob("*.key")} for host in (head, other)}
            assert copied == {head: {*EVERYBODY, "second.key"}, other: {"client.key", "second.key"}}
            script("seamark", "keys", "revoke", "second", "--keys", str(home / "suite"))
            (home / "hostfile").write_text(f"{head} slots=1 node=first\n")
            script(*up)
            (home / "hostfile").write_text(hosts)

            def refused() -> bool:
                return '"revoked_key"' in script("ssh", head, f"env {suite} seamark status --json || true")

            wait_for("the head to refuse the second host's agent", refused)
        script(str(SCRIPTS / "cluster-down.sh"), str(home / "hostfile"))
    except BaseException:
        # Whatever state it was left in: nobody else would end it.
        wait_for("nothing to be left", lambda: not killed(str(home)), 20.0)
        raise
    wait_for("processes of both hosts to end", lambda: not descendants_of(str(home)), 20.0)
