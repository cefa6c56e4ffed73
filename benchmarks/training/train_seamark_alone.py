"""The loop under Seamark without an agent or a launcher; a process that dies is not started again."""

from __future__ import annotations

from seamark.autorestart import fork_and_monitor

fork_and_monitor(max_restarts=0)

import torch.distributed as dist  # noqa: E402
from loop import Probe, train  # noqa: E402

import seamark  # noqa: E402

probe = Probe()


@seamark.Wrapper()
def main(call: seamark.CallWrapper) -> None:
    dist.init_process_group("gloo")
    train(probe, attempt=call.iteration, ping=call.ping)


if __name__ == "__main__":
    main()
