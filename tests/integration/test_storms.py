"""Workers that behave badly: children by the hundred, a daemon, closed output, a full disk, 10,000 lines a second.

Their node's agent has a training beside them to look after. That one ends as if nothing were, the lighthouse never
has to wait for a beat, and with the jobs everything ends that their workers started.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import psutil
import pytest
from standalone import EVERY, STEPS, wait_for
from suite import Suite, small_disk, suite

from seamark.protocol.messages import LighthouseStatus, StatusRequest
from seamarkd.cli.operator import Operator

pytestmark = pytest.mark.suite

CHILDREN = 198
"""Never more than 200."""
LINES = 10_000
"""Lines per second."""
ROLES = """
import os, pathlib, sys, time

HERE = pathlib.Path(__file__).parent

def wait_for(name):
    while not (HERE / name).exists():
        time.sleep(0.02)

def tell(name, value):
    (HERE / f"{name}.new").write_text(str(value))
    (HERE / f"{name}.new").rename(HERE / name)

def children():
    \"\"\"All alive at once; every other one is an orphan from the first moment on.\"\"\"
    def end():
        time.sleep(1.0)
        os._exit(0)

    mine = []
    for _ in range(CHILDREN // 3):
        mine.append(os.fork())
        if not mine[-1]:
            end()
        mine.append(os.fork())
        if not mine[-1]:
            if os.fork():
                os._exit(0)
            end()
    for pid in mine:
        os.waitpid(pid, 0)
    tell("children", len(mine) * 3 // 2)

def daemon():
    if os.fork():
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    os.closerange(0, 256)
    tell("daemon", os.getpid())
    time.sleep(600.0)
    os._exit(0)

def silent():
    os.close(1)
    os.close(2)
    tell("silent", os.getpid())

def lines():
    began, written = time.monotonic(), 0
    while not (HERE / "finish").exists():
        due = int((time.monotonic() - began) * LINES)
        sys.stdout.write("".join(f"{number}\\n" for number in range(written, due)))
        written = due
        time.sleep(0.01)
    tell("lines", f"{written} {time.monotonic() - began}")

role = (children, daemon, silent, lines)[int(os.environ["RANK"])]
wait_for("begin")
role()
wait_for("finish")
"""
DISK = """
import pathlib, sys, time

HERE = pathlib.Path(__file__).parent
while not (HERE / "begin").exists():
    time.sleep(0.02)
with open(HERE / "starts", "a") as file:
    file.write("x")
print("fills the disk that its log is on", flush=True)
try:
    with open(sys.argv[1], "ab", buffering=0) as file:
        for block in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(block))
            except OSError as error:
                full = error
    print("goes on", flush=True)
except OSError as error:
    full = error
raise full
"""
DISK_BYTES = 16 << 20
ROOM_FOR_DESCRIPTORS = 5
ROOM_FOR_MEMORY = 24 << 20


@contextlib.contextmanager
def beats(cluster: Suite) -> Iterator[list[LighthouseStatus]]:
    """What the lighthouse says, twenty times a second; it is all there when the block ends."""
    said: list[LighthouseStatus] = []
    over = threading.Event()

    def follow() -> None:
        with Operator(cluster.env["SEAMARK_LIGHTHOUSE_ADDRESS"]) as operator:
            while not over.wait(0.05):
                said.append(operator.ask(StatusRequest, LighthouseStatus, 30.0))

    follower = threading.Thread(target=follow)
    follower.start()
    try:
        yield said
    finally:
        over.set()
        follower.join()


def test_workers_that_behave_badly_harm_nobody_else(tmp_path_factory: pytest.TempPathFactory, undisturbed: str) -> None:
    home = tmp_path_factory.mktemp("s")
    small = home / "small"
    scripts = {}
    for name, text in (("roles", ROLES), ("disk", DISK)):
        scripts[name] = home / f"{name}.py"
        scripts[name].write_text(f"CHILDREN, LINES = {CHILDREN}, {LINES}\n{text}")
    with (
        small_disk(small, f"{DISK_BYTES}") as (_, prefix),
        suite(home, agents=1, slots=9, prefix=prefix) as cluster,
        contextlib.ExitStack() as ending,
    ):
        agent = psutil.Process(cluster.programs()["agent-0"].pid)
        pace = ("--steps", str(STEPS), "--every", str(EVERY), "--pause", "0.05")
        training = cluster.run(home / "training", "--nproc-per-node", "4", name="training", arguments=pace)
        ending.callback(training.close)
        storm = cluster.run(
            home / "storm",
            *("--nproc-per-node", "4", "--preload", "none", "--max-restarts", "0", "--log-dir", str(home / "logs")),
            name="storm",
            script=scripts["roles"],
        )
        ending.callback(storm.close)
        disk = cluster.run(
            home / "disk",
            *("--preload", "none", "--max-restarts", "1", "--log-dir", str(small)),
            name="disk",
            script=scripts["disk"],
            arguments=(str(small / "filling"),),
        )
        ending.callback(disk.close)
        training.wait_step(0, STEPS // 10, 0)
        descriptors, memory = agent.num_fds(), agent.memory_info().rss
        events = cluster.follow("events", "training", "--follow", "--json")
        ending.callback(events.close)
        with beats(cluster) as said:
            (home / "begin").touch()
            orphaned = wait_for("the daemon", lambda: (home / "daemon").exists() and (home / "daemon").read_text())
            daemon = psutil.Process(int(orphaned))
            wait_for("the children", (home / "children").exists)
            assert disk.finish() == 1, disk.text()
            assert training.finish() == 0, training.text() + training.logs()
            assert daemon.is_running(), "its job goes on"
            (home / "finish").touch()
            assert storm.finish() == 0, storm.text() + storm.logs()
            wait_for("the daemon's end", lambda: not daemon.is_running())
        assert training.digests() == {undisturbed}
        assert training.incidents() == []
        assert [event for event in events.printed() if event["event"] == "failure"] == []
        assert len(said) > 20
        assert {one.sentence for one in said} == {""}, "no node was suspect"
        assert {node.verdict for one in said for node in one.nodes} == {""}
        assert {len(one.nodes) for one in said} == {1}
        assert agent.pid == cluster.programs()["agent-0"].pid
        assert (home / "starts").read_text() == "xx", "one start and one restart"
        assert "exited with code 1" in disk.text()
        assert int((home / "children").read_text()) == CHILDREN
        written, seconds = (home / "lines").read_text().split()
        in_order = (home / "logs" / "rank_3.log").read_text() == "".join(
            f"{number}\n" for number in range(int(written))
        )
        assert in_order, "every line"
        assert int(written) > 0.9 * LINES * float(seconds) - LINES
        wait_for("the descriptors of the ended jobs", lambda: agent.num_fds() < descriptors + ROOM_FOR_DESCRIPTORS)
        assert agent.memory_info().rss < memory + ROOM_FOR_MEMORY
