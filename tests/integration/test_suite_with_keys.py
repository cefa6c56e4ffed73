"""A suite with keys under supervisord: a job runs, and strangers, impostors and revoked keys change nothing for it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq
from standalone import EVERY, descendants_of, wait_for
from suite import Suite, suite

from seamark.protocol.codec import decode, encode
from seamark.protocol.keys import Key, own, write
from seamark.protocol.messages import (
    Beat,
    BeatAnswer,
    DrainNode,
    EventBeat,
    InjectFailure,
    Message,
    NodeHello,
    Refused,
    StopJob,
)
from seamark.protocol.sockets import connect, make_socket, new_pair
from seamarkd.cli.status import REFUSALS

pytestmark = pytest.mark.suite

TWO_BY_TWO = ("--nnodes", "2", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    # Short: the path of a Unix socket has 107 bytes at most.
    with suite(tmp_path_factory.mktemp("k"), keys=True) as made:
        made.wait_healthy()
        yield made


class Peer:
    """Somebody with a key, who talks to the suite's daemons on standing connections."""

    def __init__(self, cluster: Suite, key: Key) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self.sockets = {}
        for daemon, kind in (("LIGHTHOUSE_ADDRESS", zmq.DEALER), ("COORDINATOR_ADDRESS", zmq.DEALER)):
            self.sockets[daemon.split("_")[0].lower()] = self._connected(kind, cluster.env[f"SEAMARK_{daemon}"], key)
        self.events = self._connected(zmq.SUB, cluster.env["SEAMARK_LIGHTHOUSE_EVENTS"], key)
        self.events.subscribe(b"")

    def _connected(self, kind: int, address: str, key: Key) -> zmq.Socket[Any]:
        socket = make_socket(self._context, kind)
        connect(socket, address, key)
        return socket

    def tell(self, daemon: str, message: Message) -> None:
        self.sockets[daemon].send_multipart(encode(message))

    def ask(self, daemon: str, message: Message) -> Message:
        """The answer to this message, whatever came before."""
        socket = self.sockets[daemon]
        while socket.poll(0):
            socket.recv_multipart()
        self.tell(daemon, message)
        assert socket.poll(20_000), f"no answer to {message}"
        return decode(socket.recv_multipart())

    def heard(self) -> bool:
        """Whether any daemon has said anything."""
        return any(socket.poll(0) for socket in (*self.sockets.values(), self.events))

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._context.destroy(linger=0)


def not_allowed(answer: Message) -> str:
    """The sentence of a refusal."""
    assert isinstance(answer, Refused), answer
    assert answer.code == "NOT_ALLOWED"
    return answer.reason


def counts(cluster: Suite) -> dict[str, dict[str, int]]:
    """What has been refused so far, by who refused it."""
    status = cluster.status()
    found = {daemon: dict(status[daemon]["dropped"]) for daemon in ("lighthouse", "coordinator")}
    return found | {node["node"]: node["refused"] for node in status["coordinator"]["nodes"]}


def logged_once(cluster: Suite, daemon: str, pattern: str) -> None:
    """A warning like this is in the daemon's log, and no second one; supervisord writes it in its own time."""

    def found() -> list[str]:
        written = (cluster.state / "log" / f"{daemon}.log").read_text().splitlines()
        return [line for line in written if re.search(f"WARNING .*refused {pattern}", line)]

    wait_for(f"{pattern} in the log of {daemon}", found)
    assert len(found()) == 1


def test_a_job_runs_and_ends_beside_all_who_may_not(cluster: Suite, tmp_path: Path) -> None:
    """Rank 1 is killed after all that: events still reach agents and coordinator, and it is replaced."""
    until = tmp_path / "until"
    arguments = ("--steps", "1000000", "--until", str(until), "--every", str(EVERY), "--pause", "0.02")
    before = {name: program.pid for name, program in cluster.programs().items()}
    run = cluster.run(tmp_path, *TWO_BY_TWO, name="beside", arguments=arguments)
    with ExitStack() as ending:
        ending.callback(run.close)
        for rank in range(4):
            run.wait_step(rank, 5, 0)
        for abuse in (a_stranger, an_impostor, an_agent_that_commands, a_key_that_is_revoked):
            abuse(cluster)
            run.check_alive()
        assert {rank: run.reports(rank)[-1]["iteration"] for rank in range(4)} == dict.fromkeys(range(4), 0)
        assert {name: program.pid for name, program in cluster.programs().items()} == before, "nothing was restarted"
        cluster.wait_healthy()
        run.kill(1)
        for rank in range(4):
            run.wait_entered(rank, 1)
        until.write_text(str(run.wait_step(0, 1, 1)["step"] + 20))
        assert run.finish() == 0, run.text() + run.logs()
        assert len(run.digests()) == 1
    assert "refused" in cluster.command("status")


def a_stranger(cluster: Suite) -> None:
    """It knows the daemons' public half, and nobody knows its own."""
    daemon = own(cluster.keys, "operator").daemon
    public, secret = new_pair()
    with Peer(cluster, Key("stranger", "operator", public, secret, daemon)) as peer:
        for name in peer.sockets:
            peer.tell(name, StopJob(1, "beside", "by a stranger"))
        wait_for("it to be refused by both", refused_by(cluster, "unknown_key", "lighthouse", "coordinator"))
        assert not peer.heard()
    for name in ("lighthouse", "coordinator"):
        logged_once(cluster, name, f"a connection from 127.0.0.1: nobody knows the key {re.escape(public)}")


def an_impostor(cluster: Suite) -> None:
    """A node's own key, and another node's name."""
    with Peer(cluster, own(cluster.keys, "node", "host-1")) as peer:
        for name in peer.sockets:
            for message in (NodeHello("host", "i", "tcp://127.0.0.1:1", 64), Beat("host", "i", 1)):
                for _ in range(5):
                    sentence = not_allowed(peer.ask(name, message))
                    assert sentence.startswith("the key of node host-1 may not speak for node host (")
    refused = counts(cluster)
    assert refused["lighthouse"]["other_node"] == refused["coordinator"]["other_node"] == 10
    for name in ("lighthouse", "coordinator"):
        logged_once(cluster, name, "a message from 127.0.0.1: the key of node host-1 may not")
    slots = {node["node"]: node["slots"] for node in cluster.status()["coordinator"]["nodes"]}
    assert slots == {"host": 2, "host-1": 2}, "not the 64 of the impostor"


def an_agent_that_commands(cluster: Suite) -> None:
    """What only an operator may say, with the key of a node."""
    with Peer(cluster, own(cluster.keys, "node", "host")) as peer:
        for name, message in (
            ("coordinator", StopJob(1, "beside", "by an agent")),
            ("coordinator", DrainNode(2, "host-1", "by an agent")),
            ("lighthouse", InjectFailure(3, "beside", "ranks", "beside/0")),
        ):
            sentence = not_allowed(peer.ask(name, message))
            assert sentence == f"the key host has the role node, which may not send {type(message).__name__}"
    refused = counts(cluster)
    assert (refused["coordinator"]["not_allowed"], refused["lighthouse"]["not_allowed"]) == (2, 1)


def a_key_that_is_revoked(cluster: Suite) -> None:
    """On connections that stand: it was heard, and is not any more."""
    cluster.command("keys", "add", "given-away")
    key = own(cluster.keys, "node", "given-away")
    with Peer(cluster, key) as peer, Peer(cluster, own(cluster.keys, "node", "host-1")) as other:
        for name in peer.sockets:
            assert isinstance(peer.ask(name, Beat("given-away", "i", 5)), BeatAnswer)
        assert peer.events.poll(10_000)
        cluster.command("keys", "revoke", "given-away")
        for name in peer.sockets:
            wait_for(f"the {name} to refuse it", no_more(peer, name))
            logged_once(cluster, name, "a message from 127.0.0.1: the key given-away is not allowed here any more")
        with Peer(cluster, key) as again:
            # The lighthouse has refused it before: it is the subscriber's address, too.
            logged_once(cluster, "coordinator", "a connection from 127.0.0.1: the key given-away was revoked")
            assert not again.heard()
        refused = counts(cluster)
        assert all(refused[name]["revoked_key"] >= 2 for name in peer.sockets)
        while peer.events.poll(0):
            peer.events.recv_multipart()
        while other.events.poll(0):
            other.events.recv_multipart()
        assert other.events.poll(10_000)
        assert isinstance(decode(other.events.recv_multipart()[1:]), EventBeat)
        assert not peer.events.poll(0)


def no_more(peer: Peer, daemon: str) -> Callable[[], bool]:
    def refused() -> bool:
        answer = peer.ask(daemon, Beat("given-away", "i", 5))
        if isinstance(answer, BeatAnswer):
            return False
        return "not allowed here any more" in not_allowed(answer)

    return refused


def refused_by(cluster: Suite, reason: str, *daemons: str) -> Callable[[], bool]:
    return lambda: all(counts(cluster)[daemon].get(reason, 0) > 0 for daemon in daemons)


WORKER = """
import os, pathlib, time, zmq
from seamark.protocol.codec import decode, encode
from seamark.protocol.messages import DrainNode, JobSpec, StopJob, SubmitJob
from seamark.protocol.sockets import make_socket

spec = JobSpec("evil", ["x"], False, "python", "/", {}, 1, 1, 1, "replace", 0, "", "/tmp")
commands = [StopJob(1, os.environ["SEAMARK_JOB"], "me"), DrainNode(2, "host", "me"), SubmitJob(3, spec, "s")]
context = zmq.Context()
socket = make_socket(context, zmq.DEALER, identity=os.environ["SEAMARK_INCARNATION"].encode())
socket.connect(os.environ["SEAMARK_ADDRESS"])
for command in commands:
    socket.send_multipart(encode(command))
    assert socket.poll(10_000)
    answer = decode(socket.recv_multipart())
    print(answer.code, answer.request, answer.reason)
socket.close()
context.term()
"""


def test_a_worker_that_sends_an_operator_s_commands_is_refused_and_counted(cluster: Suite, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WORKER)
    run = cluster.run(tmp_path, "--preload", "none", name="worker", script=script)
    try:
        assert run.finish() == 0, run.text() + run.logs()
        for number, kind in enumerate(("StopJob", "DrainNode", "SubmitJob"), 1):
            assert f"NOT_ALLOWED {number} a worker may not send {kind}" in run.logs()
    finally:
        run.close()

    def node() -> str | None:
        return next((name for name, refused in counts(cluster).items() if refused == {"not_allowed": 3}), None)

    where = wait_for("the coordinator to hear of it", node)
    agent = f"agent-{0 if where == 'host' else 1}"
    logged_once(cluster, agent, "a message of peer .*: a worker may not send")
    said = " ".join(cluster.command("status", code=None).split())
    assert re.search(
        f"the agent of node {where} refused, the last .* ago: 3 messages that are not their sender's", said
    )
    jobs = {job["job"]: job["state"] for job in cluster.status()["coordinator"]["jobs"]}
    assert jobs["worker"] == "SUCCEEDED"
    assert "evil" not in jobs


def test_commands_without_a_key_say_what_is_missing(cluster: Suite) -> None:
    absent = str(cluster.home / "absent")
    said = cluster.command("status", code=78, SEAMARK_SECURITY_KEYS=absent)
    assert f"security.keys: {absent}: can't be read" in said
    assert "seamark keys init" in said
    assert "unreachable" in cluster.command("status", code=2, SEAMARK_SECURITY_KEYS="")

    stranger = cluster.home / "stranger"
    stranger.mkdir(mode=0o700)
    public, secret = new_pair()
    assert write(stranger, Key("mallory", "operator", public, secret, own(cluster.keys, "operator").daemon))
    said = cluster.command("status", code=2, SEAMARK_SECURITY_KEYS=str(stranger))
    assert "to the key mallory: does seamark keys list still show it on the head?" in " ".join(said.split())


def test_daemons_whose_keys_are_missing_are_not_started_and_it_is_said_what_to_do(tmp_path: Path) -> None:
    made = Suite(tmp_path / "s", agents=1, keys=True)
    said = made.command("up", "--agents", "3", code=78)
    for name in ("host-1", "host-2"):
        assert f"security.keys: {made.keys}: there is no key {name}: on the head, seamark keys add {name};" in said
    made.keys.chmod(0o755)
    assert made.command("up", code=78).count(f"chmod 700 {made.keys}") == 1
    assert "nothing is running" in made.command("down")


def test_daemons_are_not_stopped_under_jobs_that_nobody_may_end(tmp_path: Path) -> None:
    made = Suite(tmp_path / "s", agents=1, keys=True)
    try:
        made.up()
        pids = {program.pid for program in made.programs().values()}
        operator = made.keys / "operator.key"
        operator.rename(tmp_path / "operator.key")
        assert "there is no key of role operator" in made.command("down", code=78)
        public, secret = new_pair()
        write(made.keys, Key("operator", "operator", public, secret, new_pair()[0]))
        assert "--keep-jobs stops the daemons without ending them" in made.command("down", code=2)
        assert {program.pid for program in made.programs().values()} == pids
        (tmp_path / "operator.key").rename(operator)
        said = made.command("down", SEAMARK_SECURITY_KEYS="")
        assert "stopped: supervisord" in said, "with what the suite itself was started with"
    finally:
        made.end()
    wait_for("its processes to end", lambda: not descendants_of(str(made.home)), 20.0)


def test_keys_for_a_suite_that_was_started_without(tmp_path: Path) -> None:
    made = Suite(tmp_path / "s", agents=1, keys=True)
    try:
        made.command("up", SEAMARK_SECURITY_KEYS="")
        said = made.command("up", code=78)
        assert "has no keys, and security.keys names some: seamark down, then seamark up" in said
        made.command("down")
        made.command("up")
        made.wait_healthy()
        assert "has keys, and this configuration names none" in made.command("up", code=78, SEAMARK_SECURITY_KEYS="")
        assert "already running" in made.command("up")
    finally:
        made.end()
    wait_for("its processes to end", lambda: not descendants_of(str(made.home)), 20.0)


@pytest.mark.parametrize("daemon", ["lighthouse", "coordinator", "agent"])
def test_a_daemon_without_its_key_ends_with_78(tmp_path: Path, daemon: str) -> None:
    made = Suite(tmp_path / "s")
    env = made.env | {"SEAMARK_SECURITY_KEYS": str(tmp_path / "none")}
    command = [sys.executable, "-c", f"from seamarkd.{daemon}.main import main; main()"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 78, done.stderr
    assert f"ERROR {daemon} security.keys: {tmp_path / 'none'}: can't be read" in done.stderr


def test_files_of_keys_stay_private(cluster: Suite) -> None:
    assert cluster.keys.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in cluster.keys.iterdir()} == {0o600}
    assert all(path.stat().st_uid == os.geteuid() for path in cluster.keys.iterdir())


def test_a_node_whose_key_is_revoked_is_lost_and_the_job_goes_on_without_it(tmp_path: Path) -> None:
    made = Suite(tmp_path / "s", keys=True)
    made.env["SEAMARK_LIGHTHOUSE_AGENT_GRACE"] = "1"
    until = tmp_path / "until"
    arguments = ("--steps", "1000000", "--until", str(until), "--every", str(EVERY), "--pause", "0.02")
    with ExitStack() as ending:
        ending.callback(made.end)
        made.up()
        made.wait_healthy()
        options = ("--nnodes", "1:2", "--nproc-per-node", "2", "--join-timeout", "5")
        run = made.run(tmp_path, *options, name="smaller", arguments=arguments)
        ending.callback(run.close)
        for rank in range(4):
            run.wait_step(rank, 5, 0)
        ranks = made.status()["coordinator"]["members"]["smaller"]
        (gone,) = (one["node"] for one in ranks if one["rank"] == 2)
        made.command("keys", "revoke", gone)
        for rank in range(2):
            run.wait_entered(rank, 1)
        until.write_text(str(run.wait_step(0, 1, 1)["step"] + 20))
        assert run.finish() == 0, run.text() + run.logs()
        agent = (made.state / "log" / f"agent-{0 if gone == 'host' else 1}.log").read_text()
        assert f"a daemon refuses this agent's messages: the key {gone} is not allowed here any more" in agent
        assert [node["node"] for node in made.status()["coordinator"]["nodes"]] == [
            {"host": "host-1"}.get(gone, "host")
        ]
        # Added again it has another key: its agent finds that by itself.
        made.command("keys", "add", gone)
        wait_for("the node to be back", lambda: len(made.status()["coordinator"]["nodes"]) == 2)
        made.wait_healthy()
    wait_for("its processes to end", lambda: not descendants_of(str(made.home)), 20.0)


SHARDS = """
import seamark
for shard in seamark.shards("inputs", size=40, shard_size=10):
    shard.complete()
"""


def test_shards_are_leased_and_read_with_keys(cluster: Suite, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SHARDS)
    before = counts(cluster)
    options = ("--nnodes", "2", "--independent", "--preload", "none")
    run = cluster.run(tmp_path, *options, name="shards", script=script)
    try:
        assert run.finish() == 0, run.text() + run.logs()
    finally:
        run.close()
    (dataset,) = json.loads(cluster.command("manifest", "shards"))["datasets"]
    assert [shard["state"] for shard in dataset["shards"]] == ["DONE"] * 4
    assert "succeeded" in cluster.command("why", "shards")
    refused = {who: sum(numbers.get(reason, 0) for reason in REFUSALS) for who, numbers in counts(cluster).items()}
    assert refused == {who: sum(numbers.get(reason, 0) for reason in REFUSALS) for who, numbers in before.items()}
