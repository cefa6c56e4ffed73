"""Whether this rank is fit for another iteration: ``Wrapper(health_check=...)``.

Called after a fault, before the rank joins again. An exception makes it leave the job.
"""

from __future__ import annotations

from datetime import timedelta

from seamark.inprocess.deadline import call_within, seconds
from seamark.inprocess.exceptions import HealthCheckError
from seamark.inprocess.state import State


class CudaHealthCheck:
    """Whether the present CUDA device still answers; nothing where CUDA was not used (NVRx's).

    Args:
        timeout: seconds, or a ``timedelta``, that the device has.

    Raises:
        ValueError: the timeout is not above 0.
    """

    def __init__(self, timeout: float | timedelta = 30.0) -> None:
        self._timeout = seconds(timeout)

    def __call__(self, state: State) -> State:
        """The state itself.

        Raises:
            TimeoutError: the device does not answer.
        """
        import torch

        # Where nobody used CUDA a check would create a context, and fail on a host without a device.
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            device = torch.cuda.current_device()
            call_within(self._timeout, f"synchronising CUDA device {device}", lambda: torch.cuda.synchronize(device))
        return state


class FaultCounter:
    """A rank that raised too often leaves (NVRx's).

    Args:
        max_rank_faults: exceptions of the function on this rank that are borne; None for any number.

    Raises:
        ValueError: it is less than 0.
    """

    def __init__(self, max_rank_faults: int | None = None) -> None:
        if max_rank_faults is not None and max_rank_faults < 0:
            raise ValueError(f"max_rank_faults must be at least 0, not {max_rank_faults}")
        self._limit = max_rank_faults
        self._faults = 0

    def __call__(self, state: State) -> State:
        """The state itself.

        Raises:
            HealthCheckError: there were more.
        """
        self._faults += state.fn_exception is not None
        if self._limit is not None and self._faults > self._limit:
            raise HealthCheckError(f"rank {state.rank} raised {self._faults} times, max_rank_faults={self._limit}")
        return state
