"""A small GPT learns the source of Python's standard library, byte by byte, on every rank that Seamark gives it.

What Seamark needs of a training script: `Wrapper` around the function that trains, the store and the ranks of the
call for its process group, a ping in every step, and a checkpoint to go on from. Everything else is plain PyTorch.
"""

import argparse
import hashlib
import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import seamark
from seamark import checkpoints

CONTEXT, WIDTH, HEADS, LAYERS, BATCH = 64, 128, 4, 4, 8

# Read once for each process: a restart in place finds the data where the last call of train() left it.
SOURCES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
TEXT = torch.frombuffer(bytearray().join(path.read_bytes() for path in SOURCES), dtype=torch.uint8)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--checkpoint-every", type=int, default=10, metavar="STEPS")
parser.add_argument("--checkpoint-dir", default=os.environ.get("SEAMARK_CHECKPOINT_DIR", "checkpoints"))
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
steps_executed = 0


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.byte, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.byte(text) + self.place.weight
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return self.head(x)


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """A function of seed, step and rank alone, so that a step done again sees the same bytes."""
    random = torch.Generator().manual_seed(options.seed << 48 | step << 16 | rank)
    starts = torch.randint(len(TEXT) - CONTEXT, (BATCH, 1), generator=random)
    windows = TEXT[starts + torch.arange(CONTEXT + 1)].long()
    return windows[:, :-1], windows[:, 1:]


@seamark.Wrapper()
def train(call: seamark.CallWrapper) -> str:
    global steps_executed
    rank, world_size = call.state.active_rank, call.state.active_world_size
    dist.init_process_group("gloo", store=call.store, rank=rank, world_size=world_size)
    torch.manual_seed(options.seed)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    choice = [checkpoints.latest(options.checkpoint_dir) if rank == 0 else None]
    dist.broadcast_object_list(choice)  # every rank resumes from what rank 0 found
    resumed = choice[0].step if choice[0] else 0
    if choice[0]:
        state = checkpoints.load(choice[0])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    # Without find_unused_parameters DDP reorders its sums after the first step: a resumed run would differ in bits.
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    if rank == 0:
        print(f"resumed from step {resumed}", flush=True)
    for step in range(resumed + 1, options.steps + 1):
        inputs, targets = batch(step, rank)
        loss = nn.functional.cross_entropy(ddp(inputs).flatten(0, 1), targets.flatten())
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
    ...
