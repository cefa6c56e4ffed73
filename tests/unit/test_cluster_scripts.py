"""The ssh scripts: what they would run, what they refuse, and that a failed start leaves nothing up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"

# A host is a directory: `up` leaves a file there, `down` removes it, a file `broken` makes the host fail.
FAKE_SSH = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done
mkdir -p "$HOSTS/$1" && cd "$HOSTS/$1"
echo "$2" >>commands
[[ ! -e broken ]] || exit "$(cat broken)"
case $2 in
    *" up "*) [[ ! -e up ]] || echo "already running: supervisord, pid 7"; touch up ;;
    *" down"*) rm -f up ;;
    umask*) cat >keys.tar ;;
esac
"""


class Cluster:
    def __init__(self, directory: Path) -> None:
        self.hosts = directory / "hosts"
        self.file = directory / "hostfile"
        binaries = directory / "bin"
        binaries.mkdir()
        self.hosts.mkdir()
        (binaries / "ssh").write_text(FAKE_SSH)
        (binaries / "ssh").chmod(0o755)
        self.environment = {
            "PATH": f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOSTS": str(self.hosts),
            "TMPDIR": str(directory),
        }

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(SCRIPTS / f"cluster-{script}.sh"), *arguments, str(self.file)]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30)

    def up(self) -> list[str]:
        return sorted(path.parent.name for path in self.hosts.glob("*/up"))


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    made = Cluster(tmp_path)
    made.file.write_text("localhost slots=2  # the head\n\n# nobody\n127.0.0.2 node=b agents=2\n127.0.0.3")
    return made


HEAD = (
    "SEAMARK_LIGHTHOUSE_ADDRESS=tcp://{0}:29710 SEAMARK_LIGHTHOUSE_EVENTS=tcp://{0}:29711 "
    "SEAMARK_COORDINATOR_ADDRESS=tcp://{0}:29712"
)


def test_dry_run_prints_every_step_and_runs_none(cluster: Cluster) -> None:
    done = cluster.run("up", "--dry-run")
    assert done.returncode == 0, done.stderr
    head = HEAD.format("localhost")
    assert done.stdout.splitlines() == [
        f"+ ssh localhost env {head} SEAMARK_AGENT_HOST=localhost SEAMARK_AGENT_SLOTS=2 "
        "seamark up --roles lighthouse,coordinator,agent",
        f"+ ssh 127.0.0.2 env {head} SEAMARK_AGENT_HOST=127.0.0.2 SEAMARK_AGENT_NODE=b "
        "seamark up --roles agent --agents 2",
        f"+ ssh 127.0.0.3 env {head} SEAMARK_AGENT_HOST=127.0.0.3 seamark up --roles agent",
    ]
    down = cluster.run("down", "--dry-run").stdout.splitlines()
    assert down == [f"+ ssh {host} seamark down" for host in ("127.0.0.3", "127.0.0.2", "localhost")]
    assert list(cluster.hosts.iterdir()) == []


def test_up_twice_and_down_twice(cluster: Cluster) -> None:
    for _ in range(2):
        done = cluster.run("up")
        assert done.returncode == 0, done.stderr
        assert cluster.up() == ["127.0.0.2", "127.0.0.3", "localhost"]
    for _ in range(2):
        assert cluster.run("down").returncode == 0
        assert cluster.up() == []
    assert sorted(path.name for path in cluster.file.parent.iterdir()) == ["bin", "hostfile", "hosts"]


@pytest.mark.parametrize("code", ["1", "255"])
def test_a_failed_host_takes_down_what_this_call_brought_up_and_no_more(cluster: Cluster, code: str) -> None:
    (cluster.hosts / "localhost").mkdir()
    (cluster.hosts / "localhost/up").touch()
    (cluster.hosts / "127.0.0.3").mkdir()
    (cluster.hosts / "127.0.0.3/broken").write_text(code)
    done = cluster.run("up")
    assert done.returncode == 1
    assert f"127.0.0.3 failed with exit code {code}" in done.stderr
    assert ("broken off half-way" in done.stderr) == (code == "255")
    assert cluster.up() == ["localhost"]
    assert (cluster.hosts / "127.0.0.2/commands").read_text().splitlines()[-1] == "seamark down"


def test_a_failed_host_does_not_keep_the_others_up(cluster: Cluster) -> None:
    assert cluster.run("up").returncode == 0
    (cluster.hosts / "127.0.0.2/broken").write_text("1")
    done = cluster.run("down")
    assert done.returncode == 1
    assert cluster.up() == ["127.0.0.2"]
    assert "127.0.0.2 failed" in done.stderr


def test_other_machines_need_keys_or_insecure(cluster: Cluster) -> None:
    cluster.file.write_text("me@head address=10.0.0.1\nnode-b config=/etc/s.toml seamark=/opt/bin/seamark\n")
    refused = cluster.run("up")
    assert refused.returncode == 78
    assert "say --keys DIR" in refused.stderr
    assert list(cluster.hosts.iterdir()) == []
    lines = cluster.run("up", "--dry-run", "--insecure").stdout.splitlines()
    head = HEAD.format("10.0.0.1")
    assert lines[1] == (
        f"+ ssh node-b env {head} SEAMARK_AGENT_HOST=node-b SEAMARK_SECURITY_INSECURE=true "
        "/opt/bin/seamark up --roles agent --config /etc/s.toml"
    )
    assert lines[0].startswith("+ ssh me@head env ")
    assert "SEAMARK_AGENT_HOST=10.0.0.1 " in lines[0]


def test_keys_are_made_here_and_given_to_each_host_before_it_starts(cluster: Cluster) -> None:
    """What the steps do is shown by tests/integration/test_hosts.py."""
    cluster.file.write_text("me@head address=10.0.0.1\nnode-b agents=2 keys=/etc/seamark/keys\n")
    done = cluster.run("up", "--dry-run", "--keys", "suite keys")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        "+ env SEAMARK_AGENT_NODE=head seamark keys init --keys suite keys",
        "+ seamark keys add --keys suite keys node-b",
        "+ seamark keys add --keys suite keys node-b-1",
    ]
    assert lines[3].startswith('+ tar -cf - -C suite keys all | ssh me@head umask 077; mkdir -p "$HOME/.config/seamark')
    assert 'SEAMARK_SECURITY_KEYS="$HOME/.config/seamark/keys" seamark up' in lines[4]
    assert "SEAMARK_AGENT_NODE=head " in lines[4]
    assert lines[5].startswith("+ tar -cf - -C suite keys client.key node-b.key node-b-1.key | ssh node-b umask 077; ")
    assert "SEAMARK_SECURITY_KEYS=/etc/seamark/keys seamark up --roles agent --agents 2" in lines[6]
    assert "INSECURE" not in done.stdout
    assert list(cluster.hosts.iterdir()) == []
    assert not (cluster.file.parent / "suite keys").exists()


def test_a_host_that_does_not_take_its_keys_is_not_started(cluster: Cluster) -> None:
    cluster.file.write_text("localhost\n127.0.0.2\n")
    (cluster.hosts / "127.0.0.2").mkdir()
    (cluster.hosts / "127.0.0.2/broken").write_text("1")
    done = cluster.run("up", "--keys", str(cluster.file.parent / "suite"))
    assert done.returncode == 1
    assert "127.0.0.2 did not take its keys" in done.stderr
    assert (cluster.hosts / "localhost/keys.tar").exists()
    assert cluster.up() == [], "and what was started is taken down again"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no host"),
        ("localhost keys=here", "must be an absolute path"),
        ("-oProxyCommand=x", "is not a host name"),
        ("localhost;reboot", "is not a host name"),
        ("localhost slots=$(reboot)", "expected key=value"),
        ("localhost slots=many", "must be a number"),
        ("localhost agents=0", "must be a number from 1"),
        ("localhost slot=3", "line 1: no key slot"),
        ("localhost\nlocalhost", "line 2: localhost is there twice"),
        ("localhost\nnode-b", "can't reach the head"),
    ],
)
def test_a_bad_host_file_is_refused_before_anything_runs(cluster: Cluster, text: str, said: str) -> None:
    cluster.file.write_text(text)
    done = cluster.run("up", "--insecure")
    assert done.returncode == 78
    assert said in done.stderr
    assert list(cluster.hosts.iterdir()) == []


def test_usage(cluster: Cluster) -> None:
    assert cluster.run("up", "--fast").returncode == 64
    assert cluster.run("up", "--insecure", "--keys", "x").returncode == 64
    assert cluster.run("down", "--insecure").returncode == 64
    cluster.file.unlink()
    assert cluster.run("up").returncode == 78
