"""A store client connected ahead of need.

Every new TCPStore connection looks its peer's name up on both sides, which takes seconds with a bad resolver; so the
next iteration's client is connected while this one trains, and a restart finds it ready. A client of a store that has
been started anew is useless: the store's incarnation tells.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from seamark.inprocess.abort import connect
from seamark.inprocess.exceptions import StoreUnreachableError
from seamark.inprocess.groups import Socket
from seamark.protocol.messages import StoreAddress


class SpareStore:
    """At most one client in reserve.

    Args:
        timeout: seconds to connect.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._thread: threading.Thread | None = None
        self._address = StoreAddress()
        self._ready: tuple[Any, Socket] | None = None

    def prepare(self, address: StoreAddress, first: Callable[[Any], None] = lambda _: None) -> None:
        """Begins to connect the next client, on a thread, where ``first`` may use it before anybody else."""
        self._address = address
        self._thread = threading.Thread(
            target=self._connect, args=(address, first), name="seamark-spare-store", daemon=True
        )
        self._thread.start()

    def take(self, address: StoreAddress) -> tuple[Any, Socket]:
        """A connected client of this store: the spare if it is one, else a new one.

        Raises:
            StoreUnreachableError: nobody answers.
        """
        ready = self._collect()
        if ready is not None and self._address == address:
            return ready
        try:
            return connect(address.host, address.port, self._timeout)
        except RuntimeError as error:
            why = str(error).strip().split("\n", 1)[0]
            raise StoreUnreachableError(
                f"the job's TCPStore does not answer on {address.host}:{address.port}: {why}"
            ) from None

    def close(self) -> None:
        """Gives the spare up."""
        self._collect()

    def _collect(self) -> tuple[Any, Socket] | None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        ready, self._ready = self._ready, None
        return ready

    def _connect(self, address: StoreAddress, first: Callable[[Any], None]) -> None:
        try:
            ready = connect(address.host, address.port, self._timeout)
            first(ready[0])
            self._ready = ready
        except RuntimeError:
            # The store is gone: take() will say so when a client is needed.
            self._ready = None
