"""A trainer that takes shards through a DataLoader with two workers, and writes down what it has said ``done()`` to."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

import seamark
from seamark.sharding import HostLeaves


class Bad(Exception):
    """What a sample is that can't be read."""


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--size", type=int, default=120)
    parser.add_argument("--shard-size", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument(
        "--hold-at", type=int, default=-1, help="rank 1's first process waits for its end in this batch"
    )
    parser.add_argument("--raise-at", type=int, default=-1, help="rank 1 raises in this batch of its first process")
    parser.add_argument(
        "--leave-at", type=int, default=-1, help="there rank 1's first process is told that its host goes"
    )
    parser.add_argument("--break-every", type=int, default=0, help="begin a new pass after so many batches")
    parser.add_argument("--poison", type=int, default=-1, help="a sample that can't be read")
    parser.add_argument("--wrapped", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    seamark.map_failure(Bad, "poison_input")
    trainer = Trainer(arguments)
    if arguments.wrapped:
        seamark.Wrapper()(trainer.train)()
    else:
        trainer.train()


class Trainer:
    """One process of a rank."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.rank = os.environ["RANK"]
        path = arguments.out / f"rank_{self.rank}.jsonl"
        self.first = not path.exists()
        self.file = path.open("a")
        self.seen = 0
        self.left: seamark.ShardBatch | None = None

    def say(self, event: str, **fields: object) -> None:
        """For the test."""
        self.file.write(json.dumps({"event": event, "pid": os.getpid(), "at": time.monotonic(), **fields}) + "\n")
        self.file.flush()

    def train(self, call: seamark.CallWrapper | None = None) -> None:
        """All passes."""
        self.atomic = call.atomic if call is not None else nullcontext
        given = self.arguments
        with seamark.ShardDataset(
            "set",
            size=given.size,
            shard_size=given.shard_size,
            batch_size=given.batch_size,
            load=Reader(given.poison),
            shuffle_seed=3,
            epochs=given.epochs,
        ) as dataset:
            loading = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=given.break_every > 0)
            passes = 1
            while not self.go_through(loading):
                passes += 1
            self.say("end", passes=passes, left=sum(1 for batch in loading if batch))

    def go_through(self, loading: DataLoader[seamark.ShardBatch]) -> bool:
        """False where it breaks off, with a batch in hand that it has not trained on."""
        for number, batch in enumerate(filter(None, loading), 1):
            if number == self.arguments.break_every:
                self.left = batch
                return False
            self.seen += 1
            with batch:
                self.step(batch)
            if self.left is not None:
                # What was in hand when the last pass ended has been read again: it is another lease's.
                assert not self.left.done()
                self.left = None
        return True

    def step(self, batch: seamark.ShardBatch) -> None:
        """Trains on it, and says so."""
        told = {"indices": batch.data.tolist(), "shard": batch.lease.shard, "batch": batch.index}
        if self.rank == "0" and self.seen == 3:
            self.wait_for_rank_1()
        if self.rank == "1" and self.first and self.seen == self.arguments.hold_at:
            self.say("holds", **told)
            signal.pause()
        if self.rank == "1" and self.first and self.seen == self.arguments.raise_at:
            self.first = False
            self.say("raises", **told)
            raise Bad("asked to fail")
        if self.rank == "1" and self.first and self.seen == self.arguments.leave_at:
            self.say("leaves", **told)
            raise HostLeaves("asked to")
        # No restart comes between what the coordinator takes and what is written here.
        with self.atomic():
            if batch.done():
                self.say("done", **told)

    def wait_for_rank_1(self) -> None:
        """Until it has done what it was asked to: on a slow machine nothing would be left for it."""
        given = self.arguments
        if max(given.hold_at, given.raise_at, given.leave_at) < 0:
            return
        path = given.out / "rank_1.jsonl"
        while not (path.exists() and any(f'"{event}"' in path.read_text() for event in ("holds", "raises", "leaves"))):
            time.sleep(0.01)


class Reader:
    """Reads samples, but one."""

    def __init__(self, poison: int) -> None:
        self.poison = poison

    def __call__(self, indices: NDArray[np.int64]) -> torch.Tensor:
        if self.poison in indices:
            raise Bad(f"sample {self.poison} can't be read")
        return torch.from_numpy(indices)


if __name__ == "__main__":
    main()
