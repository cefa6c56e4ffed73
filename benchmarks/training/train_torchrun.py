"""The loop under torchrun, and under any launcher that counts restarts as torchrun does."""

from __future__ import annotations

import os

import torch.distributed as dist
from loop import Probe, train


def main() -> None:
    probe = Probe()
    dist.init_process_group("gloo")
    train(probe, attempt=int(os.environ["TORCHELASTIC_RESTART_COUNT"]))


if __name__ == "__main__":
    main()
