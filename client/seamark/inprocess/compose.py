"""Several components of the wrapper in the place of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

V = TypeVar("V")


class Compose(Generic[V]):
    """Calls components one after the other, the last one first, each with what the one before returned (NVRx's).

    A component that returns None has changed nothing.

    Args:
        components: functions of one argument: a ``State`` or, for a rank assignment, ``Ranks``.

    Raises:
        TypeError: one of them can't be called.
    """

    def __init__(self, *components: Callable[[V], V | None]) -> None:
        for component in components:
            if not callable(component):
                raise TypeError(f"Compose takes functions of one argument, not {component!r}")
        self.components = components

    def __call__(self, value: V) -> V:
        """What the first component returns."""
        for component in reversed(self.components):
            result = component(value)
            value = value if result is None else result
        return value


def parts_of(component: Any) -> list[Any]:
    """The components within a component, in the order in which they are called."""
    if isinstance(component, Compose):
        return [part for inner in reversed(component.components) for part in parts_of(inner)]
    return [component]


def component(name: str, given: Any) -> Any:
    """The component that was given for this argument of the wrapper; None for none.

    A 1-tuple is taken as what is in it, as the reference's documentation writes it.

    Raises:
        TypeError: it is nothing that can be called.
    """
    if isinstance(given, tuple) and len(given) == 1:
        given = given[0]
    if given is not None and not callable(given):
        raise TypeError(f"Wrapper({name}=...) takes a function, a component or a Compose of them, not {given!r}")
    return given
