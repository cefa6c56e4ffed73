"""Whether the main thread is blocked in native code that no interrupt reaches.

Cutting a group's connections frees its collectives, but not always: Gloo forgets to wake an operation whose message
was half-way through when the peer died (``Pair::signalException`` in gloo/transport/tcp/pair.cc tells those that were
not yet begun), and that one would wait until the group's timeout, half an hour. Such a thread sleeps, uses no
processor time and never returns to the interpreter to run a signal's handler; one that computes, waits for a disk or
runs Python is not taken for it. Knows nothing of what is to be done about it.
"""

from __future__ import annotations

import time
from pathlib import Path


class Stillness:
    """How long a thread has been asleep without a sign of life.

    Args:
        thread_id: the native id of the thread.
    """

    def __init__(self, thread_id: int) -> None:
        self._stat = Path(f"/proc/self/task/{thread_id}/stat")
        self._sign: tuple[int, int] | None = None
        self._since = 0.0

    def restart(self) -> None:
        """Begins anew: what was seen so far tells nothing any more."""
        self._sign = None

    def lasted(self, handled: int) -> float:
        """Seconds for which all looks found it asleep; 0 at the first look and after every sign of life.

        Args:
            handled: how many signals its handler has answered so far.
        """
        fields = self._stat.read_text().rpartition(")")[2].split()
        asleep, processor_ticks = fields[0] == "S", int(fields[11]) + int(fields[12])
        now = time.monotonic()
        if not asleep or self._sign != (handled, processor_ticks):
            self._sign = (handled, processor_ticks) if asleep else None
            self._since = now
        return now - self._since
