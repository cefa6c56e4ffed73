"""What a plain ``init_process_group()`` finds: the store of this iteration, by the ``env://`` method (D8)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from seamark.inprocess.state import State


class EnvRendezvous:
    """Torch's ``env://`` handler, replaced while the wrapped function runs."""

    def __init__(self) -> None:
        self._original: Callable[..., Iterator[Any]] | None = None
        self._store: Any = None
        self._state: State | None = None

    def install(self) -> None:
        """From now on ``env://`` yields what was offered."""
        handlers = _handlers()
        self._original = handlers["env"]
        handlers["env"] = self._rendezvous

    def uninstall(self) -> None:
        """Gives torch its own handler back."""
        if self._original is not None:
            _handlers()["env"] = self._original
            self._original = None

    def offer(self, store: Any, state: State | None) -> None:
        """The store and the place that ``env://`` yields from now on."""
        self._store = store
        self._state = state

    def _rendezvous(self, url: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if self._state is None or self._store is None:
            raise RuntimeError("init_process_group() outside the function that seamark.Wrapper wraps")
        yield self._store, self._state.active_rank, self._state.active_world_size
        raise RuntimeError("an iteration's rendezvous happens once; a restart is a new iteration")


def _handlers() -> dict[str, Callable[..., Iterator[Any]]]:
    # torch.distributed.rendezvous is the function of that name once the package is imported.
    handlers: dict[str, Callable[..., Iterator[Any]]] = importlib.import_module(
        "torch.distributed.rendezvous"
    )._rendezvous_handlers
    return handlers
