"""Signs of life of the main thread: it counts one whenever it runs Python after being asked.

The counting function is C (``sem_post(3)``, which adds one to the number that it is given): Python code in its place
could be hit by a restart's interrupt, which would be lost there. A thread that is blocked in native code, stopped, or
kept off the interpreter's lock answers nothing.
"""

from __future__ import annotations

import ctypes

from seamark.progress import ProgressPage

_count_one = ctypes.CDLL(None).sem_post
_ask = ctypes.pythonapi.Py_AddPendingCall
_ask.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
_ask.restype = ctypes.c_int


class Signs:
    """Asks the main thread for signs of life, one at a time.

    Args:
        page: where they are counted.
    """

    def __init__(self, page: ProgressPage) -> None:
        self._page = page
        self._cell = page.cell_of_signs()
        self._asked_at: int | None = None

    def ask(self) -> None:
        """From any thread: the next sign is due."""
        if self._asked_at == self._page.signs:
            return
        self._asked_at = self._page.signs
        _ask(ctypes.cast(_count_one, ctypes.c_void_p), ctypes.addressof(self._cell))
