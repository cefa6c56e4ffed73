"""A small GPT learns the source of Python's standard library, byte by byte.

What Seamark needs of a training script is in the lines that say `seamark`, `call` or `checkpoints`: a wrapped
function, the call's store and ranks for its process group, a ping in every step, a checkpoint to go on from.
"""

import argparse
import hashlib
import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import seamark
from seamark import checkpoints

CONTEXT, WIDTH, BATCH = 64, 128, 4
MASK = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
# Read once per process: a restart in place only calls train() again, and the data is still there.
SOURCES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
TEXT = torch.frombuffer(bytearray().join(path.read_bytes() for path in SOURCES), dtype=torch.uint8)
steps_executed = 0  # in this process, whatever was restarted

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--checkpoint-every", type=int, default=10, metavar="STEPS")
parser.add_argument("--checkpoint-dir", default=os.environ.get("SEAMARK_CHECKPOINT_DIR", "checkpoints"))
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.byte, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, text):
        return self.head(self.layers(self.byte(text) + self.place.weight, MASK, is_causal=True))


def batch(step, rank):  # by seed, step and rank alone: a step done again sees the same bytes
    random = torch.Generator().manual_seed(options.seed << 48 | step << 16 | rank)
    starts = torch.randint(len(TEXT) - CONTEXT, (BATCH, 1), generator=random)
    windows = TEXT[starts + torch.arange(CONTEXT + 1)].long()
    return windows[:, :-1], windows[:, 1:]


@seamark.Wrapper()
def train(call: seamark.CallWrapper) -> str:
    global steps_executed
    rank = call.state.active_rank
    dist.init_process_group("gloo", store=call.store, rank=rank, world_size=call.state.active_world_size)
    torch.manual_seed(options.seed)
    model = GPT()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = [checkpoints.latest(options.checkpoint_dir) if rank == 0 else None]
    dist.broadcast_object_list(found)  # every rank goes on from what rank 0 found
    done = found[0].step if found[0] else 0
    if done:
        state = checkpoints.load(found[0])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    # Otherwise DDP reorders its sums after the first step, and a resumed run differs in the last bits.
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    if done and rank == 0:
        print(f"resumed from step {done}", flush=True)
    for step in range(done + 1, options.steps + 1):
        inputs, targets = batch(step, rank)
        loss = nn.functional.cross_entropy(ddp(inputs).transpose(1, 2), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps_executed += 1
        call.ping()
        if rank == 0 and step % 5 == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
        if rank == 0 and step % options.checkpoint_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoints.save(options.checkpoint_dir, step, state)
    final = model.state_dict()
    return hashlib.sha256(b"".join(final[name].numpy().tobytes() for name in sorted(final))).hexdigest()


if __name__ == "__main__":
    sha256 = train()
    if os.environ["RANK"] == "0":
        print(f"steps executed in this process {steps_executed}\nfinal parameters sha256 {sha256}")
