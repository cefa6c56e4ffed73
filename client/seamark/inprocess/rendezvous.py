"""What a plain ``init_process_group()`` finds: the store of this iteration, by the ``env://`` method (D8)."""

from __future__ import annotations

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
        from torch.distributed import rendezvous

        self._original = rendezvous._rendezvous_handlers["env"]
        rendezvous._rendezvous_handlers["env"] = self._rendezvous

    def uninstall(self) -> None:
        """Gives torch its own handler back."""
        from torch.distributed import rendezvous

        if self._original is not None:
            rendezvous._rendezvous_handlers["env"] = self._original
            self._original = None

    def offer(self, store: Any, state: State | None) -> None:
        """The store and the place that ``env://`` yields from now on."""
        self._store = store
        self._state = state

    def _rendezvous(self, url: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if self._state is None or self._store is None:
            raise RuntimeError("init_process_group() outside the function that seamark.Wrapper wraps")
        yield self._store, self._state.rank, self._state.world_size
        raise RuntimeError("an iteration's rendezvous happens once; a restart is a new iteration")
