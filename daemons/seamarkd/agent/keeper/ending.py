"""The end of a worker: as the interpreter ends a script, without freeing every module."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import os
import sys
from typing import NoReturn

from .forking import Task


def run_and_exit(task: Task) -> NoReturn:
    """End as the interpreter ends a script, but without freeing every module.

    With torch that takes 2 s, in which nobody hears of the end.
    """
    status = 0
    try:
        task.run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        # Only the interpreter itself ends a process by the signal. Whatever was frozen has to be freed with the
        # rest: extension modules report leaks otherwise.
        gc.unfreeze()
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    flush_files()
    os._exit(status & 0xFF)


def flush_files() -> None:
    """Write out what the open files still hold, which freeing them would do: Python's own and the C library's."""
    files = [thing for thing in gc.get_objects() if issubclass(type(thing), io.IOBase)]
    for file in (*files, sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            file.flush()
    ctypes.CDLL(None).fflush(None)
