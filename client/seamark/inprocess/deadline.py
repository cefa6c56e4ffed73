"""A call that may take only so long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

from seamark.inprocess.exceptions import TimeoutError


def seconds(duration: float | timedelta) -> float:
    """A duration in seconds, given as such or as a ``timedelta``.

    Raises:
        ValueError: it is not above 0.
    """
    length = duration.total_seconds() if isinstance(duration, timedelta) else float(duration)
    if not length > 0:
        raise ValueError(f"a timeout must be more than 0 seconds, not {duration}")
    return length


def call_within(timeout: float, what: str, function: Callable[[], object]) -> None:
    """Calls the function on a thread of its own and waits for its end.

    Args:
        timeout: seconds.
        what: for the error's sentence.

    Raises:
        TimeoutError: it goes on; its thread is left behind.
        BaseException: what the function raised.
    """
    raised: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call, name=f"seamark-{what}", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise TimeoutError(f"{what} takes longer than {timeout:g} s")
    if raised:
        raise raised[0]
