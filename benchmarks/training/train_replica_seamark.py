"""The loop of a replica group under Seamark's Manager, at its defaults."""

from __future__ import annotations

import time
from typing import Any

from replica_loop import Probe, Training

import seamark
from seamark.replicas.groups import ReconfigurableGroup


class TimedGroup(ReconfigurableGroup):
    """The default group, and when it was made."""

    def configure(self, *arguments: Any, **more: Any) -> None:
        """Make it."""
        began = time.monotonic()
        super().configure(*arguments, **more)
        probe.made_group(began, time.monotonic())


probe = Probe()
training = Training(probe)
constructing = time.monotonic()
with seamark.Manager(
    pg=TimedGroup(),
    load_state_dict=training.load,
    state_dict=training.state,
    min_replica_size=2,
    replica_id=f"replica{probe.replica}",
) as manager:
    training.run(manager, constructing)
