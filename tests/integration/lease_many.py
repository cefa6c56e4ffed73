"""Leases, checkpoints and completes many shards; what was acknowledged is on disk before the next request is made.

A line per event in ``rank_<r>.jsonl``. Shards are done in order of their numbers as far as ``--quota`` allows, a file
with one byte for each ``--per-byte`` shards: whoever writes it spreads the work over the time that a test takes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import seamark
from seamark.sharding import Shard

POLL = 0.005


def main() -> None:
    """One rank's part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, required=True)
    parser.add_argument("--quota", type=Path, required=True)
    parser.add_argument("--per-byte", type=int, required=True)
    arguments = parser.parse_args()
    path = arguments.out / f"rank_{os.environ['RANK']}.jsonl"
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    note(log, "started", pid=os.getpid())
    with seamark.shards("many", size=2 * arguments.shards, shard_size=2) as shards:
        for shard in shards:
            note(log, "leased", shard=shard.number, lease_id=shard.lease_id, attempt=shard.attempt)
            while shard.number >= arguments.quota.stat().st_size * arguments.per_byte:
                time.sleep(POLL)
            work(log, shard)
    note(log, "ended")


def work(log: int, shard: Shard) -> None:
    """Fails as often as the number says, and then does it."""
    if shard.attempt <= failures(shard.number):
        assert shard.fail("a drill", kind="transient")
        note(log, "failed", shard=shard.number, lease_id=shard.lease_id)
        return
    for batch in shard.batches(1):
        assert shard.checkpoint(batch.index)
    taken = shard.complete(f"of {shard.lease_id}")
    note(log, "completed" if taken else "refused", shard=shard.number, lease_id=shard.lease_id)


def failures(shard: int) -> int:
    """How often this shard fails before it is done."""
    return {7: 1, 17: 2}.get(shard % 25, 0)


def note(log: int, event: str, **fields: int) -> None:
    """Appends a line, on disk when this returns."""
    os.write(log, json.dumps({"event": event, "at": time.monotonic(), **fields}).encode() + b"\n")
    os.fsync(log)


if __name__ == "__main__":
    main()
