"""What a training function keeps beside its checkpoints: small plain data that all ranks share, through restarts.

One JSON text with a version, changed by compare-and-set in the job's TCPStore, where every iteration of every process
finds it. Who changes it also tells (``on_change``), for a copy that outlives the store; a new store is given the latest
that any rank has seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, NamedTuple

KEY = "seamark_state_dict"
MAX_BYTES = 65_536
ENVIRONMENT = "SEAMARK_STATE_DICT"
"""In a worker's environment: the latest that the coordinator knew when the worker was to be started."""


class _Content(NamedTuple):
    version: int
    values: dict[str, Any]

    @classmethod
    def read(cls, text: str) -> _Content:
        if not text:
            return cls(0, {})
        content = json.loads(text)
        return cls(content["version"], content["values"])

    def text(self) -> str:
        return json.dumps({"version": self.version, "values": self.values}, separators=(",", ":"))


class StateDict(MutableMapping[str, Any]):
    """``call.state_dict``: strings to what JSON can hold, 64 kB in all; each access is a round trip to the store.

    Args:
        known: the text as it was known when this process started; empty: none.
        on_change: called with the version and the text of each change that was made here.
    """

    def __init__(self, known: str, on_change: Callable[[int, str], None]) -> None:
        self._known = known
        self._on_change = on_change
        self._client: Any = None
        self._store = ""

    def bind(self, client: Any, store: str) -> None:
        """From now on by this client, of the store of this incarnation, which is given what it may not know.

        Raises:
            torch.distributed.DistError: the store is gone.
        """
        self._client = client
        if self._known and store != self._store:
            while (there := self._exchange("", "")) != self._known:
                if _Content.read(there).version >= _Content.read(self._known).version:
                    break
                self._exchange(there, self._known)
        self._store = store

    def unbind(self) -> None:
        """The iteration has ended."""
        self._client = None

    def _exchange(self, expected: str, desired: str) -> str:
        if self._client is None:
            raise RuntimeError("call.state_dict belongs to the wrapped function: it is out of reach between iterations")
        found: bytes = self._client.compare_set(KEY, expected, desired)
        return found.decode()

    def _read(self) -> str:
        # A key that is not there is made, empty: one round trip, where a look and a read would be two.
        self._known = self._exchange("", "") or self._known
        return self._known

    def _change(self, change: Callable[[dict[str, Any]], None]) -> None:
        there = self._read()
        while True:
            content = _Content.read(there)
            change(content.values)
            made = _Content(content.version + 1, content.values)
            text = made.text()
            if len(text) > MAX_BYTES:
                raise ValueError(
                    f"call.state_dict would have {len(text)} bytes, {MAX_BYTES} are allowed: large state belongs in "
                    "a checkpoint"
                )
            found = self._exchange(there, text)
            if found == text:
                self._known = text
                self._on_change(made.version, text)
                return
            there = self._exchange("", "")

    # --- the mapping ---------------------------------------------------------------------------------------

    def __getitem__(self, key: str) -> Any:
        return _Content.read(self._read()).values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        try:
            same = isinstance(key, str) and json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            raise TypeError(
                f"call.state_dict[{key!r}]: a {type(value).__name__} does not come back from JSON as it was: "
                "put strings, numbers, booleans, None, and lists and string-keyed dicts of those under string keys"
            )
        self._change(lambda values: values.__setitem__(key, value))

    def __delitem__(self, key: str) -> None:
        self._change(lambda values: values.__delitem__(key))

    def __iter__(self) -> Iterator[str]:
        return iter(_Content.read(self._read()).values)

    def __len__(self) -> int:
        return len(_Content.read(self._read()).values)

    def __repr__(self) -> str:
        return f"StateDict({_Content.read(self._known).values!r})"
