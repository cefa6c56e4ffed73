"""The loop of a replica group under torchft's Manager, at its defaults."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from replica_loop import Probe, Training
from torch.distributed import TCPStore
from torchft import Manager, ProcessGroupGloo

GROUP_TIMEOUT = timedelta(seconds=5)
"""As in the project's own example for CPU (`train_ddp.py`); its default is 60 s."""


class TimedGroup(ProcessGroupGloo):
    """The default group, and when it was made."""

    def configure(self, *arguments: Any, **more: Any) -> None:
        """Make it."""
        began = time.monotonic()
        super().configure(*arguments, **more)
        probe.made_group(began, time.monotonic())


probe = Probe()
training = Training(probe)
constructing = time.monotonic()
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
manager = Manager(
    pg=TimedGroup(timeout=GROUP_TIMEOUT),
    load_state_dict=training.load,
    state_dict=training.state,
    min_replica_size=2,
    rank=0,
    world_size=1,
    store_addr="127.0.0.1",
    store_port=store.port,
    replica_id=f"replica{probe.replica}",
)
training.run(manager, constructing)
