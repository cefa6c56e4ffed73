"""The training loop of a replica group that every system under test runs, and what it reports about itself.

It knows no system: the scripts beside it hand it a manager with ``start_quorum``, ``allreduce``, ``should_commit`` and
``num_participants``. Every process writes JSON lines to a file of its own, timed by CLOCK_MONOTONIC, which all
processes of one host share. Import this module first: its import is the start of the process, as far as a script can
see it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

BEGAN = time.monotonic()

import torch  # noqa: E402
from torch import nn  # noqa: E402

REPLICAS = 3
ACCELERATOR = 0.008
"""Seconds of a step in which a core of this host has nothing to do, as while an accelerator computes."""
BATCH, INPUTS, HIDDEN, OUTPUTS = 32, 64, 128, 8


class Probe:
    """The reports of this process."""

    def __init__(self) -> None:
        self.replica = int(sys.argv[1])
        name = f"{self.replica}-{os.getpid()}-{time.monotonic_ns()}.jsonl"
        path = os.path.join(os.environ["BENCHMARK_REPORTS"], name)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._configured: list[tuple[float, float]] = []

    def report(self, event: str, **fields: Any) -> None:
        """Append one line."""
        line = {"event": event, "replica": self.replica, "pid": os.getpid(), **fields}
        os.write(self._file, json.dumps(line).encode() + b"\n")

    def made_group(self, began: float, ended: float) -> None:
        """A process group across the replica groups was made; from any thread."""
        self._configured.append((began, ended))

    def groups_made(self) -> Sequence[tuple[float, float]]:
        """The groups made since the last call."""
        made, self._configured = self._configured, []
        return made


class Training:
    """A small model, its optimizer, and the loop."""

    def __init__(self, probe: Probe) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(probe.replica)
        self._probe = probe
        self._model = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUTS))
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.01, momentum=0.9)

    def state(self) -> dict[str, Any]:
        """What another replica group needs to go on from here."""
        return {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def run(self, manager: Any, constructing: float) -> None:
        """Take steps until somebody ends this process. `constructing`: when the manager's construction began."""
        self._probe.report(
            "manager", began=BEGAN, constructing=constructing, at=time.monotonic(), torch=torch.__version__
        )
        while True:
            self._step(manager)

    def _step(self, manager: Any) -> None:
        asked = time.monotonic()
        manager.start_quorum()
        self._optimizer.zero_grad()
        inputs = torch.randn(BATCH, INPUTS)
        nn.functional.mse_loss(self._model(inputs), inputs[:, :OUTPUTS].sin()).backward()
        time.sleep(ACCELERATOR)
        parameters = list(self._model.parameters())
        # Who takes part is told by the collective itself: each adds its process id in a place of its own.
        present = torch.zeros(REPLICAS)
        present[self._probe.replica] = os.getpid()
        gradient = torch.cat([*(one.grad.flatten() for one in parameters), present])
        manager.allreduce(gradient).wait()
        reduced = time.monotonic()
        commits = manager.should_commit()
        at = time.monotonic()
        pids: list[int] = []
        if commits:
            *parts, present = gradient.split([*(one.numel() for one in parameters), REPLICAS])
            for one, part in zip(parameters, parts, strict=True):
                one.grad.copy_(part.view_as(one))
            self._optimizer.step()
            pids = [round(share) for share in (present * manager.num_participants()).tolist()]
        self._probe.report(
            "commit" if commits else "discarded",
            asked=asked,
            groups=self._probe.groups_made(),
            reduced=reduced,
            at=at,
            step=manager.current_step(),
            participants=manager.num_participants(),
            pids=pids,
        )
