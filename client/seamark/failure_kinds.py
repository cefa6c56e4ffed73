"""The kinds of failure that differ in what is done about them (docs/retries.md).

Worker and coordinator use the same words: a worker names the kind of what it raised, the coordinator decides by it.
"""

from __future__ import annotations

from typing import Literal, TypeGuard, get_args

Kind = Literal["spot_preemption", "poison_input", "oom", "transient", "timeout", "hardware", "unknown"]

KINDS: tuple[Kind, ...] = get_args(Kind)


def is_kind(word: object) -> TypeGuard[Kind]:
    """True if this is the name of a kind."""
    return word in KINDS
