"""What a user can put into the wrapper: functions of the state, one for each phase of an iteration."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeAlias

from seamark.inprocess.compose import component
from seamark.inprocess.exceptions import HealthCheckError
from seamark.inprocess.rank_assignment import DEFAULT, Assignment
from seamark.inprocess.state import Mode, State

log = logging.getLogger(__name__)

Component: TypeAlias = Callable[[State], State | None]

ABORT_TIMEOUT = 10.0
"""Seconds that the user's part of an abort may take until the restart goes on without its end."""


@dataclass(frozen=True, slots=True)
class Components:
    """The components of a wrapper; None where there is none.

    Raises:
        TypeError: one of them can't be called.
    """

    initialize: Component | None = None
    abort: Component | None = None
    finalize: Component | None = None
    health_check: Component | None = None
    completion: Component | None = None
    terminate: Component | None = None
    rank_assignment: Assignment | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, component(one.name, getattr(self, one.name)))

    @property
    def assignment(self) -> Assignment:
        """How ranks are assigned."""
        return self.rank_assignment or DEFAULT

    def begin_abort(self, state: State) -> threading.Thread | None:
        """Calls the user's abort on a thread: whoever is to be freed must not wait for it, nor who frees."""
        if self.abort is None:
            return None
        thread = threading.Thread(target=_logged, args=("abort", self.abort, state), name="seamark-abort", daemon=True)
        thread.start()
        return thread

    def clean_up(self, state: State) -> None:
        """After a fault: finalize, then the health check.

        Raises:
            Exception: what finalize raised.
            HealthCheckError: for whatever the health check raised.
        """
        if self.finalize is not None and state.mode is Mode.ACTIVE:
            self.finalize(state)
        if self.health_check is not None:
            try:
                self.health_check(state)
            except HealthCheckError:
                raise
            except Exception as error:
                raise HealthCheckError(f"rank {state.rank} is not fit to go on: {error}") from error

    def terminated(self, state: State) -> None:
        """This rank ends by an exception, which nothing that happens here may hide."""
        if self.terminate is not None:
            _logged("terminate", self.terminate, state)


def _logged(name: str, called: Component, state: State) -> None:
    try:
        called(state)
    except Exception:
        log.exception("rank %d: %s raised; nothing follows from that", state.rank, name)
