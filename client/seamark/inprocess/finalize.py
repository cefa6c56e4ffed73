"""What cleans up after the function, when it was ended by a fault: ``Wrapper(finalize=...)``.

By then the process groups are gone. An exception makes this rank leave the job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from seamark.inprocess.deadline import call_within, seconds
from seamark.inprocess.state import State


class ThreadedFinalize:
    """Calls a function on a thread of its own, for so long at most (NVRx's).

    Args:
        timeout: seconds, or a ``timedelta``.
        fn: called with ``args`` and ``kwargs``.

    Raises:
        ValueError: the timeout is not above 0.
    """

    def __init__(
        self,
        timeout: float | timedelta,
        fn: Callable[..., object],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._timeout = seconds(timeout)
        self._function = lambda: fn(*args, **(kwargs or {}))

    def __call__(self, state: State) -> State:
        """The state itself.

        Raises:
            TimeoutError: the function takes longer.
        """
        call_within(self._timeout, "finalize", self._function)
        return state
