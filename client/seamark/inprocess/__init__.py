"""Restart in process: the wrapper around a training function, and its parts, under NVRx's names.

A script that used ``nvidia_resiliency_ext.inprocess`` changes the import: ``import seamark.inprocess as inprocess``.
Importing this package imports nothing else; its parts are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seamark.inprocess import abort as abort
    from seamark.inprocess import exceptions as exceptions
    from seamark.inprocess import finalize as finalize
    from seamark.inprocess import health_check as health_check
    from seamark.inprocess import initialize as initialize
    from seamark.inprocess import rank_assignment as rank_assignment
    from seamark.inprocess.compose import Compose as Compose
    from seamark.inprocess.state import FrozenState as FrozenState
    from seamark.inprocess.state import Mode as Mode
    from seamark.inprocess.state import State as State
    from seamark.inprocess.wrapper import CallWrapper as CallWrapper
    from seamark.inprocess.wrapper import Wrapper as Wrapper

__all__ = [
    "CallWrapper",
    "Compose",
    "FrozenState",
    "Mode",
    "State",
    "Wrapper",
    "abort",
    "exceptions",
    "finalize",
    "health_check",
    "initialize",
    "rank_assignment",
]

_HOMES = {
    "CallWrapper": "wrapper",
    "Compose": "compose",
    "FrozenState": "state",
    "Mode": "state",
    "State": "state",
    "Wrapper": "wrapper",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"seamark.inprocess.{_HOMES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"seamark.inprocess.{name}")
    raise AttributeError(f"module 'seamark.inprocess' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
