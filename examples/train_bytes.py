"""A byte-level GPT learns Python's standard library. The lines with `seamark` or `call` are Seamark's."""

import argparse
import hashlib
import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import seamark

CONTEXT, WIDTH, BATCH = 64, 128, 4
MASK = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
# Read once per process: a restart in place only calls train() again, and the text is still there.
TEXT = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
steps_executed = []  # by this process, in all calls of train()

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--checkpoint-every", type=int, default=10)
parser.add_argument("--checkpoint-dir", default=os.environ.get("SEAMARK_CHECKPOINT_DIR", "checkpoints"))
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()


class Layer(nn.TransformerEncoderLayer):
    def forward(self, x):
        return super().forward(x, MASK, is_causal=True)


def batch(step, rank):  # of seed, step and rank alone: a step that is done again sees the same bytes
    random = torch.Generator().manual_seed(options.seed << 48 | step << 16 | rank)
    starts = torch.randint(len(TEXT) - CONTEXT, (BATCH,), generator=random)
    return torch.tensor([list(TEXT[start : start + CONTEXT + 1]) for start in starts])


@seamark.Wrapper()
def train(call: seamark.CallWrapper) -> str:
    rank, world_size = call.state.active_rank, call.state.active_world_size
    dist.init_process_group("gloo", store=call.store, rank=rank, world_size=world_size)
    torch.manual_seed(options.seed)
    layers = [Layer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True) for _ in range(4)]
    model = nn.Sequential(nn.Embedding(256, WIDTH), *layers, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = [seamark.checkpoints.latest(options.checkpoint_dir) if rank == 0 else None]
    dist.broadcast_object_list(found)  # every rank goes on from what rank 0 found
    done = found[0].step if found[0] else 0
    if found[0]:
        state = seamark.checkpoints.load(found[0])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    # Without find_unused_parameters DDP reorders its sums after a first step: a resumed run gets other bits.
    ddp = nn.parallel.DistributedDataParallel(model, init_sync=False, find_unused_parameters=True)
    if rank == 0:
        print(f"resumed from step {done}", flush=True)
    for step in range(done + 1, options.steps + 1):
        text = batch(step, rank)
        loss = nn.functional.cross_entropy(ddp(text[:, :-1]).transpose(1, 2), text[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps_executed.append(step)
        call.ping()
        if rank == 0 and step % 5 == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
        if rank == 0 and step % options.checkpoint_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            seamark.checkpoints.save(options.checkpoint_dir, step, state)
    weights = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for _, tensor in weights)).hexdigest()


if __name__ == "__main__":
    sha256 = train()
    if os.environ["RANK"] == "0":
        print(f"executed {len(steps_executed)} steps in this process\nfinal parameters sha256 {sha256}")
