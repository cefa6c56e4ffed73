"""Signs of life of the main thread: it counts one whenever it runs Python after being asked.

The counting function is C (``sem_post(3)``, which adds one to the number that it is given): Python code in its place
could be hit by a restart's interrupt, which would be lost there. A thread that is blocked in native code, stopped, or
kept off the interpreter's lock answers nothing.
"""

from __future__ import annotations

import ctypes

from seamark.progress import ProgressPage

_COUNT_ONE = ctypes.cast(ctypes.CDLL(None).sem_post, ctypes.c_void_p).value
_ask = ctypes.pythonapi.Py_AddPendingCall
_ask.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
_ask.restype = ctypes.c_int


PARTS = 60
SHORTEST, LONGEST = 0.25, 1.0


def interval(soft: float) -> float:
    """Seconds between two signs: by so much a timeout may come early, since it begins at the last sign.

    Args:
        soft: seconds that a worker may give none; 0.0: for ever.
    """
    return min(LONGEST, max(SHORTEST, soft / PARTS)) if soft else LONGEST


class Signs:
    """Asks the main thread for signs of life, one at a time.

    Args:
        page: where they are counted.
    """

    def __init__(self, page: ProgressPage) -> None:
        self._page = page
        self._cell = page.cell_of_signs()
        self._address = ctypes.addressof(self._cell)
        self._asked_at: int | None = None

    def ask(self) -> None:
        """From any thread: the next sign is due."""
        signs = self._page.signs
        if self._asked_at != signs:
            self._asked_at = signs
            _ask(_COUNT_ONE, self._address)
