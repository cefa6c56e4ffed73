"""What the parts of an agent's shell stand on, all of them the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from seamarkd.agent.core import Agent
from seamarkd.agent.effects import Effect
from seamarkd.agent.kept import KeptJobs
from seamarkd.agent.tasks import Tasks


class Ground(NamedTuple):
    """One agent's.

    Attributes:
        core: what decides.
        jobs: what is held of each job.
        tasks: what is done beside.
        perform: carries out what the core says.
    """

    core: Agent
    jobs: KeptJobs
    tasks: Tasks
    perform: Callable[[list[Effect]], None]
