"""The gate of a worker that was started as held: a pipe that the keeper writes to when it may run."""

from __future__ import annotations

import os
import sys


def wait_for_release(gate: int) -> None:
    """Let nothing of the worker happen before its agent has written down that it is there.

    A keeper that was killed can't let it go: whoever starts another worker in this place starts the only one.
    """
    released = os.read(gate, 1)
    os.close(gate)
    if not released:
        print("its keeper was killed before anybody knew of this process", file=sys.stderr, flush=True)
        os._exit(os.EX_OSERR)
