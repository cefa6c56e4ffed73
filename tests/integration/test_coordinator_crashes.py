"""The coordinator is killed at random points while four workers complete shards: whatever was acknowledged stays so."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from lease_many import failures
from standalone import Run, wait_for
from suite import Suite, suite

from seamark.protocol.messages import ShardDecision
from seamarkd.coordinator.books import reading
from seamarkd.coordinator.ledger import Row, State

pytestmark = pytest.mark.suite

KILLS = int(os.environ.get("SEAMARK_LEDGER_KILLS", "20"))
"""The proof is 100: ``SEAMARK_LEDGER_KILLS=100 scripts/test.sh --timeout 3600 -k acknowledged_completion``."""
SEED = int(os.environ.get("SEAMARK_SEED", "0"))
PER_KILL = 20
SCRIPT = Path(__file__).with_name("lease_many.py")
RANKS = 4


class Books:
    """What workers wrote down, and what the coordinator did."""

    def __init__(self, out: Path, manifest: dict[str, Any], rows: dict[int, Row], decisions: list[ShardDecision]):
        self.events = [events(out, rank) for rank in range(RANKS)]
        self.manifest = manifest
        self.rows = rows
        self.decisions = decisions

    def of(self, kind: str) -> Iterator[dict[str, Any]]:
        """The events of a kind, of all ranks."""
        return (event for rank in self.events for event in rank if event["event"] == kind)


def events(out: Path, rank: int) -> list[dict[str, Any]]:
    path = out / f"rank_{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def written(out: Path) -> int:
    """Bytes that the workers have written down."""
    return sum(path.stat().st_size for path in out.glob("rank_*.jsonl"))


def failed(out: Path) -> int:
    return sum(path.read_text().count('"failed"') for path in out.glob("rank_*.jsonl"))


def kill_at_random(cluster: Suite, run: Run, out: Path, chance: random.Random) -> float:
    """kill -9: while it starts, as soon as a shard has failed, or anywhere in the work. When it was."""
    moment = chance.random()
    if moment < 0.45:
        time.sleep(chance.uniform(0.0, 0.4))
    else:
        before, lines = (failed(out), 1) if moment < 0.65 else (written(out), chance.randrange(1, 2_000))
        count = failed if moment < 0.65 else written

        def reached() -> bool:
            run.check_alive()
            return count(out) >= before + lines

        wait_for("work to be done", reached)
        time.sleep(chance.uniform(0.0, 0.01))
    run.check_alive()
    at = time.monotonic()
    cluster.kill("coordinator")
    return at


def test_every_acknowledged_completion_outlives_the_coordinator(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    out = tmp_path / "out"
    out.mkdir()
    quota = tmp_path / "quota"
    quota.write_bytes(b"x")
    total = PER_KILL * (KILLS + 1)
    arguments = ("--out", str(out), "--shards", str(total), "--quota", str(quota), "--per-byte", str(PER_KILL))
    options = ("--nproc-per-node", str(RANKS), "--max-restarts", "0", "--preload", "none")
    kills = []
    with ExitStack() as stack:
        cluster = stack.enter_context(suite(tmp_path / "s", agents=1, slots=RANKS))
        run = cluster.run(tmp_path / "job", *options, name="many", script=SCRIPT, arguments=arguments)
        stack.callback(run.close)
        wait_for("all workers to have begun", lambda: len(list(out.glob("rank_*.jsonl"))) == RANKS)
        for _ in range(KILLS):
            # More than the workers do until the kill: whenever it comes, they are at work.
            with quota.open("ab") as file:
                file.write(b"x")
            kills.append(kill_at_random(cluster, run, out, chance))
        assert run.finish() == 0, run.text() + run.logs() + cluster.logs()
        manifest = json.loads(cluster.command("manifest", "many"))
        cluster.kill("coordinator")
        cluster.wait_healthy()
        assert json.loads(cluster.command("manifest", "many")) == manifest
    with reading(tmp_path / "s" / "state" / "seamark" / "coordinator.db") as books:
        record = books.job("many")
        assert record is not None
        assert (record.state, record.process_restarts, record.generation) == ("SUCCEEDED", 0, 0)
        (dataset,) = books.shards("many").datasets
        found = Books(out, manifest, {row.shard: row for row in dataset.rows}, books.decisions("many"))
    check_completions(found, total)
    check_processes(found)
    check_accounts(found)
    check_back_off(found, kills)
    interrupted = interruptions(found, kills)
    print(f"{KILLS} kills, {total} shards, {len(found.decisions)} failures, {interrupted} kills in the middle of work")
    assert interrupted >= KILLS // 4, "the kills fell where nothing was being done"


def check_completions(found: Books, total: int) -> None:
    """Acknowledged is what is in the manifest, under that lease, and all of it once."""
    acknowledged = [(event["shard"], event["lease_id"]) for event in found.of("completed")]
    assert not list(found.of("refused"))
    assert [count for count in Counter(shard for shard, _ in acknowledged).values() if count > 1] == []
    (dataset,) = found.manifest["datasets"]
    done = [(one["shard"], one["lease_id"]) for one in dataset["shards"] if one["state"] == "DONE"]
    assert sorted(acknowledged) == done
    assert [shard for shard, _ in done] == list(range(total))
    assert all(one["digest"] == f"of {one['lease_id']}" for one in dataset["shards"])


def check_processes(found: Books) -> None:
    """Each rank began once and came to its end; no lease id was given out for two shards."""
    for rank in found.events:
        assert [event["event"] for event in rank].count("started") == 1
        assert rank[-1]["event"] == "ended"
    leases: dict[int, int] = {}
    for event in found.of("leased"):
        assert leases.setdefault(event["lease_id"], event["shard"]) == event["shard"]


def check_accounts(found: Books) -> None:
    """Each failure was charged once."""
    charged = Counter(event["shard"] for event in found.of("failed"))
    assert charged == {shard: failures(shard) for shard in charged}
    assert len(charged) >= KILLS
    assert Counter(decision.shard for decision in found.decisions) == charged
    for shard, row in found.rows.items():
        account = json.loads(row.account)
        assert row.state == State.DONE
        assert account["budgets"].get("transient", 0) == charged[shard]
        assert account["attempts"] == charged[shard] + 1
        assert account["progress"] == 2


def check_back_off(found: Books, kills: list[float]) -> None:
    """What failed was not leased again before its time, also where the coordinator was killed meanwhile."""
    last: dict[int, float] = {}
    for event in found.of("failed"):
        last[event["shard"]] = max(last.get(event["shard"], 0.0), event["at"])
    through_a_kill = 0
    for event in found.of("leased"):
        failed_at = last.get(event["shard"])
        if failed_at is None or event["at"] < failed_at:
            continue
        through_a_kill += any(failed_at < kill < event["at"] for kill in kills)
        assert event["at"] >= json.loads(found.rows[event["shard"]].account)["not_before"]
    assert through_a_kill, "no back-off was under way at a kill"


def interruptions(found: Books, kills: list[float]) -> int:
    """Kills that fell into the middle of the work: something was acknowledged shortly before."""
    times = sorted(event["at"] for kind in ("completed", "failed") for event in found.of(kind))
    return sum(any(kill - 0.2 < at < kill for at in times) for kill in kills)
