"""Seamark inside the training process: a fault costs milliseconds and loses no work.

Importing this package imports neither torch nor ZeroMQ; what needs them is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seamark import checkpoints as checkpoints
    from seamark.failure_report import map_failure as map_failure
    from seamark.inprocess.exceptions import RestartAbort as RestartAbort
    from seamark.inprocess.exceptions import RestartError as RestartError
    from seamark.inprocess.state import State as State
    from seamark.inprocess.wrapper import CallWrapper as CallWrapper
    from seamark.inprocess.wrapper import Wrapper as Wrapper
    from seamark.listener import FailureListener as FailureListener
    from seamark.listening import EventsLost as EventsLost
    from seamark.preemption import on_preemption as on_preemption
    from seamark.preemption import preempted as preempted
    from seamark.runtime_config import RuntimeConfig as RuntimeConfig
    from seamark.sections import section as section
    from seamark.shard_dataset import ShardBatch as ShardBatch
    from seamark.shard_dataset import ShardDataset as ShardDataset
    from seamark.sharding import Shard as Shard
    from seamark.sharding import ShardError as ShardError
    from seamark.sharding import report_failure as report_failure
    from seamark.sharding import shards as shards

__all__ = [
    "CallWrapper",
    "EventsLost",
    "FailureListener",
    "RestartAbort",
    "RestartError",
    "RuntimeConfig",
    "Shard",
    "ShardBatch",
    "ShardDataset",
    "ShardError",
    "State",
    "Wrapper",
    "checkpoints",
    "map_failure",
    "on_preemption",
    "preempted",
    "report_failure",
    "section",
    "shards",
]

_HOMES = {
    "CallWrapper": "seamark.inprocess.wrapper",
    "Manager": "seamark.manager",
    "EventsLost": "seamark.listening",
    "FailureListener": "seamark.listener",
    "RestartAbort": "seamark.inprocess.exceptions",
    "RestartError": "seamark.inprocess.exceptions",
    "RuntimeConfig": "seamark.runtime_config",
    "Shard": "seamark.sharding",
    "ShardBatch": "seamark.shard_dataset",
    "ShardDataset": "seamark.shard_dataset",
    "ShardError": "seamark.sharding",
    "State": "seamark.inprocess.state",
    "Wrapper": "seamark.inprocess.wrapper",
    "map_failure": "seamark.failure_report",
    "on_preemption": "seamark.preemption",
    "preempted": "seamark.preemption",
    "report_failure": "seamark.sharding",
    "section": "seamark.sections",
    "shards": "seamark.sharding",
}


def __getattr__(name: str) -> Any:
    if name == "checkpoints":
        return importlib.import_module("seamark.checkpoints")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'seamark' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
