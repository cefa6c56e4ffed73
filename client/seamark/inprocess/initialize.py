"""What a rank looks at before it enters the function: ``Wrapper(initialize=...)``.

An exception is a fault like any in the function; ``RestartAbort`` ends the job.
"""

from __future__ import annotations

from dataclasses import dataclass

from seamark.inprocess.compose import parts_of
from seamark.inprocess.exceptions import RestartAbort
from seamark.inprocess.state import State


@dataclass(frozen=True)
class RetryController:
    """Ends the job where another try makes no sense (NVRx's).

    All ranks know the same numbers, so all of them end in the same iteration, with exit code 130.

    Args:
        max_iterations: how often the function may be entered in this job, restarts of either kind included; None
            for any number.
        min_world_size: ranks that must be there.
        min_active_world_size: ranks that must take part.

    Raises:
        ValueError: a limit is less than 1.
    """

    max_iterations: int | None = None
    min_world_size: int = 1
    min_active_world_size: int = 1

    def __post_init__(self) -> None:
        for name in ("max_iterations", "min_world_size", "min_active_world_size"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ValueError(f"RetryController: {name} must be at least 1, not {limit}")

    def __call__(self, state: State) -> State:
        """The state itself.

        Raises:
            RestartAbort: a limit is reached.
        """
        if self.max_iterations is not None and state.restarts >= self.max_iterations:
            raise RestartAbort(f"the function was entered {state.restarts} times, max_iterations={self.max_iterations}")
        if state.world_size < self.min_world_size:
            raise RestartAbort(f"{state.world_size} ranks are left, min_world_size={self.min_world_size}")
        if state.active_world_size < self.min_active_world_size:
            raise RestartAbort(
                f"{state.active_world_size} ranks would take part, min_active_world_size={self.min_active_world_size}"
            )
        return state


def check_minimum(initialize: object, min_world_size: int) -> None:
    """Refuses a minimum that would end the job where its launcher lets it go on.

    Args:
        initialize: the wrapper's component, or a Compose of several.
        min_world_size: ranks below which the job waits: MIN of ``--nnodes MIN:MAX`` times ``--nproc-per-node``.

    Raises:
        ValueError: a RetryController wants more.
    """
    for part in parts_of(initialize):
        if isinstance(part, RetryController) and part.min_world_size > min_world_size:
            raise ValueError(
                f"RetryController(min_world_size={part.min_world_size}) would end the job where --nnodes goes on, "
                f"with MIN x --nproc-per-node = {min_world_size} ranks: make the two equal"
            )
