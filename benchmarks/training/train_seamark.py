"""The loop under Seamark: a plain `init_process_group` finds the store of the iteration."""

from __future__ import annotations

import torch.distributed as dist
from loop import Probe, train

import seamark

probe = Probe()


@seamark.Wrapper()
def main(call: seamark.CallWrapper) -> None:
    dist.init_process_group("gloo")
    train(probe, attempt=call.iteration, ping=call.ping)


if __name__ == "__main__":
    main()
