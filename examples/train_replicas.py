"""Three replica groups train together; kill one with `kill -9`, start it again: it heals from the others and goes on.

seamark-lighthouse --address tcp://127.0.0.1:29510 --events tcp://127.0.0.1:29511 &
export SEAMARK_LIGHTHOUSE_ADDRESS=tcp://127.0.0.1:29510
for name in a b c; do python examples/train_replicas.py --replica-id $name & done
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import torch
from torch import nn

import seamark

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--replica-id", required=True)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--until", type=Path, help="instead of --steps: once this file is there, the last step is in it")
parser.add_argument("--min-replicas", type=int, default=2)
parser.add_argument("--pause", type=float, default=0.0, help="seconds each step takes at least")
parser.add_argument("--async-quorum", action="store_true", help="ask for the quorum beside the forward pass")
parser.add_argument("--report", type=Path, help="append a JSON line per step to this file")
options = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(sum(options.replica_id.encode()))  # each begins with other weights: the first quorum makes them equal
model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def state_dict():
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def load_state_dict(state):
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def digest():
    momenta = [optimizer.state[one]["momentum_buffer"] for one in model.parameters() if one in optimizer.state]
    tensors = [*(one.detach() for one in model.parameters()), *momenta]
    return hashlib.sha256(b"".join(one.numpy().tobytes() for one in tensors)).hexdigest()


def report(**fields):
    if options.report:
        with options.report.open("a") as file:
            file.write(json.dumps({"at": time.monotonic(), **fields}) + "\n")


def last_step():
    if options.until is None:
        return options.steps
    return int(options.until.read_text()) if options.until.exists() else 1 << 40


manager = seamark.Manager(
    replica_id=options.replica_id,
    state_dict=state_dict,
    load_state_dict=load_state_dict,
    min_replica_size=options.min_replicas,
    use_async_quorum=options.async_quorum,
)
with manager:
    while manager.current_step() < last_step():
        step = manager.current_step()
        manager.start_quorum()
        optimizer.zero_grad()
        quorum = manager.wait_quorum()
        if not options.async_quorum:
            step = manager.current_step()  # after healing
            report(
                event="quorum", step=step, quorum_id=quorum.quorum_id, digest=digest(), size=len(quorum.participants)
            )
        # Each replica group has a part of the step's batch: of seed, step and rank alone.
        random = torch.Generator().manual_seed(step << 8 | (manager.participating_rank() or 0))
        inputs = torch.randn(16, 32, generator=random)
        loss = nn.functional.mse_loss(model(inputs), inputs[:, :8].sin())
        loss.backward()
        gradient = torch.cat([one.grad.flatten() for one in model.parameters()])
        manager.allreduce(gradient).wait()
        for one, part in zip(
            model.parameters(), gradient.split([one.numel() for one in model.parameters()]), strict=True
        ):
            one.grad.copy_(part.view_as(one))
        if manager.should_commit():
            optimizer.step()
            report(event="commit", step=manager.current_step(), participants=manager.num_participants())
            if manager.current_step() % 50 == 0:
                print(f"{options.replica_id}: step {manager.current_step()} loss {loss.item():.4f}", flush=True)
        time.sleep(options.pause)
    print(f"{options.replica_id}: final parameters sha256 {digest()}", flush=True)
    report(event="done", step=manager.current_step(), digest=digest())
