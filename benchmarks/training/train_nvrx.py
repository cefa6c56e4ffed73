"""The loop under the in-process wrapper of nvidia-resiliency-ext.

Set up as in that project's own "optimal" example: one store, made before the wrapped function and prefixed by
the iteration (MASTER_PORT + 1; the wrapper's is on MASTER_PORT + 2), and its process-group timeout for CPU.
"""

# No `from __future__ import annotations`: the wrapper looks for a class in an annotation, not for a string.
import datetime
import logging
import os

import nvidia_resiliency_ext.inprocess as inprocess
import torch.distributed as dist
from loop import Probe, train

MASTER_PORT = int(os.environ["MASTER_PORT"])
SHORT = datetime.timedelta(milliseconds=50)
INTERVALS = ("monitor_thread_interval", "monitor_process_interval", "heartbeat_interval", "last_call_wait")
TUNED = dict.fromkeys((*INTERVALS, "progress_watchdog_interval"), SHORT) if os.environ.get("TUNED") else {}


@inprocess.Wrapper(store_kwargs={"port": MASTER_PORT + 2}, **TUNED)
def run(probe: Probe, store: dist.Store, call: inprocess.CallWrapper | None = None) -> None:
    assert call is not None
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(str(call.iteration), store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        # The wrapper doesn't free a rank that is blocked in a Gloo collective; this timeout does.
        timeout=datetime.timedelta(seconds=10),
    )
    train(probe, attempt=call.iteration, ping=call.ping)


def main() -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s", level=logging.INFO)
    probe = Probe()
    store = dist.TCPStore(
        host_name=os.environ["MASTER_ADDR"],
        port=MASTER_PORT + 1,
        world_size=int(os.environ["WORLD_SIZE"]),
        is_master=int(os.environ["RANK"]) == 0,
        multi_tenant=True,
        wait_for_workers=True,
    )
    run(probe, store)


if __name__ == "__main__":
    main()
