"""A host that is taken away: SIGTERM, and half a minute for a checkpoint.

The agent of a host that goes away (a spot notice, ``seamark drain``, the end of an allocation) asks every worker by
SIGTERM. A signal handler may run anywhere, in the middle of an optimizer's step too, so what is registered here runs in
the main thread at the next ``call.ping()``: between two steps. Standard library only.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FrameType

TERMINATED = 143
"""128 + SIGTERM, as a shell reports it."""

log = logging.getLogger("seamark")
_asked = False
_listening = False
_save: Callable[[], object] | None = None
_ping_hook: Callable[[Callable[[], None]], None] | None = None
_atomic: Callable[[], AbstractContextManager[None]] = nullcontext
_before: Callable[[int, FrameType | None], object] | None = None
_held: list[AbstractContextManager[None]] = []
"""Entered, and never left: nothing interrupts the way out."""


def on_preemption(save: Callable[[], object]) -> None:
    """Have an emergency checkpoint saved when this process's host goes away.

    ``save`` is called once, in the main thread, at the first ``call.ping()`` after SIGTERM; then the process exits with
    143. No restart interrupts it. A rank that waits in a collective for one that has left already saves nothing, so
    with state that is spread over ranks decide together (``preempted()`` and an ``all_reduce``). An agent kills the
    process after 30 s. Call it in the main thread; a later call replaces ``save``. A handler of SIGTERM that the script
    had before is called first.

    Args:
        save: writes the checkpoint, with ``seamark.checkpoints.save`` for instance.

    Raises:
        RuntimeError: this is not the main thread, which alone can be interrupted by signals.
    """
    global _save
    _listen()
    _save = save
    _hook()


def preempted() -> bool:
    """Whether this process was asked to end by SIGTERM since it first called this or ``on_preemption``.

    For a loop that saves and ends by itself: from the first call on, SIGTERM ends this process no longer.

    Raises:
        RuntimeError: this is not the main thread, and no call was made in it before.
    """
    _listen()
    return _asked


def attach(
    ping_hook: Callable[[Callable[[], None]], None] | None, atomic: Callable[[], AbstractContextManager[None]]
) -> None:
    """For the wrapper: ``ping_hook`` has its argument called at the next ping, ``atomic`` keeps restarts away."""
    global _ping_hook, _atomic
    _ping_hook, _atomic = ping_hook, atomic
    _hook()


def _listen() -> None:
    global _listening, _before
    if _listening:
        return
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("seamark.on_preemption() and preempted() begin in the main thread: signals arrive there")
    handler = signal.signal(signal.SIGTERM, _on_sigterm)
    _before = handler if callable(handler) else None
    _listening = True
    # A child that inherited it could not be terminated.
    os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    global _listening
    if _listening and signal.getsignal(signal.SIGTERM) is _on_sigterm:
        signal.signal(signal.SIGTERM, _before or signal.SIG_DFL)
    _listening = False


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    _hook()
    if _before is not None:
        _before(number, frame)


def _hook() -> None:
    if _asked and _save is not None and _ping_hook is not None:
        _ping_hook(_at_ping)


def _at_ping() -> None:
    if threading.current_thread() is not threading.main_thread():
        _hook()
        return
    held = _atomic()
    held.__enter__()
    _held.append(held)
    log.warning("this host goes away (SIGTERM): saving a checkpoint")
    try:
        assert _save is not None
        _save()
    except Exception:
        log.exception("no checkpoint was saved")
    sys.exit(TERMINATED)
