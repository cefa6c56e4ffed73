"""How a job is operated: checkpoints, time limits, retries; apart from what its model is.

A value object of the standard library and msgspec: no file, no clock, nothing of torch.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import force_setattr

SCHEMA_VERSION = 1
"""Of ``RuntimeConfig.to_dict``: raised whenever a field is added, renamed or gets another meaning."""


class RuntimeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The operational parameters of a job; the defaults are those of docs/retries.md.

    Durations are in seconds. A number of retries is one less than the number of runs: 3 retries are 4 runs.

    Args:
        checkpoint_interval: between two checkpoints. What a failure costs at most; Young's rule of thumb is
            sqrt(2 × seconds that a checkpoint takes × mean seconds between failures).
        attempt_timeout: how long one attempt at a shard may take.
        oom_retries: after running out of memory, each with half the batch size.
        transient_retries: after failures that are expected to pass.
        timeout_retries: after attempts that ran past ``attempt_timeout``.
        unknown_retries: after failures of which nothing is known.
        poison_attempts: runs of one batch that may end in ``poison_input``; then it is quarantined.
        poison_delay: before a batch is tried again.
        max_delay: no retry is put off for longer. 60 at most.
        spot_poll_interval: between two looks for capacity after a preemption.
        monitor_interval: between two looks at what runs.
        no_progress_cycles: retries in a row without a new checkpoint, of whatever kinds; the failure of the last one
            ends the shard.
        elastic_redistribution: whether shards of lost workers go to others that are healthy.
        min_batch_size_scale: the smallest part of the batch size that halving goes down to.

    Raises:
        ValueError: values that can't be used, a line each, which names the field and what is allowed.
    """

    checkpoint_interval: float = 300.0
    attempt_timeout: float = 3_600.0
    oom_retries: int = 3
    transient_retries: int = 3
    timeout_retries: int = 3
    unknown_retries: int = 3
    poison_attempts: int = 2
    poison_delay: float = 1.0
    max_delay: float = 60.0
    spot_poll_interval: float = 60.0
    monitor_interval: float = 5.0
    no_progress_cycles: int = 3
    elastic_redistribution: bool = True
    min_batch_size_scale: float = 0.125

    def __post_init__(self) -> None:
        problems = [_problem(name, getattr(self, name)) for name in FIELDS]
        _refuse([problem for problem in problems if problem])
        for name, field in FIELDS.items():
            if field.type is float:
                force_setattr(self, name, float(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, and ``schema_version``: numbers and booleans, as JSON and TOML have them."""
        return {"schema_version": SCHEMA_VERSION, **{name: getattr(self, name) for name in FIELDS}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RuntimeConfig:
        """What ``to_dict`` gave, or part of it: fields that are absent have their defaults.

        Args:
            values: by name; it is left as it is. ``schema_version`` may be of this version or an older one, and is
                taken for this one's if absent.

        Raises:
            ValueError: unknown names and values that can't be used, a line each.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"the runtime configuration must be a mapping of names to values, not {_shown(values)}")
        version = values.get("schema_version", SCHEMA_VERSION)
        if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
            raise ValueError(
                f"schema_version: must be a whole number from 1 to {SCHEMA_VERSION}, not {_shown(version)}; "
                "what a newer Seamark wrote needs a newer Seamark"
            )
        given = {name: value for name, value in values.items() if name != "schema_version"}
        problems = [_problem(name, value) if name in FIELDS else _no_such_field(name) for name, value in given.items()]
        _refuse([problem for problem in problems if problem])
        return cls(**given)


FIELDS = {field.name: field for field in msgspec.structs.fields(RuntimeConfig)}
SECONDS = "a number of seconds"
COUNT = "a whole number"
LIMITS: dict[str, tuple[str, float, float]] = {
    "checkpoint_interval": (SECONDS, 0.001, 2_592_000),
    "attempt_timeout": (SECONDS, 0.001, 2_592_000),
    "oom_retries": (COUNT, 0, 1_000),
    "transient_retries": (COUNT, 0, 1_000),
    "timeout_retries": (COUNT, 0, 1_000),
    "unknown_retries": (COUNT, 0, 1_000),
    "poison_attempts": (COUNT, 1, 1_000),
    "poison_delay": (SECONDS, 0, 60),
    "max_delay": (SECONDS, 0, 60),
    "spot_poll_interval": (SECONDS, 0.001, 86_400),
    "monitor_interval": (SECONDS, 0.001, 86_400),
    "no_progress_cycles": (COUNT, 1, 1_000),
    "min_batch_size_scale": ("a number", 0.001, 1),
}
"""What a number is of, the least and the most. Nothing that is polled for can be polled for without a pause."""


def _problem(name: str, value: object) -> str:
    """Why this can't be the field's value; empty if it can."""
    kind = FIELDS[name].type
    if kind is bool:
        return "" if isinstance(value, bool) else f"{name}: must be True or False, not {_shown(value)}"
    noun, least, most = LIMITS[name]
    number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    # Not a number is neither at least the least nor at most the most.
    if number and least <= value <= most:  # type: ignore[operator]
        return ""
    return f"{name}: must be {noun} from {least:g} to {most:.10g}, not {_shown(value)}"


def _no_such_field(name: object) -> str:
    close = difflib.get_close_matches(str(name), FIELDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(FIELDS)}"
    return f"{_shown(name)}: no such field; {hint}"


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    return reprlib.repr(value)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(problems))
