"""Of which kind an exception is, as the worker that raised it knows best (docs/retries.md).

Pure: nothing is sent here, and nothing imported: torch's exceptions are known by their names.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from typing import Literal

from seamark.failure_kinds import KINDS, MESSAGES, Kind, is_kind

EXAMINED = 4_096
"""Characters of an exception's message that are looked at."""

_MESSAGES = tuple((re.compile(regex), kind) for regex, kind in MESSAGES)
_NAMES: dict[str, Kind] = {
    "torch.OutOfMemoryError": "oom",
    "torch.distributed.DistError": "transient",
    "builtins.MemoryError": "oom",
    "builtins.TimeoutError": "timeout",
    "builtins.ConnectionError": "transient",
}
_mapped: dict[type[BaseException], Kind] = {}


def map_failure(exception_type: type[BaseException], kind: str) -> None:
    """Have failures by this exception, or one derived from it, reported as a kind.

    Goes before what Seamark itself knows of exceptions, so map the narrowest type that will do. Of several mapped types
    the nearest ancestor counts; a later call for the same type replaces the earlier one.

    Args:
        exception_type: a class, not an instance.
        kind: spot_preemption, poison_input, oom, transient, timeout, hardware or unknown.

    Raises:
        TypeError: `exception_type` is not an exception class.
        ValueError: `kind` is none.
    """
    if not (isinstance(exception_type, type) and issubclass(exception_type, BaseException)):
        raise TypeError(f"map_failure() takes an exception class such as ValueError, not {exception_type!r}")
    if not is_kind(kind):
        raise ValueError(f"{kind!r} is no kind of failure; there are {', '.join(KINDS)}")
    _mapped[exception_type] = kind


def kind_of(error: BaseException) -> Kind | Literal[""]:
    """The kind of failure that this exception is.

    An exception of which nothing is known may have been raised from one of which something is: the nearest of its
    causes that says something counts, and of a group the first exception that does.

    Args:
        error: what was raised.

    Returns:
        The kind, or "" where the exception alone doesn't tell.
    """
    return next((kind for one in _causes(error) if (kind := _own_kind(one))), "")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception, then what it was raised from or while handling, nearest first."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
        waiting.append(one.__cause__ if one.__suppress_context__ else one.__context__)


def _own_kind(error: BaseException) -> Kind | Literal[""]:
    ancestors = type(error).__mro__
    if mapped := next((_mapped[ancestor] for ancestor in ancestors if ancestor in _mapped), None):
        return mapped
    if isinstance(error, RuntimeError | OSError):
        message = "".join(traceback.format_exception_only(error))[:EXAMINED]
        for regex, kind in _MESSAGES:
            if regex.search(message):
                return kind
    names = (f"{ancestor.__module__}.{ancestor.__qualname__}" for ancestor in ancestors)
    return next((_NAMES[name] for name in names if name in _NAMES), "")
