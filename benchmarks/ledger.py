"""What a shard costs: leased and completed, durably, through a real coordinator and its disk.

Agents without workers ask one coordinator for shards over ipc sockets, as real ones do for theirs; each completion is
on disk before it is answered, and its answer brings the next lease. Beside it the disk's own fsync, and DLRover's task
manager, which is called in process and writes nothing.

\b
Examples:
  python benchmarks/ledger.py --seconds 2 --open 1000 --shards 100000      does it run here?
  python benchmarks/ledger.py --json ledger.json                           all of it, with a result file
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import psutil
import zmq
from rich import box
from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from daemons import MEBI, environment, started
from harness import peers
from harness.command import BenchmarkRun, json_option, peer_env_option, work_directory
from harness.summary import Summary, duration
from ledgers.agents import DATASET, JOB, Cluster, Consumer
from seamark.protocol.messages import CompleteShard, CoordinatorStatus, Dataset, LeaseShard, OpenShards, ShardAnswer
from seamark.runtime_config import RuntimeConfig
from seamarkd.cli.status import ask_one
from seamarkd.coordinator.effects import Persist
from seamarkd.coordinator.ledger import Row, State
from seamarkd.coordinator.manifest import Manifest
from seamarkd.coordinator.shards import JobShards, Numbers, Record

CLIENTS = (1, 8, 64)
FSYNCS = 200
NODE_LEASES = 64
"""Of a host with eight ranks and eight DataLoader workers each."""
MANY = 10_000_000
HERE = Path(__file__).resolve().parent
NOTES = """\
lease+complete: a completion on disk and the next lease, one request. Agents and their load have the machine's other
core. reassigned: from the event that a node is lost to the last of its leases at another node's consumers.
start: from exec to the first lease, on a manifest with that many shards DONE. In process: the rules alone, no socket
and no disk, beside DLRover's task manager, got and reported in process, which has neither."""


@click.command(help=__doc__)
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(0.5), help="Of each load.")
@click.option("--open", "leases", default=10_000, show_default=True, help="Leases of all nodes.")
@click.option("--losses", default=10, show_default=True, type=click.IntRange(1), help="Lost nodes.")
@click.option("--shards", default=1_000_000, show_default=True, help="Of the large data set.")
@click.option("--starts", default=5, show_default=True, type=click.IntRange(1), help="Starts with it.")
@peer_env_option("dlrover")
@json_option
def main(
    seconds: float, leases: int, losses: int, shards: int, starts: int, peer_env: Path, json_path: Path | None
) -> None:
    """Measures, prints, and writes the result file."""
    run = BenchmarkRun("ledger", 0, json_path)
    found: dict[str, Any] = {"loads": [], "reassigned": {}, "starts": []}
    with run.measuring(), run.progress() as progress:
        task = progress.add_task("ledger", total=len(CLIENTS) + 2 * losses + starts + 2, last="")
        found["fsync"] = fsyncs()
        progress.advance(task)
        for clients in CLIENTS:
            found["loads"].append(asyncio.run(load(clients, seconds)))
            progress.advance(task)
        for lost in (NODE_LEASES, leases):
            for _ in range(losses):
                found["reassigned"].setdefault(str(lost), []).append(asyncio.run(reassign(leases, lost)))
                progress.advance(task)
        with work_directory() as home:
            prepare(home, shards)
            for _ in range(starts):
                found["starts"].append(asyncio.run(start_with(home, shards)))
                progress.advance(task)
        found["in_process"] = in_process(64, seconds / 2)
        found["dlrover"] = dlrover(peer_env, 64, seconds / 2)
        progress.advance(task)
    run.finish(table_of(found, leases, shards), found)


def fsyncs() -> list[float]:
    """What the disk takes for 4 KiB at the end of a file."""
    with work_directory() as home, (home / "file").open("wb", buffering=0) as file:
        samples = []
        for _ in range(FSYNCS):
            file.write(bytes(4096))
            began = time.perf_counter()
            os.fsync(file.fileno())
            samples.append(time.perf_counter() - began)
    return samples


async def load(clients: int, seconds: float) -> dict[str, Any]:
    """So many consumers, each with one request under way, for so long."""
    nodes = min(8, clients)
    with work_directory() as home:
        env = environment(home)
        with started("coordinator", env) as (process, _):
            cluster = _cluster(env, nodes=nodes, workers=clients // nodes, consumers=1, size=MANY)
            try:
                await cluster.start(str(home))
                latencies: list[float] = []

                def answered(consumer: Consumer, answer: ShardAnswer) -> None:
                    latencies.append(time.perf_counter() - consumer.asked_at)
                    cluster.complete(consumer, answer)

                cluster.on_answer = answered
                before, used = _commits(env), _cpu(process)
                began = time.perf_counter()
                for consumer in cluster.consumers.values():
                    cluster.lease(consumer)
                await asyncio.sleep(seconds)
                cluster.on_answer = None
                spent = time.perf_counter() - began
                after, core = _commits(env), (_cpu(process) - used) / spent
            finally:
                cluster.close()
    done = latencies[clients:]
    summary = Summary.of(done)
    return {
        "clients": clients,
        "per_second": len(done) / spent,
        "p50": summary.p50,
        "p99": summary.p99,
        "max": summary.maximum,
        "per_commit": len(done) / (after - before),
        "core_share": core,
    }


async def reassign(leases: int, lost: int) -> float:
    """Seconds from the loss of a node that held ``lost`` of so many leases until all of those are another's."""
    consumers = -(-leases // 8)
    with work_directory() as home:
        env = environment(home)
        with started("coordinator", env):
            cluster = _cluster(env, nodes=2, workers=8, consumers=consumers, size=leases)
            try:
                await cluster.start(str(home))
                own = [one for one in cluster.consumers.values() if one.node == "n0"]
                other = [one for one in cluster.consumers.values() if one.node == "n1"]
                holders = own[:lost] + other[: leases - lost]
                waiters = other[leases - lost :][:lost]
                held = await _answers(cluster, holders, lambda answer: answer.kind == "leased")
                assert held == len(holders)
                await _answers(cluster, waiters, lambda answer: answer.kind == "wait")
                ended = asyncio.get_running_loop().create_future()
                count = 0

                def answered(consumer: Consumer, answer: ShardAnswer) -> None:
                    nonlocal count
                    count += answer.kind == "leased"
                    if count == len(waiters) and not ended.done():
                        ended.set_result(time.perf_counter())

                cluster.on_answer = answered
                began = time.perf_counter()
                cluster.lose("n0")
                at: float = await asyncio.wait_for(ended, 60.0)
                return at - began
            finally:
                cluster.close()


async def _answers(cluster: Cluster, consumers: list[Consumer], wanted: Callable[[ShardAnswer], bool]) -> int:
    """All of these ask for a shard; how many answers are as wanted, once all are there."""
    ended = asyncio.get_running_loop().create_future()
    waiting = {one.name for one in consumers}
    good = 0

    def answered(consumer: Consumer, answer: ShardAnswer) -> None:
        nonlocal good
        if consumer.name in waiting:
            waiting.discard(consumer.name)
            good += wanted(answer)
        if not waiting and not ended.done():
            ended.set_result(None)

    cluster.on_answer = answered
    for position, consumer in enumerate(consumers):
        cluster.lease(consumer)
        if position % 500 == 499:
            await asyncio.sleep(0.05)
    await asyncio.wait_for(ended, 60.0)
    return good


def prepare(home: Path, shards: int) -> None:
    """A manifest as a coordinator leaves it that has seen all but one of the shards done."""
    state = Path(environment(home)["XDG_STATE_HOME"], "seamark")
    state.mkdir(parents=True, mode=0o700)

    async def submit() -> None:
        env = environment(home)
        with started("coordinator", env):
            cluster = _cluster(env, nodes=1, workers=1, consumers=1, size=shards)
            try:
                await cluster.start(str(home))
                await _answers(cluster, list(cluster.consumers.values()), lambda answer: True)
            finally:
                cluster.close()

    asyncio.run(submit())
    with Manifest(state / "coordinator.db") as manifest:
        ((number, _),) = manifest.datasets(JOB)
        for first in range(1, shards - 1, 50_000):
            rows = {
                (number, shard): Row(shard, State.DONE, shard + 2, "", f"{JOB}/0", "n0", "", b"")
                for shard in range(first, min(first + 50_000, shards - 1))
            }
            manifest.commit(list[Persist](), [Record(JOB, {}, rows, {}, {})])


async def start_with(home: Path, shards: int) -> dict[str, float]:
    """A start on that manifest: until it serves, until a lease was given, and its memory."""
    env = environment(home)
    began = time.perf_counter()
    with started("coordinator", env) as (process, serving):
        cluster = _cluster(env, nodes=1, workers=1, consumers=2, size=shards)
        try:
            cluster.introduce()
            (fresh,) = [one for one in cluster.consumers.values() if one.name.endswith("/1")]
            fresh.request = int(time.time() * 1_000)
            await cluster.ask_until(fresh, OpenShards, spec=cluster.spec)
            answer = await cluster.ask_until(fresh, LeaseShard)
            first = time.perf_counter() - began
            assert answer.kind in ("leased", "wait"), answer
            memory = psutil.Process(process.pid).memory_info().rss / MEBI
            if answer.lease is not None:
                await cluster.release(fresh, answer)
        finally:
            cluster.close()
    return {"serving": serving, "first_lease": first, "resident_mib": memory}


def _cluster(env: dict[str, str], *, nodes: int, workers: int, consumers: int, size: int) -> Cluster:
    return Cluster(
        zmq.Context.instance(),
        env["SEAMARK_COORDINATOR_ADDRESS"],
        env["SEAMARK_LIGHTHOUSE_ADDRESS"],
        env["SEAMARK_LIGHTHOUSE_EVENTS"],
        nodes=nodes,
        workers=workers,
        consumers=consumers,
        spec=Dataset(DATASET, size, 1),
    )


def _commits(env: dict[str, str]) -> int:
    answer = ask_one(env["SEAMARK_COORDINATOR_ADDRESS"], CoordinatorStatus)
    assert isinstance(answer, CoordinatorStatus), answer
    return answer.commits


def _cpu(process: subprocess.Popen[bytes]) -> float:
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


def in_process(workers: int, seconds: float) -> float:
    """Leases and completions per second of the rules alone."""
    shards = JobShards(JOB, RuntimeConfig(), Numbers(1), random.Random(0))
    nodes = frozenset({"n0"})
    consumers = [f"i{number}#{DATASET}/0" for number in range(workers)]

    def handle(request: Any) -> ShardAnswer:
        (answer,) = shards.handle(0.0, request, "n0", lambda: nodes, "")
        shards.take_record()
        return answer.message

    for name in consumers:
        handle(OpenShards(1, JOB, f"{JOB}/0", name, DATASET, Dataset(DATASET, MANY, 1)))
    held = {name: handle(LeaseShard(2, JOB, f"{JOB}/0", name, DATASET)) for name in consumers}
    request, done = 2, 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        request += 1
        for name, answer in held.items():
            lease = answer.lease
            assert lease is not None
            held[name] = handle(
                CompleteShard(request, JOB, f"{JOB}/0", name, DATASET, lease.shard, lease.lease_id, "", True)
            )
            done += 1
    return done / (time.perf_counter() - began)


def dlrover(directory: Path, workers: int, seconds: float) -> dict[str, Any]:
    """The peer's tasks per second, or why there are none."""
    try:
        peer = peers.ensure(directory, "dlrover", "dlrover")
        program = str(HERE / "ledgers" / "dlrover_tasks.py")
        command = [str(peer.python), program, str(workers), str(seconds)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            return {"version": peer.version, "error": answer.stderr.strip().splitlines()[-1]}
        return {"version": peer.version, **json.loads(answer.stdout.splitlines()[-1])}
    except peers.PeerUnavailable as error:
        return {"error": str(error)}


def table_of(found: dict[str, Any], leases: int, shards: int) -> Lines:
    """All figures."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("", "n", "per second", "p50", "p99", "per fsync", "core"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    disk = Summary.of(found["fsync"])
    table.add_row(
        "the disk's own fsync", str(disk.n), f"{1 / disk.p50:,.0f}", duration(disk.p50), duration(disk.p99 or 0)
    )
    for one in found["loads"]:
        table.add_row(
            f"lease+complete, {one['clients']} clients",
            "",
            f"{one['per_second']:,.0f}",
            duration(one["p50"]),
            duration(one["p99"] or one["max"]),
            f"{one['per_commit']:.1f}",
            f"{100 * one['core_share']:.0f} %",
        )
    for lost, samples in found["reassigned"].items():
        summary = Summary.of(samples)
        cells = (duration(summary.p50), f"max {duration(summary.maximum)}")
        table.add_row(f"{int(lost):,} of {leases:,} leases lost and reassigned", str(summary.n), "", *cells)
    if found["starts"]:
        first = [one["first_lease"] for one in found["starts"]]
        memory = statistics.median(one["resident_mib"] for one in found["starts"])
        cells = (duration(statistics.median(first)), f"max {duration(max(first))}", "", f"{memory:.0f} MiB")
        table.add_row(f"{shards:,} shards: start to first lease", str(len(first)), "", *cells)
    if "in_process" in found:
        table.add_row("the rules, in process", "", f"{found['in_process']:,.0f}")
    if "dlrover" in found:
        peer = found["dlrover"]
        rate = f"{peer['per_second']:,.0f}" if "per_second" in peer else peer["error"]
        table.add_row(f"DLRover {peer.get('version', '')}, in process", "", rate)
    return Lines(table, Text(NOTES, style="dim"))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
