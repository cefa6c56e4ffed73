"""Interrupting the main thread exactly inside the wrapped function (D7).

An asynchronous exception does not wake a thread that is blocked; a signal does. The monitor thread sends one to the
main thread, again and again until the wrapper has left the function; the handler, which Python runs in the main
thread, raises only while the function runs. Who decides that an iteration is over is not known here.

There is no lock, on purpose: the handler runs in the main thread, between two of its bytecodes, so whatever the main
thread alone writes (``_armed``, ``_atomic``) can't change under it, and a lock that the main thread holds would be one
that the handler waits for in vain. The one value written by the monitor, ``_aborted``, only rises. CPython looks for
signals when a call returns, when a function starts and when a loop turns, and never between the end of a ``try`` body
and a plain store at the head of its ``finally``: so ``_armed = None`` there closes the window for good.

The function's own locks are another matter: a lock that is taken or given back by Python code (a ``Condition``, a
logging handler) can be left locked by an exception that arrives inside that code, and then the whole process waits
for it. There the signal is passed over, and sent again a millisecond later.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing.synchronize
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, TypeVar

from seamark.inprocess.exceptions import RestartError, RestartInterrupt

DEFAULT_SIGNAL = signal.SIGRTMIN + 7
REPEAT_INTERVAL = 0.1
"""Seconds between two signals: one can be spent where an exception is swallowed, as in a destructor."""

_PASSED_OVER_INTERVAL = 0.001
_MOST_PASSED_OVER = 100
"""Signals passed over in one run: a thread that waits for a lock that nobody gives back is interrupted after all."""


def _locking_code() -> frozenset[CodeType]:
    owners = (
        threading.Condition,
        threading.Semaphore,
        multiprocessing.synchronize.SemLock,
        multiprocessing.synchronize.Condition,
        logging.Handler,
        logging,
    )
    names = ("__enter__", "__exit__", "acquire", "release", "_acquire_restore", "_acquireLock", "_releaseLock")
    found = (getattr(owner, name, None) for owner, name in itertools.product(owners, names))
    return frozenset(code for code in (getattr(one, "__code__", None) for one in found) if code is not None)


_LOCKING_CODE = _locking_code()

T = TypeVar("T")


class Interrupter:
    """Runs a function in the main thread so that another thread can make it stop.

    Args:
        signum: the signal to use; it must not have a handler yet.

    Raises:
        RestartError: this is not the main thread, or the signal is taken.
    """

    def __init__(self, signum: int = DEFAULT_SIGNAL) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RestartError(
                "seamark.Wrapper must be called from the main thread: only it can be interrupted by a signal"
            )
        if signal.getsignal(signum) is not signal.SIG_DFL:
            raise RestartError(
                f"signal {signum} has a handler already: choose another with Wrapper(interrupt_signal=...)"
            )
        self._signum = signum
        self._main = threading.get_ident()
        self._armed: int | None = None
        self._atomic = 0
        self._aborted = -1
        self._handled = 0
        self._passed_over = 0
        self._left = threading.Condition()
        self._outside = True
        signal.signal(signum, self._handle)

    def close(self) -> None:
        """Gives the signal back."""
        signal.signal(self._signum, signal.SIG_DFL)

    @property
    def handled(self) -> int:
        """How many signals the main thread has answered: one that doesn't is in native code."""
        return self._handled

    @property
    def in_atomic(self) -> bool:
        """True while the function asks not to be interrupted."""
        return self._atomic > 0

    def aborted(self, iteration: int) -> bool:
        """True if this iteration has been given up."""
        return self._aborted >= iteration

    def run(self, iteration: int, function: Callable[[], T]) -> T:
        """Runs the function; the only place where ``RestartInterrupt`` can be raised.

        Raises:
            RestartInterrupt: the iteration was given up before or while the function ran, also if the function
                returned or raised something else meanwhile.
        """
        self._outside = False
        self._passed_over = 0
        try:
            try:
                self._armed = iteration
                if self._aborted >= iteration:
                    raise RestartInterrupt
                result = function()
            finally:
                self._armed = None
        finally:
            with self._left:
                self._outside = True
                self._left.notify_all()
        if self._aborted >= iteration:
            raise RestartInterrupt
        return result

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """Within this block of the function no interrupt is raised; a pending one is at its end.

        Other threads than the main one are never interrupted, and may enter it too.
        """
        if threading.get_ident() != self._main:
            yield
            return
        self._atomic += 1
        try:
            yield
        finally:
            self._atomic -= 1
        if self._atomic == 0 and self._armed is not None and self._aborted >= self._armed:
            raise RestartInterrupt

    def abort(self, iteration: int) -> None:
        """From another thread: this iteration and those before it are given up. Does not interrupt yet."""
        self._aborted = max(self._aborted, iteration)

    def interrupt(self, timeout: float) -> bool:
        """From another thread: signals the main thread until it is outside the function.

        Args:
            timeout: seconds after which to come back in any case.

        Returns:
            True if the main thread is outside the function.
        """
        deadline = time.monotonic() + timeout
        while not self._outside:
            passed_over = self._passed_over
            signal.pthread_kill(self._main, self._signum)
            with self._left:
                remaining = min(REPEAT_INTERVAL, deadline - time.monotonic())
                if remaining <= 0:
                    return self._outside
                left = self._left.wait_for(lambda: self._outside, min(remaining, _PASSED_OVER_INTERVAL))
                if not left and self._passed_over == passed_over:
                    self._left.wait_for(lambda: self._outside, remaining)
        return True

    def _handle(self, signum: int, frame: FrameType | None) -> Any:
        self._handled += 1
        armed = self._armed
        if armed is None or self._atomic or self._aborted < armed:
            return
        if frame is not None and frame.f_code in _LOCKING_CODE and self._passed_over < _MOST_PASSED_OVER:
            self._passed_over += 1
            return
        raise RestartInterrupt
