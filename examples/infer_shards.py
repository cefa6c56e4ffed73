"""Batch inference over files, in shards: each file is done exactly once, whatever dies.

    seamark run --standalone --independent --nproc-per-node 2 examples/infer_shards.py --out /tmp/statistics

Each rank leases shards of the list of files, counts each file's tokens and embeds its bytes with a small model, and
publishes one output file per shard, named by the lease it was made under. At the end rank 0 reads the outputs of the
accepted leases only: what a process wrote that had lost its lease is never read. Kill a rank, or the coordinator of a
suite: nothing is counted twice, and nothing is left out. --pause 0.5 leaves time for that.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sysconfig
import time
import tokenize
from collections import Counter
from pathlib import Path

import torch

import seamark
from seamark.sharding import Batch, Shard

DATASET = "files"


def main() -> None:
    """One rank's part."""
    arguments = parse()
    files = sorted(path for path in arguments.inputs.rglob("*.py") if path.is_file())[: arguments.limit]
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.EmbeddingBag(256, 8)
    with seamark.shards(DATASET, size=len(files), shard_size=arguments.shard_size) as shards:
        for shard in shards:
            work(shard, files, model, arguments)
        if os.environ["RANK"] == "0":
            merge(arguments.out, [(entry.shard, entry.lease_id) for entry in shards.results()])


def work(shard: Shard, files: list[Path], model: torch.nn.Module, arguments: argparse.Namespace) -> None:
    """Does one shard, from behind its last checkpoint on, and publishes what came of it."""
    output = arguments.out / f"{shard.number}.{shard.lease_id}.json"
    results = before(arguments.out, shard)
    for batch in shard.batches(arguments.batch_size):
        if arguments.drill_oom == shard.number and shard.batch_size_scale == 1.0:
            error = torch.OutOfMemoryError("CUDA out of memory. (a drill)")
            shard.fail(error)
            return
        try:
            results |= infer(batch, files, arguments.inputs, model)
        except (UnicodeDecodeError, tokenize.TokenError, SyntaxError) as error:
            # The input is bad, and no other rank will find it better.
            shard.fail(error, kind="poison_input")
            return
        if batch.last:
            publish(output, results)
            shard.checkpoint(batch.index)
            time.sleep(arguments.pause)
    publish(output, results)
    shard.complete(f"{len(results)} files")


def infer(batch: Batch, files: list[Path], root: Path, model: torch.nn.Module) -> dict[str, object]:
    """Token counts and an embedding for each file of a batch."""
    found: dict[str, object] = {}
    for index in batch.indices.tolist():
        data = files[index].read_bytes()
        kinds = Counter(tokenize.tok_name[token.type] for token in tokenize.tokenize(io.BytesIO(data).readline))
        with torch.no_grad():
            vector = model(torch.frombuffer(bytearray(data or b" "), dtype=torch.uint8).long().unsqueeze(0))[0]
        name = str(files[index].relative_to(root))
        found[name] = {"tokens": dict(sorted(kinds.items())), "embedding": [f"{x:.4f}" for x in vector]}
    return found


def before(out: Path, shard: Shard) -> dict[str, object]:
    """What an earlier holder of this shard had published when it made its last checkpoint."""
    if not shard.progress:
        return {}
    earlier = [path for path in out.glob(f"{shard.number}.*.json") if int(path.name.split(".")[1]) < shard.lease_id]
    newest = max(earlier, key=lambda path: int(path.name.split(".")[1]))
    found: dict[str, object] = json.loads(newest.read_text())
    return found


def publish(output: Path, results: dict[str, object]) -> None:
    """On disk before it is reported, and whole or not there."""
    temporary = output.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(results, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(output)


def merge(out: Path, done: list[tuple[int, int]]) -> None:
    """All results of the accepted leases, in one file."""
    results: dict[str, object] = {}
    for shard, lease_id in done:
        results |= json.loads((out / f"{shard}.{lease_id}.json").read_text())
    publish(out / "all.json", dict(sorted(results.items())))
    print(f"{len(results)} files of {len(done)} shards in {out / 'all.json'}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    library = Path(sysconfig.get_path("stdlib"))
    parser.add_argument("--inputs", type=Path, default=library, help="a directory of Python sources")
    parser.add_argument("--out", type=Path, required=True, help="where the results go")
    parser.add_argument("--limit", type=int, default=400, help="so many files")
    parser.add_argument("--shard-size", type=int, default=8, help="files of a shard")
    parser.add_argument("--batch-size", type=int, default=2, help="files of a batch")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two batches: time to kill a rank in")
    parser.add_argument("--drill-oom", type=int, default=-1, help="a shard whose first attempt runs out of memory")
    return parser.parse_args()


if __name__ == "__main__":
    main()
