"""A small GPT learns the source of Python's standard library, byte by byte.

What Seamark needs of a training script is in the lines that say `seamark`, `call` or `checkpoints`: a wrapped
function, the call's store and rank for its process group, a ping in every step, a checkpoint to go on from.
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

# Read once per process: a restart in place calls train() again, and the data is still there.
SOURCES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
TEXT = torch.frombuffer(bytearray().join(path.read_bytes() for path in SOURCES), dtype=torch.uint8)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--checkpoint-every", type=int, default=10, metavar="STEPS")
parser.add_argument("--checkpoint-dir", default=os.environ.get("SEAMARK_CHECKPOINT_DIR", "checkpoints"))
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
steps_executed = 0  # in this process, through all restarts in place


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.byte, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = lambda: nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(layer() for _ in range(4))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))

    def forward(self, text):
        x = self.byte(text) + self.place.weight
        for layer in self.layers:
            x = layer(x, src_mask=MASK, is_causal=True)
        return self.head(x)


def batch(step, rank):  # a function of seed, step and rank: a step done again sees the same bytes
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    found = [checkpoints.latest(options.checkpoint_dir) if rank == 0 else None]
    dist.broadcast_object_list(found)  # every rank resumes from what rank 0 found
    if checkpoint := found[0]:
        state = checkpoints.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if rank == 0:
            print(f"resumed from step {checkpoint.step}", flush=True)
    # DDP then never reorders its sums after a first step, so that a resumed run ends with the same bits.
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(checkpoint.step + 1 if checkpoint else 1, options.steps + 1):
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
    parameters = sorted(model.named_parameters())
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for _, tensor in parameters)).hexdigest()


if __name__ == "__main__":
    sha256 = train()
    if os.environ["RANK"] == "0":
        print(f"steps executed in this process {steps_executed}")
        print(f"final parameters sha256 {sha256}")
